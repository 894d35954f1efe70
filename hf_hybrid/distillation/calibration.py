"""Starting values of mixers, read off the pretrained layers on a little text.

A mixer has to be told two things that copying projections does not: how long the layer remembers, and how loud it
speaks. Both are in the layer's own softmax.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import HybridConfigError
from ..mixers import LinearMixer


logger = logging.get_logger(__name__)

# Least squares may ask for nothing at all, or for the opposite sign, where a state says nothing yet: it stays in the
# graph.
SCALE_RANGE = (1e-3, 1e3)
# First tokens of a sequence, on which heads leave the mass they have no use for (StreamingLLM): it says nothing of how
# long a layer remembers.
NUM_SINKS = 4
# Queries whose attention weights are held at a time.
QUERIES = 256


def calibrate_mixers(
    model: PreTrainedModel,
    batches: Iterable[dict],
    *,
    half_lives: bool = True,
    output_scale: bool = True,
    closed_form: bool = True,
) -> None:
    """
    Set the starting values of the mixers of a model that is being distilled, or was converted, in place.

    - `half_lives`: a decay forgets one half in as many tokens as hold one half of what the layer's softmax looks at,
      per state, without the mass on the first four tokens of a sequence: `softplus(bias) = ln 2 / d` (`gla`,
      `gated_delta_net`, `kimi_delta`, `jet_block`).
    - `output_scale`: what the state adds to the output, $y_S$, is multiplied, per query head, by the factor that brings
      the whole closest to the softmax's output $y_T$, given what the window adds, $y_W$: $\\langle y_T - y_W, y_S
      \\rangle / \\langle y_S, y_S \\rangle$ (the mixers above, `lightning`, and `linear_attention` without a window).

    - `closed_form`: a mixer whose best fit has a closed form takes it (`affine`).

    Mixers that have none of these are left as they are, and cost nothing here.

    Args:
        model (`PreTrainedModel`): Of `prepare_distillation_` or `convert_to_hybrid`, before training.
        batches (`Iterable[dict]`): Inputs of the model; a few thousand tokens do. Padded and packed rows are read as
            what they are.
        half_lives, output_scale, closed_form (`bool`, *optional*, default to `True`): What to set.

    Raises:
        HybridConfigError: If there are no mixers or no batches.
    """
    mixers = [module for module in model.modules() if isinstance(module, LinearMixer)]
    if not mixers:
        raise HybridConfigError(
            "calibrate_mixers: the model has no mixers. Call prepare_distillation_ or convert_to_hybrid first."
        )
    # labels are for losses, but for an encoder-decoder that makes its decoder's input of them
    batches = [
        {k: v for k, v in batch.items() if k not in ("labels", "label") or _decoder_reads_labels(model, batch)}
        for batch in batches
    ]
    if not batches:
        raise HybridConfigError("calibrate_mixers: batches is empty. Pass at least one batch of inputs.")
    decaying = [mixer for mixer in mixers if hasattr(mixer, "set_half_lives")]
    if half_lives and decaying:
        for mixer, histogram in _observe(model, decaying, batches, look_back_histogram):
            # consecutive query heads read one state
            per_state = histogram.view(mixer.num_states, -1, histogram.shape[-1]).sum(1)
            seen = per_state.sum(-1, keepdim=True) > 0
            if not seen.any():
                logger.warning(
                    f"No token of the calibration batches looks at anything but the first {NUM_SINKS} of its sequence: "
                    "too short to say how long layers remember. Decays keep their starting values."
                )
                break
            per_state = torch.where(
                seen, per_state, per_state.sum(0)
            )  # a head that looks at sinks alone says nothing: as its layer
            mixer.set_half_lives(median_distance(per_state).to(next(mixer.parameters()).device))
    scaled = [mixer for mixer in mixers if mixer.can_scale_output]
    if output_scale and scaled:
        for mixer, sums in _observe(model, scaled, batches, _least_squares_sums):
            mixer.scale_output((sums[0] / sums[1].clamp_min(1e-12)).clamp(*SCALE_RANGE))
    if closed_form:
        _take_closed_forms(model, mixers, batches)


def _take_closed_forms(model: PreTrainedModel, mixers: list[LinearMixer], batches: list[dict]) -> None:
    solvable = [mixer for mixer in mixers if hasattr(mixer, "fit")]
    for mixer, products in _observe(model, solvable, batches, _affine_products) if solvable else ():
        mixer.fit(products)


def _decoder_reads_labels(model: PreTrainedModel, batch: dict) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False)) and batch.get("decoder_input_ids") is None


class Call(NamedTuple):
    """What a mixer was called with: tensors as in [`LinearMixer.forward`]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    hidden_states: torch.Tensor | None
    valid: torch.Tensor | None
    segments: torch.Tensor | None

    def run(self, mixer: LinearMixer) -> torch.Tensor:
        """The mixer's output, `[B, T, H, V]` fp32."""
        output, _ = mixer(*self[:4], valid=self.valid, segments=self.segments)
        return output.float()


def _observe(
    model: PreTrainedModel,
    mixers: list[LinearMixer],
    batches: list[dict],
    statistic: Callable[[LinearMixer, Call], torch.Tensor],
) -> list[tuple[LinearMixer, torch.Tensor]]:
    """Every mixer that the batches reach, with the sum of `statistic(mixer, call)` over its calls."""
    totals: dict[int, torch.Tensor] = {}
    busy: set[int] = set()

    def hook(mixer, args, kwargs):
        if id(mixer) in busy:  # the statistic runs the mixer itself
            return
        busy.add(id(mixer))
        hidden_states = args[3] if len(args) > 3 else kwargs.get("hidden_states")
        with torch.no_grad():
            value = statistic(mixer, Call(*args[:3], hidden_states, kwargs.get("valid"), kwargs.get("segments")))
        busy.discard(id(mixer))
        before = totals.get(id(mixer))
        if before is not None and before.shape != value.shape:  # batches of different lengths
            width = max(before.shape[-1], value.shape[-1])
            before, value = (F.pad(x, (0, width - x.shape[-1])) for x in (before, value))
        totals[id(mixer)] = value if before is None else before + value

    handles = [mixer.register_forward_pre_hook(hook, with_kwargs=True) for mixer in mixers]
    training = model.training
    try:
        # while it is distilled, a model shows its mixers their inputs in training only
        model.train(getattr(model, "training_objective", None) is not None)
        for batch in batches:
            with torch.no_grad():
                model(**{k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return [(mixer, totals[id(mixer)]) for mixer in mixers if id(mixer) in totals]


def _attention_weights(call: Call, causal: bool) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """
    The softmax the mixer stands in for, a few queries of one row at a time: `(row, queries, [H, Q, T] fp32)`. Tokens
    that do not exist get and give nothing; packed sequences do not see each other.
    """
    batch, length, num_heads, head_dim = call.query.shape
    position = torch.arange(length, device=call.query.device)
    for row in range(batch):
        keys = call.key[row].float().transpose(0, 1).repeat_interleave(num_heads // call.key.shape[2], dim=0)
        for start in range(0, length, QUERIES):
            here = slice(start, min(start + QUERIES, length))
            scores = call.query[row, here].float().transpose(0, 1) @ keys.transpose(-1, -2) * head_dim**-0.5
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            if causal:
                seen = position <= position[here, None]
            if call.segments is not None:
                seen = seen & (call.segments[row] == call.segments[row, here, None])
            if call.valid is not None:
                seen = seen & call.valid[row] & call.valid[row, here, None]
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
            yield row, here, scores.softmax(-1) * seen


def _affine_products(mixer: LinearMixer, call: Call) -> torch.Tensor:
    """Sums over tokens of [x, 1, y] [x, 1]^T, `[D + 1 + H V, D + 1]`, y being the softmax's output."""
    groups = call.query.shape[2] // call.key.shape[2]
    inputs = F.pad(call.hidden_states.float(), (0, 1), value=1.0)
    sums = inputs.new_zeros(inputs.shape[-1] + call.query.shape[2] * call.value.shape[3], inputs.shape[-1])
    for row, here, weights in _attention_weights(call, mixer.causal):
        output = weights @ call.value[row].float().transpose(0, 1).repeat_interleave(groups, dim=0)  # [H, Q, V]
        x = inputs[row, here]
        if call.valid is not None:
            x = x * call.valid[row, here, None]
        sums += torch.cat([x, output.transpose(0, 1).flatten(1)], dim=1).T @ x
    return sums


def _rank_in_sequence(call: Call) -> torch.Tensor:
    """How many tokens of its sequence exist before each token, `[B, T]`."""
    batch, length = call.query.shape[:2]
    exists = call.valid if call.valid is not None else call.query.new_ones(batch, length, dtype=torch.bool)
    before = exists.cumsum(1) - exists.long()
    if call.segments is None:
        return before
    starts = F.pad(call.segments[:, 1:] != call.segments[:, :-1], (1, 0), value=True)
    return before - torch.where(starts, before, 0).cummax(1).values


def look_back_histogram(mixer: LinearMixer, call: Call) -> torch.Tensor:
    """
    Attention mass by distance, `[H, T]` fp64: entry d is the mass on the token d positions back. Without the mass on
    the sinks.
    """
    batch, length, num_heads, _ = call.query.shape
    sinks = _rank_in_sequence(call) < NUM_SINKS
    position = torch.arange(length, device=call.query.device)
    histogram = torch.zeros(num_heads, length, dtype=torch.double, device=call.query.device)
    for row, here, weights in _attention_weights(call, mixer.causal):
        distance = (position[here, None] - position).abs()
        mass = (weights * ~sinks[row]).double().flatten(1)
        histogram.index_add_(1, distance.flatten(), mass)
    return histogram


def median_distance(histogram: torch.Tensor) -> torch.Tensor:
    """
    Distance within which one half of the mass lies, between tokens by interpolation, at least 1: `[.., T]` -> `[..]`.
    """
    cumulative = histogram.cumsum(-1) / histogram.sum(-1, keepdim=True).clamp_min(1e-12)
    index = (cumulative < 0.5).sum(-1, keepdim=True).clamp_max(histogram.shape[-1] - 1)
    upper = cumulative.gather(-1, index)
    lower = torch.where(index > 0, cumulative.gather(-1, (index - 1).clamp_min(0)), 0.0)
    share = ((0.5 - lower) / (upper - lower).clamp_min(1e-12)).clamp(0.0, 1.0)
    return (index + share).squeeze(-1).clamp_min(1.0).float()


def _least_squares_sums(mixer: LinearMixer, call: Call) -> torch.Tensor:
    """`[2, H]`: sums over tokens of $\\langle y_T - y_W, y_S \\rangle$ and $\\langle y_S, y_S \\rangle$."""
    output = call.run(mixer)
    window = torch.zeros_like(output)
    if mixer.has_window_and_state():
        before, mixer.ablated = mixer.ablated, "state"
        try:
            window = call.run(mixer) * (1.0 - mixer.output_stage.state_share())
        finally:
            mixer.ablated = before
        output = output - window
    groups = call.query.shape[2] // call.key.shape[2]
    sums = output.new_zeros(2, output.shape[2], dtype=torch.double)
    for row, here, weights in _attention_weights(call, mixer.causal):
        target = weights @ call.value[row].float().transpose(0, 1).repeat_interleave(groups, dim=0)  # [H, Q, V]
        state, rest = (x[row, here].transpose(0, 1) for x in (output, window))
        if call.valid is not None:
            state = state * call.valid[row, here, None]
        sums[0] += ((target - rest) * state).double().sum((1, 2))
        sums[1] += state.double().square().sum((1, 2))
    return sums
