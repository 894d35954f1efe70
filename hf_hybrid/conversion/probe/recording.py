"""
The recording: every attention of a model notes how it is called instead of computing, and everything is put back
afterwards.
"""

import contextlib
import contextvars
import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ..masks.padding import shown
from ..ports import find_port
from .records import Call, Record


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
# Names under which attention modules are handed another sequence to attend to.
OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states", "cross_attention_states")


def _record(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    """Stands in for the softmax: notes the call on the module, returns zeros of the right shape."""
    lost = [LOST[name] for name in LOST if kwargs.get(name) is not None]
    causal = _is_causal(attention_mask, is_causal, getattr(module, "is_causal", None))
    if torch.is_tensor(attention_mask) and attention_mask.ndim == 4 and attention_mask.device.type != "meta":
        lost += _lost_with_mask(attention_mask, causal)
    record = module.__dict__.get("_hybrid_probe")
    if record is not None and record.calls:
        call = Call(query.shape, key, value.shape, record.layer_idx, causal, tuple(dict.fromkeys(lost)))
        record.calls[-1].append(call)
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _is_causal(mask, keyword, attribute) -> bool:
    """
    The mask is the ground truth (some bidirectional models keep `is_causal=True`); then the keyword, the attribute,
    SDPA's rule.
    """
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
    """
    Numbers added to scores are a bias; rows that see different tokens, in a bidirectional layer, are windows or blocks.
    """
    lost = []
    if mask.is_floating_point() and bool(((mask != 0) & shown(mask)).any()):
        lost.append(LOST_BIAS)
    if not causal and bool((shown(mask) != shown(mask)[..., :1, :]).any()):
        lost.append(LOST_MASK)
    return lost


# Some that compute attention inline do not know what to do with a mask where they expect none.
MAY_SKIP = contextvars.ContextVar("may_skip", default=False)


def _probe_mask(*args, **kwargs):
    """
    Always an explicit mask, also where the host would do without one: causality is read off it. On the CPU, so that it
    can be read where the model has no weights (meta device).
    """
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":
        kwargs["device"] = "cpu"
    if not MAY_SKIP.get():
        kwargs["allow_is_bidirectional_skip"] = False
    return eager_mask(*args, **kwargs)


AttentionInterface.register(PROBE, _record)
AttentionMaskInterface.register(PROBE, _probe_mask)


class InlineSoftmax(TorchFunctionMode):
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
def recording(model: nn.Module):
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
        record = module.__dict__.setdefault("_hybrid_probe", Record([]))
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
        for module in modules:
            if hasattr(module, "linear_heads"):  # converted: all of its heads are recorded, whichever are linear
                module.linear_heads = ()
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
        forget_records(model)


def _attributes(module: nn.Module) -> dict[str, tuple]:
    """
    What a forward, or the probe, may leave on a module: states, tables it looked up, another kind of attention for
    short texts; mode and forward. Every attribute with a copy of what it holds, if it is a container.
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


def forget_records(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop("_hybrid_probe", None)


def take_records(model: nn.Module) -> dict[str, Record]:
    """Records of the modules that called the attention function, by path."""
    found = {}
    for name, module in model.named_modules():
        record = module.__dict__.get("_hybrid_probe")
        if record is not None and any(record.calls):
            found[name] = record
    return found


__all__ = ["MAY_SKIP", "InlineSoftmax", "forget_records", "recording", "take_records"]
