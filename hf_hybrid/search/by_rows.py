"""A trainer's search by rows: units, costs and proposals of its model, and the path of a strategy."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..conversion.layer import check_divisible
from ..errors import DatasetError, HybridConfigError, MetricError
from .greedy import SwapReport, allowed_drop, read_metric
from .proposals import FisherProposals, Scores, fisher_proposals
from .row_scorer import RowScorer, heads_of, unit_names
from .row_table import METRIC, RowTable
from .scoring import evaluate
from .searching import Budget, search_path
from .strategies import check_order
from .trace import SwapTrace


logger = logging.get_logger(__name__)

GRANULARITIES = ("layer", "head")
PROPOSALS = ("fisher", "local_loss", "induction", "none")
PROPOSED = ("race", "proposed")
# rows for a look at what units would cost: one backward pass each
FISHER_ROWS = 32
INDUCTION_ROWS, INDUCTION_LENGTH = 4, 512


def switch_to(trainer, units) -> None:
    """Make exactly these units linear."""
    trainer.swap_layers(None, heads_of(units, trainer.distill_sites))


@dataclass(frozen=True)
class RowSearch:
    """Settings of a search by rows; see [`GreedyLayerSwapCallback`], whose arguments these are."""

    metric: str
    greater_is_better: bool
    strategy: str
    granularity: str
    proposals: str | dict[str, float]
    max_drop: float | str | None
    floor: float | None
    max_units: int | None
    cache_share: float | None
    length: int
    order: list[str] | None

    def budget(self, sites) -> Budget:
        if self.cache_share is None:
            return Budget(self.max_units)
        costs, total = unit_costs(sites, self.granularity, self.length)
        return Budget(self.max_units, costs, (1 - self.cache_share) * total)


def search_by_rows(trainer, settings: RowSearch, trace: SwapTrace, on_step=None) -> SwapReport:
    """A collective. The settings were checked with [`check_search`]."""
    metric = settings.metric
    # prepares the model as every evaluation does: shards, casts and places it
    trainer.swap_layers([])
    whole = read_metric(evaluate(trainer, metric), metric, "search, before the first step")
    scorer = RowScorer(trainer, metric)
    units = unit_names(scorer.sites, settings.granularity)
    table = RowTable(scorer, len(trainer.eval_dataset), seed=trainer.args.seed, trace=trace, metric=metric)
    _check_mean(metric, float(table.means([])[METRIC]), whole)
    trace.start_search(asdict(settings))
    report = search_path(
        units,
        table,
        metric=metric,
        greater_is_better=settings.greater_is_better,
        strategy=settings.strategy,
        max_drop=settings.max_drop,
        floor=settings.floor,
        budget=settings.budget(scorer.sites),
        predicted=_predicted(settings, scorer, table, units),
        order=settings.order,
        seed=trainer.args.seed,
        trace=trace,
        on_step=on_step,
    )
    report.layer_forwards = scorer.layer_forwards
    return report


def check_search(trainer, settings: RowSearch) -> None:
    """
    What would stop a search by rows, before anything is paid for.

    Raises:
        DatasetError: If there are no single rows to look at.
        HybridConfigError: If a setting does not fit this model.
    """
    data, args, strategy = trainer.eval_dataset, trainer.args, settings.strategy
    if isinstance(data, dict) or not hasattr(data, "__len__"):
        raise DatasetError(
            f"strategy={strategy!r} looks at single rows: eval_dataset must be one dataset with a length; got "
            f"{type(data).__name__}. Use strategy='greedy' with granularity='layer' for others."
        )
    if args.include_for_metrics or args.batch_eval_metrics:
        raise HybridConfigError(
            f"strategy={strategy!r} gives compute_metrics single rows of predictions and labels; got "
            f"include_for_metrics={args.include_for_metrics}, batch_eval_metrics={args.batch_eval_metrics}. Use "
            "strategy='greedy' with granularity='layer'."
        )
    units = unit_names(trainer.distill_sites, settings.granularity)
    if isinstance(settings.proposals, dict) and strategy in PROPOSED:
        missing = next((unit for unit in units if unit not in settings.proposals), None)
        if missing is not None:
            raise HybridConfigError(f"search: proposals must score every unit; {missing!r} is missing.")
    if strategy == "fixed":
        check_order(units, settings.order)
    if settings.granularity == "head":
        for name, layer in trainer.distill_sites.items():
            if len(layer.hybrid.heads) > 1:
                check_divisible(layer, f"search by head: {name}")
    settings.budget(trainer.distill_sites).check(units)


def _check_mean(metric: str, mean: float, whole: float) -> None:
    """A search by rows decides by means over rows; an evaluation's loss may weigh rows by their tokens."""
    if metric != "eval_loss" and abs(mean - whole) > 1e-3 * max(1.0, abs(whole)):
        raise MetricError(
            f"search: {metric!r} must be a mean over rows to be decided by rows; it is {whole:.6g} of all rows, and "
            f"the mean of single rows is {mean:.6g}. Use strategy='greedy' with granularity='layer', or a metric that "
            "is a mean."
        )


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


def _predicted(settings: RowSearch, scorer: RowScorer, table: RowTable, units):
    """What a strategy goes by, if it goes by predictions."""
    proposals, granularity = settings.proposals, settings.granularity
    if settings.strategy not in PROPOSED:
        return None
    if isinstance(proposals, dict):
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
    rows = [trainer.eval_dataset[i].get("input_ids") for i in range(min(INDUCTION_ROWS, len(trainer.eval_dataset)))]
    if any(row is None for row in rows):
        raise HybridConfigError("search: proposals='induction' reads text twice; these rows have no input_ids.")
    model: Any = scorer.model.eval()
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * INDUCTION_LENGTH
    length = min(INDUCTION_LENGTH, longest // 2, *(len(row) for row in rows))
    passages = torch.tensor([list(row)[:length] for row in rows], device=trainer.args.device)
    scores = observed_induction(model, passages)
    if granularity == "layer":
        return {name: max(scores[name]) for name in units}
    return {unit: scores[unit.partition(":")[0]][int(unit.partition(":")[2])] for unit in units}


__all__ = ["check_settings", "search_by_rows", "switch_to", "unit_costs"]
