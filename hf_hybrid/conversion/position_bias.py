"""
T5's position bias: one layer computes it for all layers of its stack. Where nobody reads it, it need not be computed.
"""

import torch
from torch import nn
from transformers import PreTrainedModel


class OwnsPositionBias:
    """
    Put in front of the hybrid class of T5's attention, one layer of which computes a position bias [1, H, T, KV] for
    all layers of its stack. Where all of them are linear nobody reads it: 32,768 tokens and 8 heads would be 32 GiB of
    it.
    """

    # the other layers of the stack; `None`: not known, they may read it
    _hybrid_bias_readers: tuple[nn.Module, ...] | None = None

    def compute_bias(self, query_length, key_length, *args, **kwargs):
        readers = self._hybrid_bias_readers
        if readers is None or not all(is_all_linear(layer) for layer in (self, *readers)):
            return super().compute_bias(query_length, key_length, *args, **kwargs)
        nothing: torch.Tensor = self.relative_attention_bias.weight.new_zeros(1, 1, 1, 1)
        return nothing.expand(1, self.n_heads, query_length, key_length)


def is_all_linear(layer: nn.Module) -> bool:
    """Whether all heads of a layer run through its mixer, now."""
    site = getattr(layer, "hybrid_site", None)
    return site is not None and len(layer.linear_heads) == site.num_key_value_heads


def note_bias_readers_(model: nn.Module) -> None:
    """Tell every layer of `model` that computes a position bias which other layers get it. After conversions."""
    # from the outside in: what counts in the end is the innermost model around a layer
    for stack in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        layers = [layer for layer in stack.modules() if hasattr(type(layer), "compute_bias")]
        for owner in layers:
            if isinstance(owner, OwnsPositionBias) and getattr(owner, "has_relative_attention_bias", False):
                owner._hybrid_bias_readers = tuple(layer for layer in layers if _reads_bias_of(owner, layer))


def _reads_bias_of(owner: nn.Module, layer: nn.Module) -> bool:
    """
    Layers of the stack without a bias of their own; cross-attention, not causal in a causal stack, begins with zeros.
    """
    same_kind = getattr(layer, "is_causal", None) == getattr(owner, "is_causal", None)
    return same_kind and not getattr(layer, "has_relative_attention_bias", True)


__all__ = ["OwnsPositionBias", "is_all_linear", "note_bias_readers_"]
