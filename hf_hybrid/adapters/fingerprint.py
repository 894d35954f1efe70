"""Tells base models apart by their weights, not by their names."""

from collections.abc import Iterable

import torch
from torch import nn

from ..conversion.layer import hybrid_layers


# A fingerprint is a random projection of a site's weights, about 1 in size. Rounding weights to bfloat16 moves it by
# 0.001, a fine-tuning that changes them by 5 % by 0.05.
TOLERANCE = 0.01


def base_fingerprint(model: nn.Module, sites: Iterable[str]) -> dict[str, float]:
    """
    A number per site that tells full-attention weights apart: the sum of the weights under fixed random signs, over
    their norm.

    Taken once per model in distillation, whose base weights never change, and before they are sharded: it is noted on
    the model.

    Raises:
        AttributeError: If the model has no such site.
    """
    layers = hybrid_layers(model)
    # a model that is only looked at may have other weights the next time
    known = model.__dict__.setdefault("base_fingerprint", {}) if layers else {}
    for name in sites:
        if name not in known:
            known[name] = _of_attention(layers[name] if name in layers else model.get_submodule(name))
    return {name: known[name] for name in sites}


def _of_attention(attention: nn.Module) -> float:
    own = [p for name, p in attention.named_parameters() if not name.startswith(("hybrid.", "hybrid_delta."))]
    weights = torch.cat([p.detach().float().cpu().flatten() for p in own])
    signs = torch.randint(0, 2, weights.shape, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
    return round((weights.double() @ signs.double() / weights.double().norm().clamp_min(1e-30)).item(), 6)


__all__ = ["TOLERANCE", "base_fingerprint"]
