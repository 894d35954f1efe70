"""Hybrid models: mirror classes of every family (`HybridLlamaForCausalLM` is a `LlamaForCausalLM`), their checkpoints,
the Auto classes.

The mirror classes are built on demand and registered in every Auto class that knows the family, so that
`AutoModelFor….from_pretrained` works on a hybrid checkpoint as on any other.
"""

import copy
import functools
import inspect
import sys
from typing import Any, Protocol

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .configuration_hybrid import (
    MODEL_TYPE,
    HybridAttentionConfig,
    HybridConfigMixin,
    LinearSite,
    hybrid_config_class,
    hybrid_section,
    on_new_family,
)
from .conversion.cache import linear_cache_layer
from .conversion.layer import (
    check_own_forward,
    convert_attention_,
    hybrid_layers,
    is_hybrid_attention,
    rebind_forward_,
)
from .conversion.masks.custom import tell_of_masks
from .conversion.position_bias import note_bias_readers_
from .conversion.positions import is_rotary_decoder, with_positions
from .conversion.published import published_sites
from .errors import CheckpointError, HybridError, UnsupportedModelError
from .hub.auto_classes import AUTO_CLASSES, PREPROCESSOR_MAPPINGS, auto_map
from .hub.checkpoint import CheckpointMixin
from .mixers import LinearMixer, MixerConfig, build_mixer


logger = logging.get_logger(__name__)


class TrainingObjective(Protocol):
    """What runs the model's forward in training, instead of the task: see `distillation.objective`."""

    def run_model(self, model: PreTrainedModel, forward, args: tuple, kwargs: dict) -> Any: ...


class HybridModelMixin(CheckpointMixin):
    """
    Put in front of a family's model class. Builds the linear layers a config names, and keeps caches, checkpoints and
    guards right.

    Attributes:
        training_objective (`TrainingObjective` or `None`): Set while the model is distilled; its forward then returns
            local losses in training.
        projections (`str`): What of the linear layers trains or was trained beside their mixers.
    """

    # the recurrent state is not exchanged between ranks, and nothing in the config would say so
    supports_context_parallel = False
    # the family's own class
    base_model_class: type[PreTrainedModel]
    training_objective: TrainingObjective | None = None

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.hybrid and not self.__dict__.get("_hybrid_built"):
            self._build_hybrid(config)

    def _build_hybrid(self, config):
        modules, prefix = dict(self.named_modules()), self.base_model_prefix
        for name, linear in config.linear_sites().items():
            # a base model (LlamaModel) inside or outside its head class: the same layers under a shorter or longer path
            candidates = (name, name.removeprefix(prefix + "."), f"{prefix}.{name}")
            module = next((modules[c] for c in candidates if c in modules), None)
            if module is None:
                raise CheckpointError(
                    f"config.json names the attention site {name!r}, which {type(self).__name__} does not have. The "
                    "file was edited, or belongs to another model."
                )
            if is_hybrid_attention(module):  # an inner model built from the same config did it already
                continue
            try:
                mixer = build_mixer(MixerConfig.from_dict(linear.mixer), **linear.site.sizes(), heads=linear.heads)
            except (HybridError, TypeError) as error:
                raise type(error)(f"config.json, attention site {name!r}: {error}") from error
            weight = next(module.parameters())
            mixer.to(dtype=mixer_dtype(self, module))
            if weight.device.type != "meta":
                mixer.to(device=weight.device).init_weights()
            convert_attention_(module, mixer, linear.site)
            module.linear_heads = linear.heads
        note_bias_readers_(self)
        self._hybrid_built, self._hybrid_is_rotary = True, is_rotary_decoder(self)

    @property
    def projections(self) -> str:
        return self.config.hybrid["projections"] if self.config.hybrid else "shared"

    @property
    def repaired(self) -> bool:
        """Whether weights were trained after the replacement, so that the softmax is not the base model's any more."""
        return bool(self.config.hybrid and self.config.hybrid.get("repair"))

    def train(self, mode: bool = True):
        if self.training_objective is None:
            return super().train(mode)
        # everything inside stays in eval mode: dropout in the teacher would be noise in the target
        super().train(False)
        self.training = mode
        return self

    def gradient_checkpointing_enable(self, *args, **kwargs):
        if self.training_objective is None:
            super().gradient_checkpointing_enable(*args, **kwargs)
        else:
            self.training_objective.recompute = True

    def gradient_checkpointing_disable(self):
        if self.training_objective is None:
            super().gradient_checkpointing_disable()
        else:
            self.training_objective.recompute = False

    def refresh_hybrid_config(self) -> None:
        """Write into `config.hybrid` which heads of which layers are linear now."""
        hybrid = self.config.hybrid or {}
        base = hybrid.get("base_model", {"name_or_path": None, "revision": None})
        sites = published_sites(self)
        self.config.hybrid = hybrid_section(
            sites, base["name_or_path"], base["revision"], self.projections, hybrid.get("repair")
        )

    def hybrid_auto_map(self) -> dict[str, str]:
        """The `auto_map` entry of this model's checkpoints: which class of the shim each Auto class loads."""
        return auto_map(type(self), type(self.config))

    def initialize_weights(self):
        # transformers initialises each inner model by that model's own rules, which know nothing of our parameters:
        # ours come first
        for module in self.modules():
            if isinstance(module, LinearMixer) and not getattr(module, "_is_hf_initialized", False):
                if any(parameter.device.type == "meta" for parameter in module.parameters()):
                    continue
                loaded = {
                    n: p.detach().clone()
                    for n, p in module.named_parameters()
                    if getattr(p, "_is_hf_initialized", False)
                }
                module.init_weights()
                with torch.no_grad():
                    for name, value in loaded.items():  # a parameter that came from the checkpoint stays
                        module.get_parameter(name).copy_(value)
                for part in module.modules():
                    part._is_hf_initialized = True
        super().initialize_weights()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            for layer in hybrid_layers(self).values():
                # a module used at several depths is told its layer when it runs, and puts its cache layer there then
                if getattr(layer, "layer_idx", None) is not None and layer.linear_heads and layer.hybrid.causal:
                    linear_cache_layer(cache, layer.layer_idx, layer._split(layer.linear_heads))
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return result

    def _refuse_continuous_batching(self, *args, **kwargs):
        raise UnsupportedModelError(
            f"{type(self).__name__}: linear-attention layers keep no paged keys and values, so continuous batching "
            "cannot run this model. Use `generate`, which batches with padding."
        )

    generate_batch = continuous_batching_context_manager = _refuse_continuous_batching

    @property
    def init_continuous_batching(self):
        # `transformers serve` asks with `hasattr`, and falls back to one request at a time
        raise AttributeError(
            f"{type(self).__name__}: linear-attention layers keep no paged keys and values, so continuous batching "
            "cannot run this model. Use `generate`, which batches with padding."
        )

    @classmethod
    def is_custom_code(cls):
        return False  # otherwise transformers skips the family's own weight-conversion rules

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """
        Nothing to do: the remote-code shim imports the installed package, sources are never copied into checkpoints.
        """

    def _get_name(self):  # the Trainer looks this name up in transformers' tables (label smoothing)
        return next(cls.__name__ for cls in type(self).__mro__ if cls.__module__.startswith("transformers."))


def mixer_dtype(model: PreTrainedModel, module: torch.nn.Module) -> torch.dtype:
    """
    The type a mixer's parameters have beside an attention module: that of its weights, or the model's where those are
    packed by a quantiser.
    """
    kinds = [p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize >= 2]
    return kinds[0] if kinds else model.dtype


# ---------------------------------------------------------------------------------------------------- classes on demand

_MODEL_CLASSES: dict[tuple[type, type], type] = {}


def hybrid_model_class(base: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """`Hybrid<Model>` for a family's model class; built once per config class."""
    if issubclass(base, HybridModelMixin):
        return base
    if (base, config_class) not in _MODEL_CLASSES:
        name = "Hybrid" + base.__name__
        if any(
            cls.__name__ == name for cls in _MODEL_CLASSES.values()
        ):  # one modeling class can serve several config classes
            name = config_class.__name__.removesuffix("Config") + base.__name__
        names = tuple(inspect.signature(base.forward).parameters)[1:]

        @functools.wraps(base.__init__)
        def __init__(self, config, *args, **kwargs):
            HybridModelMixin.__init__(self, config, *args, **kwargs)

        @functools.wraps(base.forward)  # keep the signature: the Trainer drops dataset columns by inspecting it
        def forward(self, *args, **kwargs):
            tell_of_masks(self, args, kwargs, lambda: filter(is_hybrid_attention, self.modules()))
            if self.training_objective is not None and self.training:
                return self.training_objective.run_model(self, functools.partial(base.forward, self), args, kwargs)
            if "position_ids" in names:
                kwargs = with_positions(self, names, args, kwargs)
            return base.forward(self, *args, **kwargs)

        namespace = {
            "__init__": __init__,
            "forward": forward,
            "base_model_class": base,
            "config_class": config_class,
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"[`{base.__name__}`] some of whose attention layers are linear; `config.hybrid` says which.",
        }
        cls = type(base)(name, (HybridModelMixin, base), namespace)
        _MODEL_CLASSES[base, config_class] = cls
        # rules keyed by class name; those by model_type are found anyway
        conversion = get_checkpoint_conversion_mapping(base.__name__)
        if conversion is not None:
            register_checkpoint_conversion_mapping(name, conversion, overwrite=True)
    return _MODEL_CLASSES[base, config_class]


def __getattr__(name: str):
    """Hybrid classes by name, in a process that did not build them yet: for pickle and the remote-code shim."""
    built = next((cls for cls in _MODEL_CLASSES.values() if cls.__name__ == name), None)
    if built is not None:
        return built
    base = getattr(transformers, name.removeprefix("Hybrid"), None) if name.startswith("Hybrid") else None
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        return hybrid_config_class(base)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return hybrid_model_class(base, hybrid_config_class(base.config_class))


def become_hybrid_(model: PreTrainedModel, projections: str = "shared") -> None:
    """
    Give `model` and its config their mirror classes, and write down which heads are linear; the modules are converted
    already.
    """
    note_bias_readers_(model)
    config = model.config
    if not isinstance(config, HybridConfigMixin):
        base_class, config_class = type(model), hybrid_config_class(type(config))
        own_config = copy.copy(config)  # another model may have been built from the same object
        own_config.__class__ = config_class
        revision = getattr(config, "_commit_hash", None)
        own_config.hybrid = hybrid_section({}, config.name_or_path or None, revision, projections)
        replace_config_(model, config, own_config)
        check_own_forward(model)
        model.__class__ = hybrid_model_class(base_class, config_class)
        rebind_forward_(model)
        _CAN_RECORD_REGISTRY[model] = model._can_record_outputs  # a class that is never constructed does not note it
        model._hybrid_built, model._hybrid_is_rotary = True, is_rotary_decoder(model)
    model.config.hybrid["projections"] = projections
    model.refresh_hybrid_config()


def become_base_(model: PreTrainedModel) -> None:
    """Give `model` and its config the classes of the family again; the modules are restored already."""
    config = model.config
    for name in ("hybrid", "auto_map"):
        config.__dict__.pop(name, None)
    config.__class__ = type(config).base_config_class
    model.__class__ = type(model).base_model_class
    for name in ("_hybrid_built", "_hybrid_is_rotary", "_hybrid_told_of_masks", "training_objective"):
        model.__dict__.pop(name, None)
    rebind_forward_(model)


def replace_config_(model: PreTrainedModel, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Make every part of `model` that holds the config object `old` hold `new`."""
    for module in model.modules():
        for attribute in ("config", "_hybrid_host_config"):
            if module.__dict__.get(attribute) is old:
                setattr(module, attribute, new)


def describe(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (model_type={model.config.model_type!r})"


# -------------------------------------------------------------------------------------------------------- Auto classes

_REGISTERED: set[type] = set()


def register_family(config_class: type[PreTrainedConfig]) -> None:
    """Register a family's mirror classes in every Auto class that knows the family. Repeated calls do nothing."""
    if config_class in _REGISTERED:
        return
    _REGISTERED.add(config_class)
    base = config_class.base_config_class
    for auto in AUTO_CLASSES:
        if base in auto._model_mapping:
            known = auto._model_mapping[base]
            classes = tuple(
                hybrid_model_class(cls, config_class)
                for cls in (known if isinstance(known, (tuple, list)) else (known,))
            )
            # exist_ok: without it, registering against a config that is native to transformers is silently ignored
            auto.register(config_class, classes if isinstance(known, (tuple, list)) else classes[0], exist_ok=True)
    for mapping in PREPROCESSOR_MAPPINGS:
        if base in mapping:
            mapping.register(config_class, mapping[base], exist_ok=True)


on_new_family.append(register_family)


def register_auto_classes() -> None:
    """Make `AutoConfig` know `hybrid_attention`. Called once, on import of the package."""
    AutoConfig.register(MODEL_TYPE, HybridAttentionConfig, exist_ok=True)
    # the shim inside checkpoints of version 0.1 imports its classes from there
    sys.modules[f"{__package__}.dynamic"] = sys.modules[__name__]


__all__ = [
    "HybridModelMixin",
    "LinearSite",
    "TrainingObjective",
    "become_base_",
    "become_hybrid_",
    "describe",
    "hybrid_model_class",
    "mixer_dtype",
    "register_auto_classes",
    "replace_config_",
]
