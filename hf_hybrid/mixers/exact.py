"""The exact part of a mixer: window, sinks and memory, in front of whatever the mixer keeps of the rest."""

from typing import Any

import torch

from ..errors import HybridConfigError
from ..ops import (
    LinearPart,
    MemoryState,
    WindowState,
    empty_memory_state,
    empty_window_state,
    memory_attention,
    window_attention,
)
from .heads import query_heads


# Tensors of a state without its recurrent part, of a window as of a memory.
TENSORS = 4


class ExactPart:
    """
    Exact attention over the latest tokens, the first ones, and (with a memory) a bounded number of those between. Holds
    no parameters. Heads whose memories have different sizes run one size after the other; their states lie one after
    the other in the mixer's.

    Args:
        mixer (`LinearMixer`): Whose heads they are.
        window_size (`int`), num_sink_tokens (`int`): Of all heads.
        num_memory_tokens (`int` or `tuple[int, ...]`): Of all heads, or of each of the layer's key-value heads.
        memory_block_size (`int`): Tokens after which the memory chooses again.

    Raises:
        HybridConfigError: If the memory's sizes are not as many as the layer has key-value heads.
    """

    def __init__(self, mixer, window_size: int, num_sink_tokens: int, num_memory_tokens, memory_block_size: int):
        self.window_size, self.num_sink_tokens, self.memory_block_size = window_size, num_sink_tokens, memory_block_size
        self.scale, self.groups = mixer.head_dim**-0.5, mixer.groups
        of_layer = mixer.layer_sizes["num_key_value_heads"]
        if isinstance(num_memory_tokens, int):
            num_memory_tokens = (num_memory_tokens,) * of_layer
        if len(num_memory_tokens) != of_layer:
            raise HybridConfigError(
                f"{mixer.config_class.name}: num_memory_tokens must be one number, or one for each of the layer's "
                f"{of_layer} key-value heads; got {len(num_memory_tokens)} numbers."
            )
        sizes = [num_memory_tokens[head] for head in mixer.heads]
        # `{size: the mixer's key-value heads with a memory of that size}`
        self.heads_by_size = {size: [i for i, own in enumerate(sizes) if own == size] for size in sorted({*sizes})}

    @property
    def num_tensors(self) -> int:
        """Tensors of a state."""
        return TENSORS * len(self.heads_by_size)

    @property
    def has_memory(self) -> bool:
        return any(self.heads_by_size)

    def __call__(
        self,
        query,
        key,
        value,
        *,
        linear: LinearPart | None = None,
        valid=None,
        state: tuple[torch.Tensor, ...] = (),
        recurrent: torch.Tensor | None = None,
        inplace_final_state: bool = False,
    ):
        """
        Args:
            query, key, value: As of a mixer.
            linear (`LinearPart`, *optional*): Linear attention over the rest, under the same normaliser.
            valid, inplace_final_state: As of a mixer.
            state (`tuple`): What the previous call returned; empty before the first token.
            recurrent (`torch.Tensor`, *optional*): `[B, H_kv, F, V + 1]`, of the linear part.

        Returns:
            `(output, state, recurrent)`: `[B, T, H, V]`, [`num_tensors`] tensors, and `None` without a linear part.
        """
        options = {"valid": valid, "inplace_final_state": inplace_final_state}
        if len(self.heads_by_size) == 1:
            (size,) = self.heads_by_size
            return self._run(size, query, key, value, linear, state, recurrent, **options)
        output = query.new_empty(*query.shape[:3], value.shape[3])
        finals, recurrents, places = [], [], []
        for number, (size, heads) in enumerate(self.heads_by_size.items()):
            own, queries = (
                torch.tensor(rows, device=query.device) for rows in (heads, query_heads(heads, self.groups))
            )
            part, final, rest = self._run(
                size,
                query.index_select(2, queries),
                key.index_select(2, own),
                value.index_select(2, own),
                None if linear is None else _of_heads(linear, own, queries),
                state[number * TENSORS : (number + 1) * TENSORS],
                None if recurrent is None else recurrent.index_select(1, own),
                **options,
            )
            output = output.index_copy(2, queries, part)
            finals += final
            recurrents.append(rest)
            places += heads
        if linear is None:
            return output, tuple(finals), None
        back = torch.tensor(places, device=query.device).argsort()
        return output, tuple(finals), torch.cat(recurrents, dim=1).index_select(1, back)

    def _run(self, size, query, key, value, linear, state, recurrent, *, valid, inplace_final_state):
        kwargs: dict[str, Any] = {
            "window_size": self.window_size,
            "num_sinks": self.num_sink_tokens,
            "scale": self.scale,
            "linear": linear,
            "valid": valid,
            "inplace_final_state": inplace_final_state,
        }
        if not size:
            before = WindowState(*state, recurrent) if state else None
            output, window = window_attention(query, key, value, state=before, **kwargs)
            return output, tuple(window[:TENSORS]), window.recurrent
        memory = MemoryState(*state, recurrent) if state else None
        kwargs |= {"num_memory_tokens": size, "memory_block_size": self.memory_block_size}
        output, final = memory_attention(query, key, value, state=memory, **kwargs)
        return output, tuple(final[:TENSORS]), final.recurrent

    def empty_state(self, key, value) -> tuple[torch.Tensor, ...]:
        """The state before the first token, shaped after `key` and `value` `[B, T, H_kv, .]`."""
        state: list[torch.Tensor] = []
        for size, heads in self.heads_by_size.items():
            keys, values = key[:, :, : len(heads)], value[:, :, : len(heads)]
            window = {"window_size": self.window_size, "num_sinks": self.num_sink_tokens}
            if not size:
                state += [x for x in empty_window_state(keys, values, **window)[:TENSORS] if x is not None]
                continue
            sizes = {"num_memory_tokens": size, "memory_block_size": self.memory_block_size}
            state += [x for x in empty_memory_state(keys, values, **window, **sizes)[:TENSORS] if x is not None]
        return tuple(state)


class _MapOfHeads:
    """A feature map over some of its heads."""

    def __init__(self, feature_map, heads: torch.Tensor):
        self.feature_map, self.heads, self.output_dim = feature_map, heads, feature_map.output_dim

    def weights(self):
        return tuple(weight.index_select(0, self.heads) for weight in self.feature_map.weights())

    def features(self, x, *weights):
        return self.feature_map.features(x, *weights)

    def step_features(self, x):
        return self.features(x.transpose(1, 2), *self.weights()).transpose(1, 2)


def _of_heads(linear: LinearPart, own, queries) -> LinearPart:
    return LinearPart(
        _MapOfHeads(linear.feature_map_q, queries),
        _MapOfHeads(linear.feature_map_k, own),
        linear.log_weight.index_select(0, queries),
    )


__all__ = ["ExactPart"]
