"""
The PEFT method `HYBRID`: a wrapper around each attention layer holds the mixers of all adapters; the active one stands
beside the layer.
"""

import dataclasses

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..configuration_hybrid import LinearSite
from ..conversion.layer import (
    check_divisible,
    check_own_forward,
    convert_attention_,
    hybrid_layers,
    is_hybrid_attention,
    put_mixer_,
    restore_attention_,
    site_name,
)
from ..conversion.probe import probe_attention
from ..conversion.projections import merge_deltas_, new_deltas
from ..conversion.sites import select_heads
from ..errors import AlreadyHybridError, CheckpointError, HybridConfigError, UnsupportedModelError
from ..mixers import MixerConfig
from ..modeling_hybrid import HybridModelMixin, become_base_, become_hybrid_, describe, mixer_dtype
from ..surgery import check_projections, forget_distillation_, new_mixer, warn_of_losses
from .bank import check_base
from .config import HYBRID, HybridPeftConfig
from .fingerprint import base_fingerprint


class HybridTunerLayer(nn.Module, BaseTunerLayer):
    """
    Stands where the attention stood. The attention itself, converted, is `base_layer`; attributes that the host's code
    reads from it are its own.

    A wrapper, because PEFT takes every other child of a tuner layer for adapter weights; and every key of the adapter
    begins with `hybrid_`, because transformers puts the adapter's name only behind the method's own prefix.

    Args:
        base_layer (`nn.Module`): The attention.
    """

    adapter_layer_names = ("hybrid_mixer", "hybrid_delta")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.hybrid_mixer, self.hybrid_delta = nn.ModuleDict(), nn.ModuleDict()
        self.heads_of: dict[str, tuple[int, ...]] = {}
        self.config_of: dict[str, HybridPeftConfig] = {}
        self.merged_adapters: list[str] = []

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args, **kwargs):
        return self.base_layer(*args, **kwargs)

    def add(self, adapter_name: str, mixer, deltas: nn.ModuleDict | None, site, heads: tuple[int, ...]) -> None:
        """Add the mixer of one more adapter, whose `heads` are linear while it is active."""
        if not is_hybrid_attention(self.base_layer):
            convert_attention_(self.base_layer, mixer, site, register=False)
        self.hybrid_mixer[adapter_name] = mixer
        self.hybrid_delta[adapter_name] = nn.ModuleDict() if deltas is None else deltas
        self.heads_of[adapter_name] = heads
        self._set_switch()

    def _set_switch(self) -> None:
        active = [name for name in self.active_adapters if name in self.hybrid_mixer]
        if len(active) > 1:
            raise HybridConfigError(
                f"An attention layer runs through one mixer at a time; got the active adapters {active}. Activate one "
                "(set_adapter)."
            )
        layer = self.base_layer
        layer.linear_heads, layer.__dict__["hybrid_delta"] = (), None
        if is_hybrid_attention(layer) and not active:
            layer.__dict__.pop("hybrid", None)  # no adapter that is active has a mixer here
        if not is_hybrid_attention(layer) or not active:
            return
        put_mixer_(layer, self.hybrid_mixer[active[0]], register=False)
        deltas = self.hybrid_delta[active[0]]
        layer.__dict__["hybrid_delta"] = deltas if len(deltas) else None
        if not self.disable_adapters:
            layer.linear_heads = self.heads_of[active[0]]

    def remember_switch(self) -> None:
        """After the switch was set by hand: the active adapter keeps it, also in its file."""
        active = next((name for name in self.active_adapters if name in self.heads_of), None)
        if active is None or self.disable_adapters:
            return
        self.heads_of[active] = self.base_layer.linear_heads
        config, name = self.config_of[active], self.base_layer.hybrid_site.name
        everything = {
            site: entry.get("heads", list(range(entry["num_key_value_heads"]))) for site, entry in config.sites.items()
        }
        config.linear_heads = {**(everything if config.linear_heads is None else config.linear_heads)}
        config.linear_heads[name] = list(self.base_layer.linear_heads)

    def set_adapter(self, adapter_names, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._set_switch()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._set_switch()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.heads_of.pop(adapter_name, None)
        self._set_switch()

    def merge(self, safe_merge: bool = False, adapter_names=None) -> None:
        raise HybridConfigError(
            "A mixer cannot be merged into the weights of an attention layer. Call merge_and_unload(), which makes the "
            "model a hybrid."
        )


class HybridTuner(BaseTuner):
    """
    Puts [`HybridTunerLayer`]s around attention layers. The model itself becomes a `Hybrid…` model: caches, masks and
    guards are as of a converted one.
    """

    prefix = "hybrid_"
    tuner_layer_cls = HybridTunerLayer
    target_module_mapping: dict = {}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for kind in HybridTunerLayer.adapter_layer_names:
            key = key.replace(f".{kind}.{adapter_name}.", f".{kind}.")
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = {
            name
            for name in model.state_dict()
            if any(f".{kind}.{adapter_name}." in name for kind in HybridTunerLayer.adapter_layer_names)
        }
        try:
            check_tensors(own, {name for name in remapped if ".hybrid_" in name}, config)
        except CheckpointError:
            for wrapper in (module for module in model.modules() if isinstance(module, HybridTunerLayer)):
                wrapper.delete_adapter(adapter_name)  # the model computes what it did before
            raise
        return remapped

    def _check_new_adapter_config(self, config) -> None:
        """Nothing that goes for other methods' configs goes for this one's."""

    def _check_tied_modules(self, model, peft_config) -> None:
        """Attention layers are not tied to embeddings."""

    def _prepare_adapter_config(self, peft_config: HybridPeftConfig, model_config: dict) -> HybridPeftConfig:
        model = self.model
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}.")
        _check_bare(model)
        check_projections(peft_config.projections, peft_config.projection_rank, peft_config.heads)
        if peft_config.sites is None:
            self._measure(peft_config)
        else:
            check_base(peft_config, model, "adapter_config.json")
        peft_config.target_modules = list(peft_config.sites)
        for name in peft_config.sites:
            check_own_forward(_inner(model.get_submodule(name)))
        return peft_config

    def _measure(self, config: HybridPeftConfig) -> None:
        model, mixer = self.model, config.mixer_config
        probed = probe_attention(model)
        sites = [dataclasses.replace(site, name=site_name(site.name)) for site in probed.sites]
        selected = select_heads(config.layers, config.heads, sites, describe(model))
        for name, (site, heads) in selected.items():
            if len(heads) < site.num_key_value_heads:
                check_divisible(_inner(model.get_submodule(name)), name)
        lost = {site_name(name): what for name, what in probed.lost.items()}
        warn_of_losses({name: lost[name] for name in selected})
        config.describe_sites(
            {
                name: LinearSite(site, mixer.fitted(site.causal).to_dict(), heads)
                for name, (site, heads) in selected.items()
            }
        )
        config.base_fingerprint = base_fingerprint(model, selected)
        config.base_model_name_or_path = config.base_model_name_or_path or model.config.name_or_path or None
        config.revision = config.revision or getattr(model.config, "_commit_hash", None)

    @staticmethod
    def _check_target_module_exists(peft_config, key: str):
        return key in peft_config.sites

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key) -> None:
        linear = peft_config.linear_sites()[current_key]
        attention = _inner(target)
        mixer = new_mixer(
            MixerConfig.from_dict(linear.mixer),
            linear.site,
            linear.heads,
            attention,
            dtype=torch.promote_types(mixer_dtype(self.model, attention), torch.float32),
        )
        deltas = new_deltas(attention, peft_config.projections, peft_config.projection_rank)
        switched = peft_config.linear_heads
        heads = linear.heads if switched is None else tuple(sorted(switched.get(current_key, ())))
        if not isinstance(target, HybridTunerLayer):
            target = HybridTunerLayer(target)
            setattr(parent, target_name, target)
        target._active_adapter = list(self.active_adapters) if target.hybrid_mixer else [adapter_name]
        target.config_of[adapter_name] = peft_config
        target.add(adapter_name, mixer, deltas, linear.site, heads)
        # the first adapter is active; one that is added to others waits until it is chosen
        target.set_adapter(target._active_adapter, inference_mode=peft_config.inference_mode)

    def inject_adapter(self, model, adapter_name, *args, **kwargs) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        become_hybrid_(model)
        self._note_switch()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._note_switch()

    def set_adapter(self, adapter_name, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        self._note_switch()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._note_switch()

    def _note_switch(self) -> None:
        if not isinstance(self.model, HybridModelMixin):  # not yet, while the first adapter is being put in
            return
        active = next((self.peft_config[name] for name in self.active_adapters if name in self.peft_config), None)
        if active is not None:
            self.model.config.hybrid["projections"] = active.projections
            self.model.__dict__["distill_rank"] = active.projection_rank
        self.model.refresh_hybrid_config()

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names=None
    ) -> PreTrainedModel:
        """The hybrid of the active adapter (or the one named), or with `merge=False` the base model."""
        model: HybridModelMixin = self.model
        if adapter_names:
            self.set_adapter(adapter_names[0])
        for name, wrapper in [(n, m) for n, m in model.named_modules() if isinstance(m, HybridTunerLayer)]:
            layer = wrapper.base_layer
            if merge and layer.linear_heads:
                own = layer.hybrid.restricted(layer.linear_heads).to(mixer_dtype(model, layer))
                merge_deltas_(layer, layer.__dict__.get("hybrid_delta"))
                put_mixer_(layer, own)
                layer.__dict__["hybrid_delta"] = None
            else:
                restore_attention_(layer)
            model.set_submodule(name, layer)
        for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]:
            own = module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            model.set_submodule(name, own)
        forget_distillation_(model)
        model.__dict__.pop("peft_config", None)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        if merge and hybrid_layers(model):
            model.refresh_hybrid_config()
        else:
            become_base_(model)
        return model


def _check_bare(model: nn.Module) -> None:
    """An adapter of mixers stands beside the base model's own attention, and beside no other adapter's layers."""
    wrapped = {id(m.base_layer) for m in model.modules() if isinstance(m, HybridTunerLayer)}
    for name, module in model.named_modules():
        if is_hybrid_attention(module) and id(module) not in wrapped:
            raise AlreadyHybridError(
                f"{name} of {describe(model)} is converted already. Call restore_full_attention(model) first: an "
                "adapter of mixers "
                "stands beside the base model's attention."
            )
        if isinstance(module, BaseTunerLayer) and not isinstance(module, HybridTunerLayer):
            raise UnsupportedModelError(
                f"{describe(model)} carries another adapter ({name}). Merge it first, or add it to the hybrid that "
                "merge_and_unload gives."
            )


def _inner(target: nn.Module) -> nn.Module:
    return target.base_layer if isinstance(target, HybridTunerLayer) else target


def check_tensors(own: set[str], given: set[str], config: HybridPeftConfig) -> None:
    """
    Raises:
        CheckpointError: If an adapter lacks tensors of its layers, or has others.
    """
    for what, names in {"lacks": own - given, "has foreign": given - own}.items():
        if names:
            raise CheckpointError(
                f"The adapter of {config.base_model_name_or_path!r} {what} tensors: {len(names)}, the first "
                f"{sorted(names)[0]!r}. It was truncated or edited; save or download it again."
            )


def register_peft_method() -> None:
    """Make PEFT, and transformers' own loader of adapters, know `HYBRID`. Called once, on import of the package."""
    PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(HYBRID, HybridPeftConfig)
    PEFT_TYPE_TO_TUNER_MAPPING.setdefault(HYBRID, HybridTuner)
    PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(HYBRID, HybridTuner.prefix)


__all__ = ["HybridTuner", "HybridTunerLayer", "check_tensors", "register_peft_method"]
