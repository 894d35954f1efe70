"""
What an attention mask says to a layer that has no scores to mask: which tokens exist, and how far the host itself looks
back.
"""

import dataclasses

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from ...errors import UnsupportedModelError


# Families whose text layers let the tokens of one picture see each other.
PICTURE_BLOCKS = ("colpali", "gemma3", "gemma4", "gemma4_unified", "molmo2", "paligemma", "shieldgemma2", "step3p7")


def valid_tokens(mask, length: int, offset, device) -> torch.Tensor | None:
    """
    Which new tokens exist, bool `[B, T]`, from whatever form of mask reaches the layer; `None` when all do.

    A causal mask tells by its diagonal: a padded token does not see itself. `offset` is the position of the first new
    token on the mask's key axis.
    """
    if mask is None:
        return None
    if is_block_mask(mask):
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
        index = torch.arange(length, device=mask.device) + within_keys(offset, length, mask.shape[-1])
        index = index[None, :, None].expand(mask.shape[0], -1, 1)
        diagonal = mask.gather(2, index)[..., 0]
    return shown(diagonal)


def shown(mask: torch.Tensor) -> torch.Tensor:
    """What a mask shows, as booleans: it is those already, or numbers that are added to scores."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise UnsupportedModelError(
            f"The 4D attention mask has dtype {mask.dtype}. Pass booleans (True: seen), numbers that are added to "
            "scores, or a mask [B, T]."
        )
    return mask > torch.finfo(mask.dtype).min / 2


def is_block_mask(mask) -> bool:
    """Whether it is flex attention's `BlockMask`, by name: importing it is slow, and few use it."""
    return type(mask).__name__ == "BlockMask"


def within_keys(offset, length: int, num_keys: int):
    """
    `offset`, at most so that `length` tokens end with the last of `num_keys` keys. Where every layer is linear, a
    static cache lays all masks out like its first layer's, and a full sliding one ends at the newest token whatever its
    position.
    """
    most = max(num_keys - length, 0)
    return offset.clamp_max(most) if torch.is_tensor(offset) else min(offset, most)


@dataclasses.dataclass(frozen=True)
class Span:
    """
    How far a host's causal layer looks back by itself: `window` tokens (sliding window), or to the beginning of its
    `chunk` of so many.
    """

    window: int | None = None
    chunk: int | None = None

    @classmethod
    def of(cls, layer: nn.Module, config: PreTrainedConfig | None) -> "Span":
        """Of an attention layer; where the config does not say which layers look back so far, of any."""
        kinds, index = getattr(config, "layer_types", None), getattr(layer, "layer_idx", None)
        kind = kinds[index] if kinds and isinstance(index, int) and index < len(kinds) else "sliding, or chunked"
        return cls(
            window=_of_layer(config, "sliding_window", index) if "sliding" in kind else None,
            chunk=_of_layer(config, "attention_chunk_size", index) if "chunked" in kind else None,
        )


def _of_layer(config: PreTrainedConfig | None, name: str, index: int | None):
    """A setting that may differ between the layers of a model, of the layer at `index`; `None` if there is no such."""
    try:
        return getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return None if config is None or index is None else getattr(config.per_layer_config[index], name, None)


__all__ = ["PICTURE_BLOCKS", "Span", "is_block_mask", "shown", "valid_tokens", "within_keys"]
