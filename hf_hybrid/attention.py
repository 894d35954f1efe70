"""The interception: one attention function, and the mixin that gives it what the interface does not pass.

A converted attention module keeps its class as a base, its parameters and their names. Two things change: its config is a shallow copy
whose attention implementation is ours, and its `forward` first notes the layer's input and cache. The host's own code then computes
queries, keys and values (projections, norms, rotary embedding) and calls the function below where it would call the softmax.
"""

import copy
import functools
import importlib
import inspect
import sys
import types

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import linear_cache_layer
from .custom_masks import CustomMasks
from .errors import CheckpointError, UnsupportedModelError
from .masks import Span, valid_tokens, within_keys
from .mixers import LinearMixer
from .packing import packed_segments
from .ports import find_port


IMPLEMENTATION = "hf_hybrid"
CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")


class HybridAttentionMixin:
    """
    Put in front of a host's attention class. Overrides nothing but `forward`, which notes the call's `hidden_states` and cache on the
    module: one forward at a time per module, as everywhere in transformers.

    Attributes:
        hybrid (`LinearMixer`): The mixer; all learned parameters of the layer's linear side.
        hybrid_swapped (`bool`): Whether the mixer is active. `False` runs the host's softmax, bit for bit.
        custom_masks (`CustomMasks` or `None`): Masks that were given to this forward of the model as they are, to be looked at.
        last_valid (`torch.Tensor` or `None`): Which tokens of the last call existed, bool `[B, T]`; `None` for all of them.
    """

    hybrid: LinearMixer
    hybrid_swapped: bool
    last_valid: torch.Tensor | None = None
    custom_masks: CustomMasks | None = None

    def forward(self, *args, **kwargs):
        if not self.hybrid_swapped:
            return super().forward(*args, **kwargs)
        # a family that calls the interface runs its own code; for one that does not, its port stands in
        port = self._hybrid_port
        host_forward = super().forward if port is None else functools.partial(port, hybrid_attention_forward, self)
        positions = self._hybrid_positions

        def argument(name):
            if name in kwargs:
                return kwargs[name]
            index = positions.get(name)
            return args[index] if index is not None and index < len(args) else None

        hidden_states = argument("hidden_states")
        if hidden_states is None and args:
            hidden_states = args[0]
        context = {"hidden_states": hidden_states, "layer": None, "offset": None, "calls": 0}
        context["position_ids"] = kwargs.get("position_ids")
        cache = next((c for c in map(argument, CACHE_ARGUMENTS) if c is not None), None)
        layer_idx = argument("layer_idx")  # a module used at several depths is told which one
        layer_idx = getattr(self, "layer_idx", None) if layer_idx is None else layer_idx
        if cache is not None and layer_idx is not None:
            layer = linear_cache_layer(cache, layer_idx)
            # T5 and its kin size the position bias of *all* layers with the keys of the one that owns it
            layer.full_length_keys = bool(getattr(self, "has_relative_attention_bias", False))
            offset = layer.mask_offset()  # before the host's attention advances the counter
            context["layer"], context["offset"] = layer, offset.clone() if torch.is_tensor(offset) else offset
        self._hybrid_context = context
        try:
            return host_forward(*args, **kwargs)
        finally:
            self._hybrid_context = None


class OwnsPositionBias:
    """
    Put in front of the hybrid class of T5's attention, one layer of which computes a position bias [1, H, T, KV] for all layers of its stack. Where all of
    them are linear nobody reads it: 32,768 tokens and 8 heads would be 32 GiB of it.
    """

    # the other layers of the stack; `None`: not known, they may read it
    _hybrid_bias_readers: tuple[nn.Module, ...] | None = None

    def compute_bias(self, query_length, key_length, *args, **kwargs):
        readers = self._hybrid_bias_readers
        if not self.hybrid_swapped or readers is None or not all(is_linear_now(reader) for reader in readers):
            return super().compute_bias(query_length, key_length, *args, **kwargs)
        nothing = self.relative_attention_bias.weight.new_zeros(1, 1, 1, 1)
        return nothing.expand(1, self.n_heads, query_length, key_length)


def is_linear_now(module: nn.Module) -> bool:
    """Whether a module's mixer is what computes, now."""
    return is_hybrid_attention(module) and module.hybrid_swapped


def note_bias_readers_(model: nn.Module) -> None:
    """Tell every layer of `model` that computes a position bias which other layers get it. After conversions."""
    # from the outside in: what counts in the end is the innermost model around a layer
    for stack in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        layers = [layer for layer in stack.modules() if hasattr(type(layer), "compute_bias")]
        for owner in layers:
            if isinstance(owner, OwnsPositionBias) and getattr(owner, "has_relative_attention_bias", False):
                owner._hybrid_bias_readers = tuple(layer for layer in layers if _reads_bias_of(owner, layer))


def _reads_bias_of(owner: nn.Module, layer: nn.Module) -> bool:
    """Layers of the stack without a bias of their own; cross-attention, not causal in a causal stack, begins with zeros."""
    same_kind = getattr(layer, "is_causal", None) == getattr(owner, "is_causal", None)
    return same_kind and not getattr(layer, "has_relative_attention_bias", True)


def hybrid_attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
):
    """
    What converted modules call instead of a softmax. Layout of the attention interface: `[B, H, T, K]`; mixers use `[B, T, H, K]`,
    and this is the one place that converts.
    """
    if not module.hybrid_swapped:
        host = ALL_ATTENTION_FUNCTIONS.get_interface(
            module._hybrid_host_config._attn_implementation, _eager_function(module)
        )
        return host(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            **({} if is_causal is None else {"is_causal": is_causal}), **kwargs,
        )  # fmt: skip
    if kwargs.get("cache") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__}: linear-attention layers keep no paged keys and values, so continuous batching "
            "(`generate_batch`, `transformers serve`) cannot run this model. Use `generate`."
        )
    context, mixer = module._hybrid_context, module.hybrid
    layer, length, hidden_states = context["layer"], query.shape[2], context["hidden_states"]
    if layer is not None and layer.full_length_keys:
        key, value = layer.take_new_key_values()
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    context["calls"] += 1
    _check_call(module, query, key, context)
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        query = query * (scaling * query.shape[-1] ** 0.5)  # mixers scale by K^-0.5; keep the host's own temperature

    offset = context["offset"]
    if offset is None:  # no cache or a dynamic one: the mask's key axis ends at the newest token
        offset = 0 if attention_mask is None else max(attention_mask.shape[-1] - length, 0)
    valid = valid_tokens(attention_mask, length, offset, query.device)
    if valid is not None and valid.shape[0] != query.shape[0]:
        valid = valid.expand(query.shape[0], -1)
    module.last_valid = valid
    state = None if layer is None else layer.read_state()
    segments = None
    if length > 1:
        segments = _read_mask(module, attention_mask, valid, query, offset, state, kwargs)

    output, state = mixer(
        query,
        key,
        value,
        hidden_states,
        valid=valid,
        segments=segments,
        state=state,
        output_final_state=layer is not None,
        # decoding overwrites the cache's own tensors, unless somebody may want them back
        inplace_final_state=layer is not None and not layer.record_past and not torch.is_grad_enabled(),
    )
    if layer is not None:

        def replay(before, num_tokens):
            cut = [x[:, :num_tokens] for x in (query, key, value, hidden_states)]
            cut_valid = None if valid is None else valid[:, :num_tokens]
            with torch.no_grad():
                return module.hybrid(*cut, valid=cut_valid, state=before, output_final_state=True)[1]

        layer.write_state(state, replay, length)
        layer.count(valid, length)
    return output, None


def _read_mask(module, mask, valid, query, offset, state, kwargs) -> torch.Tensor | None:
    """Packed sequences among new tokens, `[B, T]`, and a refusal of masks that the layer could not follow. `query` is `[B, T, H, K]`."""
    context, causal = module._hybrid_context, module.hybrid.causal
    span = Span.of(module, getattr(module, "_hybrid_host_config", None))
    segments = None
    if state is None:
        positions = {"position_ids": context["position_ids"], **kwargs}
        segments = packed_segments(positions, valid, query, mask, causal, span)
    custom = None if torch.compiler.is_compiling() else module.custom_masks
    if custom is not None and custom.includes(mask):
        offset = within_keys(offset, query.shape[1], mask.shape[-1])
        past = None if context["layer"] is None else context["layer"].real_tokens_seen(before=query.shape[1])
        custom.check(mask, causal, offset, segments, span, past)
    return segments


def _check_call(module, query, key, context) -> None:
    """Refuse what a linear layer would silently compute wrongly. `query` and `key` are `[B, T, H, K]`."""
    mixer, name = module.hybrid, type(module).__name__
    if context["calls"] > 1 and (mixer.causal or context["layer"] is not None):
        raise UnsupportedModelError(
            f"{name}: attention is called {context['calls']} times in one forward. A causal linear layer has one state, which would take in the tokens "
            "twice. Leave the layer out of `layers`."
        )
    if key.shape[1] != query.shape[1]:
        raise UnsupportedModelError(
            f"{name}: a linear layer attends from a sequence to itself; got {query.shape[1]} queries and {key.shape[1]} keys. Keys of another sequence "
            "(cross-attention, shared keys, prefix tuning) cannot be mixed in."
        )
    hidden_states = context["hidden_states"]
    if mixer.needs_hidden_states and hidden_states.shape[:2] != query.shape[:2]:
        raise UnsupportedModelError(
            f"{name}: {mixer.config_class.name} makes its gates from the layer's input of shape {list(hidden_states.shape)}, which does not fit queries of "
            f"shape {list(query.shape)}. Use linear_attention or sliding_window here."
        )
    if (query.shape[-1], query.shape[2], key.shape[2]) != (mixer.head_dim, mixer.num_heads, mixer.num_key_value_heads):
        raise CheckpointError(
            f"{name}: the config says {mixer.num_heads} query heads, {mixer.num_key_value_heads} key-value heads of size {mixer.head_dim}; the layer has "
            f"{query.shape[2]}, {key.shape[2]} of size {query.shape[-1]}. The config was edited."
        )


AttentionInterface.register(IMPLEMENTATION, hybrid_attention_forward)
# only read if somebody sets our implementation for a whole model; a converted module is asked with its host's mask
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _eager_function(module):
    """The host family's own eager softmax: what its attention code falls back to."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    return None


_ATTENTION_CLASSES: dict[type, type] = {}


def hybrid_attention_class(base: type) -> type:
    """`Hybrid<Attention>` for a host's attention class; built once, found again by pickle under a name that spells its origin."""
    if issubclass(base, HybridAttentionMixin):
        return base
    if base not in _ATTENTION_CLASSES:
        from . import dynamic

        parameters = [name for name in inspect.signature(base.forward).parameters if name != "self"]
        qualname = f"{base.__module__.replace('.', '__')}__{base.__name__}"
        namespace = {
            "_hybrid_positions": {name: index for index, name in enumerate(parameters)},
            "_hybrid_context": None,
            "_hybrid_port": None if find_port(base) is None else staticmethod(find_port(base)),
            "__module__": dynamic.__name__,
            "__qualname__": qualname,
        }
        mixins = (OwnsPositionBias, HybridAttentionMixin) if hasattr(base, "compute_bias") else (HybridAttentionMixin,)
        _ATTENTION_CLASSES[base] = type("Hybrid" + base.__name__, (*mixins, base), namespace)
        setattr(dynamic, qualname, _ATTENTION_CLASSES[base])
    return _ATTENTION_CLASSES[base]


def attention_class_from_qualname(qualname: str) -> type:
    """The class that `hybrid_attention_class` named `qualname`, in a process that did not build it yet."""
    module, _, name = qualname.rpartition("__")
    return hybrid_attention_class(getattr(importlib.import_module(module.replace("__", ".")), name))


def convert_attention_(module: nn.Module, mixer: LinearMixer) -> None:
    """Put `mixer` beside the attention of `module`, in place, and make it active."""
    host_config = getattr(module, "config", None)
    module.__class__ = hybrid_attention_class(type(module))
    if host_config is not None:  # ported families look nothing up in it, and some do not have it
        module.config = copy.copy(host_config)  # per-layer config: only the dispatch key differs
        if module._hybrid_port is None:
            module.config._attn_implementation_internal = IMPLEMENTATION
        module._hybrid_host_config = host_config
    module.hybrid = mixer.train(module.training)
    module.hybrid_swapped = True
    _rebind_wrapped_forward(module)


def restore_attention_(module: nn.Module) -> None:
    """Take the mixer away again, in place: class, config and parameters are the host's own."""
    host_class = next(cls for cls in type(module).__mro__[1:] if cls not in (OwnsPositionBias, HybridAttentionMixin))
    module.__class__ = host_class
    if "_hybrid_host_config" in module.__dict__:
        module.config = module.__dict__.pop("_hybrid_host_config")
    del module.hybrid
    module.__dict__.pop("hybrid_swapped", None)
    for attribute in ("_hybrid_context", "_hybrid_bias_readers", "last_valid", "custom_masks"):
        module.__dict__.pop(attribute, None)
    _rebind_wrapped_forward(module)


def _rebind_wrapped_forward(module):
    if "_old_forward" in module.__dict__:  # an accelerate hook wrapped the former class's forward on the instance
        module._old_forward = types.MethodType(type(module).forward, module)


def is_hybrid_attention(module: nn.Module) -> bool:
    return isinstance(module, HybridAttentionMixin)


__all__ = [
    "HybridAttentionMixin",
    "attention_class_from_qualname",
    "convert_attention_",
    "hybrid_attention_class",
    "hybrid_attention_forward",
    "is_hybrid_attention",
    "is_linear_now",
    "note_bias_readers_",
    "restore_attention_",
]
