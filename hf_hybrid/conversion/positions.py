"""
Positions of left-padded rows, where nobody gave any: as `generate` makes them, so that padding in front changes
nothing.
"""

import torch
from torch import nn

from .layer import hybrid_layers


def with_positions(model: nn.Module, names: tuple[str, ...], args: tuple, kwargs: dict) -> dict:
    """
    Keyword arguments of a forward, with `position_ids` where they are missing and there is a mask [B, T].

    A rotary softmax does not notice where a row begins; features and gates do. Hosts that embed positions themselves,
    or make their own of pictures, are left alone: there the untouched model notices too.

    Args:
        model (`nn.Module`): The hybrid.
        names (`tuple[str, ...]`): The arguments of its forward, in order.
        args, kwargs: Those of this call.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = given.get("attention_mask")
    if not torch.is_tensor(mask) or mask.ndim != 2 or mask.device.type == "meta":
        return kwargs
    if given.get("position_ids") is not None or not model.__dict__.get("_hybrid_is_rotary", False):
        return kwargs
    if not torch.compiler.is_compiling():
        if mask.device.type == "cpu" and bool(mask[:, 0].all()):  # elsewhere looking would cost more than it saves
            return kwargs
        if not any(layer.linear_heads for layer in hybrid_layers(model).values()):
            return kwargs
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return kwargs
    in_front = mask.bool().int().argmax(-1, keepdim=True)
    positions = (torch.arange(mask.shape[1], device=mask.device) - in_front).clamp_min(0)
    return {**kwargs, "position_ids": positions[:, -tokens.shape[1] :]}


def is_rotary_decoder(model: nn.Module) -> bool:
    """Whether a model turns queries and keys by the positions that it is given, and by nothing else."""
    config = model.config.get_text_config(decoder=True)
    makes_own = any(hasattr(part, "get_rope_index") for part in (model, getattr(model, "base_model", None)))
    return bool(getattr(config, "rope_parameters", None)) and not model.config.is_encoder_decoder and not makes_own


__all__ = ["is_rotary_decoder", "with_positions"]
