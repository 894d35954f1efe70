"""Time and cache bytes, measured on the machine at hand.

Times are only ever reported side by side: all candidates are run in turn, round by round, and ratios are medians of
per-round ratios.
"""

import functools
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..conversion.cache import cache_bytes


@dataclass
class Timing:
    """Seconds are medians over rounds; `ratio` is the median of `reference / this` in each round: above 1 is faster."""

    seconds: float
    ratio: float


@dataclass
class Speed:
    """One model at one context length."""

    prefill: Timing
    decode: Timing  # per token
    cache_bytes: int


def accelerators_of(models: Iterable[nn.Module]) -> list[torch.device]:
    """The devices with a queue of their own that hold a part of the models: all but the CPU."""
    devices = {parameter.device for model in models for parameter in model.parameters()}
    return sorted((device for device in devices if device.type not in ("cpu", "meta")), key=str)


def compare_times(
    candidates: dict[str, Callable[[], object]],
    rounds: int = 5,
    warmup: int = 1,
    devices: Collection[torch.device] | None = None,
) -> dict[str, Timing]:
    """
    Time callables in turn (A B C A B C …).

    Args:
        candidates (`dict[str, Callable]`): By name. The first is the reference of the ratios.
        rounds (`int`, *optional*, defaults to 5): How often each is timed.
        warmup (`int`, *optional*, defaults to 1): How often each is run before.
        devices (`Collection[torch.device]`, *optional*): Accelerators whose queued work is waited for before the clock
            is read. By default the current one, if the machine has one.

    Returns:
        `dict[str, Timing]`: By name.
    """
    if devices is None:
        current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        devices = [] if current is None else [current]

    def now() -> float:
        for device in devices:
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = now()
            run()
            seconds[name].append(now() - start)
    reference = next(iter(seconds.values()))
    return {
        name: Timing(statistics.median(own), statistics.median(r / s for r, s in zip(reference, own, strict=True)))
        for name, own in seconds.items()
    }


@torch.no_grad()
def compare_speed(
    models: dict[str, PreTrainedModel], length: int, decode_tokens: int = 8, rounds: int = 3, batch_size: int = 1
) -> dict[str, Speed]:
    """
    Prefill of `length` tokens, and `decode_tokens` further tokens one by one, for several models side by side, each on
    its own device.

    Args:
        models (`dict[str, PreTrainedModel]`): By name; they are put into eval mode. The first is the reference of all
            ratios.
        length (`int`): Tokens of the prompt.
        decode_tokens (`int`, *optional*, defaults to 8): Tokens decoded per round.
        rounds (`int`, *optional*, defaults to 3): Side-by-side rounds.
        batch_size (`int`, *optional*, defaults to 1): Sequences.

    Returns:
        `dict[str, Speed]`: By name.
    """
    first = next(iter(models.values()))
    vocabulary = first.config.get_text_config().vocab_size
    prompt = torch.randint(0, vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0))
    # copied before the clock runs
    prompts = {name: prompt.to(model.device) for name, model in models.items()}
    keep = {"logits_to_keep": 1}
    caches = {}

    def prefill(name):
        caches[name] = models[name](input_ids=prompts[name], use_cache=True, **keep).past_key_values

    def decode(name):
        for _ in range(decode_tokens):
            models[name](input_ids=prompts[name][:, :1], past_key_values=caches[name], use_cache=True, **keep)

    for model in models.values():
        model.eval()
    devices = accelerators_of(models.values())
    prefills = compare_times({name: functools.partial(prefill, name) for name in models}, rounds, devices=devices)
    sizes = {name: cache_bytes(caches[name]) for name in models}
    decodes = compare_times({name: functools.partial(decode, name) for name in models}, rounds, devices=devices)
    return {
        name: Speed(prefills[name], Timing(decodes[name].seconds / decode_tokens, decodes[name].ratio), sizes[name])
        for name in models
    }
