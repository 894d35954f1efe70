"""A search from units to a report: proposals, strategy, floor, budget, trace. What `trainer.search` runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import HybridConfigError, MetricError
from .greedy import SwapReport, Trial, _holds, check_floor, floor_of
from .row_table import RowTable
from .strategies import Problem, Step, get_strategy
from .trace import SwapTrace


@dataclass
class Budget:
    """
    When a search has enough.

    Args:
        max_units (`int`, *optional*): After so many linear units.
        costs (`dict`, *optional*), target (`float`, *optional*): What each unit costs while it keeps its softmax, less
            what it costs when linear (bytes, milliseconds), and how much of that is to be saved.
    """

    max_units: int | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    target: float | None = None

    def check(self, units: Sequence[str]) -> None:
        """
        Raises:
            HybridConfigError: If all units together do not save what is asked for.
        """
        everything = sum(self.costs.get(unit, 0.0) for unit in units)
        if self.target is not None and everything < self.target:
            raise HybridConfigError(
                f"search: the budget asks to save {self.target:.4g}, and all {len(units)} units together save "
                f"{everything:.4g}. Ask for less, or use a mixer with a smaller state."
            )

    def is_met(self, units: Sequence[str]) -> bool:
        if self.max_units is not None and len(units) >= self.max_units:
            return True
        return self.target is not None and sum(self.costs.get(unit, 0.0) for unit in units) >= self.target


def search_path(
    units: Sequence[str],
    table: RowTable,
    *,
    metric: str,
    greater_is_better: bool,
    strategy: str = "race",
    max_drop: float | str | None = 0.02,
    floor: float | None = None,
    budget: Budget | None = None,
    predicted: Callable[[Sequence[str]], Mapping[str, float]] | None = None,
    order: Sequence[str] | None = None,
    seed: int = 0,
    trace: SwapTrace | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> SwapReport:
    """
    Make units linear along the path of a strategy, as long as the metric holds and the budget is not met.

    Args:
        units (`list[str]`): The candidates, in the model's order.
        table (`RowTable`): How to score them.
        metric (`str`), greater_is_better (`bool`): What decides, and its direction.
        strategy (`str`, *optional*, defaults to `"race"`): A name of `STRATEGIES`.
        max_drop (`float`, `str` or `None`), floor (`float`, *optional*): As in [`greedy_swap`]; `None` for no floor.
        budget (`Budget`, *optional*): When to stop before that.
        predicted (`Callable`, *optional*), order (`list[str]`, *optional*), seed (`int`): See [`Problem`].
        trace (`SwapTrace`, *optional*): Where steps are said; rows are the table's business.
        on_step (`Callable`, *optional*): Called after every step.

    Returns:
        [`SwapReport`]: Of units instead of layers, where units are heads.

    Raises:
        MetricError: If the teacher itself is below `floor`.
        HybridConfigError: If there is no such strategy.
    """
    run, budget = get_strategy(strategy), budget or Budget()
    budget.check(units)
    sign = 1.0 if greater_is_better else -1.0
    problem = Problem(list(units), table, sign, predicted, seed, budget.max_units, order)
    start = problem.step([])
    if floor is not None:
        check_floor(metric, start.metric, floor, greater_is_better)
    else:
        floor = floor_of(start.metric, max_drop, greater_is_better)
    report = SwapReport(metric, greater_is_better, start.metric, floor, [], [], [], [_trial(start, metric)])
    best = sign * start.metric
    for step in run(problem) if units else ():
        trial = _trial(step, metric)
        report.trials.append(trial)
        if not _holds(step.metric, floor, greater_is_better):
            break
        report.commits.append(trial)
        report.most_linear = list(step.units)
        if sign * step.metric >= best:
            report.best, best = list(step.units), sign * step.metric
        if trace:
            trace.add_event("commit", round=len(step.units), swapped=list(step.units), metrics=trial.metrics)
        if on_step:
            on_step(step)
        if budget.is_met(step.units):
            break
    is_short = budget.target is not None and not budget.is_met(report.most_linear)
    if is_short and len(report.most_linear) < problem.length:
        saved = sum(budget.costs.get(unit, 0.0) for unit in report.most_linear)
        raise MetricError(
            f"search: the budget asks to save {budget.target:.4g}; within the floor of {floor:.4g} for {metric}, "
            f"{len(report.most_linear)} of {len(units)} units save {saved:.4g}. Allow a larger drop, or a larger "
            "budget."
        )
    if trace:
        trace.add_event("result", metric=metric, best=report.best, most_linear=report.most_linear, base=report.base)
    return report


def _trial(step: Step, metric: str) -> Trial:
    last = step.units[-1] if step.units else None
    return Trial(len(step.units), list(step.units), last, {metric: step.metric, "eval_loss": step.loss})


__all__ = ["Budget", "search_path"]
