"""What a checkpoint shows of a model: the heads that are linear now, and the parameters of these alone."""

import torch
from torch import nn

from ..configuration_hybrid import LinearSite
from ..errors import UnsupportedModelError
from .layer import HybridAttentionMixin, hybrid_layers, is_hybrid_attention
from .position_bias import is_all_linear
from .projections import parameter_name


# Where PEFT's wrappers keep the layer that they wrap.
WRAPPED = ".base_layer"


def published_sites(model: nn.Module) -> dict[str, LinearSite]:
    """The layers of which some heads are linear now, by name."""
    return {
        name: LinearSite(layer.hybrid_site, layer.hybrid_config.to_dict(), layer.linear_heads)
        for name, layer in hybrid_layers(model).items()
        if layer.linear_heads
    }


def is_published(path: str, layer: HybridAttentionMixin, dtype: torch.dtype) -> bool:
    """Whether the layer holds what a checkpoint would hold of it, and nothing else."""
    if "hybrid" not in layer._modules or path.endswith(WRAPPED):
        return False
    same_type = all(parameter.dtype == dtype for parameter in layer.hybrid.parameters())
    return layer.linear_heads == layer.hybrid.heads and layer.hybrid_delta is None and same_type


def published_state(model: nn.Module, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor] | None:
    """
    The tensors of the hybrid as the switch stands: no mixers of heads that are not linear, projections with their
    trained differences, everything in the model's type and under the host's names, also where an adapter holds the
    mixers.

    Args:
        model (`nn.Module`): The hybrid, also while it is distilled.
        state (`dict`, *optional*): Its state, where somebody gathered it; `model.state_dict()` by default.

    Returns:
        `dict` or `None`: `None` if nothing has to be changed.
    """
    layers = {path: module for path, module in model.named_modules() if is_hybrid_attention(module)}
    types = {path: _own_dtype(layer, model) for path, layer in layers.items()}
    if all(is_published(path, layer, types[path]) for path, layer in layers.items()):
        return state
    state = dict(model.state_dict() if state is None else state)
    _unwrap_saved_modules(model, state)
    for path, layer in layers.items():
        owner = path.removesuffix(WRAPPED)
        mixer, deltas = _taken(state, model, path, owner, layer)
        if any(value.is_meta for value in mixer.values()):
            raise UnsupportedModelError(
                f"{owner}: the mixer is offloaded, so that the rows of some heads cannot be taken out of it. Load the "
                "model "
                "without offload to save it with this switch."
            )
        for name in [name for name in state if owner != path and name.startswith(f"{path}.")]:
            state[f"{owner}.{name.removeprefix(f'{path}.')}"] = state.pop(name)
        if not layer.linear_heads:
            continue
        whole = layer.linear_heads == layer.hybrid.heads
        for name, value in mixer.items():
            rows = value if whole else layer.hybrid._rows(name, value, layer.linear_heads)
            state[f"{owner}.hybrid.{name}"] = rows.detach().to(types[path]).contiguous()
        if layer.hybrid_delta is not None and is_all_linear(layer):
            _add_deltas(state, owner, layer, deltas)
    return state


def _unwrap_saved_modules(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Other modules that train with an adapter (a classifier's head), under the host's names."""
    for path, module in model.named_modules():
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            saved, original = (_take(state, f"{path}.{kind}.") for kind in ("modules_to_save", "original_module"))
            active = (getattr(module, "active_adapters", None) or [""])[0]
            trained = _take(saved, f"{active}.")
            state.update({f"{path}.{name}": value for name, value in (trained or original).items()})


def _taken(state, model: nn.Module, path: str, owner: str, layer: HybridAttentionMixin) -> tuple[dict, dict]:
    """
    Tensors of the layer's mixer and of its differences, taken out of `state`, and with them those of adapters that are
    not active.
    """
    if owner == path:
        return _take(state, f"{path}.hybrid."), _take(state, f"{path}.hybrid_delta.")
    held = model.get_submodule(owner).hybrid_mixer
    active = next((name for name, mixer in held.items() if mixer is getattr(layer, "hybrid", None)), "")
    mixers, deltas = _take(state, f"{owner}.hybrid_mixer."), _take(state, f"{owner}.hybrid_delta.")
    return _take(mixers, f"{active}."), _take(deltas, f"{active}.")


def _own_dtype(layer: HybridAttentionMixin, model: nn.Module) -> torch.dtype:
    own = (p for name, p in layer.named_parameters() if not name.startswith(("hybrid.", "hybrid_delta.")))
    return next((p.dtype for p in own if p.is_floating_point() and p.dtype.itemsize >= 2), model.dtype)


def _take(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state.pop(name) for name in names}


def _add_deltas(state, path: str, layer: HybridAttentionMixin, deltas: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for key, delta in layer.hybrid_delta.items():
            own = {name.removeprefix(f"{key}."): value for name, value in deltas.items() if name.startswith(f"{key}.")}
            name = f"{path}.{parameter_name(key)}"
            state[name] = torch.func.functional_call(delta, own, (state[name],)).detach()


__all__ = ["is_published", "published_sites", "published_state"]
