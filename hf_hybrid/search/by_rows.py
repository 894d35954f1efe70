"""A trainer's search by rows: units, costs and proposals of its model, and the path of a strategy."""

from typing import Any

import torch
from transformers.utils import logging

from ..errors import DatasetError, HybridConfigError
from .greedy import SwapReport, allowed_drop
from .proposals import FisherProposals, Scores, fisher_proposals
from .row_scorer import RowScorer, heads_of, unit_names
from .row_table import RowTable
from .searching import Budget, search_path
from .trace import SwapTrace


logger = logging.get_logger(__name__)

GRANULARITIES = ("layer", "head")
PROPOSALS = ("fisher", "local_loss", "induction", "none")
# rows for a look at what units would cost: one backward pass each
FISHER_ROWS = 32
INDUCTION_ROWS, INDUCTION_LENGTH = 4, 512


def switch_to(trainer, units) -> None:
    """Make exactly these units linear."""
    trainer.swap_layers(None, heads_of(units, trainer.distill_sites))


def search_by_rows(
    trainer,
    *,
    metric: str,
    greater_is_better: bool,
    strategy: str,
    granularity: str,
    proposals,
    max_drop: float | str | None,
    floor: float | None,
    max_units: int | None,
    cache_share: float | None,
    length: int,
    order: list[str] | None,
    trace: SwapTrace,
    on_step=None,
) -> SwapReport:
    """See [`GreedyLayerSwapCallback`], whose arguments these are. A collective; the switch is as it was afterwards."""
    data = trainer.eval_dataset
    if isinstance(data, dict) or not hasattr(data, "__len__"):
        raise DatasetError(
            f"strategy={strategy!r} looks at single rows: eval_dataset must be one dataset with a length; got "
            f"{type(data).__name__}. Use strategy='greedy' with granularity='layer' for others."
        )
    scorer = RowScorer(trainer, metric)
    units = unit_names(scorer.sites, granularity)
    table = RowTable(scorer, len(data), seed=trainer.args.seed, trace=trace, metric=metric)
    budget = Budget(max_units)
    if cache_share is not None:
        costs, total = unit_costs(scorer.sites, granularity, length)
        budget = Budget(max_units, costs, (1 - cache_share) * total)
    report = search_path(
        units,
        table,
        metric=metric,
        greater_is_better=greater_is_better,
        strategy=strategy,
        max_drop=max_drop,
        floor=floor,
        budget=budget,
        predicted=_predicted(proposals, scorer, table, units, granularity),
        order=order,
        seed=trainer.args.seed,
        trace=trace,
        on_step=on_step,
    )
    report.layer_forwards = scorer.layer_forwards
    return report


def unit_costs(sites, granularity: str, length: int) -> tuple[dict[str, float], float]:
    """
    Bytes of cache (bf16, one sequence of `length` tokens) that each unit saves by being linear, and the bytes of all
    these layers with their softmax.
    """
    saved: dict[str, float] = {}
    total = 0.0
    for name, layer in sites.items():
        site = layer.hybrid_site
        kept = length * (site.head_dim + site.value_dim) * 2
        total += kept * site.num_key_value_heads
        for head in layer.hybrid.heads:
            state = layer.hybrid.restricted((head,)).state_bytes(dtype=torch.bfloat16)
            unit = name if granularity == "layer" else f"{name}:{head}"
            saved[unit] = saved.get(unit, 0.0) + kept - state
    return saved, total


def check_settings(strategy: str, granularity: str, proposals, max_drop, cache_share) -> None:
    """
    Raises:
        HybridConfigError: Of the first setting that means nothing.
    """
    where = "GreedyLayerSwapCallback"
    if granularity not in GRANULARITIES:
        raise HybridConfigError(f"{where}: granularity must be 'layer' or 'head'; got {granularity!r}.")
    if not (proposals in PROPOSALS if isinstance(proposals, str) else isinstance(proposals, dict)):
        raise HybridConfigError(
            f"{where}: proposals must be one of {', '.join(PROPOSALS)}, or a dict of scores by unit; got {proposals!r}."
        )
    if cache_share is not None and not 0 < cache_share < 1:
        raise HybridConfigError(f"{where}: cache_share must be in (0, 1); got {cache_share!r}.")
    if max_drop is not None:
        allowed_drop(max_drop)


def _predicted(proposals, scorer: RowScorer, table: RowTable, units, granularity: str):
    if isinstance(proposals, dict):
        missing = next((unit for unit in units if unit not in proposals), None)
        if missing is not None:
            raise HybridConfigError(f"search: proposals must score every unit; {missing!r} is missing.")
        return Scores(proposals)
    if proposals == "fisher":
        return _fisher(scorer, table, units)
    if proposals == "local_loss":
        return Scores(_local_losses(scorer.trainer, units, granularity))
    if proposals == "induction":
        return Scores(_induction(scorer, units, granularity))
    return None


def _fisher(scorer: RowScorer, table: RowTable, units) -> FisherProposals | None:
    try:
        return fisher_proposals(scorer, units, table.order[:FISHER_ROWS].tolist())
    except HybridConfigError as error:  # softmax inline: the race goes by what it measures
        logger.warning(f"{error}")
        return None


def _local_losses(trainer, units, granularity: str) -> dict[str, float]:
    losses = trainer.last_block_losses if granularity == "layer" else trainer.last_head_losses
    if not losses:
        raise HybridConfigError("search: proposals='local_loss' needs a distillation in this trainer before it.")
    if granularity == "layer":
        return dict(losses)
    heads = {name: layer.hybrid.heads for name, layer in trainer.distill_sites.items()}
    return {f"{name}:{head}": loss for name in heads for head, loss in zip(heads[name], losses[name], strict=True)}


def _induction(scorer: RowScorer, units, granularity: str) -> dict[str, float]:
    """What looks things up is dear; of a layer, its dearest head counts."""
    from ..surgery.induction import observed_induction

    trainer = scorer.trainer
    rows = [trainer.eval_dataset[i]["input_ids"] for i in range(min(INDUCTION_ROWS, len(trainer.eval_dataset)))]
    length = min(INDUCTION_LENGTH, *(len(row) for row in rows))
    passages = torch.tensor([list(row)[:length] for row in rows], device=trainer.args.device)
    model: Any = scorer.model
    scores = observed_induction(model, passages)
    if granularity == "layer":
        return {name: max(scores[name]) for name in units}
    return {unit: scores[unit.partition(":")[0]][int(unit.partition(":")[2])] for unit in units}


__all__ = ["check_settings", "search_by_rows", "switch_to", "unit_costs"]
