"""What a hybrid checkpoint says about itself: which attention sites are linear, by which mixer, at which sizes. Facts, not recipes.

On disk `model_type` is `"hybrid_attention"` and `base_model_type` names the family, so that nothing but this package loads the
checkpoint and silently drops tensors. In memory `model_type` stays the family's, because much of the ecosystem branches on it.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .errors import CheckpointError, HybridConfigError, NoMatchingAttentionError, closest


MODEL_TYPE = "hybrid_attention"
# Raised when the meaning of an entry changes. A newer file is refused, never guessed at.
SCHEMA_VERSION = 1


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
        part (`str`): `"encoder"` or `"decoder"` in an encoder-decoder, else `"text"`, `"vision"` or `"audio"`. Not stored in checkpoints.
    """

    name: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    hidden_size: int
    causal: bool
    part: str = dataclasses.field(default="", compare=False)

    def sizes(self) -> dict[str, Any]:
        """The arguments of a mixer's constructor that follow from the model: what a checkpoint stores beside the name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.compare and field.name != "name"
        }


def hybrid_section(
    sites: dict[str, tuple[AttentionSite, dict]],
    base_model: str | None,
    revision: str | None,
    projections: str = "shared",
) -> dict:
    """
    The `hybrid` entry of a config, from `{name: (site, mixer settings)}`. `projections` other than `"shared"` says that the linear layers'
    projections were trained, so that the softmax cannot be put back over them.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "hf_hybrid_version": package_version(),
        "base_model": {"name_or_path": base_model, "revision": revision},
        "projections": projections,
        "sites": {name: {"mixer": dict(settings), **site.sizes()} for name, (site, settings) in sites.items()},
    }


def read_hybrid_section(section: dict, where: str) -> dict[str, tuple[AttentionSite, dict]]:
    """
    The sites of a `hybrid` entry, checked: `{name: (site, mixer settings)}`.

    Raises:
        CheckpointError: If the entry is not an object, has another schema version, or a site lacks or has extra entries.
    """
    if not isinstance(section, dict) or "schema_version" not in section:
        raise CheckpointError(
            f"{where}: `hybrid` must be an object with a schema_version; got {section!r}. The file was edited."
        )
    if section["schema_version"] != SCHEMA_VERSION:
        raise CheckpointError(
            f"{where}: `hybrid.schema_version` must be {SCHEMA_VERSION}; got {section['schema_version']!r}, written by hf_hybrid "
            f"{section.get('hf_hybrid_version')!r} (this is {package_version()}). Upgrade with `pip install -U hf_hybrid`."
        )
    if section.get("projections") not in ("shared", "low_rank", "full") or not isinstance(section.get("sites"), dict):
        raise CheckpointError(
            f"{where}: `hybrid` must have `sites` and `projections` (shared, low_rank or full); got {section.get('projections')!r}. The file "
            "was edited."
        )
    expected = {field.name for field in dataclasses.fields(AttentionSite)} - {"name", "part"} | {"mixer"}
    sites = {}
    for name, entry in section["sites"].items():
        if not isinstance(entry, dict) or set(entry) != expected:
            difference = sorted(expected ^ set(entry)) if isinstance(entry, dict) else entry
            raise CheckpointError(
                f"{where}: `hybrid.sites[{name!r}]` has missing or unknown entries: {difference}. The file was edited."
            )
        wrong = [
            key
            for key, value in entry.items()
            if key != "mixer"
            and not (isinstance(value, bool) if key == "causal" else type(value) is int and value > 0)
        ]
        if wrong or not isinstance(entry["mixer"], dict):
            key = (wrong or ["mixer"])[0]
            raise CheckpointError(
                f"{where}: `hybrid.sites[{name!r}].{key}` has a value that cannot be; got {entry[key]!r}. The file was edited."
            )
        sites[name] = (AttentionSite(name=name, **{k: v for k, v in entry.items() if k != "mixer"}), entry["mixer"])
    return sites


class HybridAttentionConfig(PreTrainedConfig):
    """
    The config class that `AutoConfig` finds for `model_type: "hybrid_attention"`. It never is the config of a live model: reading a
    file gives `Hybrid<Family>Config`, which has every attribute of the family's config and one more, `hybrid`.
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
                'config.json says model_type "hybrid_attention" but has no `base_model_type` and `hybrid` entries. The file was edited.'
            )
        return _family_config_class(config_dict.pop("base_model_type")).from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to do: the remote-code shim imports the installed package, sources are never copied into checkpoints."""


def _family_config_class(base_model_type: str) -> type[PreTrainedConfig]:
    if base_model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"config.json: base_model_type {base_model_type!r} is unknown to the installed transformers. Upgrade transformers."
        )
    return hybrid_config_class(CONFIG_MAPPING[base_model_type])


class HybridConfigMixin:
    """Put in front of a family's config class: the family's attributes, our file format."""

    hybrid: dict | None

    def hybrid_sites(self) -> dict[str, tuple[AttentionSite, dict]]:
        """`{name: (site, mixer settings)}` of the linear layers; empty before conversion."""
        return (
            read_hybrid_section(self.hybrid, f"config of {self.name_or_path or type(self).__name__}")
            if self.hybrid
            else {}
        )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        config_dict = {k: v for k, v in config_dict.items() if k not in ("model_type", "base_model_type")}
        if config_dict.get("hybrid") is not None:
            read_hybrid_section(config_dict["hybrid"], "config.json")
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == MODEL_TYPE:
            base_model_type = config_dict.pop("base_model_type", None)
            if base_model_type not in (None, cls.model_type):
                raise CheckpointError(
                    f"{cls.__name__} is for base_model_type {cls.model_type!r}, but config.json says {base_model_type!r}. "
                    f"Load it with AutoConfig / AutoModelFor….from_pretrained."
                )
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def to_dict(self):
        return self._as_written(super().to_dict())

    def to_diff_dict(self):
        return self._as_written(super().to_diff_dict())

    def _as_written(self, config_dict):
        return {**config_dict, "model_type": MODEL_TYPE, "base_model_type": type(self).model_type}

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to do: see [`HybridAttentionConfig.register_for_auto_class`]."""


_CONFIG_CLASSES: dict[type, type] = {}
# Called with every new family's config class. modeling_hybrid adds the registration in the Auto classes here: imports point one way.
on_new_family: list[Callable[[type], None]] = []


def hybrid_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """`Hybrid<Family>Config` for a family's config class; built once."""
    if issubclass(base, HybridConfigMixin):
        return base
    if base not in _CONFIG_CLASSES:
        from . import (
            dynamic,  # the module these classes are found in again by pickle; it imports nothing from here at import
        )

        name = "Hybrid" + base.__name__
        namespace = {
            "__module__": dynamic.__name__,
            "__qualname__": name,
            "__annotations__": {"hybrid": dict | None},
            "hybrid": None,
            "__doc__": f"[`{base.__name__}`] of a model some of whose attention layers are linear; `hybrid` says which.",
        }
        _CONFIG_CLASSES[base] = type(base)(name, (HybridConfigMixin, base), namespace)
        setattr(dynamic, name, _CONFIG_CLASSES[base])
        for hook in on_new_family:
            hook(_CONFIG_CLASSES[base])
    return _CONFIG_CLASSES[base]


def check_selection(layers, sites: list[AttentionSite], model_description: str) -> list[AttentionSite]:
    """
    The sites that `layers` selects: `None` for all, an iterable of indices and names, or a predicate on [`AttentionSite`]. A name is that of a site,
    of a module around sites (`"model.vision_tower"`), or of a part (`"encoder"`, `"decoder"`, `"text"`, `"vision"`, `"audio"`).

    Raises:
        HybridConfigError: If an index is out of range or a name is not a site.
        NoMatchingAttentionError: If nothing is selected.
    """
    if layers is None:
        chosen = list(sites)
    elif callable(layers):
        chosen = [site for site in sites if layers(site)]
    else:
        by_name, chosen = {site.name: site for site in sites}, []
        if isinstance(layers, (str, int)):
            layers = [layers]
        for layer in layers:
            if isinstance(layer, int):
                if not -len(sites) <= layer < len(sites):
                    raise HybridConfigError(
                        f"layers: index must be in 0..{len(sites) - 1} for the {len(sites)} attention sites of {model_description}; got {layer}."
                    )
                selected = [sites[layer]]
            elif layer in by_name:
                selected = [by_name[layer]]
            else:
                selected = [site for site in sites if site.part == layer or site.name.startswith(f"{layer}.")]
            if not selected:
                parts = sorted({site.part for site in sites if site.part})
                raise HybridConfigError(
                    f"layers: {layer!r} is not an attention site of {model_description}, nor around one, nor one of its parts "
                    f"({', '.join(parts)}).{closest(str(layer), [*by_name, *parts])} Use find_attention_sites(model) to see them."
                )
            chosen.extend(site for site in selected if site not in chosen)
    if not chosen:
        raise NoMatchingAttentionError(
            f"layers={layers!r} matched none of the {len(sites)} attention sites of {model_description}. "
            "Use find_attention_sites(model) to see them."
        )
    return chosen
