"""
Settings that belong together, by what they are for and what they cost. `hf-hybrid distill --preset NAME --dry-run`
prints one.
"""

import dataclasses
import json
from typing import Any

from .errors import HybridConfigError, closest


@dataclasses.dataclass(frozen=True)
class Preset:
    """
    Settings of every stage; `None` for a stage that is left out.

    Attributes:
        name (`str`), purpose (`str`), cost (`str`): What it is for, and what it takes.
        mixer (`dict`): The mixer and its settings.
        plan (`dict` or `None`): Arguments of [`plan_heads`]: a budget shared out among heads, without training.
        distill (`dict` or `None`): Fields of [`HybridTrainingArguments`].
        search (`dict` or `None`): Arguments of [`GreedyLayerSwapCallback`].
        repair (`dict` or `None`): Fields of [`RepairArguments`].
    """

    name: str
    purpose: str
    cost: str
    mixer: dict[str, Any]
    plan: dict[str, Any] | None = None
    distill: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    repair: dict[str, Any] | None = None

    def describe(self) -> str:
        """As `--dry-run` prints it."""
        lines = [f"preset {self.name}: {self.purpose}", f"cost: {self.cost}"]
        for stage in ("mixer", "plan", "distill", "search", "repair"):
            settings = getattr(self, stage)
            lines.append(f"{stage}: {'left out' if settings is None else json.dumps(settings)}")
        return "\n".join(lines)


_MEMORY = {"name": "sliding_window", "window_size": 192}
# A budget of 15 % of the cache at 4,096 tokens, which does not grow: a third of the heads, those that look things up,
# hold about a thousand tokens, the others a window. Heads that keep their softmax cost four times as much (LOG.md).
_PLAN = {"share": 0.15, "length": 4096, "num_kept_heads": 0, "num_memory_tokens": 64}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="paper",
            purpose="the method of arXiv 2601.11667: whole layers, a pure state, projections that train, greedy search",
            cost="a distillation step is about 1.9 teacher forwards; the search scores every layer in every round",
            mixer={"name": "gated_delta_net", "window_size": 0},
            distill={"projections": "full", "initialization": "none", "max_steps": 640, "recall_share": 0.0},
            search={"max_drop": "5%"},
        ),
        Preset(
            name="fast",
            purpose="no training: windows, sinks and memories, large ones where heads look things up",
            cost="five forwards of the teacher, to rank the heads",
            mixer=_MEMORY,
            plan=_PLAN,
        ),
        Preset(
            name="balanced",
            purpose="the default: the plan of fast, then a repair on your text",
            cost="that, and 96 repair steps of 2,048 tokens, each about three teacher forwards",
            mixer=_MEMORY,
            plan=_PLAN,
            repair={"max_steps": 96, "recall_share": 0.25},
        ),
        Preset(
            name="recall",
            purpose="for long inputs whose details are asked for: more heads keep their softmax, more rows ask",
            cost="as balanced, with twice the cache (30 %)",
            mixer={"name": "sliding_window", "window_size": 256},
            plan={"share": 0.30, "length": 4096, "num_kept_heads": 0.12, "num_memory_tokens": 96},
            repair={"max_steps": 96, "recall_share": 0.4},
        ),
    )
}


def get_preset(name: str) -> Preset:
    """The preset of that name; [`HybridConfigError`] with the closest names otherwise."""
    if name not in PRESETS:
        raise HybridConfigError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}.{closest(name, PRESETS)}")
    return PRESETS[name]


__all__ = ["PRESETS", "Preset", "get_preset"]
