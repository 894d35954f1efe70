"""The interception: the one attention function that converted layers call where their host would call its softmax."""

import dataclasses
import sys

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import CheckpointError, UnsupportedModelError
from .cache import HybridHeadsLayer
from .heads import KeptHeads
from .layer import IMPLEMENTATION, LayerCall
from .masks.packing import packed_segments
from .masks.padding import Span, valid_tokens, within_keys


@dataclasses.dataclass
class MixerInputs:
    """
    What a mixer is given in one call.

    Attributes:
        query (`torch.Tensor`): `[B, T, H, K]`, at the host's own temperature.
        key, value (`torch.Tensor`): `[B, T, H_kv, K]`, `[B, T, H_kv, V]`.
        hidden_states (`torch.Tensor`): `[B, T, D]`.
        valid (`torch.Tensor`, *optional*): Which tokens exist, bool `[B, T]`; `None` for all of them.
        segments (`torch.Tensor`, *optional*): Packed sequence of each token, int `[B, T]`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    hidden_states: torch.Tensor
    valid: torch.Tensor | None
    segments: torch.Tensor | None


def hybrid_attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
):
    """
    What converted modules call instead of a softmax. Layout of the attention interface: `[B, H, T, K]`; mixers use
    `[B, T, H, K]`, and this module is the one place that converts.

    Args:
        module (`HybridAttentionMixin`): The layer.
        query, key, value (`torch.Tensor`): `[B, H, T, K]`, `[B, H_kv, KV, K]`, `[B, H_kv, KV, V]`.
        attention_mask, dropout, scaling, is_causal, kwargs: As the host passes them to its softmax.

    Returns:
        `(output, attention weights)`: `[B, T, H, V]`, and the host's weights where all heads are softmax, else `None`.

    Raises:
        UnsupportedModelError, CheckpointError: For what a mixer would silently compute wrongly.
    """
    call: LayerCall | None = module._hybrid_call
    softmax = {
        "dropout": dropout,
        "scaling": scaling,
        **({} if is_causal is None else {"is_causal": is_causal}),
        **kwargs,
    }
    if call is None:
        return _host_softmax(module, module, query, key, value, attention_mask, softmax)
    if kwargs.get("cache") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__}: linear-attention layers keep no paged keys and values, so continuous batching "
            "(`generate_batch`, `transformers serve`) cannot run this model. Use `generate`."
        )
    call.count += 1
    if call.observer is not None:
        target, weights = _host_softmax(module, module, query, key, value, attention_mask, softmax)
        inputs = _mixer_inputs(module, call, query, key, value, attention_mask, scaling, kwargs)
        call.observer.observe(module, inputs, target)
        return target, weights
    split = module._split(call.linear_heads)
    if split is None:
        if call.cache_layer is not None and call.cache_layer.full_length_keys:
            key, value = call.cache_layer.take_new_key_values()
        return _mix(module, call, _mixer_inputs(module, call, query, key, value, attention_mask, scaling, kwargs)), None
    new_key, new_value, kept_key, kept_value = _split_keys(call, split, query.shape[2], key, value)
    linear = _mixer_inputs(
        module, call, split.linear(query, axis=1), new_key, new_value, attention_mask, scaling, kwargs
    )
    mixed = _mix(module, call, linear)
    mask, softmax = split.kept_of_arguments(attention_mask, softmax)
    stand_in = KeptHeads(module, split) if torch.is_tensor(getattr(module, "sinks", None)) else module
    exact, _ = _host_softmax(module, stand_in, split.kept(query, axis=1), kept_key, kept_value, mask, softmax)
    return split.together(exact, mixed, axis=2), None


def _host_softmax(module, stand_in, query, key, value, mask, kwargs):
    host = ALL_ATTENTION_FUNCTIONS.get_interface(
        module._hybrid_host_config._attn_implementation, _eager_function(module)
    )
    return host(stand_in, query, key, value, mask, **kwargs)


def _eager_function(module):
    """The host family's own eager softmax: what its attention code falls back to."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    return None


def _split_keys(call: LayerCall, split, length: int, key, value):
    """New keys and values of linear heads, all keys and values of the others. Layout of the attention interface."""
    layer = call.cache_layer
    if not isinstance(layer, HybridHeadsLayer):
        return split.linear(key, 1), split.linear(value, 1), split.kept(key, 1), split.kept(value, 1)
    if not layer.holds_all_heads:
        return *layer.take_new_key_values(), key, value
    # the host made keys of all heads, old and new, from what it caches
    if call.mask_offset is None:
        new = (x[:, :, -length:] for x in (key, value))
    else:
        place = torch.arange(length, device=key.device) + call.mask_offset
        new = (x.index_select(2, place) for x in (key, value))
    return *(split.linear(x, 1) for x in new), split.kept(key, 1), split.kept(value, 1)


def _mixer_inputs(module, call: LayerCall, query, key, value, mask, scaling, kwargs) -> MixerInputs:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    _check_call(module, call, query, key)
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        query = query * (scaling * query.shape[-1] ** 0.5)  # mixers scale by K^-0.5; keep the host's own temperature
    length, offset = query.shape[1], call.mask_offset
    if offset is None:  # no cache or a dynamic one: the mask's key axis ends at the newest token
        offset = 0 if mask is None else max(mask.shape[-1] - length, 0)
    valid = valid_tokens(mask, length, offset, query.device)
    if valid is not None and valid.shape[0] != query.shape[0]:
        valid = valid.expand(query.shape[0], -1)
    segments = _read_mask(module, call, mask, valid, query, offset, kwargs) if length > 1 else None
    return MixerInputs(query, key, value, call.hidden_states, valid, segments)


def _mix(module, call: LayerCall, inputs: MixerInputs) -> torch.Tensor:
    """Run the mixer, and keep its state in the cache. `[B, T, H, V]`."""
    layer, mixer, heads = call.cache_layer, module.hybrid, call.linear_heads
    arguments = inputs.query, inputs.key, inputs.value, inputs.hidden_states
    module.last_valid = inputs.valid
    output, state = mixer(
        *arguments,
        valid=inputs.valid,
        segments=inputs.segments,
        state=None if layer is None else layer.read_state(),
        output_final_state=layer is not None,
        # decoding overwrites the cache's own tensors, unless somebody may want them back
        inplace_final_state=layer is not None and not layer.record_past and not torch.is_grad_enabled(),
        heads=heads,
    )
    if layer is not None:

        def replay(before, num_tokens):
            cut = [x[:, :num_tokens] for x in arguments]
            cut_valid = None if inputs.valid is None else inputs.valid[:, :num_tokens]
            with torch.no_grad():
                return mixer(*cut, valid=cut_valid, state=before, output_final_state=True, heads=heads)[1]

        layer.write_state(state, replay, inputs.query.shape[1])
        layer.count(inputs.valid, inputs.query.shape[1])
    return output


def _read_mask(module, call: LayerCall, mask, valid, query, offset, kwargs) -> torch.Tensor | None:
    """
    Packed sequences among new tokens, `[B, T]`, and a refusal of masks that the layer could not follow. `query` is `[B,
    T, H, K]`.
    """
    layer, causal = call.cache_layer, module.hybrid.causal
    span = Span.of(module, getattr(module, "_hybrid_host_config", None))
    segments = None
    if layer is None or layer.read_state() is None:
        positions = {"position_ids": call.position_ids, **kwargs}
        if torch.compiler.is_compiling() and module.positions_given and positions.get("cu_seq_lens_q") is None:
            # whether rows are packed is read off numbers, which a graph cannot branch on: found out between two graphs
            segments = _packed_outside_graphs(positions, valid, query.shape[:2], query.device, mask, causal, span)
        else:
            segments = packed_segments(positions, valid, query, mask, causal, span)
    custom = None if torch.compiler.is_compiling() else module.custom_masks
    if custom is not None and custom.includes(mask):
        offset = within_keys(offset, query.shape[1], mask.shape[-1])
        past = None if layer is None else layer.real_tokens_seen(before=query.shape[1])
        custom.check(mask, causal, offset, segments, span, past)
    return segments


@torch.compiler.disable
def _packed_outside_graphs(positions, valid, shape, device, mask, causal, span) -> torch.Tensor | None:
    return packed_segments(positions, valid, torch.empty(*shape, 0, 0, device=device), mask, causal, span)


def _check_call(module, call: LayerCall, query, key) -> None:
    """Refuse what a linear layer would silently compute wrongly. `query` and `key` are `[B, T, H, K]`."""
    mixer, name, site = module.hybrid, type(module).__name__, module.hybrid_site
    if call.count > 1 and (mixer.causal or call.cache_layer is not None):
        raise UnsupportedModelError(
            f"{name}: attention is called {call.count} times in one forward. A causal linear layer has one state, "
            "which would take in the tokens twice. Leave the layer out of `layers`."
        )
    if key.shape[1] != query.shape[1]:
        raise UnsupportedModelError(
            f"{name}: a linear layer attends from a sequence to itself; got {query.shape[1]} queries and "
            f"{key.shape[1]} keys. Keys of another sequence "
            "(cross-attention, shared keys, prefix tuning) cannot be mixed in."
        )
    hidden_states = call.hidden_states
    if mixer.needs_hidden_states and hidden_states.shape[:2] != query.shape[:2]:
        raise UnsupportedModelError(
            f"{name}: {mixer.config_class.name} makes its gates from the layer's input of shape "
            f"{list(hidden_states.shape)}, which does not fit queries of "
            f"shape {list(query.shape)}. Use linear_attention or sliding_window here."
        )
    heads = len(call.linear_heads) or site.num_key_value_heads
    expected = site.head_dim, heads * mixer.groups, heads
    if (query.shape[-1], query.shape[2], key.shape[2]) != expected:
        raise CheckpointError(
            f"{name}: the config says {expected[1]} query heads, {expected[2]} key-value heads of size {expected[0]}; "
            f"the layer has {query.shape[2]}, {key.shape[2]} of size {query.shape[-1]}. The config was edited."
        )


AttentionInterface.register(IMPLEMENTATION, hybrid_attention_forward)
# only read if somebody sets our implementation for a whole model; a converted module is asked with its host's mask
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


__all__ = ["MixerInputs", "hybrid_attention_forward"]
