"""
How much exact attention each key-value head gets, under a budget of cache bytes: without training, from one forward
of each of a few passages.

Perplexity wants a longer window everywhere; recall wants a few heads that can look far back. Heads are ranked by what
they look up (`induction_scores`); the first keep their softmax, the next get a large memory, all others a small one.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ..configuration_hybrid import AttentionSite
from ..conversion.probe import probe_attention
from ..errors import HybridConfigError
from ..mixers import MixerConfig, build_mixer, resolve_mixer_config
from ..mixers.checks import check_int
from .convert import convert_to_hybrid
from .induction import induction_scores


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """
    What becomes of every key-value head.

    Attributes:
        mixers (`dict[str, MixerConfig]`): Of every layer that has linear heads.
        heads (`dict[str, list[int]]`): The linear heads of those of them that keep some.
        share (`float`): Bytes of a bf16 cache at `length` tokens, of those of the full cache.
        length (`int`): Tokens at which the share was counted.
    """

    mixers: dict[str, MixerConfig]
    heads: dict[str, list[int]]
    share: float
    length: int

    def convert(self, model: PreTrainedModel) -> PreTrainedModel:
        """[`convert_to_hybrid`] by this plan, in place."""
        return convert_to_hybrid(model, self.mixers, layers=list(self.mixers), heads=self.heads or None)


# Longer than most: the bytes of heads, layers and the whole are one sum.
def plan_heads(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    *,
    share: float,
    length: int = 4096,
    mixer: str | dict | MixerConfig = "sliding_window",
    num_kept_heads: int | float = 0,
    num_memory_tokens: int = 64,
    large_memory_tokens: int | None = None,
    scores: Mapping[str, Sequence[float]] | None = None,
) -> HeadPlan:
    """
    Share a budget of cache out among the key-value heads of a model.

    Args:
        model (`PreTrainedModel`): A causal language model, not hybrid; it is not changed.
        input_ids (`torch.Tensor`, *optional*): Passages `[N, T]` by which heads are ranked, see [`induction_scores`].
        share (`float`): Bytes of the hybrid's bf16 cache at `length` tokens, of those of the full cache, at most.
        length (`int`, *optional*, defaults to 4096): Tokens at which the share is counted. The states do not grow.
        mixer (`str`, `dict` or `MixerConfig`, *optional*, defaults to `"sliding_window"`): Of all linear heads. Its
            `num_memory_tokens` is what is planned.
        num_kept_heads (`int` or `float`, *optional*, defaults to 0): Heads that keep their softmax; their cache grows.
            A number below 1 is a share of all heads, rounded down.
        num_memory_tokens (`int`, *optional*, defaults to 64): Memory of a head that looks up little.
        large_memory_tokens (`int`, *optional*): Memory of a head that looks up much; by default so many that such a
            head holds 1,000 tokens in all. As many heads get it as the budget allows.
        scores (`dict[str, list[float]]`, *optional*): Instead of `input_ids`: any number by site and head, the larger
            the more a head needs.

    Raises:
        HybridConfigError: If the budget does not even allow small memories everywhere, or arguments contradict each
            other.

    Example:

        >>> plan = plan_heads(model, passages, share=0.08)
        >>> hybrid = plan.convert(model)
    """
    base = resolve_mixer_config(mixer)
    _check(base, share, length, num_kept_heads, num_memory_tokens)
    if (scores is None) == (input_ids is None):
        raise HybridConfigError("plan_heads: give either input_ids or scores.")
    if large_memory_tokens is None:
        others = base.window_size + base.num_sink_tokens + base.memory_block_size
        large_memory_tokens = max(1000 - others, num_memory_tokens)
    probed = probe_attention(model)
    sites = {site.name: site for site in probed.sites if site.causal}
    scores = induction_scores(model, input_ids) if scores is None else _checked_scores(scores, sites)

    def full_bytes(name):  # of one head; a layer whose host looks back a few tokens caches no more
        tokens = min(length, probed.windows.get(name) or length)
        return tokens * (sites[name].head_dim + sites[name].value_dim) * 2

    # a layer whose own cache is no larger than a state is left alone, and counted
    planned = {
        name: site
        for name, site in sites.items()
        if name in scores and _state_bytes(base, site, num_memory_tokens) < full_bytes(name)
    }
    left = sum(full_bytes(name) * sites[name].num_key_value_heads for name in sites if name not in planned)
    if not planned:
        raise HybridConfigError(
            f"plan_heads: every layer's own cache at {length} tokens is smaller than a state of {base!r} with a memory "
            f"of {num_memory_tokens}. Make windows or memories smaller."
        )
    sites = planned
    order = sorted(
        ((name, head) for name in sites for head in range(sites[name].num_key_value_heads)),
        key=lambda place: -scores[place[0]][place[1]],  # stable: of equals the earlier layer's
    )
    cost = {}  # bytes of one head, by site and memory; a head that keeps its softmax is `None`
    for name, site in sites.items():
        for size in {num_memory_tokens, large_memory_tokens}:
            cost[name, size] = _state_bytes(base, site, size)
        cost[name, None] = full_bytes(name)
    full = left + sum(cost[name, None] for name, _ in order)
    if isinstance(num_kept_heads, float):
        num_kept_heads = int(num_kept_heads * len(order))
    memory: dict[tuple[str, int], int | None] = dict.fromkeys(order, num_memory_tokens)
    memory |= dict.fromkeys(order[:num_kept_heads])
    spent = left + sum(cost[place[0], size] for place, size in memory.items())
    if spent > share * full:
        raise HybridConfigError(
            f"plan_heads: {num_kept_heads} kept heads and memories of {num_memory_tokens} beside windows of "
            f"{base.window_size} take {spent / full:.1%} of the cache at {length} tokens; got share={share:.1%}. Keep "
            "fewer heads, or make windows or memories smaller."
        )
    for place in order[num_kept_heads:]:
        more = cost[place[0], large_memory_tokens] - cost[place[0], num_memory_tokens]
        if more < 0 or cost[place[0], large_memory_tokens] > cost[place[0], None]:
            continue  # nothing is won over keeping the softmax
        if spent + more > share * full:
            break
        memory[place], spent = large_memory_tokens, spent + more
    return HeadPlan(*_by_layer(memory, sites, base), spent / full, length)


def _by_layer(memory, sites, base: MixerConfig) -> tuple[dict[str, MixerConfig], dict[str, list[int]]]:
    """`mixers` and `heads` of a [`HeadPlan`], from the memory of each head (`None`: it keeps its softmax)."""
    mixers, heads = {}, {}
    for name, site in sites.items():
        of_layer = [memory[name, head] for head in range(site.num_key_value_heads)]
        linear = [head for head, size in enumerate(of_layer) if size is not None]
        if linear:
            sizes = tuple(size or 0 for size in of_layer)
            of_all = sizes[0] if len({*sizes}) == 1 else sizes
            mixers[name] = dataclasses.replace(base, num_memory_tokens=of_all)
        if 0 < len(linear) < site.num_key_value_heads:
            heads[name] = linear
    return mixers, heads


def _check(base: MixerConfig, share, length, num_kept_heads, num_memory_tokens) -> None:
    if not hasattr(base, "num_memory_tokens") or not base.window_size:
        raise HybridConfigError(f"plan_heads: mixer must have a window to keep a memory beside; got {base!r}.")
    if not 0.0 < share <= 1.0:
        raise HybridConfigError(f"plan_heads: share must be in (0, 1]; got {share!r}.")
    check_int("plan_heads", "length", length, 1)
    if not isinstance(num_kept_heads, float) or not 0.0 <= num_kept_heads < 1.0:
        check_int("plan_heads", "num_kept_heads", num_kept_heads, 0)
    check_int("plan_heads", "num_memory_tokens", num_memory_tokens, 1)


def _checked_scores(scores, sites):
    for name, site in sites.items():
        if name in scores and len(scores[name]) != site.num_key_value_heads:
            raise HybridConfigError(
                f"plan_heads: scores of {name} must be {site.num_key_value_heads}, one for each key-value head; got "
                f"{len(scores[name])}."
            )
    unknown = next((name for name in scores if name not in sites), None)
    if unknown is not None or not scores:
        raise HybridConfigError(
            f"plan_heads: scores must be given by the model's causal attention sites; got {unknown!r}."
        )
    return scores


def _state_bytes(config: MixerConfig, site: AttentionSite, size: int) -> int:
    """Bytes of the state of one head."""
    sizes = {**site.sizes(), "num_key_value_heads": 1, "num_heads": site.num_heads // site.num_key_value_heads}
    mixer = build_mixer(dataclasses.replace(config, num_memory_tokens=size), **sizes)
    return mixer.state_bytes(dtype=torch.bfloat16)


__all__ = ["HeadPlan", "plan_heads"]
