r"""
Cheap looks at what each unit would cost, to decide which ones are worth a trial. They propose; the metric decides.

The gradient of the divergence from the teacher is zero at the teacher, so that first-order scores say nothing. Second
order does: with
$$a_l = \langle \partial \log p(\mathrm{answer}) / \partial o_l,\; \mathrm{linear}_l - \mathrm{softmax}_l \rangle$$
for each row and unit, $F_{lm} = \operatorname{mean}_{\mathrm{rows}} a_l a_m$ is a Fisher (Gauss-Newton) matrix over
units, and making a set $S$ linear costs about $\tfrac12 \sum_{l, m \in S} F_{lm}$: interactions included, for one
backward pass a row.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..conversion.interception import MixerInputs
from ..conversion.layer import HybridAttentionMixin
from ..errors import HybridConfigError
from .ranks import gathered
from .row_scorer import RowScorer


class FisherProposals:
    """
    Damage by the matrix above; a `predicted` of [`Problem`].

    Args:
        units (`list[str]`): Their names, in the order of the columns of `slopes`.
        slopes (`np.ndarray`): $a$, one row for each row of data, `[R, U]`.
    """

    def __init__(self, units: Sequence[str], slopes: np.ndarray):
        self.units, self.matrix = list(units), slopes.T @ slopes / max(len(slopes), 1)

    def __call__(self, linear: Sequence[str]) -> dict[str, float]:
        """What each of the other units would add to the cost of those that are linear."""
        inside = [self.units.index(unit) for unit in linear]
        return {
            unit: float(self.matrix[i, i] / 2 + self.matrix[i, inside].sum())
            for i, unit in enumerate(self.units)
            if i not in inside
        }


class Scores:
    """The same damage whatever is linear already: local losses, induction, whatever a user has."""

    def __init__(self, scores: Mapping[str, float]):
        self.scores = dict(scores)

    def __call__(self, linear: Sequence[str]) -> dict[str, float]:
        return {unit: score for unit, score in self.scores.items() if unit not in linear}


def fisher_proposals(scorer: RowScorer, units: Sequence[str], rows: Sequence[int]) -> FisherProposals:
    """
    One forward and backward pass for each of these rows, all heads softmax, every mixer beside its layer. A collective.

    Args:
        scorer ([`RowScorer`]): With the model, the rows and the loss.
        units (`list[str]`): Layers or heads.
        rows (`list[int]`): Which rows; a few dozen do.

    Raises:
        HybridConfigError: If no layer shows its queries and keys (it computes its softmax inline).
    """
    trainer, observer = scorer.trainer, _Slopes(scorer.sites)
    share = list(rows)[trainer.args.process_index :: trainer.args.world_size] if not trainer.is_fsdp_enabled else rows
    trains = {parameter: parameter.requires_grad for parameter in scorer.model.parameters()}
    layers, slopes = list(scorer.sites.values()), []
    with scorer._switch_restored():
        trainer.swap_layers([])
        scorer.model.eval()
        try:
            for parameter in trains:  # nothing but the outputs of attention is differentiated
                parameter.requires_grad_(False)
            for layer in layers:
                layer.local_objective = observer
            for row in share:
                slopes.append(observer.of_row(scorer, row, units))
            # a backward pass through activations alone is about one forward
            scorer.layer_forwards += 2 * len(layers) * len(rows)
        finally:
            for layer in layers:
                layer.local_objective = None
            for parameter, mode in trains.items():
                parameter.requires_grad_(mode)
    parts = gathered(np.array(slopes).reshape(-1, len(units)))
    found = np.concatenate(parts if not trainer.is_fsdp_enabled else parts[:1])
    if not found.any():
        raise HybridConfigError(
            "fisher_proposals: no attention of this model shows its queries and keys (it computes its softmax inline). "
            "Search without proposals, or with strategy='greedy'."
        )
    return FisherProposals(units, found)


class _Slopes:
    """Runs layers as their host does, and takes the inner product of what comes back with what a mixer would change."""

    def __init__(self, sites: Mapping[str, HybridAttentionMixin]):
        self.names = {layer: name for name, layer in sites.items()}
        self.found: dict[str, torch.Tensor] = {}

    def of_row(self, scorer: RowScorer, row: int, units: Sequence[str]) -> list[float]:
        self.found = {}
        with torch.enable_grad():
            trainer = scorer.trainer
            inputs = scorer._inputs(np.array([row]))
            with trainer.compute_loss_context_manager():
                trainer.compute_loss(trainer.model, dict(inputs)).backward()
        return [self._of(unit) for unit in units]

    def _of(self, unit: str) -> float:
        name, _, head = unit.partition(":")
        slopes = self.found.get(name)
        if slopes is None:
            return 0.0
        return float(slopes[int(head)] if head else slopes.sum())

    def run_layer(self, layer, args, kwargs):
        return layer.observed_forward(self, args, kwargs)

    def observe(self, layer: HybridAttentionMixin, inputs: MixerInputs, target: torch.Tensor) -> None:
        mixer = layer.hybrid
        if layer.hybrid_delta is not None or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            given, softmax, split = inputs, target, None
            tensors = [given.query, given.key, given.value]
            if len(mixer.heads) < layer.hybrid_site.num_key_value_heads:
                split = layer._split(mixer.heads)
                assert split is not None  # some heads are not in the mixer
                tensors = [split.linear(x, axis=2) for x in tensors]
                softmax = split.linear(target, axis=2)
            mixed, _ = mixer(*tensors, given.hidden_states, valid=given.valid, segments=given.segments)
            change = (mixed - softmax).float()
            if given.valid is not None and given.valid.shape == change.shape[:2]:
                change = change * given.valid[..., None, None]
        if not target.requires_grad:  # the first one: nothing below it is differentiated
            target.requires_grad_(True)
        name, total = self.names[layer], layer.hybrid_site.num_key_value_heads

        def take(gradient: torch.Tensor) -> None:
            own = gradient if split is None else split.linear(gradient, axis=2)
            of_heads = (own.float() * change).sum((0, 1, 3)).unflatten(0, (len(mixer.heads), -1)).sum(1)
            slopes = self.found.setdefault(name, torch.zeros(total, device=of_heads.device))
            slopes[list(mixer.heads)] += of_heads

        target.register_hook(take)


__all__ = ["FisherProposals", "Scores", "fisher_proposals"]
