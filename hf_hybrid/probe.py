"""Where attention can be replaced, measured: one dry forward with a recording attention function in place of every softmax.

Nothing is guessed from names or source code. A module is a site if it calls the attention interface exactly once per forward, attending
from a sequence to itself; heads, sizes and causality are read off the call.
"""

import contextlib
import dataclasses

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from .configuration_hybrid import AttentionSite
from .errors import UnsupportedModelError


PROBE = "hf_hybrid_probe"
# Tokens of the dry forward: more than one sliding or chunked mask block of toy models, cheap for large ones.
PROBE_LENGTH = 9

# What a linear layer cannot carry over, by the keyword through which the host passes it to its softmax.
LOST = {
    "position_bias": "the learned relative position bias",
    "s_aux": "the learned attention sinks",
    "sinks": "the learned attention sinks",
    "softcap": "the soft-cap on attention scores",
}


@dataclasses.dataclass
class _Call:
    count: int
    query: torch.Size
    key: torch.Size
    value: torch.Size
    causal: bool
    lost: tuple[str, ...]
    hidden_size: int | None = None


def _record(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    """Stands in for the softmax: notes the call on the module, returns zeros of the right shape."""
    call = module.__dict__.get("_hybrid_probe")
    if call is None:
        lost = tuple(dict.fromkeys(LOST[name] for name in LOST if kwargs.get(name) is not None))
        causal = _is_causal(attention_mask, is_causal, getattr(module, "is_causal", None))
        module.__dict__["_hybrid_probe"] = _Call(1, query.shape, key.shape, value.shape, causal, lost)
    else:
        call.count += 1
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _is_causal(mask, keyword, attribute) -> bool:
    """The mask is the ground truth (some bidirectional models keep `is_causal=True`); then the keyword, the attribute, SDPA's rule."""
    if torch.is_tensor(mask) and mask.ndim == 4:
        if mask.shape[-2] == 1:
            return False
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        side = min(seen.shape[-2:])
        return not bool(seen[..., :side, :side].triu(1).any())
    if keyword is not None:
        return bool(keyword)
    return True if attribute is None else bool(attribute)


AttentionInterface.register(PROBE, _record)
AttentionMaskInterface.register(PROBE, eager_mask)  # always an explicit mask: causality is read off it


@contextlib.contextmanager
def _recording(model: nn.Module):
    """Every attention of `model` records instead of computing; everything is put back, whatever happens inside."""
    configs = {
        id(config): config for config in (getattr(m, "config", None) for m in model.modules()) if config is not None
    }
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    training = {module: module.training for module in model.modules()}

    def note_input(module, args, kwargs):
        hidden_states = kwargs.get("hidden_states", args[0] if args else None)
        if torch.is_tensor(hidden_states):
            module.__dict__["_hybrid_probe_input"] = hidden_states.shape[-1]

    handles = [module.register_forward_pre_hook(note_input, with_kwargs=True) for module in model.modules()]
    try:
        for config in configs.values():
            config._attn_implementation_internal = PROBE
        model.eval()
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
            module.__dict__.pop("_hybrid_probe", None)
            module.__dict__.pop("_hybrid_probe_input", None)


def probe_attention(
    model: PreTrainedModel, example_inputs: dict | None = None
) -> list[tuple[AttentionSite, tuple[str, ...]]]:
    """
    Every attention site of `model` in the order of execution, with what a linear layer there would lose.

    Args:
        model (`PreTrainedModel`): Any model on a real device. It comes back unchanged.
        example_inputs (`dict`, *optional*): Keyword arguments of one forward; defaults to a few token ids.

    Raises:
        UnsupportedModelError: If no module calls the attention interface, or the dry forward fails without `example_inputs`.
    """
    description = f"{type(model).__name__} (model_type={model.config.model_type!r})"
    if example_inputs is None:
        example_inputs = {"input_ids": torch.arange(PROBE_LENGTH, device=model.device)[None] % 5, "use_cache": False}
    found = []
    with _recording(model), torch.no_grad():
        try:
            model(**example_inputs)
        except TypeError as error:
            raise UnsupportedModelError(
                f"The dry forward of {description} failed: {error}. Pass example_inputs=… with the arguments its forward needs."
            ) from error
        for name, module in model.named_modules():
            call = module.__dict__.get("_hybrid_probe")
            if call is None:
                continue
            call.hidden_size = module.__dict__.get("_hybrid_probe_input")
            # several calls per forward, or keys from another sequence (cross-attention): a linear layer would be another function
            if call.count == 1 and call.query[2] == call.key[2] and call.hidden_size is not None:
                site = AttentionSite(
                    name=name,
                    num_heads=call.query[1],
                    num_key_value_heads=call.key[1],
                    head_dim=call.query[-1],
                    value_dim=call.value[-1],
                    hidden_size=call.hidden_size,
                    causal=call.causal,
                )
                found.append((site, call.lost))
    if not found:
        raise UnsupportedModelError(
            f"{description} has no attention layer that hf_hybrid can replace: none of its modules attends from a sequence to itself "
            "through transformers' AttentionInterface. Families that compute attention inline need a port."
        )
    return found
