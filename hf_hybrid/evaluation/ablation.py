"""How much of a window mixer's output comes from its state. One that ignores it is a sliding window in disguise."""

import contextlib
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import HybridConfigError
from ..mixers import LinearMixer


def _window_mixers(model: nn.Module) -> dict[str, LinearMixer]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, LinearMixer) and m.has_window_and_state()}
    if not found:
        raise HybridConfigError(
            "The model has no mixer with both a window and a state: there is nothing to take apart."
        )
    return found


@contextlib.contextmanager
def ablate(model: nn.Module, part: str):
    """
    For the duration of the block, every mixer with a window and a state runs without one of them.

    Args:
        model (`nn.Module`): A hybrid.
        part (`str`): `"state"`: only the window and the sinks are left, as in `sliding_window`. `"window"`: only the
            recurrence is left, and takes in every token at once.

    Raises:
        HybridConfigError: If `part` is neither, or no mixer has both.
    """
    if part not in ("state", "window"):
        raise HybridConfigError(f"ablate: part must be 'state' or 'window'; got {part!r}.")
    mixers = _window_mixers(model)
    before = {name: mixer.ablated for name, mixer in mixers.items()}
    for mixer in mixers.values():
        mixer.ablated = part
    try:
        yield model
    finally:
        for name, mixer in mixers.items():
            mixer.ablated = before[name]


def _share_hook(name: str, sums: dict[str, list[float]]):
    """A forward hook that adds to `sums[name]` the squares of what the state contributes and of the whole output."""

    def hook(mixer, args, kwargs, result):
        if mixer.ablated is not None:  # called from in here
            return
        kwargs = {**kwargs, "inplace_final_state": False, "output_final_state": False}
        mixer.ablated = "state"
        try:
            without = mixer(*args, **kwargs)[0]
        finally:
            mixer.ablated = None
        output, valid = result[0].double(), kwargs.get("valid")
        difference = output - without.double()
        if valid is not None:
            output, difference = (x * valid[..., None, None] for x in (output, difference))
        part, whole = sums.get(name, (0.0, 0.0))
        sums[name] = [part + difference.square().sum().item(), whole + output.square().sum().item()]

    return hook


def state_share(model: nn.Module, batches: Iterable[dict]) -> dict[str, float]:
    """
    Share of each mixer's output that comes from its state: $\\lVert y - y_{window} \\rVert / \\lVert y \\rVert$ over
    all tokens of the batches, each layer on its own inputs. 0 is a sliding window in disguise; above 1 the two halves
    work against each other.

    Args:
        model (`nn.Module`): A hybrid in eval mode.
        batches (`Iterable[dict]`): Inputs of the model.

    Returns:
        `dict[str, float]`: By the mixer's name in the model; without mixers that no batch reached (switched off, or of
        a vision tower that was given no picture).

    Raises:
        HybridConfigError: If no mixer has both parts, there are no batches, no batch reaches a mixer, or the model is
            inside an [`ablate`] block.
    """
    mixers, batches = _window_mixers(model), list(batches)
    if not batches:
        raise HybridConfigError("state_share: batches is empty. Pass at least one.")
    if any(mixer.ablated is not None for mixer in mixers.values()):
        raise HybridConfigError(
            "state_share: the model is ablated already, so that nothing can be compared. "
            "Leave the `ablate` block first."
        )
    sums: dict[str, list[float]] = {}

    handles = [mixer.register_forward_hook(_share_hook(name, sums), with_kwargs=True) for name, mixer in mixers.items()]
    try:
        for batch in batches:
            with torch.no_grad():
                model(**{**batch, "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise HybridConfigError(
            "state_share: batches must reach a mixer; got none that does. "
            "Switch linear layers on, or pass inputs that use them."
        )
    return {name: (sums[name][0] / sums[name][1]) ** 0.5 if sums[name][1] else 0.0 for name in mixers if name in sums}
