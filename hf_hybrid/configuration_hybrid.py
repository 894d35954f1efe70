"""What a hybrid checkpoint says about itself: which attention sites are linear, by which mixer, at which sizes. Facts,
not recipes.

On disk `model_type` is `"hybrid_attention"` and `base_model_type` names the family, so that nothing but this package
loads the checkpoint and silently drops tensors. In memory `model_type` stays the family's, because much of the
ecosystem branches on it.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .errors import CheckpointError


MODEL_TYPE = "hybrid_attention"
# Raised when the meaning of an entry changes. A newer file is refused, never guessed at. 2: a site may have `heads`.
SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
# What trains beside the mixers of a distillation.
PROJECTIONS = ("shared", "low_rank", "full")


def package_version() -> str:
    try:
        return importlib.metadata.version("hf_hybrid")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0.1.0"


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """
    A place in a model where attention can be replaced, as measured by one forward pass.

    Args:
        name (`str`): Path of the attention module, e.g. `model.layers.3.self_attn`.
        num_heads (`int`): Query heads.
        num_key_value_heads (`int`): Key-value heads.
        head_dim (`int`): Size of queries and keys per head.
        value_dim (`int`): Size of values per head.
        hidden_size (`int`): Size of the layer's input.
        causal (`bool`): Whether tokens see only earlier ones.
        part (`str`): `"encoder"` or `"decoder"` in an encoder-decoder, else `"text"`, `"vision"` or `"audio"`. Not
            stored in checkpoints.
    """

    name: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    hidden_size: int
    causal: bool
    part: str = dataclasses.field(default="", compare=False)

    @property
    def key_value_heads(self) -> range:
        """The key-value heads, by the numbers that `heads` takes."""
        return range(self.num_key_value_heads)

    def sizes(self) -> dict[str, Any]:
        """
        The arguments of a mixer's constructor that follow from the model: what a checkpoint stores beside the name.
        """
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.compare and field.name != "name"
        }


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """
    A site some of whose heads are linear, as a checkpoint describes it.

    Args:
        site (`AttentionSite`): Where, and of which sizes.
        mixer (`dict`): Settings of the mixer, with its name.
        heads (`tuple[int, ...]`): The key-value heads that are linear; the mixer has parameters of these alone.
    """

    site: AttentionSite
    mixer: dict
    heads: tuple[int, ...]

    def entry(self) -> dict:
        """As `config.hybrid["sites"][name]` says it: `heads` is left out where all of them are linear."""
        some = {} if len(self.heads) == self.site.num_key_value_heads else {"heads": list(self.heads)}
        return {"mixer": dict(self.mixer), **self.site.sizes(), **some}


def hybrid_section(
    sites: dict[str, LinearSite],
    base_model: str | None,
    revision: str | None,
    projections: str = "shared",
    repair: dict | None = None,
) -> dict:
    """
    The `hybrid` entry of a config. `projections` other than `"shared"` says that the linear layers' projections were
    trained, so that the softmax cannot be put back over them; `repair` says what of the whole model was trained after
    the replacement.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "hf_hybrid_version": package_version(),
        "base_model": {"name_or_path": base_model, "revision": revision},
        "projections": projections,
        **({} if repair is None else {"repair": dict(repair)}),
        "sites": {name: site.entry() for name, site in sites.items()},
    }


def read_hybrid_section(section: dict, where: str) -> dict[str, LinearSite]:
    """
    The sites of a `hybrid` entry, checked.

    Raises:
        CheckpointError: If the entry is not an object, has another schema version, or a site lacks or has extra
            entries.
    """
    if not isinstance(section, dict) or "schema_version" not in section:
        raise CheckpointError(
            f"{where}: `hybrid` must be an object with a schema_version; got {section!r}. The file was edited."
        )
    if section["schema_version"] not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{where}: `hybrid.schema_version` must be {SCHEMA_VERSION} or less; got {section['schema_version']!r}, "
            f"written by hf_hybrid {section.get('hf_hybrid_version')!r} (this is {package_version()}). Upgrade with "
            "`pip install -U hf_hybrid`."
        )
    if section.get("projections") not in PROJECTIONS or not isinstance(section.get("sites"), dict):
        raise CheckpointError(
            f"{where}: `hybrid` must have `sites` and `projections` (shared, low_rank or full); got "
            f"{section.get('projections')!r}. The file was edited."
        )
    return {name: _read_site(name, entry, where) for name, entry in section["sites"].items()}


def _read_site(name: str, entry, where: str) -> LinearSite:
    expected = {field.name for field in dataclasses.fields(AttentionSite)} - {"name", "part"} | {"mixer"}
    if not isinstance(entry, dict) or set(entry) - {"heads"} != expected:
        difference = sorted(expected ^ (set(entry) - {"heads"})) if isinstance(entry, dict) else entry
        raise CheckpointError(
            f"{where}: `hybrid.sites[{name!r}]` has missing or unknown entries: {difference}. The file was edited."
        )
    sizes = {key: value for key, value in entry.items() if key not in ("mixer", "heads")}
    wrong = [
        key
        for key, value in sizes.items()
        if not (isinstance(value, bool) if key == "causal" else type(value) is int and value > 0)
    ]
    if wrong or not isinstance(entry["mixer"], dict):
        key = (wrong or ["mixer"])[0]
        raise CheckpointError(
            f"{where}: `hybrid.sites[{name!r}].{key}` has a value that cannot be; got {entry[key]!r}. The file was "
            "edited."
        )
    site = AttentionSite(name=name, **sizes)
    heads = entry.get("heads", list(range(site.num_key_value_heads)))
    known = isinstance(heads, list) and all(type(h) is int and 0 <= h < site.num_key_value_heads for h in heads)
    if not known or not heads or len(set(heads)) < len(heads):
        raise CheckpointError(
            f"{where}: `hybrid.sites[{name!r}].heads` must be a list of key-value heads "
            f"0..{site.num_key_value_heads - 1}, each once; got {heads!r}. The file was edited."
        )
    return LinearSite(site, entry["mixer"], tuple(sorted(heads)))


class HybridAttentionConfig(PreTrainedConfig):
    """
    The config class that `AutoConfig` finds for `model_type: "hybrid_attention"`. It never is the config of a live
    model: reading a file gives `Hybrid<Family>Config`, which has every attribute of the family's config and one more,
    `hybrid`.
    """

    model_type = MODEL_TYPE
    base_model_type: str | None = None
    hybrid: dict | None = None

    def __new__(cls, *args, **kwargs):
        # nested use (a hybrid inside a composite config): CONFIG_MAPPING["hybrid_attention"](**sub_config)
        if cls is HybridAttentionConfig and "base_model_type" in kwargs:
            kwargs.pop("model_type", None)
            return _family_config_class(kwargs.pop("base_model_type"))(**kwargs)
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        config_dict = dict(config_dict)
        config_dict.pop("model_type", None)
        if "hybrid" not in config_dict or "base_model_type" not in config_dict:
            raise CheckpointError(
                'config.json says model_type "hybrid_attention" but has no `base_model_type` and `hybrid` entries. The '
                "file was edited."
            )
        return _family_config_class(config_dict.pop("base_model_type")).from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """
        Nothing to do: the remote-code shim imports the installed package, sources are never copied into checkpoints.
        """


def _family_config_class(base_model_type: str) -> type[PreTrainedConfig]:
    if base_model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"config.json: base_model_type {base_model_type!r} is unknown to the installed transformers. Upgrade "
            "transformers."
        )
    return hybrid_config_class(CONFIG_MAPPING[base_model_type])


class WrittenModelType(str):
    """
    `"hybrid_attention"` where it is written or read, and the family's own model type where it is looked up in a table.
    Dictionaries of configs are both: transformers writes them to files, PEFT finds a family's default target modules by
    them.
    """

    def __new__(cls, family: str):
        written = super().__new__(cls, MODEL_TYPE)
        written.family = family
        return written

    def __eq__(self, other):
        return str.__eq__(self, other) or other == self.family

    def __hash__(self):
        return hash(self.family)

    def __reduce__(self):
        return WrittenModelType, (self.family,)


class HybridConfigMixin:
    """Put in front of a family's config class: the family's attributes, our file format."""

    hybrid: dict | None

    # the family's own config class
    base_config_class: ClassVar[type[PreTrainedConfig]]

    def linear_sites(self) -> dict[str, LinearSite]:
        """The layers of which some heads are linear, by name; empty before conversion."""
        if not self.hybrid:
            return {}
        return read_hybrid_section(self.hybrid, f"config of {self.name_or_path or type(self).__name__}")

    def hybrid_sites(self) -> dict[str, tuple[AttentionSite, dict]]:
        """`{name: (site, mixer settings)}` of these layers."""
        return {name: (linear.site, linear.mixer) for name, linear in self.linear_sites().items()}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        config_dict = {k: v for k, v in config_dict.items() if k not in ("model_type", "base_model_type")}
        if config_dict.get("hybrid") is not None:
            read_hybrid_section(config_dict["hybrid"], "config.json")
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if str(config_dict.get("model_type")) == MODEL_TYPE:
            base_model_type = config_dict.pop("base_model_type", None)
            if base_model_type not in (None, cls.model_type):
                raise CheckpointError(
                    f"{cls.__name__} is for base_model_type {cls.model_type!r}, but config.json says "
                    f"{base_model_type!r}. Load it with AutoConfig / AutoModelFor….from_pretrained."
                )
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def to_dict(self):
        return self._as_written(super().to_dict())

    def to_diff_dict(self):
        return self._as_written(super().to_diff_dict())

    def _as_written(self, config_dict):
        family = type(self).model_type
        return {**config_dict, "model_type": WrittenModelType(family), "base_model_type": family}

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to do: see [`HybridAttentionConfig.register_for_auto_class`]."""


_CONFIG_CLASSES: dict[type, type] = {}
# Called with every new family's config class. modeling_hybrid adds the registration in the Auto classes here: imports
# point one way.
on_new_family: list[Callable[[type], None]] = []


def hybrid_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """`Hybrid<Family>Config` for a family's config class; built once."""
    if issubclass(base, HybridConfigMixin):
        return base
    if base not in _CONFIG_CLASSES:
        name = "Hybrid" + base.__name__
        namespace = {
            "base_config_class": base,
            "__module__": __name__,
            "__qualname__": name,
            "__annotations__": {"hybrid": dict | None},
            "hybrid": None,
            "__doc__": f"[`{base.__name__}`] of a model some of whose attention layers are linear; `hybrid` says "
            "which.",
        }
        _CONFIG_CLASSES[base] = type(base)(name, (HybridConfigMixin, base), namespace)
        for hook in on_new_family:
            hook(_CONFIG_CLASSES[base])
    return _CONFIG_CLASSES[base]


def __getattr__(name: str):
    """`Hybrid<Family>Config` by name, in a process that did not build it yet: for pickle."""
    base = getattr(transformers, name.removeprefix("Hybrid"), None) if name.startswith("Hybrid") else None
    if not (isinstance(base, type) and issubclass(base, PreTrainedConfig)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return hybrid_config_class(base)
