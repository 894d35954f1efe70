"""Where attention can be replaced, measured: one dry forward with a recording attention function in place of every
softmax.

Nothing is guessed from names or source code. A module is a site if it calls the attention interface once per forward
(or once per stretch of its input), attending from a sequence to itself; heads, sizes and causality are read off the
call. What is no site is listed with the reason.
"""

import inspect
import itertools

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ...errors import UnsupportedModelError
from ..dummy_inputs import dummy_inputs
from ..offload import execution_device
from .recording import MAY_SKIP, InlineSoftmax, forget_records, recording, take_records
from .records import Record
from .rules import REFUSED, ProbedModel, sort_out


def probe_attention(model: PreTrainedModel, example_inputs: dict | None = None) -> ProbedModel:
    """
    Every attention site of `model` in the model's order, with what a linear layer there would lose, and what is no site
    and why.

    Towers that the forward does not reach (the vision encoder of a language model that was given text) are run by
    themselves.

    Args:
        model (`PreTrainedModel`): Any model; without weights too (on the meta device). It comes back unchanged.
        example_inputs (`dict`, *optional*): Keyword arguments of one forward; by default a few tokens, a picture or a
            sound, by the model's config.

    Raises:
        UnsupportedModelError: If there is no site, or no forward succeeds.
    """
    inline: dict[str, None] = {}
    records: dict[str, Record] = {}
    filled: list[CacheLayerMixin] = []
    description = f"{type(model).__name__} (model_type={model.config.model_type!r})"
    if type(model).forward is nn.Module.forward:
        parts = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
        raise UnsupportedModelError(
            f"{description} has no forward of its own, only what it builds on its parts. Convert those that attend: "
            f"{', '.join(parts) or 'none'}."
        )
    if model.config.model_type in REFUSED:
        # nothing is run: their own memories would keep what the dry forward computes
        raise UnsupportedModelError(
            f"{description} has no attention layer that hf_hybrid can replace: it {REFUSED[model.config.model_type]}. "
            "A linear layer there would be another function."
        )
    with recording(model) as running, torch.no_grad():
        if example_inputs is None:
            # some want more than one row
            candidates = itertools.chain(dummy_inputs(model), dummy_inputs(model, 2))
        else:
            candidates = [example_inputs]
        error, found = _first_success(model, candidates, running, filled)
        if error is not None:
            raise UnsupportedModelError(
                f"The dry forward of {description} failed: {type(error).__name__}: {error}. Pass example_inputs=… with "
                "the arguments its forward needs."
            ) from error
        inline.update(found)
        records.update(take_records(model))
        if example_inputs is None:
            _mark_changing_lengths(model, records, running)
        for name, tower in _unreached_towers(model, records):
            error, found = _first_success(tower, itertools.chain(dummy_inputs(tower), dummy_inputs(tower, 2)), running)
            if error is None:
                inline.update(found)
                records.update({f"{name}.{inner}": record for inner, record in take_records(tower).items()})
            forget_records(tower)
    probed = sort_out(model, records, tuple(inline), filled)
    if not probed.sites:
        raise UnsupportedModelError(
            f"{description} has no attention layer that hf_hybrid can replace: {probed.why_none()}"
        )
    return probed


def _first_success(model, candidates, running, filled: list | None = None) -> tuple[Exception | None, dict[str, None]]:
    """
    Run the model on the first inputs it accepts. The error is that of the likeliest ones, the names are of inline
    softmaxes; the layers of the cache that it gave back go into `filled`.
    """
    first_error = None
    for inputs, may_skip in ((inputs, may_skip) for inputs in candidates for may_skip in (False, True)):
        forget_records(model)
        del running[:]
        token = MAY_SKIP.set(may_skip)
        try:
            with InlineSoftmax(running) as inline:
                output = model(**_with_use_cache(model, inputs))
            cache = getattr(output, "past_key_values", None)
            if filled is not None and cache is not None:
                filled.extend(getattr(getattr(cache, "self_attention_cache", cache), "layers", ()))
            return None, inline.found
        except Exception as error:  # whatever the family raises for arguments it does not want
            first_error = first_error or error
        finally:
            MAY_SKIP.reset(token)
    return first_error or ValueError("no arguments to try: its forward has none that we know"), {}


def _mark_changing_lengths(model, records: dict[str, Record], running) -> None:
    """Once more with longer text: keys that are as many as the queries by chance alone are not the second time."""
    error, _ = _first_success(model, itertools.chain(dummy_inputs(model, 1, 13), dummy_inputs(model, 2, 13)), running)
    if error is not None:
        return
    for name, again in take_records(model).items():
        if name in records and any(call.query[2] != call.key.shape[2] for calls in again.calls for call in calls):
            records[name].other_sequence = True


def _with_use_cache(model, inputs: dict) -> dict:
    if "use_cache" not in inspect.signature(model.forward).parameters:
        return {name: value for name, value in inputs.items() if name != "use_cache"}
    # without weights: with a cache, transformers does not look whether position ids are those of a packed row, which it
    # could not
    return {"use_cache": execution_device(model).type == "meta", **inputs}


def _unreached_towers(model: nn.Module, records: dict[str, Record]) -> list[tuple[str, PreTrainedModel]]:
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


__all__ = ["ProbedModel", "probe_attention"]
