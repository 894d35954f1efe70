"""The rules: which of the recorded modules are sites, why the others are none, and what a linear layer would lose."""

import dataclasses

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ...configuration_hybrid import AttentionSite
from ..cache import is_plain_cache_layer
from ..masks.padding import PICTURE_BLOCKS
from .records import Call, Record


# A text shows nothing of it, so it cannot be measured: see PICTURE_BLOCKS.
LOST_PICTURE_BLOCKS = "the bidirectional attention among the tokens of a picture"
# Families that do with their attention what no forward shows.
REFUSED = {
    "diffusion_gemma": "fills a cache with keys and values that another pass over its layers attends to",
    "pi0": "fills a cache with keys and values that the action expert attends to",
    "omdet-turbo": "remembers what its text encoder made of earlier texts, from before it was converted too",
    "jev": "is loaded by a from_pretrained of its own, which does not say what it loaded",
    **dict.fromkeys(
        ("sam2_video", "sam3_video", "sam3_tracker_video", "edgetam_video"),
        "tracks objects in a session that every forward changes, so that it cannot be distilled (its image model can)",
    ),
}


@dataclasses.dataclass
class ProbedModel:
    """
    What the dry forward of a model found.

    Attributes:
        sites (`list[AttentionSite]`): Where attention can be replaced, in the model's order.
        lost (`dict[str, tuple[str, ...]]`): What a linear layer at a site cannot carry over, by the site's name; empty
            for most.
        excluded (`dict[str, str]`): Attention modules that call the interface and still are no sites: name and reason.
        inline (`tuple[str, ...]`): Classes of modules that compute a softmax over scores by themselves.
        windows (`dict[str, int]`): Keys that the host itself keeps in its cache, by the name of the site, where it
            looks back through a window.
        cached (`dict[str, int]`): Numbers that the host caches per token, by the name of the causal site. Known where
            the dry forward had a cache (on the meta device); fewer than its keys and values where it keeps something
            they are made from (DeepSeek's latents).
    """

    sites: list[AttentionSite]
    lost: dict[str, tuple[str, ...]]
    excluded: dict[str, str]
    inline: tuple[str, ...]
    windows: dict[str, int]
    cached: dict[str, int]

    def why_none(self) -> str:
        """One sentence or two for a model whose attention cannot be replaced, and what to do."""
        reasons: dict[str, str] = {}
        for name, reason in self.excluded.items():
            reasons.setdefault(reason, name)
        if reasons:
            said = "; ".join(f"{name} {reason}" for reason, name in list(reasons.items())[:3])
            return f"{said}. A linear layer there would be another function."
        if self.inline:
            computes = "computes" if len(self.inline) == 1 else "compute"
            return (
                f"{', '.join(self.inline[:3])} {computes} attention inline and not through transformers' "
                "AttentionInterface. Such families need a port (see hf_hybrid.ports)."
            )
        return "none of its modules computes attention that it could find. There is nothing to replace."


def sort_out(
    model: nn.Module, records: dict[str, Record], inline: tuple[str, ...], filled: list[CacheLayerMixin]
) -> ProbedModel:
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    sharing = _names_that_share_keys(records)
    cache_layers = _cache_layers(model)
    sites, lost, excluded, windows, cached = [], {}, {}, {}, {}
    for name, record in sorted(records.items(), key=lambda item: order[item[0]]):
        calls = max(record.calls, key=len)
        layer_idx = getattr(model.get_submodule(name), "layer_idx", None)
        reason = _why_no_site(record, calls)
        if reason is None and name in sharing:
            reason = f"shares its keys and values with {sharing[name]}"
        if reason is None and calls[0].causal:
            layer_idx = layer_idx if calls[0].layer_idx is None else calls[0].layer_idx
            reason = _why_not_cached(cache_layers, layer_idx) or _why_one_state_is_too_few(record, layer_idx)
        if reason is not None:
            excluded[name] = reason
            continue
        call = calls[0]
        sites.append(
            AttentionSite(
                name=name,
                num_heads=call.query[1],
                num_key_value_heads=call.key.shape[1],
                head_dim=call.query[-1],
                value_dim=call.value[-1],
                hidden_size=record.hidden_states[-1],
                causal=call.causal,
                part=_part_of(model, name),
            )
        )
        lost[name] = tuple(dict.fromkeys(what for call in calls for what in call.lost))
        kept = (
            getattr(cache_layers[layer_idx], "sliding_window", None)
            if call.causal and _has_slot(cache_layers, layer_idx)
            else None
        )
        if kept is not None:
            windows[name] = kept - 1  # the newest key is not in the cache yet when it is looked at
        if call.causal and _has_slot(filled, layer_idx):
            cached[name] = _numbers_per_token(filled[layer_idx])
        if model.config.model_type in PICTURE_BLOCKS and call.causal and sites[-1].part == "text":
            lost[name] = (*lost[name], LOST_PICTURE_BLOCKS)
    return ProbedModel(sites, lost, excluded, inline, windows, cached)


def _numbers_per_token(layer: CacheLayerMixin) -> int:
    """What a filled cache layer holds for one token of one sequence; keys and values are `[B, H, T, K]`."""
    held = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None and x.ndim == 4]
    return sum(x.shape[1] * x.shape[3] for x in held)


def _why_no_site(record: Record, calls: list[Call]) -> str | None:
    """Several calls per forward, or keys from elsewhere: a linear layer would be another function."""
    if record.hidden_states is None:
        return "is given no tensor"
    if record.other_sequence:
        return "attends to another sequence (cross-attention)"
    if any(call.query[2] != call.key.shape[2] for forward in record.calls for call in forward):
        return "attends to more or fewer tokens than it reads (cross-attention, or keys of several sequences merged)"
    if len({(call.query[1], call.key.shape[1], call.query[-1], call.value[-1]) for call in calls}) > 1:
        return f"calls attention {len(calls)} times per forward with different sizes"
    if calls[0].key.shape[1] != calls[0].value[1]:
        return f"has {calls[0].key.shape[1]} key heads and {calls[0].value[1]} value heads"
    if len(calls) > 1:
        # windows or pictures of a packed input are attended to one by one, each token once
        tokens = sum(call.query[0] * call.query[2] for call in calls)
        if calls[0].causal or tokens != record.hidden_states[:-1].numel():
            return f"calls attention {len(calls)} times per forward"
    return None


def _why_one_state_is_too_few(record: Record, layer_idx: int | None) -> str | None:
    """
    A module that runs several times per forward of the model, each time into another slot of the cache that we are not
    told.
    """
    slots = [calls[0].layer_idx for calls in record.calls if calls]
    if layer_idx is None or len(slots) == 1 or None not in slots:
        return None
    return f"runs {len(slots)} times per forward of the model, but has one cache slot and so one state"


def _names_that_share_keys(records: dict[str, Record]) -> dict[str, str]:
    """Modules that attend to a key which another module attends to as well, and that module."""
    owners: dict[tuple, str] = {}
    sharing = {}
    for name, record in records.items():
        for call in (call for calls in record.calls for call in calls):
            if call.key.device.type == "meta":
                continue
            key = (call.key.data_ptr(), call.key.shape)
            owner = owners.setdefault(key, name)
            if owner != name:
                sharing[name], sharing[owner] = owner, name
    return sharing


def _cache_layers(model: nn.Module) -> list[CacheLayerMixin]:
    """The layers of the cache that generation would make for this model; none if it makes none."""
    try:
        return DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except Exception:  # a config without the fields a cache needs: a model that does not generate
        return []


def _has_slot(layers: list[CacheLayerMixin], layer_idx: int | None) -> bool:
    return layer_idx is not None and layer_idx < len(layers)


def _why_not_cached(layers: list[CacheLayerMixin], layer_idx: int | None) -> str | None:
    if not _has_slot(layers, layer_idx) or is_plain_cache_layer(layers[layer_idx]):
        return None
    name = type(layers[layer_idx]).__name__
    if name == "DummyLayer":
        return "reuses the keys and values of another layer"
    return f"keeps more than keys and values in the cache ({name})"


def _part_of(model: nn.Module, name: str) -> str:
    """
    The part of the model a site belongs to: `encoder` or `decoder` of an encoder-decoder, else the modality of the
    tower around it.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        for part in ("encoder", "decoder"):
            if part in name.split(".") or any(piece.endswith("_" + part) for piece in name.split(".")):
                return part
    pieces = name.split(".")
    for end in range(len(pieces), 0, -1):
        module = model.get_submodule(".".join(pieces[: end - 1]))
        if isinstance(module, PreTrainedModel):
            main = module.main_input_name if isinstance(module.main_input_name, str) else module.main_input_name[0]
            for modality, beginnings in {
                "vision": ("pixel", "flattened_patches"),
                "audio": ("input_features", "input_values", "audio"),
            }.items():
                if main.startswith(beginnings):
                    return modality
            if module is not model or main == "input_ids":
                return "text"
    return "text"


__all__ = ["REFUSED", "ProbedModel", "sort_out"]
