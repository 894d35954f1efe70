"""Greedy layer replacement, as a pure function: names in, report out. Knows nothing of models or of the Trainer.

Algorithm 1 of [Distil-then-Replace](https://huggingface.co/papers/2601.11667): every round scores each remaining layer's replacement on top of those
already made, takes the best one, and goes on while the metric stays at or above the floor.
"""

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .errors import CheckpointError, HybridConfigError, MetricError, OutputFolderError, closest


Metrics = dict[str, float]
TRACE_FILE = "swap_trace.jsonl"


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
    What a search found. `best` and `most_linear` are lists of site names in the order they were swapped.

    Args:
        metric (`str`): Key in the metrics.
        greater_is_better (`bool`): Its direction.
        base (`float`): Its value before any swap.
        floor (`float`): The worst value a committed swap may have (for a loss: the largest).
        best (`list[str]`): The layers of the trial with the best metric; of equals, the one with more linear layers.
        most_linear (`list[str]`): The most layers reached with the metric at or above the floor.
        commits (`list[Trial]`): The trial of every committed swap, in order.
        trials (`list[Trial]`): All of them.
        confirmed (`list[str]` or `None`): The longest prefix of `most_linear` that also holds on data the search did not choose by, where
            such data was given.
        confirmations (`list[Trial]`): The evaluations on that data, the teacher's first.
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

    def to_dict(self) -> dict[str, Any]:
        result = dataclasses.asdict(self)
        result["trials"] = len(self.trials)
        return result


class SwapTrace:
    """
    `swap_trace.jsonl`: a header that says whose search this is, then one line per trial, written as it happens. A search that is
    started again on the same file finds its trials there and does not repeat them.

    Args:
        path (`str` or `Path`): The file.
        identity (`dict`): What must be equal for two searches to be the same one: sites, metric, floor, weights, data.
        write (`bool`, *optional*, defaults to `True`): `False` on ranks that only read.

    Raises:
        OutputFolderError: If the file belongs to another search.
    """

    def __init__(self, path: str | os.PathLike, identity: dict[str, Any], write: bool = True):
        self.path, self.write = Path(path), write
        self.identity = json.loads(json.dumps(identity))
        self._known: dict[tuple[str, ...], Metrics] = {}
        lines = self._read()
        if lines:
            header, *rows = lines
            if header.get("identity") != self.identity:
                theirs = header.get("identity") or {}
                changed = sorted(k for k in {*theirs, *self.identity} if theirs.get(k) != self.identity.get(k))
                raise OutputFolderError(
                    f"{self.path} holds another search: {', '.join(changed)} changed since. Choose another output folder, or delete the file to "
                    "search again."
                )
            self._known = {tuple(sorted(row["swapped"])): row["metrics"] for row in rows if row["type"] == "trial"}
        self._rows = {json.dumps(row, sort_keys=True) for row in lines}

    def _read(self) -> list[dict]:
        """All whole lines. A line cut off by a kill is dropped, and the file shortened to what precedes it."""
        if not self.path.exists():
            return []
        rows, end = [], 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                whole = line.endswith(b"\n") and isinstance(row, dict) and "type" in row
            except ValueError:
                whole = False
            if whole:
                rows.append(row)
                end += len(line)
            elif number < len(lines):
                raise CheckpointError(
                    f"{self.path}, line {number}: cannot be read; got {line[:60]!r}. The file was edited or damaged."
                )
        if self.write and end < self.path.stat().st_size:
            os.truncate(self.path, end)
        return rows

    def _append(self, row: dict) -> None:
        if not self._rows and row["type"] != "header":  # no file before there is something to keep
            self._append({"type": "header", "identity": self.identity})
        line = json.dumps(row, sort_keys=True)
        if line in self._rows:  # said by the search that is being continued
            return
        self._rows.add(line)
        if self.write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def lookup(self, swapped: Iterable[str]) -> Metrics | None:
        """The metrics of an earlier trial of these layers, or `None`."""
        return self._known.get(tuple(sorted(swapped)))

    def add_trial(self, trial: Trial) -> None:
        self._known[tuple(sorted(trial.swapped))] = trial.metrics
        self._append({"type": "trial", **dataclasses.asdict(trial)})

    def add_event(self, kind: str, **entries) -> None:
        self._append({"type": kind, **entries})


def allowed_drop(max_drop: float | str) -> tuple[float, bool]:
    """`0.02` -> (0.02, absolute), `"2%"` -> (0.02, relative to the starting metric)."""
    relative = isinstance(max_drop, str) and max_drop.strip().endswith("%")
    try:
        value = (
            float(max_drop.strip().removesuffix("%")) / (100 if relative else 1)
            if isinstance(max_drop, str)
            else float(max_drop)
        )
    except (TypeError, ValueError, AttributeError):
        value = math.nan
    if not value >= 0 or math.isinf(value):
        raise HybridConfigError(
            f'max_drop must be a number >= 0 in units of the metric, or a percentage of the starting metric such as "2%"; got {max_drop!r}.'
        )
    return value, relative


def floor_of(base: float, max_drop: float | str, greater_is_better: bool) -> float:
    """The worst allowed value of a metric that starts at `base` (for a loss: the largest)."""
    drop, relative = allowed_drop(max_drop)
    drop = drop * abs(base) if relative else drop
    return base - drop if greater_is_better else base + drop


def check_floor(metric: str, base: float, floor: float, greater_is_better: bool) -> None:
    """Raise [`MetricError`] if `floor` is better than where the metric starts."""
    if not isinstance(floor, numbers.Real) or not math.isfinite(floor):
        raise HybridConfigError(f"floor must be a finite number; got {floor!r}.")
    if (base < floor) if greater_is_better else (base > floor):
        raise MetricError(
            f"floor must be within reach of the starting metric; got floor={floor} for {metric}, which starts at {base:.6g}. "
            "Set a floor that the teacher itself meets, or use max_drop."
        )


def confirm_swaps(
    report: SwapReport, score: Callable[[list[str]], Metrics], max_drop: float | str, floor: float | None = None
) -> None:
    """
    Walk back from `report.most_linear` to the longest prefix whose metric holds on other data, by the same rule. Choosing the best of
    hundreds of noisy scores favours lucky ones; this is where luck shows. Fills `report.confirmed` and `report.confirmations`.
    """
    sign = 1.0 if report.greater_is_better else -1.0

    def run(swapped):
        metrics = score(swapped)
        read_metric(metrics, report.metric, f"confirmation of {len(swapped)} swaps")
        report.confirmations.append(Trial(len(swapped), list(swapped), None, dict(metrics)))
        return metrics[report.metric]

    base = run([])
    floor = floor_of(base, max_drop, report.greater_is_better) if floor is None else floor
    count = len(report.most_linear)
    while count and sign * run(report.most_linear[:count]) < sign * floor - 1e-12 * max(abs(floor), 1.0):
        count -= 1
    report.confirmed = report.most_linear[:count]


def read_metric(metrics: Metrics, name: str, where: str) -> float:
    """`metrics[name]`, checked: there, a number, finite."""
    if name not in metrics:
        raise MetricError(
            f"{where}: the metric {name!r} is not among what the evaluation returned: {', '.join(sorted(metrics)) or 'nothing'}."
            f"{closest(name, metrics)} compute_metrics must return it (with or without the eval_ prefix)."
        )
    try:
        value = float(metrics[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise MetricError(
            f"{where}: the metric {name!r} must be a finite number; got {metrics[name]!r}. Check compute_metrics and the validation data."
        )
    return value


def greedy_swap(
    sites: list[str],
    score: Callable[[list[str]], Metrics],
    *,
    metric: str,
    greater_is_better: bool,
    max_drop: float | str = 0.02,
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
        max_drop (`float` or `str`, *optional*, defaults to 0.02): How much worse than at the start the metric may get: in its own units, or
            `"2%"` of its starting value.
        floor (`float`, *optional*): The worst allowed value itself; takes the place of `max_drop`.
        tie_breaker (`str`, *optional*, defaults to `"eval_loss"`): Among equal metrics, the candidate with the smaller value of this one wins,
            where the evaluation returns it. Accuracy on a small validation set ties often.
        max_layers (`int`, *optional*): Stop after this many swaps.
        trace (`SwapTrace`, *optional*): Where trials are kept and found again.
        on_trial, on_commit (`Callable`, *optional*): Called after every trial (with the number of trials its round has left) and commit.

    Returns:
        [`SwapReport`]

    Raises:
        MetricError: If the metric is missing or not finite, or the floor is above the starting metric.
    """
    sign = 1.0 if greater_is_better else -1.0
    trials: list[Trial] = []

    def run(round_, swapped, candidate, left):
        metrics = trace.lookup(swapped) if trace else None
        fresh = metrics is None
        if fresh:
            metrics = score(swapped)
        trial = Trial(
            round_, list(swapped), candidate, {k: float(v) for k, v in metrics.items() if isinstance(v, numbers.Real)}
        )
        where = f"search, round {round_}, trial of {candidate}" if candidate else "search, before the first swap"
        read_metric(metrics, metric, where)
        if tie_breaker in metrics:
            read_metric(metrics, tie_breaker, where)
        trials.append(trial)
        if fresh and trace and round_:
            trace.add_trial(trial)
        if on_trial:
            on_trial(trial, left)
        return trial

    start = run(0, [], None, 0)
    base = float(start.metrics[metric])
    if floor is None:
        floor = floor_of(base, max_drop, greater_is_better)
    else:
        check_floor(metric, base, floor, greater_is_better)

    if trace and trace.lookup([]) is None:  # only now is it clear that there will be a search
        trace.add_trial(start)

    def rank(trial):
        return sign * trial.metrics[metric], -trial.metrics.get(tie_breaker, 0.0)

    swapped: list[str] = []
    best, best_value = [], sign * base
    commits: list[Trial] = []
    while len(swapped) < min(len(sites), max_layers if max_layers is not None else len(sites)):
        remaining = [site for site in sites if site not in swapped]
        round_ = len(swapped) + 1
        candidates = [run(round_, [*swapped, site], site, len(remaining) - i - 1) for i, site in enumerate(remaining)]
        winner = max(candidates, key=rank)
        value = sign * winner.metrics[metric]
        if value >= best_value:
            best, best_value = winner.swapped, value
        # a metric is compared after rounding away what summation order does to it
        if value < sign * floor - 1e-12 * max(abs(floor), 1.0):
            break
        swapped = winner.swapped
        commits.append(winner)
        if trace:
            trace.add_event("commit", round=round_, swapped=swapped, metrics=winner.metrics)
        if on_commit:
            on_commit(winner)
    report = SwapReport(metric, greater_is_better, base, floor, list(best), list(swapped), commits, trials)
    if trace:
        trace.add_event("result", best=report.best, most_linear=report.most_linear, base=base, floor=floor)
    return report
