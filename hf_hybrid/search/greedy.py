"""Greedy layer replacement, as a pure function: names in, report out. Knows nothing of models or of the Trainer.

Algorithm 1 of [Distil-then-Replace](https://huggingface.co/papers/2601.11667): every round scores each remaining
layer's replacement on top of those already made, takes the best one, and goes on while the metric stays at or above the
floor.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import HybridConfigError, MetricError, closest
from .promise import Promise
from .trace import TRACE_FILE, SwapTrace


__all__ = [
    "TRACE_FILE",
    "SwapReport",
    "SwapTrace",
    "Trial",
    "allowed_drop",
    "check_floor",
    "confirm_swaps",
    "floor_of",
    "greedy_swap",
    "read_metric",
]

Metrics = dict[str, float]


@dataclasses.dataclass
class Trial:
    """One evaluation: the layers that were linear, and what came out."""

    round: int
    swapped: list[str]
    candidate: str | None
    metrics: Metrics


@dataclasses.dataclass
class SwapReport:
    """
    What a search found. `best`, `most_linear` and `confirmed` are lists of site names in the order they were swapped.

    Args:
        metric (`str`): Key in the metrics.
        greater_is_better (`bool`): Its direction.
        base (`float`): Its value before any swap.
        floor (`float`): The worst value a committed swap may have (for a loss: the largest).
        best (`list[str]`): The layers of the trial with the best metric; of equals, the one with more linear layers.
            Where there is confirmation data, the best of the prefixes of `confirmed` that hold on it.
        most_linear (`list[str]`): The most layers reached with the metric at or above the floor.
        commits (`list[Trial]`): The trial of every committed swap, in order.
        trials (`list[Trial]`): All of them.
        confirmed (`list[str]` or `None`): The longest prefix of `most_linear` that also holds on data the search did
            not choose by, where such data was given.
        confirmations (`list[Trial]`): The evaluations on that data, the teacher's first.
        promise (`Promise` or `None`): What holds beyond the rows at hand, where that was asked for.
        layer_forwards (`float` or `None`): What a search by rows cost, in units of one block on one row.
    """

    metric: str
    greater_is_better: bool
    base: float
    floor: float
    best: list[str]
    most_linear: list[str]
    commits: list[Trial]
    trials: list[Trial]
    confirmed: list[str] | None = None
    confirmations: list[Trial] = dataclasses.field(default_factory=list)
    promise: Promise | None = None
    layer_forwards: float | None = None

    @property
    def path(self) -> list[list[str]]:
        """The committed sets, smallest first, the empty one at the front. An exchange may take a unit back."""
        return [[], *(list(trial.swapped) for trial in self.commits)]

    def kept(self, keep: str) -> list[str]:
        """What `keep=` of the callback leaves linear."""
        if keep == "best":
            return self.best
        return self.most_linear if self.confirmed is None else self.confirmed

    def to_dict(self) -> dict[str, Any]:
        """As plain values for a JSON file; of the trials only their number."""
        result = dataclasses.asdict(self)
        result["trials"] = len(self.trials)
        result["floor"] = self.floor if math.isfinite(self.floor) else None  # JSON knows no infinity
        return result


def allowed_drop(max_drop: float | str) -> tuple[float, bool]:
    """
    `0.02` -> (0.02, absolute), `"2%"` -> (0.02, relative to the starting metric).

    Raises:
        HybridConfigError: If it is neither a number >= 0 nor such a percentage.
    """
    relative = isinstance(max_drop, str) and max_drop.strip().endswith("%")
    try:
        value = float(str(max_drop).strip()[:-1]) / 100 if relative else float(max_drop)
    except (TypeError, ValueError):
        value = math.nan
    if not value >= 0 or math.isinf(value):
        raise HybridConfigError(
            "max_drop must be a number >= 0 in units of the metric, or a percentage of the starting metric such as "
            f'"2%"; got {max_drop!r}.'
        )
    return value, relative


def floor_of(base: float, max_drop: float | str | None, greater_is_better: bool) -> float:
    """The worst allowed value of a metric that starts at `base` (for a loss: the largest); infinite without a limit."""
    if max_drop is None:
        return -math.inf if greater_is_better else math.inf
    drop, relative = allowed_drop(max_drop)
    drop = drop * abs(base) if relative else drop
    return base - drop if greater_is_better else base + drop


def check_floor(metric: str, base: float, floor: float, greater_is_better: bool, where: str = "") -> None:
    """
    Check that a metric starts at or above `floor`; `where` names the data.

    Raises:
        MetricError: If the floor is better than where the metric starts.
        HybridConfigError: If it is no finite number.
    """
    if not isinstance(floor, numbers.Real) or not math.isfinite(floor):
        raise HybridConfigError(f"floor must be a finite number; got {floor!r}.")
    if not _holds(base, floor, greater_is_better):
        raise MetricError(
            f"floor must be within reach of the starting metric; got floor={floor} for {metric}{where}, which starts "
            f"at {base:.6g}. Set a floor that the teacher itself meets, or use max_drop."
        )


def read_metric(metrics: Mapping[str, Any], name: str, where: str) -> float:
    """
    `metrics[name]` as a number; `where` begins the message.

    Raises:
        MetricError: If it is missing, no number or not finite.
    """
    if name not in metrics:
        raise MetricError(
            f"{where}: the metric {name!r} is not among what the evaluation returned: "
            f"{', '.join(sorted(metrics)) or 'nothing'}.{closest(name, metrics)} compute_metrics must return it (with "
            "or without the eval_ prefix)."
        )
    try:
        value = float(metrics[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise MetricError(
            f"{where}: the metric {name!r} must be a finite number; got {metrics[name]!r}. Check compute_metrics and "
            "the validation data."
        )
    return value


def greedy_swap(
    sites: list[str],
    score: Callable[[list[str]], Metrics],
    *,
    metric: str,
    greater_is_better: bool,
    max_drop: float | str | None = 0.02,
    floor: float | None = None,
    tie_breaker: str | None = "eval_loss",
    max_layers: int | None = None,
    trace: SwapTrace | None = None,
    on_trial: Callable[[Trial, int], None] | None = None,
    on_commit: Callable[[Trial], None] | None = None,
) -> SwapReport:
    """
    Swap layers one by one, the least harmful first, as long as the metric holds.

    Args:
        sites (`list[str]`): The candidates, in the model's order; of exact ties the earlier wins.
        score (`Callable`): Takes the list of swapped layers, returns the metrics of the model so mixed.
        metric (`str`), greater_is_better (`bool`): What to watch, and its direction.
        max_drop (`float` or `str`, *optional*, defaults to 0.02): How much worse than at the start the metric may get:
            in its own units, or `"2%"` of its starting value; `None` for no limit.
        floor (`float`, *optional*): The worst allowed value itself; takes the place of `max_drop`.
        tie_breaker (`str`, *optional*, defaults to `"eval_loss"`): Among equal metrics, the candidate with the smaller
            value of this one wins, where it is returned. Accuracy on a small validation set ties often.
        max_layers (`int`, *optional*): Stop after this many swaps.
        trace (`SwapTrace`, *optional*): Where trials are kept and found again.
        on_trial, on_commit (`Callable`, *optional*): Called after every trial (with the number of trials its round has
            left) and commit.

    Returns:
        [`SwapReport`]

    Raises:
        MetricError: If the metric is missing or not finite, or the floor is above the starting metric.
    """
    search = _Search(score, metric, greater_is_better, tie_breaker, trace, on_trial)
    base = search.start(max_drop, floor)
    limit = len(sites) if max_layers is None else min(len(sites), max_layers)
    while len(search.swapped) < limit and search.round(sites):
        if on_commit:
            on_commit(search.commits[-1])
    report = SwapReport(
        metric, greater_is_better, base, search.floor, search.best, search.swapped, search.commits, search.trials
    )
    if trace:
        trace.add_event(
            "result",
            metric=metric,
            best=report.best,
            most_linear=report.most_linear,
            base=base,
            floor=report.to_dict()["floor"],
        )
    return report


class _Search:
    """The state of `greedy_swap`, whose arguments these are."""

    def __init__(self, score, metric, greater_is_better, tie_breaker, trace, on_trial):
        self.score, self.metric, self.greater_is_better = score, metric, greater_is_better
        self.tie_breaker, self.trace, self.on_trial = tie_breaker, trace, on_trial
        self.sign = 1.0 if greater_is_better else -1.0
        self.trials: list[Trial] = []
        self.commits: list[Trial] = []
        self.swapped: list[str] = []
        self.best: list[str] = []

    def start(self, max_drop: float | str | None, floor: float | None) -> float:
        """The metric before any swap; fixes the floor."""
        first = self._run(0, [], None, 0)
        base = first.metrics[self.metric]
        if floor is None:
            floor = floor_of(base, max_drop, self.greater_is_better)
        else:
            check_floor(self.metric, base, floor, self.greater_is_better)
        self.floor, self._best_value = floor, self.sign * base
        if self.trace and self.trace.lookup([]) is None:  # only now is it clear that there will be a search
            self._keep(first)
        return base

    def round(self, sites: list[str]) -> bool:
        """Score every remaining layer and commit the best one; `False` if even that is below the floor."""
        remaining = [site for site in sites if site not in self.swapped]
        number = len(self.swapped) + 1
        candidates = [
            self._run(number, [*self.swapped, site], site, len(remaining) - i - 1) for i, site in enumerate(remaining)
        ]
        winner = max(candidates, key=self._rank)
        value = winner.metrics[self.metric]
        if not _holds(value, self.floor, self.greater_is_better):
            return False
        if self.sign * value >= self._best_value:
            self.best, self._best_value = list(winner.swapped), self.sign * value
        self.swapped = list(winner.swapped)
        self.commits.append(winner)
        if self.trace:
            self.trace.add_event("commit", round=number, swapped=winner.swapped, metrics=winner.metrics)
        return True

    def _run(self, number: int, swapped: list[str], candidate: str | None, left: int) -> Trial:
        known = self.trace.lookup(swapped) if self.trace else None
        metrics = self.score(swapped) if known is None else known
        where = f"search, round {number}, trial of {candidate}" if candidate else "search, before the first swap"
        deciding = [self.metric, *([self.tie_breaker] if self.tie_breaker in metrics else [])]
        read = {name: read_metric(metrics, name, where) for name in deciding}
        trial = Trial(number, list(swapped), candidate, {**_numbers(metrics), **read})
        self.trials.append(trial)
        if known is None and self.trace and number:
            self._keep(trial)
        if self.on_trial:
            self.on_trial(trial, left)
        return trial

    def _keep(self, trial: Trial) -> None:
        self.trace.add_trial(trial.swapped, trial.metrics, round=trial.round, candidate=trial.candidate)

    def _rank(self, trial: Trial) -> tuple[float, float]:
        return self.sign * trial.metrics[self.metric], -trial.metrics.get(self.tie_breaker, 0.0)


def confirm_swaps(
    report: SwapReport, score: Callable[[list[str]], Metrics], max_drop: float | str | None, floor: float | None = None
) -> None:
    """
    Walk back from `report.most_linear` to the longest prefix whose metric holds on other data, by the same rule: as far
    below the teacher's own value there as `max_drop` allows, or `floor`. Choosing the best of hundreds of noisy scores
    favours lucky ones; this is where luck shows. Fills `report.confirmed` and `report.confirmations`, and moves
    `report.best` to the best (by the search's metric) of the prefixes up to there that hold on the other data too.

    Raises:
        MetricError: If the teacher itself is below `floor` on that data, before anything is taken back.
    """
    values: dict[int, float] = {}

    def value(count: int) -> float:
        if count not in values:
            swapped = report.path[count]
            metrics = score(swapped)
            values[count] = read_metric(metrics, report.metric, f"confirmation of {count} swaps")
            read = {**_numbers(metrics), report.metric: values[count]}
            report.confirmations.append(Trial(count, swapped, None, read))
        return values[count]

    if floor is None:
        floor = floor_of(value(0), max_drop, report.greater_is_better)
    else:
        check_floor(report.metric, value(0), floor, report.greater_is_better, " on the confirmation data")
    count = len(report.path) - 1
    while not _holds(value(count), floor, report.greater_is_better):  # the teacher does, so that this ends
        count -= 1
    report.confirmed = report.path[count]

    sign = 1.0 if report.greater_is_better else -1.0
    searched = [report.base, *(trial.metrics[report.metric] for trial in report.commits)]
    best_first = sorted(range(count + 1), key=lambda k: (sign * searched[k], k), reverse=True)
    best = next(k for k in best_first if _holds(value(k), floor, report.greater_is_better))
    report.best = report.path[best]


def _holds(value: float, floor: float, greater_is_better: bool) -> bool:
    """Whether a metric is at the floor or better, after rounding away what summation order does to it."""
    sign = 1.0 if greater_is_better else -1.0
    return sign * value >= sign * floor - 1e-12 * max(abs(floor), 1.0)


def _numbers(metrics: Mapping[str, Any]) -> Metrics:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, numbers.Real)}
