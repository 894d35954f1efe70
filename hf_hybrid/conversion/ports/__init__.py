"""
Families that compute attention inline: one small file each, which says how such a layer comes by its queries, keys and
values.

A port is a function `(attention, module, *args, **kwargs)` with the arguments and the result of the module's own
`forward`, but that it calls `attention(module, query, key, value, mask, scaling=…)` where the family computes a
softmax. It runs for linear layers (and for the probe) only: a layer that keeps its softmax runs the family's own code,
so that its numbers cannot change. Biases that the family adds to its scores are handed on by name; a linear layer
cannot express them, and conversion says so.
"""

from collections.abc import Callable

from . import bloom, deberta, deberta_v2, falcon, gptj, mpnet, mpt


# By module and name of the attention class, so that no family is imported that nobody uses. Subclasses (flash
# attention) are not ported.
PORTS: dict[str, Callable] = {
    "transformers.models.bloom.modeling_bloom.BloomAttention": bloom.forward,
    "transformers.models.deberta.modeling_deberta.DisentangledSelfAttention": deberta.forward,
    "transformers.models.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention": deberta_v2.forward,
    "transformers.models.falcon.modeling_falcon.FalconAttention": falcon.forward,
    "transformers.models.gptj.modeling_gptj.GPTJAttention": gptj.forward,
    "transformers.models.mpnet.modeling_mpnet.MPNetSelfAttention": mpnet.forward,
    "transformers.models.mpt.modeling_mpt.MptAttention": mpt.forward,
}


def find_port(attention_class: type) -> Callable | None:
    """
    The port of a family's attention class, or `None`: it calls the attention interface itself, or nobody wrote one.
    """
    return PORTS.get(f"{attention_class.__module__}.{attention_class.__qualname__}")


# Families that call the interface, and work on keys and values of all heads after they were cached. A class with its
# converted subclass.
READ_ALL_HEADS = (
    "transformers.models.doge.modeling_doge.DogeAttention",
    "transformers.models.inkling2.modeling_inkling2.Inkling2FullAttention",
    "transformers.models.inkling2.modeling_inkling2.Inkling2SlidingAttention",
)


def why_whole_layers(attention_class: type) -> str | None:
    """Why some heads of a family's layer cannot be linear while the others keep the softmax; `None`: they can."""
    classes = [cls for cls in attention_class.__mro__ if cls.__module__.startswith("transformers.models.")]
    if any(find_port(cls) is not None for cls in classes[:1]):
        return "the family computes its softmax inline, where heads cannot be taken out"
    if any(f"{cls.__module__}.{cls.__qualname__}" in READ_ALL_HEADS for cls in classes[:1]):
        return "the family works on the keys and values of all heads after it cached them"
    return None


__all__ = ["PORTS", "READ_ALL_HEADS", "find_port", "why_whole_layers"]
