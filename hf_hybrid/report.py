"""What a hybrid costs and what it keeps: perplexity, recall, time and cache bytes, measured on the machine at hand.

Times are only ever reported side by side: both models are run in turn, round by round, and ratios are medians of per-round ratios.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .cache import cache_bytes
from .errors import DatasetError


@torch.no_grad()
def token_loss(model: PreTrainedModel, input_ids: torch.Tensor, first: int = 1) -> float:
    """
    Mean cross-entropy in nats per token over positions `first` and later.

    Args:
        input_ids (`torch.Tensor`): `[N, T]`, run row by row to bound memory.
        first (`int`, *optional*, defaults to 1): First predicted position.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] <= first:
        raise DatasetError(f"token_loss: input_ids must be [N, T] with T > {first}; got {tuple(input_ids.shape)}.")
    model.eval()
    losses = []
    for row in input_ids.to(model.device).split(1):
        logits = model(input_ids=row, use_cache=False).logits[0, first - 1 : -1].float()
        losses.append(F.cross_entropy(logits, row[0, first:]).item())
    return statistics.fmean(losses)


def perplexity(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """`exp` of the mean loss per token of `[N, T]` token ids."""
    return math.exp(token_loss(model, input_ids))


def recall_loss(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """Loss in nats per token on the second copy of a passage that is read twice: low means the model looks it up. `[N, T]` -> `T // 2` tokens."""
    half = input_ids.shape[1] // 2
    return token_loss(model, torch.cat([input_ids[:, :half], input_ids[:, :half]], dim=1), first=half + 1)


def accuracy_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of an accuracy (Wilson 1927): `(low, high)` in [0, 1]."""
    p, n = correct / total, total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass
class Timing:
    """Seconds are medians over rounds; `ratio` is the median of `reference / this` within each round: above 1 is faster."""

    seconds: float
    ratio: float


def compare_times(candidates: dict[str, Callable[[], object]], rounds: int = 5, warmup: int = 1) -> dict[str, Timing]:
    """Time callables in turn (A B C A B C …). The first is the reference of the ratios."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    reference = next(iter(seconds.values()))
    return {
        name: Timing(statistics.median(own), statistics.median(r / s for r, s in zip(reference, own, strict=True)))
        for name, own in seconds.items()
    }


@dataclass
class Speed:
    """One model at one context length."""

    prefill: Timing
    decode: Timing  # per token
    cache_bytes: int


@torch.no_grad()
def compare_speed(
    models: dict[str, PreTrainedModel], length: int, decode_tokens: int = 8, rounds: int = 3, batch_size: int = 1
) -> dict[str, Speed]:
    """
    Prefill of `length` tokens, and `decode_tokens` further tokens one by one, for several models side by side.

    Returns:
        `dict[str, Speed]`: By name; the first model is the reference of all ratios.
    """
    generator = torch.Generator().manual_seed(0)
    first = next(iter(models.values()))
    vocabulary = first.config.get_text_config().vocab_size
    prompt = torch.randint(0, vocabulary, (batch_size, length), generator=generator).to(first.device)
    keep = {"logits_to_keep": 1}
    caches = {}

    def prefill(name):
        caches[name] = models[name](input_ids=prompt, use_cache=True, **keep).past_key_values

    def decode(name):
        for _ in range(decode_tokens):
            models[name](input_ids=prompt[:, :1], past_key_values=caches[name], use_cache=True, **keep)

    for model in models.values():
        model.eval()
    prefills = compare_times({name: functools.partial(prefill, name) for name in models}, rounds)
    sizes = {name: cache_bytes(caches[name]) for name in models}
    decodes = compare_times({name: functools.partial(decode, name) for name in models}, rounds)
    return {
        name: Speed(prefills[name], Timing(decodes[name].seconds / decode_tokens, decodes[name].ratio), sizes[name])
        for name in models
    }
