"""The switch: which key-value heads run through their mixers."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from ..conversion.layer import HybridAttentionMixin, check_divisible, check_heads, hybrid_layers
from ..errors import HybridConfigError, closest
from ..modeling_hybrid import HybridModelMixin


def linear_heads(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The key-value heads that are linear now, by layer; layers without are left out."""
    return {name: layer.linear_heads for name, layer in hybrid_layers(model).items() if layer.linear_heads}


def set_linear_heads_(
    model: PreTrainedModel, heads: Mapping[str, Sequence[int] | None], *, remember: bool = True
) -> None:
    """
    Set the switch of a hybrid, in place: exactly these key-value heads run through their mixers, all others through the
    softmax.

    Args:
        model (`PreTrainedModel`): With mixers: converted, in distillation, or with an adapter.
        heads (`dict`): Heads by layer; `None` for all that have a mixer. Layers that it does not name keep their
            softmax.
        remember (`bool`, *optional*, defaults to `True`): Whether an active adapter keeps this switch, also in its
            file.

    Raises:
        HybridConfigError: If a layer or a head has no mixer, or is named twice; nothing was changed.
    """
    layers = hybrid_layers(model)
    hybrid = next((part for part in model.modules() if isinstance(part, HybridModelMixin)), None)
    wanted: dict[str, tuple[int, ...]] = {}
    if not isinstance(heads, Mapping):
        raise HybridConfigError(
            f"set_linear_heads_: heads must be a dict of heads by layer; got {heads!r}. Use None for all."
        )
    for name, some in heads.items():
        if some is not None and (isinstance(some, str) or not isinstance(some, Iterable)):
            raise HybridConfigError(
                f"set_linear_heads_: heads of {name!r} must be a list of key-value heads, or None for all; got "
                f"{some!r}."
            )
        if name not in layers:
            raise HybridConfigError(
                f"set_linear_heads_: {name!r} has no mixer; {len(layers)} layers have.{closest(str(name), layers)} "
                "Convert it first."
            )
        own = layers[name].hybrid.heads
        wanted[name] = own if some is None else check_heads(some, own, f"set_linear_heads_: {name}")
        if 0 < len(wanted[name]) < layers[name].hybrid_site.num_key_value_heads:
            _check_divisible(name, layers[name], wanted[name])
    for name, layer in layers.items():
        finished = hybrid is not None and hybrid.projections != "shared" and layer.hybrid_delta is None
        if finished and wanted.get(name, ()) != layer.hybrid.heads:
            raise HybridConfigError(
                f"set_linear_heads_: the projections of {name} were trained with its mixer "
                f"(projections={hybrid.projections!r}), so that "
                "its softmax is not the teacher's any more. Keep all of its heads linear, or load the base model."
            )
    if hybrid is not None and hybrid.repaired and any(wanted.get(n, ()) != layers[n].linear_heads for n in layers):
        raise HybridConfigError(
            f"set_linear_heads_: {type(hybrid).__name__} was repaired with the switch as it stands. Set the switch of "
            "the model before its repair."
        )
    for name, layer in layers.items():
        layer.linear_heads = wanted.get(name, ())
    for part in model.modules() if remember else ():
        if hasattr(type(part), "remember_switch"):  # the wrapper of an adapter
            part.remember_switch()
    if hybrid is not None:
        hybrid.refresh_hybrid_config()


def _check_divisible(name: str, layer: HybridAttentionMixin, heads: tuple[int, ...]) -> None:
    """Some layers are linear as a whole or not at all."""
    if layer.hybrid_delta is not None:
        raise HybridConfigError(
            f"set_linear_heads_: {name} has trained projections, which belong to the whole layer; got heads "
            f"{list(heads)}. Make all of its heads linear, or distil with projections='shared'."
        )
    check_divisible(layer, f"{name} ({type(layer).__name__})")
