"""The cache layer of a site whose heads are all linear: it holds a state, and no keys."""

from collections.abc import Callable

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer


State = tuple[torch.Tensor, ...]


class HybridLinearLayer(LinearAttentionAndFullAttentionLayer):
    """
    State of one linear-attention site in a dynamic cache. Tracks the number of tokens seen, so that masks and positions
    come out right even where the first layer of the model is linear. Transformers sizes its masks by the first layer
    that is not purely linear; where that one holds something else (the keys of a picture in Mllama's cross-attention),
    sizes would be wrong, so this layer says it is both kinds.

    Args:
        host_states (`int`, *optional*, defaults to 0): Recurrent states that the host itself keeps in this layer,
            beside its attention (Falcon-H1's Mamba heads). They come first; the mixer's follow.
    """

    # A dynamic cache full of linear layers must not look like a static one: generate() would take the static-mask path.
    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, host_states: int = 0):
        super().__init__(number_of_states=host_states)
        self.host_states = host_states
        self.cumulative_length: int | torch.Tensor = 0
        # Whether `update` returns keys as long as a softmax layer's would be, for hosts that measure them: the last
        # entries are the new ones
        self.full_length_keys = False
        self.new_key_values: tuple[torch.Tensor, torch.Tensor] | None = None
        # tokens that were no padding, per row; of so many tokens in all (compiled steps are not counted)
        self._real_tokens: int | torch.Tensor = 0
        self._counted = 0
        # with `record_past`: (state before, function that replays the first n tokens of the call, tokens of the call)
        self._calls: list[tuple[State | None, Callable[[State | None, int], State], int]] = []

    # -- what the host's attention and the mask code call

    def lazy_initialization(self, *args, **kwargs):
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if self.keys is None:
            self._begin(key_states)
        self.batch_size = key_states.shape[0]
        self.cumulative_length += key_states.shape[-2]
        return self._returned(key_states, value_states)

    def _begin(self, key_states):
        self.device, self.dtype = key_states.device, key_states.dtype
        self.keys = self.values = key_states.new_empty(0)  # some hosts ask how many keys a layer holds

    def _returned(self, key_states, value_states):
        """
        The new keys and values; with `full_length_keys`, placeholders of the whole length, of zero stride so that they
        hold nothing.
        """
        if not self.full_length_keys:
            return key_states, value_states
        self.new_key_values = key_states, value_states
        length = self.get_mask_sizes(0)[0]
        return tuple(x.new_empty(1).expand(*x.shape[:-2], length, x.shape[-1]) for x in self.new_key_values)

    def take_new_key_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The keys and values of the latest `update`, once: what `full_length_keys` hid behind placeholders. The cache
        does not hold on to them.
        """
        taken, self.new_key_values = self.new_key_values, None
        return taken

    def get_seq_length(self):
        return self.cumulative_length

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def get_max_length(self):
        return -1

    def mask_offset(self) -> int | torch.Tensor | None:
        """
        Where the next token will sit on the key axis of the host's mask; `None`: dynamic masks end at the newest token.
        """
        return None

    # -- what the attention function calls

    def read_state(self) -> State | None:
        """The mixer's state after the tokens seen so far, or `None` before the first."""
        own = self._own_states()
        if not own or not all(self.has_previous_state[i] for i in own):
            return None
        return tuple(_writable(self.recurrent_states[i]) for i in own)

    def _own_states(self) -> range:
        return range(self.host_states, self.number_of_states)

    def write_state(self, state: State, replay: Callable[[State | None, int], State], num_tokens: int) -> None:
        """
        Store the state after a call of `num_tokens` tokens; `replay(state_before, n)` recomputes it for the first n of
        them.
        """
        if self.record_past:
            before = self.read_state()
            self._calls.append((None if before is None else tuple(x.clone() for x in before), replay, num_tokens))
        self._set_state(state)

    def _set_state(self, state: State | None) -> None:
        if state is None:
            self.has_previous_state.update(dict.fromkeys(self._own_states(), False))
            return
        if not self._own_states():
            self.number_of_states += len(state)
            for per_state in (self.recurrent_states, self.conv_states, self.conv_kernel_size):
                per_state.update(dict.fromkeys(self._own_states()))
            for per_state in (
                self.is_recurrent_states_initialized,
                self.is_conv_states_initialized,
                self.has_previous_state,
            ):
                per_state.update(dict.fromkeys(self._own_states(), False))
        for i, x in zip(self._own_states(), state, strict=True):
            if x is self.recurrent_states[i]:  # written in place
                continue
            # copying in place would overwrite what autograd saved, and is not allowed into what was made in inference
            # mode
            if (torch.is_grad_enabled() and x.requires_grad) or _is_frozen(self.recurrent_states[i]):
                self.recurrent_states[i], self.is_recurrent_states_initialized[i] = x, True
            else:
                self.update_recurrent_state(x, i)
            self.has_previous_state[i] = True

    def count(self, valid: torch.Tensor | None, num_tokens: int) -> None:
        """Note how many of the tokens of a call existed, by `valid` [B, T]; `None`: all of them."""
        if not torch.compiler.is_compiling():
            self._counted += num_tokens
            self._real_tokens = self._real_tokens + (num_tokens if valid is None else valid.sum(-1))

    def real_tokens_seen(self, before: int) -> int | torch.Tensor | None:
        """
        Tokens in the state that were no padding, `[B]` or for all rows, when `before` new ones are counted as seen
        already; `None`: not known.
        """
        return self._real_tokens if self._counted == int(self.get_seq_length()) - before else None

    def state_bytes(self) -> int:
        """Bytes held for this layer, whatever the number of tokens."""
        held = [*self.recurrent_states.values(), *self.conv_states.values()]
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    # -- assisted decoding: put the state back as it was before rejected tokens

    @property
    def is_croppable(self):
        return not self.host_states and (self.record_past or self.read_state() is None)

    def crop(self, tokens_to_remove):
        if tokens_to_remove > 0:
            raise RuntimeError(
                "Linear-attention layers can only be cropped by a negative number: the tokens to remove."
            )
        self._rewind(-tokens_to_remove)
        self.cumulative_length += tokens_to_remove

    def _rewind(self, left: int) -> None:
        """Put the state back as it was `left` tokens ago."""
        if left and self.host_states:
            raise RuntimeError(
                "The host's own recurrent states in this layer cannot be put back: decode without an assistant."
            )
        if left and not self.record_past:
            raise RuntimeError(
                "`crop` needs the past states: call `activate_past_recording` before the tokens to remove."
            )
        while left:
            before, replay, size = self._calls.pop()
            kept = max(size - left, 0)
            self._set_state(replay(before, kept) if kept else before)
            if kept:
                self._calls.append((before, replay, kept))
            left -= size - kept
        self._calls = []  # only what came after the last crop can be removed
        self._counted = -1  # not known any more

    # -- housekeeping

    def reset(self):
        LinearAttentionLayer.reset(self)
        self._calls = []
        self._real_tokens = self._counted = 0
        if isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length.zero_()
        else:
            self.cumulative_length = 0

    def reorder_cache(self, beam_idx):
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self._map_real_tokens(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        self._map(lambda x: x[indices, ...])

    def _map_real_tokens(self, function):
        if isinstance(self._real_tokens, torch.Tensor):
            self._real_tokens = function(self._real_tokens)

    def _map(self, function):
        self._map_real_tokens(function)
        for i in range(self.number_of_states):
            if self.is_recurrent_states_initialized[i]:
                self.recurrent_states[i] = function(self.recurrent_states[i])
            if self.is_conv_states_initialized[i]:
                self.conv_states[i] = function(self.conv_states[i])

    def offload(self):
        """Nothing to move: the state is small and does not grow."""

    def prefetch(self):
        """Nothing to move back."""


class StaticHybridLinearLayer(HybridLinearLayer):
    """
    The same in a `StaticCache`: the token counter is a tensor, so that a compiled decode step is compiled once.

    Args:
        replaced (`CacheLayerMixin`): The static layer whose place this one takes. It stays empty, and goes on telling
            how masks are laid out: full and sliding static layers differ, and the host shares one mask among all its
            layers of a kind.
        host_states (`int`, *optional*, defaults to 0): As above.
    """

    is_compileable = True

    def __init__(self, replaced: CacheLayerMixin, host_states: int = 0):
        super().__init__(host_states)
        self._replaced = replaced
        self.max_cache_len = replaced.max_cache_len
        self.is_sliding = replaced.is_sliding
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def update(self, key_states, value_states, *args, **kwargs):
        if self.keys is None:
            self._begin(key_states)
            self.batch_size = key_states.shape[0]
            self.cumulative_length = self.cumulative_length.to(key_states.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.cumulative_length)
        self.cumulative_length.add_(key_states.shape[-2])
        if self.is_sliding:
            self._replaced.cumulative_length_int += key_states.shape[-2]
        return self._returned(key_states, value_states)

    def get_seq_length(self):
        if self.is_sliding:
            return self._replaced.cumulative_length_int
        return self.cumulative_length if self.keys is not None else 0

    def get_mask_sizes(self, query_length):
        return self._replaced.get_mask_sizes(query_length)

    def mask_offset(self):
        seen = self.get_seq_length()
        return seen - self.get_mask_sizes(1)[1] if self.is_sliding else seen

    def get_max_length(self):
        return self._replaced.get_max_length()

    def reset(self):
        super().reset()
        if self.is_sliding:
            self._replaced.cumulative_length_int = 0


def _is_frozen(x: torch.Tensor) -> bool:
    """Whether it was made in inference mode, which has ended: nothing may be written into it."""
    return (
        not torch.compiler.is_compiling()
        and x is not None
        and x.is_inference()
        and not torch.is_inference_mode_enabled()
    )


def _writable(x: torch.Tensor) -> torch.Tensor:
    return x.clone() if _is_frozen(x) else x


__all__ = ["HybridLinearLayer", "State", "StaticHybridLinearLayer"]
