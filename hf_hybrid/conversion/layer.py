"""The converted attention layer: the host's own layer, a mixer beside it, and a switch that says which key-value heads
run through the mixer.

A converted module keeps its class (as a base), its parameters and their names. Its config is a shallow copy whose
attention implementation is ours, so that the host's own code computes queries, keys and values and then calls
`interception.hybrid_attention_forward`, and its `forward` first notes what the attention interface does not pass: the
layer's input and its cache.

Converting, distilling, searching, saving, sharding and adapters only read or set the switch (`linear_heads`).
"""

import copy
import dataclasses
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration_hybrid import AttentionSite
from ..errors import HybridConfigError, UnsupportedModelError
from ..mixers import LinearMixer, MixerConfig
from .cache import HybridLinearLayer, check_softmax_layer, linear_cache_layer
from .heads import HeadSplit
from .masks.custom import CustomMasks
from .offload import load_offloaded_mixer_whole
from .ports import find_port, why_whole_layers
from .position_bias import OwnsPositionBias
from .projections import with_deltas


IMPLEMENTATION = "hf_hybrid"
CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")


class LocalObjective(Protocol):
    """What runs a layer instead of itself while the model is distilled; see `distillation.objective`."""

    def run_layer(self, layer: "HybridAttentionMixin", args: tuple, kwargs: dict) -> Any: ...

    def observe(self, layer: "HybridAttentionMixin", inputs: Any, target: torch.Tensor) -> None: ...


@dataclasses.dataclass
class LayerCall:
    """
    One forward of a converted layer, as its attention function needs to know it.

    Attributes:
        hidden_states (`torch.Tensor`): The layer's input, `[B, T, D]`.
        position_ids (`torch.Tensor`, *optional*): As the layer is given them.
        linear_heads (`tuple[int, ...]`): Key-value heads that run through the mixer in this call.
        cache_layer (`HybridLinearLayer`, *optional*): Where the state is kept.
        mask_offset (`int` or `torch.Tensor`, *optional*): Place of the first new token on the mask's key axis, where a
            static cache says so.
        observer (`LocalObjective`, *optional*): Is shown queries, keys, values and the softmax's output; all heads keep
            their softmax then.
        count (`int`): How often the host has called attention so far.
    """

    hidden_states: torch.Tensor
    position_ids: torch.Tensor | None
    linear_heads: tuple[int, ...]
    cache_layer: HybridLinearLayer | None = None
    mask_offset: int | torch.Tensor | None = None
    observer: LocalObjective | None = None
    count: int = 0


class HybridAttentionMixin:
    """
    Put in front of a host's attention class. Overrides nothing but `forward`, which notes the call on the module: one
    forward at a time per module, as everywhere in transformers.

    Attributes:
        hybrid (`LinearMixer`): The mixer. Its `heads` are the key-value heads that can be linear.
        linear_heads (`tuple[int, ...]`): The switch: the key-value heads that are. `()` runs the host's softmax, bit
            for bit.
        hybrid_site (`AttentionSite`), hybrid_config (`MixerConfig`): Sizes of the layer and settings of the mixer, for
            checkpoints.
        hybrid_delta (`nn.ModuleDict` or `None`): Trained differences to the layer's projections, by name; they act
            where all heads are linear.
        local_objective (`LocalObjective` or `None`): Runs the layer while the model is distilled.
        custom_masks (`CustomMasks` or `None`): Masks that were given to this forward of the model as they are, to be
            looked at.
        last_valid (`torch.Tensor` or `None`): Which tokens of the mixer's last call existed, bool `[B, T]`; `None` for
            all of them.
        positions_given (`bool`): Whether the model was given `position_ids`, which may be those of packed rows.
    """

    hybrid: LinearMixer
    hybrid_site: AttentionSite
    hybrid_config: MixerConfig
    hybrid_delta: nn.ModuleDict | None
    linear_heads: tuple[int, ...] = ()
    local_objective: LocalObjective | None = None
    custom_masks: CustomMasks | None = None
    positions_given: bool = False
    last_valid: torch.Tensor | None = None
    # the family's own class, its port if it computes attention inline, and the places of its forward's arguments
    host_class: type
    _hybrid_port = None
    _hybrid_positions: dict[str, int]
    _hybrid_call: LayerCall | None = None

    def forward(self, *args, **kwargs):
        if self.local_objective is not None:
            return self.local_objective.run_layer(self, args, kwargs)
        if self.linear_heads:
            return self.linear_forward(self.linear_heads, args, kwargs)
        cache, layer_idx = self._cache_of(args, kwargs)
        if cache is not None and layer_idx is not None:
            check_softmax_layer(cache, layer_idx)
        return self.softmax_forward(args, kwargs)

    def softmax_forward(self, args, kwargs):
        """The family's own forward, all heads softmax."""
        return super().forward(*args, **kwargs)

    def observed_forward(self, observer: LocalObjective, args, kwargs):
        """The family's own forward, all heads softmax; `observer` is shown what the softmax was given and gave."""
        self._hybrid_call = self._new_call((), args, kwargs)
        self._hybrid_call.observer = observer
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._hybrid_call = None

    def linear_forward(self, linear_heads: tuple[int, ...], args, kwargs):
        """A forward in which these key-value heads run through the mixer, the others through the softmax."""
        if not torch.compiler.is_compiling():
            load_offloaded_mixer_whole(self.hybrid)
        # a family that calls the interface runs its own code; for one that does not, its port stands in
        port = self._hybrid_port
        if self._split(linear_heads) is not None:
            check_divisible(self, type(self).__name__)
        if port is None:
            run = super().forward
        else:
            run = functools.partial(port, ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION], self)
        call = self._new_call(linear_heads, args, kwargs)
        cache, layer_idx = self._cache_of(args, kwargs)
        if cache is not None and layer_idx is not None:
            call.cache_layer = linear_cache_layer(cache, layer_idx, self._split(linear_heads))
            # T5 and its kin size the position bias of *all* layers with the keys of the one that owns it
            call.cache_layer.full_length_keys = bool(getattr(self, "has_relative_attention_bias", False))
            offset = call.cache_layer.mask_offset()  # before the host's attention advances the counter
            call.mask_offset = offset.clone() if torch.is_tensor(offset) else offset
        self._hybrid_call = call
        try:
            if self.hybrid_delta is None:
                return run(*args, **kwargs)
            with with_deltas(self, self.hybrid_delta):
                return run(*args, **kwargs)
        finally:
            self._hybrid_call = None

    def _split(self, linear_heads: tuple[int, ...]) -> HeadSplit | None:
        """Which heads are linear and which are not; `None` if all are."""
        site = self.hybrid_site
        if len(linear_heads) == site.num_key_value_heads:
            return None
        return HeadSplit(site.num_heads, site.num_key_value_heads, linear_heads)

    def _new_call(self, linear_heads, args, kwargs) -> LayerCall:
        hidden_states = self._argument("hidden_states", args, kwargs)
        if hidden_states is None and args:
            hidden_states = args[0]
        return LayerCall(hidden_states, kwargs.get("position_ids"), linear_heads)

    def _cache_of(self, args, kwargs):
        cache = next((c for c in (self._argument(n, args, kwargs) for n in CACHE_ARGUMENTS) if c is not None), None)
        layer_idx = self._argument("layer_idx", args, kwargs)  # a module used at several depths is told which one
        return cache, getattr(self, "layer_idx", None) if layer_idx is None else layer_idx

    def _argument(self, name: str, args, kwargs):
        if name in kwargs:
            return kwargs[name]
        index = self._hybrid_positions.get(name)
        return args[index] if index is not None and index < len(args) else None


def check_divisible(module: nn.Module, where: str) -> None:
    """
    Raises:
        UnsupportedModelError: If some heads of an attention layer cannot be linear while the others keep the softmax.
    """
    reason = why_whole_layers(type(module))
    if reason is not None:
        raise UnsupportedModelError(f"{where}: {reason}. Make all heads of the layer linear, or none.")


def is_hybrid_attention(module: nn.Module) -> bool:
    return isinstance(module, HybridAttentionMixin)


def hybrid_layers(model: nn.Module) -> dict[str, HybridAttentionMixin]:
    """
    The layers of a model that have a mixer, by the name of their site, in the model's order. PEFT's wrappers are not
    part of names; a layer of which no active adapter has a mixer is left out.
    """
    found: dict[str, HybridAttentionMixin] = {}
    for name, module in model.named_modules():
        if is_hybrid_attention(module) and hasattr(module, "hybrid"):
            found[site_name(name)] = module
    return found


def site_name(path: str) -> str:
    """The name of the site at `path`, which may lie inside PEFT's wrappers."""
    pieces = path.removeprefix("base_model.model.").split(".")
    return ".".join(piece for piece in pieces if piece != "base_layer")


_ATTENTION_CLASSES: dict[type, type] = {}


def hybrid_attention_class(base: type) -> type:
    """
    `Hybrid<Attention>` for a host's attention class; built once, found again by pickle under a name that spells its
    origin.
    """
    if issubclass(base, HybridAttentionMixin):
        return base
    if base not in _ATTENTION_CLASSES:
        parameters = [name for name in inspect.signature(base.forward).parameters if name != "self"]
        qualname = f"{base.__module__.replace('.', '__')}__{base.__name__}"
        namespace = {
            "host_class": base,
            "_hybrid_positions": {name: index for index, name in enumerate(parameters)},
            "_hybrid_port": None if find_port(base) is None else staticmethod(find_port(base)),
            "__module__": __name__,
            "__qualname__": qualname,
        }
        mixins = (OwnsPositionBias, HybridAttentionMixin) if hasattr(base, "compute_bias") else (HybridAttentionMixin,)
        _ATTENTION_CLASSES[base] = type("Hybrid" + base.__name__, (*mixins, base), namespace)
    return _ATTENTION_CLASSES[base]


def __getattr__(qualname: str):
    """
    Attention classes by the name that `hybrid_attention_class` gave them, in a process that did not build them yet
    (pickle).
    """
    module_name, separator, name = qualname.rpartition("__")
    if not separator or not module_name or qualname.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {qualname!r}")
    module_name = module_name.replace("__", ".")
    # a name may come from a file: nothing is imported on its word but transformers' own modules
    module = (
        importlib.import_module(module_name)
        if module_name.startswith("transformers.models.")
        else sys.modules.get(module_name)
    )
    base = getattr(module, name, None)
    if not (isinstance(base, type) and issubclass(base, nn.Module)):
        raise AttributeError(
            f"module {__name__!r} has no attribute {qualname!r}: {module_name} has no such attention class, or is not "
            "imported"
        )
    return hybrid_attention_class(base)


def check_heads(heads: Sequence[int], allowed: Sequence[int], where: str) -> tuple[int, ...]:
    """
    Key-value heads as the switch holds them: sorted.

    Raises:
        HybridConfigError: If one is not among those allowed, or there twice.
    """
    heads = list(heads)
    for head in heads:
        if isinstance(head, bool) or not isinstance(head, int) or head not in allowed:
            raise HybridConfigError(f"{where}: key-value heads must be among {_list(allowed)}; got {head!r}.")
    if len(set(heads)) < len(heads):
        twice = next(head for head in heads if heads.count(head) > 1)
        raise HybridConfigError(f"{where}: key-value heads must be named once each; got {twice} twice.")
    return tuple(sorted(heads))


def _list(heads: Sequence[int]) -> str:
    heads = sorted(heads)
    return f"0..{heads[-1]}" if len(heads) > 1 and heads == list(range(heads[-1] + 1)) else str(heads)


def convert_attention_(module: nn.Module, mixer: LinearMixer, site: AttentionSite, *, register: bool = True) -> None:
    """
    Put `mixer` beside the attention of `module`, in place. No head is linear yet.

    Args:
        module (`nn.Module`): The attention.
        mixer (`LinearMixer`): Built for `site`, or some of its heads.
        site (`AttentionSite`): Its sizes.
        register (`bool`, *optional*, defaults to `True`): Whether the mixer's parameters become the module's, under
            `hybrid.*`. `False` where somebody else holds them (an adapter).
    """
    host_config = getattr(module, "config", None)
    check_own_forward(module)
    module.__class__ = hybrid_attention_class(type(module))
    if host_config is not None:  # ported families look nothing up in it, and some do not have it
        module.config = copy.copy(host_config)  # per-layer config: only the dispatch key differs
        if module._hybrid_port is None:
            module.config._attn_implementation_internal = IMPLEMENTATION
        module._hybrid_host_config = host_config
    module.linear_heads, module.hybrid_delta, module.hybrid_site = (), None, site
    put_mixer_(module, mixer, register=register)
    rebind_forward_(module)


def put_mixer_(module: nn.Module, mixer: LinearMixer, *, register: bool = True) -> None:
    """Put another mixer beside the attention of a converted layer, in place."""
    module.__dict__.pop("hybrid", None)
    module._modules.pop("hybrid", None)
    mixer.train(module.training)
    if register:
        module.hybrid = mixer
    else:
        module.__dict__["hybrid"] = mixer
    module.hybrid_config = mixer.config


def restore_attention_(module: nn.Module) -> None:
    """Take the mixer away again, in place: class, config and parameters are the host's own."""
    host_config = module.__dict__.pop("_hybrid_host_config", None)
    module.__class__ = module.host_class
    if host_config is not None:
        module.config = host_config
    for name in ("hybrid", "hybrid_delta"):
        module._modules.pop(name, None)
    own = (*HybridAttentionMixin.__annotations__, *OwnsPositionBias.__annotations__)
    for name in [name for name in vars(module) if name in own]:
        del module.__dict__[name]
    rebind_forward_(module)


def check_own_forward(module: nn.Module) -> None:
    """
    Raises:
        UnsupportedModelError: If somebody put a `forward` on the instance itself, around which a conversion would not
            go.
    """
    known = (
        "_old_forward",
        "_original_forward",
    )  # accelerate's hooks and its mixed precision, which `rebind_forward_` follows
    if "forward" in module.__dict__ and not any(name in module.__dict__ for name in known):
        raise UnsupportedModelError(
            f"{type(module).__name__} has a forward of its own on the instance (something patched it), which a "
            "converted class would not run. Take it off (`del module.forward`), or convert first and patch afterwards."
        )


def rebind_forward_(module: nn.Module) -> None:
    """
    After a change of the module's class: wrappers that accelerate put on the instance must not run the former class's
    forward.
    """
    if (
        "_original_forward" in module.__dict__
    ):  # mixed precision of a training that is over; the next one puts it on again
        del module.__dict__["_original_forward"]
        module.__dict__.pop("forward", None)
    if "_old_forward" in module.__dict__:  # a hook, which calls what it wrapped
        module._old_forward = types.MethodType(type(module).forward, module)


__all__ = [
    "CACHE_ARGUMENTS",
    "IMPLEMENTATION",
    "HybridAttentionMixin",
    "LayerCall",
    "LocalObjective",
    "check_divisible",
    "check_heads",
    "check_own_forward",
    "convert_attention_",
    "hybrid_attention_class",
    "hybrid_layers",
    "is_hybrid_attention",
    "put_mixer_",
    "rebind_forward_",
    "restore_attention_",
    "site_name",
]
