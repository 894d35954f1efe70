"""Starting values of mixers, read off the pretrained layers on a little text.

A gated mixer has to be told two things that copying projections does not: how long the layer remembers, and how loud it speaks. Both are in the
layer's own softmax.
"""

from collections.abc import Iterable

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .distillation import DistillModelMixin
from .errors import HybridConfigError
from .mixers import LinearMixer


# Output scales outside of this are an accident of the calibration text.
SCALE_RANGE = (0.1, 10.0)


def calibrate_mixers(
    model: PreTrainedModel,
    batches: Iterable[dict],
    *,
    half_lives: bool = True,
    output_scale: bool = True,
) -> None:
    """
    Set the starting values of the mixers of a model that is being distilled, or was converted, in place.

    - `half_lives`: a decay forgets one half in as many tokens as hold one half of what the layer's softmax looks at, per state, sinks left out:
      `softplus(bias) = ln 2 / d` (`gla`, `gated_delta_net`, `kimi_delta`, `jet_block`).
    - `output_scale`: what the state adds to the output, $y_S$, is multiplied, per query head, by the factor that brings the whole closest to the softmax's
      output $y_T$, given what the window adds, $y_W$: $\\langle y_T - y_W, y_S \\rangle / \\langle y_S, y_S \\rangle$, kept within [0.1, 10] (the mixers above, `lightning`, and `linear_attention` without a window).

    Mixers that have neither are left as they are.

    Args:
        model (`PreTrainedModel`): Of `prepare_distillation_` or `convert_to_hybrid`, before training.
        batches (`Iterable[dict]`): Inputs of the model; a few thousand tokens do.
        half_lives (`bool`, *optional*, defaults to `True`), output_scale (`bool`, *optional*, defaults to `True`): What to set.

    Raises:
        HybridConfigError: If there are no mixers or no batches.
    """
    mixers = [module for module in model.modules() if isinstance(module, LinearMixer)]
    if not mixers:
        raise HybridConfigError(
            "calibrate_mixers: the model has no mixers. Call prepare_distillation_ or convert_to_hybrid first."
        )
    batches = [{k: v for k, v in batch.items() if k not in ("labels", "label")} for batch in batches]
    if not batches:
        raise HybridConfigError("calibrate_mixers: batches is empty. Pass at least one batch of inputs.")
    decaying = [mixer for mixer in mixers if hasattr(mixer, "set_half_lives")]
    if half_lives and decaying:
        for mixer, histogram in zip(decaying, _observe(model, decaying, batches, look_back_histogram), strict=True):
            per_state = histogram.view(mixer.num_states, -1, histogram.shape[-1]).sum(1)
            mixer.set_half_lives(median_distance(per_state).to(next(mixer.parameters()).device))
    scaled = [mixer for mixer in mixers if mixer.can_scale_output]
    if output_scale and scaled:
        for mixer, sums in zip(scaled, _observe(model, scaled, batches, _least_squares_sums), strict=True):
            mixer.scale_output((sums[0] / sums[1].clamp_min(1e-12)).clamp(*SCALE_RANGE))


def _observe(model, mixers, batches, statistic):
    """Sum over the batches of `statistic(mixer, query, key, value, hidden_states, valid)`, one per mixer."""
    totals: dict[int, torch.Tensor] = {}
    handles = []

    def hook(mixer, args, kwargs):
        if id(mixer) in busy:  # the statistic runs the mixer itself
            return
        busy.add(id(mixer))
        with torch.no_grad():
            value = statistic(mixer, *args[:3], args[3] if len(args) > 3 else None, kwargs.get("valid"))
        busy.discard(id(mixer))
        before = totals.get(id(mixer))
        if before is not None and before.shape != value.shape:  # batches of different lengths
            width = max(before.shape[-1], value.shape[-1])
            before, value = (F.pad(x, (0, width - x.shape[-1])) for x in (before, value))
        totals[id(mixer)] = value if before is None else before + value

    busy: set[int] = set()
    training = model.training
    try:
        handles += [mixer.register_forward_pre_hook(hook, with_kwargs=True) for mixer in mixers]
        # while it is distilled, a model shows its students their inputs in training only
        model.train(isinstance(model, DistillModelMixin))
        for batch in batches:
            with torch.no_grad():
                model(**{k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return [totals[id(mixer)] for mixer in mixers]


def _softmax_weights(query, key, valid, causal=True):
    """Attention weights of all tokens, `[B, H, T, T]` fp32; rows of tokens that do not exist are zero."""
    length, groups = query.shape[1], query.shape[2] // key.shape[2]
    query, key = query.float().transpose(1, 2), key.float().transpose(1, 2).repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device)
    seen = seen.tril() if causal else seen
    if valid is not None:
        seen = seen & valid[:, None, None, :]
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    return weights if valid is None else weights * valid[:, None, :, None]


def look_back_histogram(mixer, query, key, value, hidden_states, valid):
    """Attention mass by distance, `[H, T]` fp64: entry d is the mass on the token d positions back. Without the mass on the sink tokens, which
    says nothing of how long a layer remembers."""
    weights = _softmax_weights(query, key, valid)
    length = weights.shape[-1]
    num_sinks = mixer.output_stage.num_sink_tokens if hasattr(mixer, "output_stage") else 0
    weights[..., :num_sinks] = 0.0  # of a left-padded row nothing but padding
    distance = torch.arange(length, device=query.device)
    distance = (distance[:, None] - distance).clamp_min(0)
    mass = weights.sum(0).double().flatten(1)
    return torch.zeros(mass.shape[0], length, dtype=torch.double, device=query.device).index_add_(
        1, distance.flatten(), mass
    )


def median_distance(histogram: torch.Tensor) -> torch.Tensor:
    """Distance within which one half of the mass lies, between tokens by interpolation, at least 1: `[.., T]` -> `[..]`."""
    cumulative = histogram.cumsum(-1) / histogram.sum(-1, keepdim=True).clamp_min(1e-12)
    index = (cumulative < 0.5).sum(-1, keepdim=True).clamp_max(histogram.shape[-1] - 1)
    upper = cumulative.gather(-1, index)
    lower = torch.where(index > 0, cumulative.gather(-1, (index - 1).clamp_min(0)), 0.0)
    share = ((0.5 - lower) / (upper - lower).clamp_min(1e-12)).clamp(0.0, 1.0)
    return (index + share).squeeze(-1).clamp_min(1.0).float()


def _least_squares_sums(mixer, query, key, value, hidden_states, valid):
    """`[2, H]`: sums over tokens of $\\langle y_T - y_W, y_S \\rangle$ and $\\langle y_S, y_S \\rangle$."""
    groups = query.shape[2] // key.shape[2]
    weights = _softmax_weights(query, key, valid, mixer.causal)
    target = (weights @ value.float().transpose(1, 2).repeat_interleave(groups, dim=1)).transpose(1, 2)
    output = mixer(query, key, value, hidden_states, valid=valid)[0].float()
    if mixer.has_window_and_state():
        before, mixer.ablated = mixer.ablated, "state"
        try:
            window = mixer(query, key, value, hidden_states, valid=valid)[0].float()
        finally:
            mixer.ablated = before
        window = window * (1.0 - mixer.output_stage.state_share())
        output, target = output - window, target - window
    if valid is not None:
        output = output * valid[..., None, None]
    return torch.stack([(target * output).sum((0, 1, 3)), (output * output).sum((0, 1, 3))]).double()
