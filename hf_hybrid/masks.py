"""What an attention mask says to a layer that has no scores to mask: which tokens exist, and where packed sequences begin. And which masks say more."""

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import UnsupportedModelError


def valid_tokens(mask, length: int, offset, device) -> torch.Tensor | None:
    """
    Which new tokens exist, bool `[B, T]`, from whatever form of mask reaches the layer; `None` when all do.

    A causal mask tells by its diagonal: a padded token does not see itself. `offset` is the position of the first new token on the
    mask's key axis.
    """
    if mask is None:
        return None
    if type(mask).__name__ == "BlockMask":  # flex attention
        batch = torch.arange(mask.shape[0], device=device)[:, None].expand(-1, length)
        row = torch.arange(length, device=device).expand_as(batch)
        return mask.mask_mod(batch, torch.zeros_like(batch), row, row + offset)
    if mask.ndim == 2:  # flash attention
        return mask[:, -length:].bool()
    if mask.ndim == 4:
        mask = mask[:, 0]  # [B, Q, KV]; heads share which tokens exist
    if mask.shape[-2] == 1 and length > 1:  # one row for all queries: a bidirectional mask
        diagonal = mask[:, 0, -length:]
    else:
        # clamped: where every layer is linear, a static cache lays all masks out like its first layer's, and a full sliding one ends at the
        # newest token whatever its position
        index = (torch.arange(length, device=mask.device) + offset).clamp_max(mask.shape[-1] - 1)
        index = index[None, :, None].expand(mask.shape[0], -1, 1)
        diagonal = mask.gather(2, index)[..., 0]
    return diagonal if diagonal.dtype == torch.bool else diagonal > torch.finfo(diagonal.dtype).min / 2


def packed_segments(kwargs: dict, valid: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """
    Packed sequence of every token, int `[B, T]`, or `None` when each row is one sequence.

    Read from `cu_seq_lens_q`, else from restarts of `position_ids` (the rule of `find_packed_sequence_indices` in transformers).
    Padding may have any positions: a restart counts only between tokens that exist.
    """
    batch, length = query.shape[:2]
    boundaries = kwargs.get("cu_seq_lens_q")
    if boundaries is not None:
        index = torch.arange(length, device=query.device)
        return torch.bucketize(index, boundaries[1:].to(index), right=True)[None].expand(batch, -1)
    positions = kwargs.get("position_ids")
    if torch.compiler.is_compiling() or positions is None or positions.ndim != 2 or positions.shape[-1] != length:
        return None
    starts = torch.diff(positions, dim=-1) != 1
    if valid is not None:
        starts = starts & valid[:, 1:] & valid[:, :-1]
    if not bool(starts.any()):
        return None
    return torch.cat([starts.new_zeros(starts.shape[0], 1), starts], dim=1).cumsum(-1).expand(batch, -1)


# The forward's arguments that may be a mask over the tokens of a text.
MASK_ARGUMENTS = ("attention_mask", "decoder_attention_mask")


def has_custom_mask(args: tuple, kwargs: dict) -> bool:
    """Whether a 4D tensor that may be a mask is among the arguments of a forward; cheap, and mostly no."""
    return any(torch.is_tensor(value) and value.ndim == 4 for value in (*args[:4], *map(kwargs.get, MASK_ARGUMENTS)))


def check_masks(model: PreTrainedModel, layers: list[nn.Module], forward: Callable, args: tuple, kwargs: dict) -> None:
    """[`check_custom_mask`] on every mask among the arguments of `forward`, with the kinds of the linear `layers` that get it."""
    given = inspect.signature(forward).bind_partial(model, *args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    for name in MASK_ARGUMENTS:
        causal = {layer.hybrid.causal for layer in layers}
        if getattr(model.config, "is_encoder_decoder", False):
            causal &= {name == "decoder_attention_mask"}
        cache = given.get("past_key_values")
        past_length = None if cache is None else cache.get_seq_length()
        check_custom_mask(name, given.get(name), causal, past_length, model.config.get_text_config())


def check_custom_mask(name: str, mask, causal: set[bool], past_length, config: PreTrainedConfig) -> None:
    """
    Refuse a 4D mask that hides more than padding and, in causal layers, the future: linear layers could not follow it.

    Such masks come from users (transformers takes a 4D mask as it is) and from `generate`, which makes them for static caches. Looking costs a pass over
    the mask, so masks of fewer dimensions, which transformers expands itself, are never looked at; nor is anything while compiling.

    Args:
        name (`str`): The argument it came in by.
        mask: Anything; only 4D tensors over several queries are checked. `[B, 1 or H, Q, KV]`, bool (`True`: seen) or added to scores.
        causal (`set[bool]`): Kinds of the linear layers that get it.
        past_length (`int` or `torch.Tensor`, *optional*): Tokens in the cache before these; `None` without a cache.
        config (`PreTrainedConfig`): Of the text model; says whether the host itself looks back through a window.

    Raises:
        UnsupportedModelError: If the mask says more than the layers can follow.
    """
    if not torch.is_tensor(mask) or mask.ndim != 4 or mask.shape[-2] == 1 or not causal:
        return
    if torch.compiler.is_compiling() or mask.device.type == "meta":
        return
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    biased = mask.is_floating_point() and bool(((mask != 0) & seen).any())
    queries, keys = seen.shape[-2:]
    offset = keys - queries if past_length is None else past_length
    at = torch.arange(queries, device=mask.device) + offset
    column = torch.arange(keys, device=mask.device)
    exists = seen.any(-2, keepdim=True)  # a key that some query sees: [B, H, 1, KV]
    past = column <= at[:, None]
    allowed = []
    if True in causal:
        allowed.append(exists & past)
        window = getattr(config, "sliding_window", None)
        if window is not None:
            allowed.append(exists & past & (at[:, None] - column < window))
        if getattr(config, "attention_chunk_size", None) is not None:
            allowed.append(
                exists & past & (column // config.attention_chunk_size == at[:, None] // config.attention_chunk_size)
            )
    if False in causal:
        allowed.append(exists.expand_as(seen))
    # what a padded query sees is nobody's business
    real = exists[..., 0, :].gather(-1, at.clamp_max(keys - 1).expand(*seen.shape[:2], -1))[..., None]
    same_heads = bool((seen == seen[:, :1]).all())
    if biased or not same_heads or not any(bool(((seen == form) | ~real).all()) for form in allowed):
        raise UnsupportedModelError(
            f"{name}: linear layers follow masks that hide padding{' and the future' if True in causal else ''}; the 4D mask of shape "
            f"{list(mask.shape)} {'adds numbers to scores' if biased else 'hides more'}. Pass a mask [B, T] of the tokens that exist; mark packed sequences "
            "by position_ids that restart."
        )


__all__ = ["check_custom_mask", "check_masks", "has_custom_mask", "packed_segments", "valid_tokens"]
