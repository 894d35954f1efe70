"""`HybridPeftConfig`: what `adapter_config.json` says of the mixers beside a frozen model."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import transformers
from peft import PeftConfig

from ..configuration_hybrid import LinearSite, hybrid_section, read_hybrid_section
from ..errors import CheckpointError, HybridConfigError
from ..mixers import MixerConfig, resolve_mixer_config


class PeftTypeName(str):
    """
    A PEFT type beside those of PEFT's own enumeration, whose members are strings too: what PEFT and transformers read
    off one is here.
    """

    value = property(lambda self: str(self))
    name = property(lambda self: str(self))

    def __reduce__(self):
        return PeftTypeName, (str(self),)

    def __deepcopy__(self, memo):
        return self


HYBRID = PeftTypeName("HYBRID")


@dataclass
class HybridPeftConfig(PeftConfig):
    """
    Configuration of an adapter that holds a mixer beside attention layers, for [`~peft.get_peft_model`].

    Args:
        mixer (`str`, `dict` or `MixerConfig`, *optional*, defaults to `"linear_attention"`): What stands beside the
            softmax.
        layers (*optional*): Attention sites, as in [`convert_to_hybrid`]; all of them by default.
        heads (`dict`, *optional*): Key-value heads by layer, as there.
        projections (`str`, *optional*, defaults to `"shared"`): What trains beside the mixers, as in
            [`HybridTrainingArguments`].
        projection_rank (`int`, *optional*, defaults to 8): Rank of `"low_rank"` differences.
        linear_heads (`dict`, *optional*): Heads by layer that are linear when the adapter is active, of those that have
            a mixer; all of them by default.
        sites (`dict`, *optional*): Sizes of the layers and their mixers. Measured when the adapter is made.
        base_fingerprint (`dict`, *optional*): Tells the base model's weights from others'. Taken when the adapter is
            made.

    Raises:
        HybridConfigError, UnknownMixerError: If the mixer is none.
    """

    mixer: str | dict = field(default="linear_attention", metadata={"help": "What stands beside the softmax."})
    layers: list | str | None = field(default=None, metadata={"help": "Attention sites; all of them by default."})
    heads: dict | None = field(default=None, metadata={"help": "Key-value heads by layer; all of them by default."})
    projections: str = field(default="shared", metadata={"help": "shared, low_rank or full."})
    projection_rank: int = field(default=8, metadata={"help": "Rank of low-rank differences to projections."})
    linear_heads: dict | None = field(default=None, metadata={"help": "Heads that are linear when it is active."})
    sites: dict | None = field(default=None, metadata={"help": "Sizes of the layers; measured."})
    base_fingerprint: dict | None = field(default=None, metadata={"help": "Of the base model's weights; measured."})
    target_modules: list | str | None = field(default=None, metadata={"help": "Names of the layers; from `sites`."})
    modules_to_save: list | None = field(default=None, metadata={"help": "Other modules that train with it."})
    exclude_modules: list | str | None = field(default=None, metadata={"help": "Not used: see `layers`."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = HYBRID
        self.mixer = resolve_mixer_config(self.mixer).to_dict()
        if callable(self.layers):
            raise HybridConfigError(
                f"HybridPeftConfig: layers must be names or indices, which a file can hold; got {self.layers!r}. "
                "Select with "
                "find_attention_sites(model) first."
            )
        if self.layers is not None and not isinstance(self.layers, str):
            self.layers = [self.layers] if isinstance(self.layers, int) else list(self.layers)
        self.heads, self.linear_heads = _as_lists(self.heads), _as_lists(self.linear_heads)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As in PEFT; what it notes of the base model's class is the family's own, which a fresh process can import."""
        noted = kwargs.get("auto_mapping_dict")
        family = getattr(transformers, (noted or {}).get("base_model_class", "").removeprefix("Hybrid"), None)
        if family is not None:
            noted = {"base_model_class": family.__name__, "parent_library": family.__module__}
            kwargs["auto_mapping_dict"] = noted
        super().save_pretrained(save_directory, **kwargs)

    @property
    def mixer_config(self) -> MixerConfig:
        return MixerConfig.from_dict(self.mixer)

    def linear_sites(self, where: str = "adapter_config.json") -> dict[str, LinearSite]:
        """
        The layers of the adapter, with the heads that have a mixer, by name.

        Raises:
            CheckpointError: If the file was edited.
        """
        section = {**hybrid_section({}, None, None, self.projections), "sites": self.sites}
        sites = read_hybrid_section(section, where)
        for name, heads in (self.linear_heads or {}).items():
            known = name in sites and isinstance(heads, list) and set(heads) <= set(sites[name].heads)
            if not known or len(set(heads)) < len(heads):
                raise CheckpointError(
                    f"{where}: `linear_heads[{name!r}]` must be heads of a layer of `sites`, each once; got {heads!r}. "
                    "The file was edited."
                )
        return sites

    def describe_sites(self, sites: dict[str, LinearSite]) -> None:
        """Note the layers and their mixers."""
        self.sites = {name: dataclasses.replace(site).entry() for name, site in sites.items()}
        self.target_modules = list(sites)


def _as_lists(heads):
    """Heads by layer as JSON holds them."""
    if not isinstance(heads, dict):
        return heads
    return {
        layer: list(some) if isinstance(some, Iterable) and not isinstance(some, str) else some
        for layer, some in heads.items()
    }


__all__ = ["HYBRID", "HybridPeftConfig", "PeftTypeName"]
