"""`hf-hybrid inspect`: what can be made linear in a model, and what that would save. Reads the config, not weights."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from ..configuration_hybrid import AttentionSite, LinearSite
from ..conversion.probe import ProbedModel
from ..errors import HybridConfigError
from ..mixers import LinearMixer, MixerConfig, build_mixer
from ..modeling_hybrid import HybridModelMixin
from .options import MixerArguments, ModelArguments


OPTIONS = (ModelArguments, MixerArguments)
LENGTHS = (4096, 32768, 131072)


@dataclass
class SiteMemory:
    """
    Bytes that one causal site keeps for one sequence, as softmax and as a linear layer.

    Args:
        heads (`int`): Key-value heads.
        per_token (`int`): Of the host's cache, all heads.
        window (`int` or `None`): Tokens the host looks back; `None`: all.
        state (`int` or `None`): Of a linear layer in its place, all heads, whatever the length; `None`: there is none.
        state_of_head (`int` or `None`): Of one linear key-value head.
        divisible (`bool`): Whether every head has a part of the cache to itself; `False` for latents that all share.
    """

    heads: int
    per_token: int
    window: int | None
    state: int | None
    state_of_head: int | None
    divisible: bool

    def cache(self, length: int) -> int:
        return self.per_token * (length if self.window is None else min(length, self.window))

    def after_conversion(self, length: int) -> int:
        return self.cache(length) if self.state is None else self.state


def run(model: ModelArguments, mixer: MixerArguments) -> None:
    """What can be made linear in a model, what would be lost, and what is kept in place of its cache."""
    (skeleton, probed), config, console = model.probed(), mixer.config(), Console()
    linear = skeleton.config.linear_sites() if isinstance(skeleton, HybridModelMixin) else {}
    # of a layer with linear heads, a forward shows the softmax of the others only
    sites = [linear[site.name].site if site.name in linear else site for site in probed.sites]
    mixers = {site.name: _mixer_at(site, config) for site in sites}
    memories = {
        site.name: _memory_of(site, mixers[site.name], probed, skeleton.dtype, is_converted=site.name in linear)
        for site in sites
        if site.causal
    }
    console.print(_sites_table(sites, linear, mixers, memories))
    console.print(
        f"heads: queries/keys x size; cache: bytes per token and key-value head; state: of {config.name}, of a layer "
        f"and of one of its key-value heads; one sequence, {skeleton.dtype}"
    )
    for what, count in Counter(what for per_site in probed.lost.values() for what in per_site).items():
        console.print(f"{count} of these layers would lose {what}")
    for name, reason in probed.excluded.items():
        console.print(f"stays softmax: {name} {reason}")
    more = sum(p.numel() for fresh in mixers.values() if fresh is not None for p in fresh.parameters())
    console.print(
        f"{len(linear)} of {len(sites)} convertible layers of {model.model} are linear, "
        f"{sum(len(one.heads) for one in linear.values())} of {sum(s.num_key_value_heads for s in sites)} "
        f"key-value heads. {sum(p.numel() for p in skeleton.parameters()):,} parameters; {more:,} more with "
        f"{config.name} everywhere."
    )
    if memories:
        console.print(_lengths_table(list(memories.values()), config.name))


def _mixer_at(site: AttentionSite, config: MixerConfig) -> LinearMixer | None:
    try:
        return build_mixer(config.fitted(site.causal), **site.sizes())
    except HybridConfigError:  # it has no bidirectional form
        return None


def _memory_of(
    site: AttentionSite, mixer: LinearMixer | None, probed: ProbedModel, dtype: torch.dtype, *, is_converted: bool
) -> SiteMemory:
    keys_and_values = site.num_key_value_heads * (site.head_dim + site.value_dim)
    numbers = keys_and_values if is_converted else probed.cached.get(site.name) or keys_and_values
    one = None if mixer is None else build_mixer(mixer.config, **site.sizes(), heads=(0,))
    return SiteMemory(
        heads=site.num_key_value_heads,
        per_token=numbers * dtype.itemsize,
        window=probed.windows.get(site.name),
        state=None if mixer is None else mixer.state_bytes(dtype=dtype),
        state_of_head=None if one is None else one.state_bytes(dtype=dtype),
        divisible=numbers == keys_and_values,
    )


def _sites_table(
    sites: list[AttentionSite],
    linear: dict[str, LinearSite],
    mixers: dict[str, LinearMixer | None],
    memories: dict[str, SiteMemory],
) -> Table:
    table = Table("#", "site", "now", "heads", "causal", "cache", "state")
    for index, site in enumerate(sites):
        memory = memories.get(site.name)
        table.add_row(
            str(index),
            site.name,
            _now_cell(site, linear.get(site.name)),
            f"{site.num_heads}/{site.num_key_value_heads} x {site.head_dim}",
            "yes" if site.causal else "no",
            _per_token_cell(memory),
            "refused" if mixers[site.name] is None else _state_cell(memory),
        )
    return table


def _now_cell(site: AttentionSite, linear: LinearSite | None) -> str:
    if linear is None:
        return "softmax"
    some = f", heads {', '.join(map(str, linear.heads))}" if len(linear.heads) < site.num_key_value_heads else ""
    return linear.mixer["name"] + some


def _per_token_cell(memory: SiteMemory | None) -> str:
    if memory is None:
        return "-"
    return f"{memory.per_token // memory.heads:,} B" if memory.divisible else "shared"


def _state_cell(memory: SiteMemory | None) -> str:
    if memory is None or memory.state is None:
        return "-"
    return f"{memory.state / 1024:,.0f} KiB, {memory.state_of_head / 1024:,.1f}"


def _lengths_table(memories: list[SiteMemory], name: str) -> Table:
    columns = ("tokens", "KV cache", f"all {name}", "KV cache, one head", f"{name}, one head")
    table = Table(*columns, title="the layers above, one sequence", title_justify="left")
    for length in LENGTHS:
        caches = sum(memory.cache(length) for memory in memories)
        states = sum(memory.after_conversion(length) for memory in memories)
        table.add_row(
            f"{length:,}",
            f"{caches / 2**20:,.1f} MiB",
            f"{states / 2**20:,.1f} MiB",
            _range([memory.cache(length) / memory.heads for memory in memories if memory.divisible], "shared"),
            _range([memory.state_of_head for memory in memories if memory.state_of_head is not None], "-"),
        )
    return table


def _range(sizes: Iterable[float], otherwise: str) -> str:
    """Bytes of one head in KiB: of the smallest and the largest, where they differ; `otherwise` if there are none."""
    texts = [f"{size / 1024:,.1f}" for size in sorted(sizes)]
    if not texts:
        return otherwise
    return f"{texts[0]} KiB" if texts[0] == texts[-1] else f"{texts[0]} - {texts[-1]} KiB"
