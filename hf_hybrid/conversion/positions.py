"""
Positions of left-padded rows, where nobody gave any: as `generate` makes them, so that padding in front changes
nothing.
"""

import inspect

import torch
from torch import nn

from .layer import hybrid_layers


def with_positions(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """
    Keyword arguments of a forward, with `position_ids` where they are missing and the mask [B, T] has padding in front.

    A rotary softmax does not notice where a row begins; features and gates do. Hosts that embed positions themselves,
    or make their own of pictures, are left alone: there the untouched model notices too.
    """
    mask = kwargs.get("attention_mask")
    if torch.compiler.is_compiling() or not torch.is_tensor(mask) or mask.ndim != 2 or mask.device.type == "meta":
        return kwargs
    if not _is_rotary_decoder(model) or _given(model, "position_ids", args, kwargs) is not None:
        return kwargs
    if mask.device.type == "cpu" and bool(mask[:, 0].all()):  # on other devices looking would cost more than it saves
        return kwargs
    if not any(layer.linear_heads for layer in hybrid_layers(model).values()):
        return kwargs
    tokens = _given(model, "input_ids", args, kwargs)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return kwargs
    in_front = mask.bool().int().argmax(-1, keepdim=True)
    positions = (torch.arange(mask.shape[1], device=mask.device) - in_front).clamp_min(0)
    return {**kwargs, "position_ids": positions[:, -tokens.shape[1] :]}


def _is_rotary_decoder(model: nn.Module) -> bool:
    config = model.config.get_text_config(decoder=True)
    makes_own = any(hasattr(part, "get_rope_index") for part in (model, getattr(model, "base_model", None)))
    return bool(getattr(config, "rope_parameters", None)) and not model.config.is_encoder_decoder and not makes_own


def _given(model: nn.Module, name: str, args: tuple, kwargs: dict):
    if name in kwargs:
        return kwargs[name]
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    index = names.index(name) if name in names else len(args)
    return args[index] if index < len(args) else None


__all__ = ["with_positions"]
