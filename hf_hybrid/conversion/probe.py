"""Where attention can be replaced, measured: one dry forward with a recording attention function in place of every softmax.

Nothing is guessed from names or source code. A module is a site if it calls the attention interface once per forward (or once per stretch of its
input), attending from a sequence to itself; heads, sizes and causality are read off the call. What is no site is listed with the reason.
"""

import contextlib
import contextvars
import copy
import dataclasses
import functools
import inspect
import itertools

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ..configuration_hybrid import AttentionSite
from ..errors import UnsupportedModelError
from .cache import is_plain_cache_layer
from .dummy_inputs import dummy_inputs
from .masks.padding import PICTURE_BLOCKS, shown
from .offload import execution_device
from .ports import find_port


PROBE = "hf_hybrid_probe"

# What a linear layer cannot carry over, by the keyword through which the host passes it to its softmax.
LOST = {
    "position_bias": "the learned relative position bias",
    "s_aux": "the learned attention sinks",
    "sinks": "the learned attention sinks",
    "softcap": "the soft-cap on attention scores",
    "alibi": "the ALiBi position bias",
    "rel_embeddings": "the disentangled relative positions",
}
LOST_BIAS = "the bias that its mask adds to attention scores"
LOST_MASK = "the mask between its tokens (windows or blocks)"
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
# Names under which attention modules are handed another sequence to attend to.
OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states", "cross_attention_states")


@dataclasses.dataclass
class ProbedModel:
    """
    What the dry forward of a model found.

    Attributes:
        sites (`list[AttentionSite]`): Where attention can be replaced, in the model's order.
        lost (`dict[str, tuple[str, ...]]`): What a linear layer at a site cannot carry over, by the site's name; empty for most.
        excluded (`dict[str, str]`): Attention modules that call the interface and still are no sites: name and reason.
        inline (`tuple[str, ...]`): Classes of modules that compute a softmax over scores by themselves.
        windows (`dict[str, int]`): Keys that the host itself keeps in its cache, by the name of the site, where it looks back through a window.
        cached (`dict[str, int]`): Numbers that the host caches per token, by the name of the causal site. Known where the dry forward had a cache (on the
            meta device); fewer than its keys and values where it keeps something they are made from (DeepSeek's latents).
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
                f"{', '.join(self.inline[:3])} {computes} attention inline and not through transformers' AttentionInterface. Such families need a port "
                "(see hf_hybrid.ports)."
            )
        return "none of its modules computes attention that it could find. There is nothing to replace."


@dataclasses.dataclass
class _Call:
    """One call of the attention function, as the module made it."""

    query: torch.Size
    key: torch.Tensor  # kept alive: two modules that attend to one key share it
    value: torch.Size
    layer_idx: int | None  # the cache slot, where the module is told it
    causal: bool
    lost: tuple[str, ...]


@dataclasses.dataclass
class _Record:
    """Forwards of one attention module."""

    calls: list[list[_Call]]  # of each forward
    hidden_states: torch.Size | None = None  # the first tensor it is given
    layer_idx: int | None = None  # of the latest forward, if that is an argument
    other_sequence: bool = False


def _record(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    """Stands in for the softmax: notes the call on the module, returns zeros of the right shape."""
    lost = [LOST[name] for name in LOST if kwargs.get(name) is not None]
    causal = _is_causal(attention_mask, is_causal, getattr(module, "is_causal", None))
    if torch.is_tensor(attention_mask) and attention_mask.ndim == 4 and attention_mask.device.type != "meta":
        lost += _lost_with_mask(attention_mask, causal)
    record = module.__dict__.get("_hybrid_probe")
    if record is not None and record.calls:
        call = _Call(query.shape, key, value.shape, record.layer_idx, causal, tuple(dict.fromkeys(lost)))
        record.calls[-1].append(call)
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _is_causal(mask, keyword, attribute) -> bool:
    """The mask is the ground truth (some bidirectional models keep `is_causal=True`); then the keyword, the attribute, SDPA's rule."""
    if torch.is_tensor(mask) and mask.ndim == 4 and mask.device.type != "meta":
        if mask.shape[-2] == 1:
            return False
        side = min(mask.shape[-2:])
        seen = shown(mask)[..., :side, :side]
        if bool(seen.triu(1).any()):
            return False
        if bool(seen.tril(-1).any()):
            return True  # else nobody sees anybody, which says nothing
    if keyword is not None:
        return bool(keyword)
    return True if attribute is None else bool(attribute)


def _lost_with_mask(mask: torch.Tensor, causal: bool) -> list[str]:
    """Numbers added to scores are a bias; rows that see different tokens, in a bidirectional layer, are windows or blocks."""
    lost = []
    if mask.is_floating_point() and bool(((mask != 0) & shown(mask)).any()):
        lost.append(LOST_BIAS)
    if not causal and bool((shown(mask) != shown(mask)[..., :1, :]).any()):
        lost.append(LOST_MASK)
    return lost


# Some that compute attention inline do not know what to do with a mask where they expect none.
_MAY_SKIP = contextvars.ContextVar("may_skip", default=False)


def _probe_mask(*args, **kwargs):
    """
    Always an explicit mask, also where the host would do without one: causality is read off it. On the CPU, so that it can be read where the model has no
    weights (meta device).
    """
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":
        kwargs["device"] = "cpu"
    if not _MAY_SKIP.get():
        kwargs["allow_is_bidirectional_skip"] = False
    return eager_mask(*args, **kwargs)


AttentionInterface.register(PROBE, _record)
AttentionMaskInterface.register(PROBE, _probe_mask)


class _InlineSoftmax(TorchFunctionMode):
    """Notes which modules compute attention without the interface: the reason why a model has no sites."""

    def __init__(self, modules: list[nn.Module]):
        super().__init__()
        self.modules, self.found = modules, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention or func is F.multi_head_attention_forward:
            self.note()
        elif func in (F.softmax, torch.softmax, torch.Tensor.softmax):
            shape = args[0].shape if args and torch.is_tensor(args[0]) else ()
            # scores are [B, H, Q, K] or [B * H, T, T]; experts' gates [B, T, E] or [T, E]
            if len(shape) > 3 or (len(shape) == 3 and shape[-1] == shape[-2]):
                self.note()
        return func(*args, **(kwargs or {}))

    def note(self):
        inside = [module for module in self.modules if type(module) is not nn.Softmax]
        if inside:
            self.found[type(inside[-1]).__name__] = None


@contextlib.contextmanager
def _recording(model: nn.Module):
    """Every attention of `model` records instead of computing; everything is put back, whatever happens inside."""
    modules = list(model.modules())
    configs = {id(config): config for config in (getattr(m, "config", None) for m in modules) if config is not None}
    configs = {key: config for key, config in configs.items() if hasattr(config, "_attn_implementation_internal")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    attributes = {module: _attributes(module) for module in modules}
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"})
    running: list[nn.Module] = []

    def enter(module, args, kwargs):
        running.append(module)
        given = [kwargs.get("hidden_states"), *args, *kwargs.values()]
        hidden_states = next((value.shape for value in given if torch.is_tensor(value)), None)
        record = module.__dict__.setdefault("_hybrid_probe", _Record([]))
        record.calls.append([])
        record.hidden_states, record.layer_idx = hidden_states, kwargs.get("layer_idx")
        record.other_sequence |= any(kwargs.get(name) is not None for name in OTHER_SEQUENCE)

    def leave(module, args, output):
        while running and running.pop() is not module:
            pass

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    ported = [(module, port) for module in modules if (port := _port_of(module)) is not None]
    try:
        for config in configs.values():
            config._attn_implementation_internal = PROBE
        for module, port in ported:
            # where an accelerate hook wraps the forward, what it wraps: the hook brings the weights
            wrapped = "_old_forward" if "_old_forward" in vars(module) else "forward"
            module.__dict__[wrapped] = functools.partial(port, _record, module)
        model.eval()
        with torch.random.fork_rng(devices):  # some hosts draw random numbers in evaluation too
            yield running
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for handle in handles:
            handle.remove()
        for module, public in attributes.items():
            _put_back(module, public)
        _forget_records(model)


def _attributes(module: nn.Module) -> dict[str, tuple]:
    """
    What a forward, or the probe, may leave on a module: states, tables it looked up, another kind of attention for short texts; mode and forward. Every
    attribute with a copy of what it holds, if it is a container.
    """
    private = ("_modules", "_buffers", "_old_forward")
    names = [name for name in vars(module) if not name.startswith("_") or name in private]
    values = ((name, module.__dict__[name]) for name in names)
    return {name: (v, copy.copy(v) if isinstance(v, (dict, list, set)) else None) for name, v in values}


def _put_back(module: nn.Module, before: dict[str, tuple]) -> None:
    for name in [name for name in vars(module) if not name.startswith("_") and name not in before]:
        del module.__dict__[name]
    for name, (value, held) in before.items():
        if held is not None:
            value.clear()
            value.extend(held) if isinstance(value, list) else value.update(held)
        module.__dict__[name] = value


def _port_of(module: nn.Module):
    """The port of a family that computes attention inline, of a converted module as of an untouched one."""
    return getattr(module, "_hybrid_port", None) or find_port(type(module))


def _forget_records(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop("_hybrid_probe", None)


def probe_attention(model: PreTrainedModel, example_inputs: dict | None = None) -> ProbedModel:
    """
    Every attention site of `model` in the model's order, with what a linear layer there would lose, and what is no site and why.

    Towers that the forward does not reach (the vision encoder of a language model that was given text) are run by themselves.

    Args:
        model (`PreTrainedModel`): Any model; without weights too (on the meta device). It comes back unchanged.
        example_inputs (`dict`, *optional*): Keyword arguments of one forward; by default a few tokens, a picture or a sound, by the model's config.

    Raises:
        UnsupportedModelError: If there is no site, or no forward succeeds.
    """
    inline: dict[str, None] = {}
    records: dict[str, _Record] = {}
    filled: list[CacheLayerMixin] = []
    description = f"{type(model).__name__} (model_type={model.config.model_type!r})"
    if type(model).forward is nn.Module.forward:
        parts = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
        raise UnsupportedModelError(
            f"{description} has no forward of its own, only what it builds on its parts. Convert those that attend: {', '.join(parts) or 'none'}."
        )
    if model.config.model_type in REFUSED:
        # nothing is run: their own memories would keep what the dry forward computes
        raise UnsupportedModelError(
            f"{description} has no attention layer that hf_hybrid can replace: it {REFUSED[model.config.model_type]}. A linear layer there would be "
            "another function."
        )
    with _recording(model) as running, torch.no_grad():
        if example_inputs is None:
            # some want more than one row
            candidates = itertools.chain(dummy_inputs(model), dummy_inputs(model, 2))
        else:
            candidates = [example_inputs]
        error, found = _first_success(model, candidates, running, filled)
        if error is not None:
            raise UnsupportedModelError(
                f"The dry forward of {description} failed: {type(error).__name__}: {error}. Pass example_inputs=… with the arguments its forward "
                "needs."
            ) from error
        inline.update(found)
        records.update(_take_records(model))
        if example_inputs is None:
            _mark_changing_lengths(model, records, running)
        for name, tower in _unreached_towers(model, records):
            error, found = _first_success(tower, itertools.chain(dummy_inputs(tower), dummy_inputs(tower, 2)), running)
            if error is None:
                inline.update(found)
                records.update({f"{name}.{inner}": record for inner, record in _take_records(tower).items()})
            _forget_records(tower)
    probed = _sort_out(model, records, tuple(inline), filled)
    if not probed.sites:
        raise UnsupportedModelError(
            f"{description} has no attention layer that hf_hybrid can replace: {probed.why_none()}"
        )
    return probed


def _first_success(model, candidates, running, filled: list | None = None) -> tuple[Exception | None, dict[str, None]]:
    """
    Run the model on the first inputs it accepts. The error is that of the likeliest ones, the names are of inline softmaxes; the layers of the cache that
    it gave back go into `filled`.
    """
    first_error = None
    for inputs, may_skip in ((inputs, may_skip) for inputs in candidates for may_skip in (False, True)):
        _forget_records(model)
        del running[:]
        token = _MAY_SKIP.set(may_skip)
        try:
            with _InlineSoftmax(running) as inline:
                output = model(**_with_use_cache(model, inputs))
            cache = getattr(output, "past_key_values", None)
            if filled is not None and cache is not None:
                filled.extend(getattr(getattr(cache, "self_attention_cache", cache), "layers", ()))
            return None, inline.found
        except Exception as error:  # whatever the family raises for arguments it does not want
            first_error = first_error or error
        finally:
            _MAY_SKIP.reset(token)
    return first_error or ValueError("no arguments to try: its forward has none that we know"), {}


def _mark_changing_lengths(model, records: dict[str, _Record], running) -> None:
    """Once more with longer text: keys that are as many as the queries by chance alone are not the second time."""
    error, _ = _first_success(model, itertools.chain(dummy_inputs(model, 1, 13), dummy_inputs(model, 2, 13)), running)
    if error is not None:
        return
    for name, again in _take_records(model).items():
        if name in records and any(call.query[2] != call.key.shape[2] for calls in again.calls for call in calls):
            records[name].other_sequence = True


def _with_use_cache(model, inputs: dict) -> dict:
    if "use_cache" not in inspect.signature(model.forward).parameters:
        return {name: value for name, value in inputs.items() if name != "use_cache"}
    # without weights: with a cache, transformers does not look whether position ids are those of a packed row, which it could not
    return {"use_cache": execution_device(model).type == "meta", **inputs}


def _take_records(model: nn.Module) -> dict[str, _Record]:
    """Records of the modules that called the attention function, by path."""
    found = {}
    for name, module in model.named_modules():
        record = module.__dict__.get("_hybrid_probe")
        if record is not None and any(record.calls):
            found[name] = record
    return found


def _unreached_towers(model: nn.Module, records: dict[str, _Record]) -> list[tuple[str, PreTrainedModel]]:
    """Outermost models inside `model` none of whose modules ran."""
    towers: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        if not name or not isinstance(module, PreTrainedModel) or module.__dict__.get("_hybrid_probe") is not None:
            continue
        inside = f"{name}."
        if any(part.__dict__.get("_hybrid_probe") is not None for part in module.modules()):
            continue
        if not any(inside.startswith(f"{outer}.") for outer, _ in towers):
            towers.append((name, module))
    return towers


def _sort_out(
    model: nn.Module, records: dict[str, _Record], inline: tuple[str, ...], filled: list[CacheLayerMixin]
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


def _why_no_site(record: _Record, calls: list[_Call]) -> str | None:
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


def _why_one_state_is_too_few(record: _Record, layer_idx: int | None) -> str | None:
    """A module that runs several times per forward of the model, each time into another slot of the cache that we are not told."""
    slots = [calls[0].layer_idx for calls in record.calls if calls]
    if layer_idx is None or len(slots) == 1 or None not in slots:
        return None
    return f"runs {len(slots)} times per forward of the model, but has one cache slot and so one state"


def _names_that_share_keys(records: dict[str, _Record]) -> dict[str, str]:
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
    """The part of the model a site belongs to: `encoder` or `decoder` of an encoder-decoder, else the modality of the tower around it."""
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


__all__ = ["LOST", "ProbedModel", "probe_attention"]
