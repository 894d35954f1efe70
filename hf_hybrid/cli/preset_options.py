"""`--preset` and `--dry-run` of the verbs that have them."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from rich.console import Console
from transformers import TrainingArguments

from ..errors import HybridConfigError
from ..presets import PRESETS, Preset, get_preset


@dataclass
class PresetArguments:
    """Settings that belong together."""

    preset: str | None = field(
        default=None,
        metadata={"help": f"Settings that belong together: {', '.join(PRESETS)}. What is given beside it counts more."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print the settings, and do nothing.", "aliases": ["--dry-run"]}
    )

    def show(self, *options) -> None:
        """Print the preset, and what of the options differs from their defaults."""
        console = Console(soft_wrap=True)
        if self.preset is not None:
            console.print(get_preset(self.preset).describe(), markup=False, highlight=False)
        for option in options:
            given = {f.name: getattr(option, f.name) for f in fields(option) if f.init}
            defaults = {f.name: f.default for f in fields(option)}
            if isinstance(option, TrainingArguments):  # which make something else of some of their defaults
                defaults = vars(type(option)(option.output_dir))
            changed = {name: value for name, value in given.items() if value not in (defaults[name], None)}
            console.print(f"{type(option).__name__}: {changed}", markup=False, highlight=False)


def use_preset(parser: argparse.ArgumentParser, stages: tuple[str, ...], arguments: list[str]) -> None:
    """
    Make the settings of `--preset` the defaults of the parser, so that what is typed beside it counts more. With
    `--dry-run` nothing is required.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset")
    peek.add_argument("--dry_run", "--dry-run", nargs="?", const=True)
    found, _ = peek.parse_known_args(arguments)
    if found.dry_run:
        for action in parser._actions:
            action.required = False
    if found.preset is not None:
        preset = get_preset(found.preset)
        if not found.dry_run and all(getattr(preset, stage) is None for stage in stages if stage != "mixer"):
            raise HybridConfigError(
                f"--preset {found.preset} has no stage {stages[-1]!r}: it is {preset.purpose}. Choose another preset, "
                "or the verbs of its own stages."
            )
        parser.set_defaults(**_options(preset, stages))


def _options(preset: Preset, stages: tuple[str, ...]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for stage in stages:
        of_stage = dict(getattr(preset, stage) or {})
        if stage == "mixer":
            settings["mixer"] = of_stage.pop("name")
        settings |= of_stage
    return settings


__all__ = ["PresetArguments", "use_preset"]
