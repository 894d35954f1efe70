"""Hybrid models: mirror classes of every family (`HybridLlamaForCausalLM` is a `LlamaForCausalLM`), conversion, Auto classes.

The mirror classes are built on demand and registered in every Auto class that knows the family, so that
`AutoModelFor….from_pretrained` works on a hybrid checkpoint as on any other.
"""

import copy
import functools
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Collection

import torch
import transformers
from huggingface_hub import file_exists
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    modeling_auto,
    processing_auto,
    tokenization_auto,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging

from . import dynamic
from .attention import (
    HybridAttentionMixin,
    attention_class_from_qualname,
    convert_attention_,
    is_hybrid_attention,
    note_bias_readers_,
    restore_attention_,
)
from .cache import linear_cache_layer
from .configuration_hybrid import (
    MODEL_TYPE,
    AttentionSite,
    HybridAttentionConfig,
    HybridConfigMixin,
    check_selection,
    hybrid_config_class,
    hybrid_section,
    on_new_family,
)
from .custom_masks import tell_of_masks
from .errors import AlreadyHybridError, CheckpointError, HybridError, UnsupportedModelError
from .mixers import (
    INITIALIZATIONS,
    LinearMixer,
    MixerConfig,
    build_mixer,
    check_initialization,
    resolve_mixer_config,
)
from .model_card import CARD_FILE, is_own_card, write_model_card
from .offload import check_not_preloaded, execution_device, load_offloaded_mixers_whole
from .probe import probe_attention


logger = logging.get_logger(__name__)

SHIM_FILE = "modeling_hf_hybrid.py"
WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
AUTO_CLASSES = [
    cls
    for cls in vars(modeling_auto).values()
    if isinstance(cls, type)
    and issubclass(cls, _BaseAutoModelClass)
    and getattr(cls, "_model_mapping", None) is not None
]
PREPROCESSOR_MAPPINGS = [
    tokenization_auto.TOKENIZER_MAPPING,
    image_processing_auto.IMAGE_PROCESSOR_MAPPING,
    feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
    processing_auto.PROCESSOR_MAPPING,
]


# ---------------------------------------------------------------------------------------------------------- conversion


def find_attention_sites(model: PreTrainedModel, example_inputs: dict | None = None) -> list[AttentionSite]:
    """
    Every place in `model` where attention can be replaced, in the order of execution. The position in this list is the layer index
    that `convert_to_hybrid` and the search use.

    Args:
        model (`PreTrainedModel`): The model; it is run once on a few tokens, a picture or a sound, and comes back unchanged.
        example_inputs (`dict`, *optional*): Arguments of that forward, for models whose arguments cannot be told from their config.

    Raises:
        UnsupportedModelError: If there is no such place.
    """
    return probe_attention(model, example_inputs).sites


def convert_to_hybrid(
    model: PreTrainedModel,
    mixer: str | dict | MixerConfig = "linear_attention",
    layers=None,
    *,
    initialization: str | Collection[str] = INITIALIZATIONS,
    example_inputs: dict | None = None,
) -> PreTrainedModel:
    """
    Replace the softmax of some attention layers by a mixer, in place and without training.

    Args:
        model (`PreTrainedModel`): The model. It becomes a `Hybrid…` model that still is an instance of its former class; all weights keep
            their names and values, mixer parameters appear under `<attention>.hybrid.*`.
        mixer (`str`, `dict` or `MixerConfig`, *optional*, defaults to `"linear_attention"`): A name of `list_mixers()` or a config.
        layers (*optional*): Indices or names of attention sites, a part of the model (`"encoder"`, `"decoder"`, `"text"`, `"vision"`, `"audio"`), a
            module around sites (`"model.vision_tower"`), or a predicate on [`AttentionSite`]. All of them by default.
        initialization (`str` or `Collection[str]`, *optional*): What fresh mixers take from their place in the pretrained model, see
            [`HybridTrainingArguments`]; all of it by default. `half_lives` and `output_scale` are [`calibrate_mixers`]' business.
        example_inputs (`dict`, *optional*): See [`find_attention_sites`].

    Returns:
        `PreTrainedModel`: The same object, now hybrid.

    Raises:
        AlreadyHybridError: If a selected layer is linear already.
        HybridConfigError, NoMatchingAttentionError, UnknownMixerError, UnsupportedModelError: See their messages; nothing was changed.

    Example:

        >>> model = convert_to_hybrid(model, mixer="sliding_window", layers=[1, 3, 5])
    """
    config, initialization = resolve_mixer_config(mixer), check_initialization(initialization)
    check_convertible(model)
    probed = probe_attention(model, example_inputs)
    sites = probed.sites
    chosen = check_selection(layers, sites, describe(model))
    modules = dict(model.named_modules())
    for site in chosen:
        if is_hybrid_attention(modules[site.name]):
            raise AlreadyHybridError(
                f"{site.name} of {describe(model)} is converted already. Call restore_full_attention(model) first, or select other layers."
            )
    check_not_preloaded(model, [site.name for site in chosen])
    # build everything before touching anything: a mixer that refuses leaves the model as it was
    mixers = {site.name: new_mixer(config, site, modules[site.name], initialization) for site in chosen}
    warn_of_losses({site.name: probed.lost[site.name] for site in chosen})
    for site in chosen:
        convert_attention_(modules[site.name], mixers[site.name])
    before = model.config.hybrid_sites() if isinstance(model.config, HybridConfigMixin) else {}
    settings = {site.name: (site, config.fitted(site.causal).to_dict()) for site in chosen}
    become_hybrid_(model, {**before, **settings})
    logger.info(f"Converted {len(chosen)} of {len(sites)} attention layers to {config.name}.")
    return model


def restore_full_attention(model: PreTrainedModel) -> PreTrainedModel:
    """
    Undo [`convert_to_hybrid`], in place: the model's class, config class, weights and their names are those of the family again.

    Raises:
        AlreadyHybridError: If the model is not hybrid.
    """
    if not isinstance(model, HybridModelMixin):
        raise AlreadyHybridError(f"{describe(model)} is not hybrid: there is nothing to restore.")
    projections = model.config.hybrid["projections"]
    if projections != "shared" and model.config.hybrid["sites"]:
        raise AlreadyHybridError(
            f"{describe(model)} was distilled with projections={projections!r}: its linear layers have projections of their own, over which "
            "the softmax is not what it was. Load the base model instead."
        )
    for module in model.modules():
        if is_hybrid_attention(module):
            restore_attention_(module)
    config = model.config
    config.__dict__.pop("hybrid", None)
    config.__dict__.pop("auto_map", None)
    config.__class__ = type(config).__mro__[2]
    model.__class__ = type(model).__mro__[2]
    model.__dict__.pop("_hybrid_built", None)
    return model


def check_convertible(model) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}.")
    if hasattr(model, "distill_sites"):
        raise AlreadyHybridError(
            f"{describe(model)} is in distillation already: it has students at {len(model.distill_sites)} sites. Finalize it, or load the "
            "teacher again."
        )


def describe(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (model_type={model.config.model_type!r})"


def new_mixer(
    config: MixerConfig, site: AttentionSite, module: nn.Module, initialization: Collection[str] = INITIALIZATIONS
) -> LinearMixer:
    """A freshly initialised mixer for `site`, on the device and in the dtype of the attention it stands in for."""
    mixer = build_mixer(config.fitted(site.causal), **site.sizes())
    weight = next(module.parameters())
    mixer.init_weights(initialization)
    for part in mixer.modules():
        part._is_hf_initialized = True
    return mixer.to(device=execution_device(module), dtype=weight.dtype)


def warn_of_losses(losses: dict[str, tuple[str, ...]]) -> None:
    """One warning for all sites about what a linear layer cannot carry over."""
    lost = sorted({what for per_site in losses.values() for what in per_site})
    if lost:
        count = sum(bool(per_site) for per_site in losses.values())
        warnings.warn(
            f"{count} of the {len(losses)} converted layers lose {' and '.join(lost)}: a linear layer cannot express it. Distil them, or leave "
            "them out of `layers`.",
            stacklevel=3,
        )


def become_hybrid_(
    model: PreTrainedModel, sites: dict[str, tuple[AttentionSite, dict]], projections: str = "shared"
) -> None:
    """Give `model` and its config their mirror classes and write down its linear sites; the modules are converted already."""
    note_bias_readers_(model)
    config = model.config
    if isinstance(config, HybridConfigMixin):
        base = config.hybrid["base_model"]
        config.hybrid = hybrid_section(sites, base["name_or_path"], base["revision"], config.hybrid["projections"])
        return
    base_class, config_class = type(model), hybrid_config_class(type(config))
    revision = getattr(config, "_commit_hash", None)
    own_config = copy.copy(config)  # another model may have been built from the same object
    own_config.__class__ = config_class
    own_config.hybrid = hybrid_section(sites, config.name_or_path or None, revision, projections)
    replace_config_(model, config, own_config)
    model.__class__ = hybrid_model_class(base_class, config_class)
    model._hybrid_built = True


def replace_config_(model: PreTrainedModel, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Make every part of `model` that holds the config object `old` hold `new`."""
    for module in model.modules():
        for attribute in ("config", "_hybrid_host_config"):
            if module.__dict__.get(attribute) is old:
                setattr(module, attribute, new)


# ------------------------------------------------------------------------------------------------------- model classes


class HybridModelMixin:
    """Put in front of a family's model class. Builds the linear layers a config names, and keeps caches, checkpoints and guards right."""

    # the recurrent state is not exchanged between ranks, and nothing in the config would say so
    supports_context_parallel = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.hybrid and not self.__dict__.get("_hybrid_built"):
            self._build_hybrid(config)

    def _build_hybrid(self, config):
        modules, prefix = dict(self.named_modules()), self.base_model_prefix
        for name, (site, settings) in config.hybrid_sites().items():
            # a base model (LlamaModel) inside or outside its head class: the same layers under a shorter or longer path
            candidates = (name, name.removeprefix(prefix + "."), f"{prefix}.{name}")
            module = next((modules[c] for c in candidates if c in modules), None)
            if module is None:
                raise CheckpointError(
                    f"config.json names the attention site {name!r}, which {type(self).__name__} does not have. The file was edited, or "
                    "belongs to another model."
                )
            if is_hybrid_attention(module):  # an inner model built from the same config did it already
                continue
            try:
                mixer = build_mixer(MixerConfig.from_dict(settings), **site.sizes())
            except (HybridError, TypeError) as error:
                raise type(error)(f"config.json, attention site {name!r}: {error}") from error
            weight = next(module.parameters())
            mixer.to(dtype=weight.dtype)
            if weight.device.type != "meta":
                mixer.to(device=weight.device).init_weights()
            convert_attention_(module, mixer)
        note_bias_readers_(self)
        self._hybrid_built = True

    def hybrid_auto_map(self) -> dict[str, str]:
        """The `auto_map` entry of this model's checkpoints: which class of the shim each Auto class loads."""
        return auto_map(type(self), type(self.config))

    def initialize_weights(self):
        # transformers initialises each inner model by that model's own rules, which know nothing of our parameters: ours come first
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers, but strict: a hybrid checkpoint that lacks or has extra weights is an error, not a warning."""
        wants_info = kwargs.pop("output_loading_info", False)
        distributed = kwargs.get("distributed_config")
        if (
            kwargs.get("tp_plan") is not None
            or kwargs.get("tp_size") is not None
            or getattr(distributed, "tp_plan", None)
            or getattr(distributed, "tp_size", None)
        ):
            raise UnsupportedModelError(
                f"{cls.__name__}: mixers have parameters per head, for which the family's tensor-parallel plan has no entries. Load it without tp_plan "
                "and tp_size; data parallelism and FSDP work."
            )
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights of {pretrained_model_name_or_path!r} cannot be read: {error}. The file is truncated or damaged; save or "
                "download it again."
            ) from error
        given = kwargs.get("config")
        own_config = given is None or getattr(given, "name_or_path", None) == str(pretrained_model_name_or_path)
        # the class that was saved must find everything; another head (a classifier on a language model) brings its own, new
        same_class = cls.__name__ in (model.config.architectures or [])
        prefix = cls.base_model_prefix + "."
        new_head_sizes = kwargs.get("ignore_mismatched_sizes", False)
        problems = {
            "missing": [
                k
                for k in info["missing_keys"]
                if own_config and (same_class or ".hybrid." in k or k.startswith(prefix))
            ],
            "unexpected": [k for k in info["unexpected_keys"] if ".hybrid." in k or (own_config and same_class)],
            "of another shape": [
                k for k in map(str, info["mismatched_keys"]) if ".hybrid." in k or not new_head_sizes
            ],
        }
        problems = {what: sorted(keys) for what, keys in problems.items()}
        for what, keys in problems.items():
            if keys:
                raise CheckpointError(
                    f"The checkpoint {pretrained_model_name_or_path!r} does not fit its config: {len(keys)} weights are {what}, the first "
                    f"{keys[0]!r}. It was truncated or edited; save or download it again."
                )
        load_offloaded_mixers_whole(model)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs):
        """As in transformers; also writes the remote-code shim and a model card, and leaves no half-written checkpoint behind."""
        if not kwargs.get("is_main_process", True):
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        os.makedirs(save_directory, exist_ok=True)
        self.config.auto_map = self.hybrid_auto_map()
        if push_to_hub:  # compares the folder before and after: must write into the folder itself
            _write_shim(save_directory, type(self))
            write_model_card(self, save_directory)
            return super().save_pretrained(save_directory, *args, push_to_hub=True, **kwargs)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=save_directory) as folder:
            result = super().save_pretrained(folder, *args, **kwargs)
            _write_shim(folder, type(self))
            if not is_own_card(os.path.join(save_directory, CARD_FILE)):
                write_model_card(self, folder)
            names = os.listdir(folder)
            # config.json goes first and comes last: a folder without it is no checkpoint, and new weights never meet an old config
            if os.path.exists(os.path.join(save_directory, "config.json")):
                os.remove(os.path.join(save_directory, "config.json"))
            for name in sorted(names, key=lambda name: (name == "config.json", name)):
                os.replace(os.path.join(folder, name), os.path.join(save_directory, name))
        # weights of an earlier save under another layout (one file, shards) would be found first by from_pretrained
        for name in os.listdir(save_directory):
            if name not in names and WEIGHT_FILES.fullmatch(name):
                os.remove(os.path.join(save_directory, name))
        return result

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # transformers has put its generic card there; ours says more, but a card that is on the Hub already is somebody's own
        if not file_exists(repo_id, CARD_FILE, token=kwargs.get("token")):
            write_model_card(self, working_dir, repo_id=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _get_files_timestamps(self, working_dir):
        # save_pretrained(push_to_hub=True) uploads what is newer than this snapshot; the shim and card are written before it
        before = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in before.items() if name not in (SHIM_FILE, "README.md")}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            for module in self.modules():
                # a module used at several depths is told its layer when it runs, and puts its cache layer there then
                has_layer = isinstance(module, HybridAttentionMixin) and getattr(module, "layer_idx", None) is not None
                if has_layer and module.hybrid_swapped and module.hybrid.causal:
                    linear_cache_layer(cache, module.layer_idx)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return result

    def _refuse_continuous_batching(self, *args, **kwargs):
        raise UnsupportedModelError(
            f"{type(self).__name__}: linear-attention layers keep no paged keys and values, so continuous batching cannot run this model. "
            "Use `generate`, which batches with padding."
        )

    generate_batch = init_continuous_batching = continuous_batching_context_manager = _refuse_continuous_batching

    @classmethod
    def is_custom_code(cls):
        return False  # otherwise transformers skips the family's own weight-conversion rules

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing to do: the remote-code shim imports the installed package, sources are never copied into checkpoints."""

    def _get_name(self):  # the Trainer looks this name up in transformers' tables (label smoothing)
        return next(cls.__name__ for cls in type(self).__mro__ if cls.__module__.startswith("transformers."))


_MODEL_CLASSES: dict[tuple[type, type], type] = {}


def hybrid_model_class(base: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """`Hybrid<Model>` for a family's model class; built once per config class."""
    if issubclass(base, HybridModelMixin):
        return base
    if (base, config_class) not in _MODEL_CLASSES:
        name = "Hybrid" + base.__name__
        if hasattr(dynamic, "__dict__") and name in vars(
            dynamic
        ):  # one modeling class can serve several config classes
            name = config_class.__name__.removesuffix("Config") + base.__name__

        @functools.wraps(base.__init__)
        def __init__(self, config, *args, **kwargs):
            HybridModelMixin.__init__(self, config, *args, **kwargs)

        @functools.wraps(base.forward)
        def forward(self, *args, **kwargs):
            tell_of_masks(self, args, kwargs, lambda: filter(is_hybrid_attention, self.modules()))
            return base.forward(self, *args, **kwargs)

        namespace = {
            "__init__": __init__,
            "forward": forward,
            "config_class": config_class,
            "__module__": dynamic.__name__,
            "__qualname__": name,
            "__doc__": f"[`{base.__name__}`] some of whose attention layers are linear; `config.hybrid` says which.",
        }
        cls = type(base)(name, (HybridModelMixin, base), namespace)
        _MODEL_CLASSES[base, config_class] = cls
        setattr(dynamic, name, cls)
        conversion = get_checkpoint_conversion_mapping(
            base.__name__
        )  # rules keyed by class name; those by model_type are found anyway
        if conversion is not None:
            register_checkpoint_conversion_mapping(name, conversion, overwrite=True)
    return _MODEL_CLASSES[base, config_class]


def resolve_dynamic_class(name: str) -> type:
    """A class of `hf_hybrid.dynamic` by name, in a process that did not build it yet."""
    if "__" in name:
        return attention_class_from_qualname(name)
    base = getattr(transformers, name.removeprefix("Hybrid"), None)
    if base is None or not name.startswith("Hybrid"):
        raise AttributeError(f"module 'hf_hybrid.dynamic' has no attribute {name!r}")
    if issubclass(base, PreTrainedConfig):
        return hybrid_config_class(base)
    config_class = hybrid_config_class(base.config_class)
    return hybrid_model_class(base, config_class)


# -------------------------------------------------------------------------------------------------------- Auto classes

_REGISTERED: set[type] = set()


def register_family(config_class: type[PreTrainedConfig]) -> None:
    """Register a family's mirror classes in every Auto class that knows the family. Repeated calls do nothing."""
    if config_class in _REGISTERED:
        return
    _REGISTERED.add(config_class)
    base = config_class.__mro__[2]
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


def auto_map(model_class: type, config_class: type) -> dict[str, str]:
    """The `auto_map` entry of a checkpoint: which class of the shim each Auto class loads."""
    stem = SHIM_FILE.removesuffix(".py")
    entries = {"AutoConfig": f"{stem}.HybridAttentionConfig"}
    for auto in AUTO_CLASSES:
        registered = auto._model_mapping._extra_content.get(config_class, ())
        if model_class in (registered if isinstance(registered, tuple) else (registered,)):
            entries[auto.__name__] = f"{stem}.{model_class.__name__}"
    return entries


def _write_shim(folder: str, model_class: type) -> None:
    """The four lines that let `trust_remote_code=True` load the checkpoint where nobody imported hf_hybrid."""
    text = (
        '"""Loads this checkpoint through the hf_hybrid package: pip install hf_hybrid."""\n'
        "import hf_hybrid\n"
        "from hf_hybrid import HybridAttentionConfig\n"
        f"from hf_hybrid.dynamic import {model_class.__name__}\n"
    )
    path = os.path.join(folder, SHIM_FILE)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    shutil.move(path + ".tmp", path)


def register_auto_classes() -> None:
    """Make `AutoConfig` know `hybrid_attention`, and PEFT's default target modules too. Called once, on import of the package."""
    AutoConfig.register(MODEL_TYPE, HybridAttentionConfig, exist_ok=True)
    try:
        from peft.utils import constants
    except ImportError:
        return
    mapping = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    mapping.setdefault(MODEL_TYPE, sorted({name for names in mapping.values() for name in names if "." not in name}))
