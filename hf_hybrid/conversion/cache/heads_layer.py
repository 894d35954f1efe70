"""The cache layer of a site some of whose heads are linear: a state for those, keys and values for the others."""

from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from ...errors import UnsupportedModelError
from ..heads import HeadSplit
from .linear_layer import HybridLinearLayer


class HybridHeadsLayer(HybridLinearLayer):
    """
    A layer some of whose key-value heads are linear: they have a state; the others have keys and values, in a layer of
    transformers' own kind.

    Args:
        kept (`CacheLayerMixin`): The layer that the host would have here, empty; it takes the heads that are not
            linear, and tells how long the text is and how masks are laid out.
        split (`HeadSplit`): Which heads are which.
        host_states (`int`, *optional*, defaults to 0): As of [`HybridLinearLayer`].
    """

    def __init__(self, kept: CacheLayerMixin, split: HeadSplit, host_states: int = 0):
        self.kept = kept
        super().__init__(host_states)
        self.split = split
        self.is_static = hasattr(kept, "max_cache_len")
        self.is_sliding, self.is_compileable = kept.is_sliding, self.is_static
        # the host hands over what its keys are made from (DeepSeek's latents): nothing that could be split by heads
        self.holds_all_heads = False

    keys = property(lambda self: self.kept.keys, lambda self, value: None)
    values = property(lambda self: self.kept.values, lambda self, value: None)

    def update(self, key_states, value_states, *args, **kwargs):
        self.batch_size = key_states.shape[0]
        self.device, self.dtype = key_states.device, key_states.dtype
        self.holds_all_heads = key_states.shape[1] != self.split.num_key_value_heads
        if self.holds_all_heads:
            if self.is_static and self.is_sliding:
                raise UnsupportedModelError(
                    "A static cache of a sliding layer holds what keys are made from, not keys, so that some of its "
                    "heads cannot be linear. Use a dynamic cache, or convert whole layers."
                )
            return self.kept.update(key_states, value_states, *args, **kwargs)
        self.new_key_values = self.split.linear(key_states, axis=1), self.split.linear(value_states, axis=1)
        return self.kept.update(
            self.split.kept(key_states, axis=1), self.split.kept(value_states, axis=1), *args, **kwargs
        )

    def get_seq_length(self):
        return self.kept.get_seq_length()

    def get_mask_sizes(self, query_length):
        return self.kept.get_mask_sizes(query_length)

    def get_max_length(self):
        return self.kept.get_max_length()

    def mask_offset(self):
        if not self.is_static:
            return None
        seen = self.get_seq_length()
        return seen - self.get_mask_sizes(1)[1] if self.is_sliding else seen

    def activate_past_recording(self):
        super().activate_past_recording()
        if hasattr(self.kept, "activate_past_recording"):
            self.kept.activate_past_recording()

    @property
    def is_croppable(self):
        return super().is_croppable and self.kept.is_croppable

    def crop(self, tokens_to_remove):
        self._rewind(-tokens_to_remove)
        self.kept.crop(tokens_to_remove)

    def reset(self):
        LinearAttentionLayer.reset(self)
        self._calls, self._real_tokens, self._counted = [], 0, 0
        self.kept.reset()

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.kept.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self.kept.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.kept.batch_select_indices(indices)

    def offload(self):
        """Move the keys and values; the state is small and does not grow."""
        self.kept.offload()

    def prefetch(self):
        """Move the keys and values back."""
        self.kept.prefetch()


__all__ = ["HybridHeadsLayer"]
