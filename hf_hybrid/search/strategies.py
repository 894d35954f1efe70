"""Strategies of a search: which units become linear next. Names and numbers in, a path out; no model, no Trainer.

A *unit* is whatever can be made linear by itself: an attention layer, or a key-value head. A *path* is a sequence of
sets of linear units, each one unit larger than the one before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import HybridConfigError, closest
from .row_table import LOSS, METRIC, RowTable


@dataclass(frozen=True)
class Step:
    """A step of a path: the linear units in the order they came, and their metric and loss over all rows."""

    units: tuple[str, ...]
    metric: float
    loss: float


@dataclass
class Problem:
    """
    What a strategy is given.

    Args:
        units (`list[str]`): All of them, in the model's order.
        table (`RowTable`): What is known of sets of them, and how to know more.
        sign (`float`): 1 if a greater metric is better, else -1.
        predicted (`Callable`, *optional*): Takes the units that are linear, returns how much worse each of the others
            would make things, as far as a cheap look can tell. In any unit; only the order counts at first.
        seed (`int`, *optional*, defaults to 0): Of whatever is drawn.
        limit (`int`, *optional*): The path's length; all units by default.
        order (`list[str]`, *optional*): Of the strategy `fixed`.
    """

    units: list[str]
    table: RowTable
    sign: float
    predicted: Callable[[Sequence[str]], Mapping[str, float]] | None = None
    seed: int = 0
    limit: int | None = None
    order: Sequence[str] | None = None

    @property
    def length(self) -> int:
        return len(self.units) if self.limit is None else min(self.limit, len(self.units))

    def step(self, units: Sequence[str]) -> Step:
        metric, loss = self.table.means(units)
        return Step(tuple(units), float(metric), float(loss))

    def damage(self, before: np.ndarray, after: np.ndarray) -> float:
        """How much worse means `[2]` became: in the loss, which moves where a metric of few rows does not, if any."""
        loss = float(after[LOSS] - before[LOSS])
        return loss if loss else self.sign * float(before[METRIC] - after[METRIC])

    def better(self, values: np.ndarray) -> int:
        """Of means `[S, 2]`, the index of the best: by the metric, among equals by the loss, then the first."""
        return max(range(len(values)), key=lambda i: (self.sign * values[i, METRIC], -values[i, LOSS], -i))


Strategy = Callable[[Problem], Iterator[Step]]
STRATEGIES: dict[str, Strategy] = {}


def register_strategy(name: str):
    """Class decorator or function decorator: makes a strategy known by name."""

    def register(strategy):
        STRATEGIES[name] = strategy
        return strategy

    return register


def get_strategy(name: str) -> Strategy:
    """
    Raises:
        HybridConfigError: If there is none of this name.
    """
    if name not in STRATEGIES:
        raise HybridConfigError(
            f"strategy must be one of {', '.join(sorted(STRATEGIES))}; got {name!r}.{closest(str(name), STRATEGIES)}"
        )
    return STRATEGIES[name]


# ----------------------------------------------------------------------------------------------------------- exhaustive


@register_strategy("greedy")
def greedy(problem: Problem) -> Iterator[Step]:
    """Every remaining unit on every row, in every round (Algorithm 1 of 2601.11667)."""
    path: list[str] = []
    while len(path) < problem.length:
        remaining = [unit for unit in problem.units if unit not in path]
        means = problem.table.values([[*path, unit] for unit in remaining], problem.table.order).mean(1)
        path.append(remaining[problem.better(means)])
        yield problem.step(path)


@register_strategy("backward")
def backward(problem: Problem) -> Iterator[Step]:
    """From all linear, always restoring the unit whose softmax helps most; read from its end, the path of a search."""
    linear, restored = list(problem.units), []
    while linear:
        means = problem.table.values([[u for u in linear if u != unit] for unit in linear], problem.table.order).mean(1)
        restored.append(linear.pop(problem.better(means)))
    yield from _along(problem, restored[::-1])


# ----------------------------------------------------------------------------------------------------------- one order


def _along(problem: Problem, order: Sequence[str]) -> Iterator[Step]:
    for count in range(1, problem.length + 1):
        yield problem.step(order[:count])


@register_strategy("one_shot")
def one_shot(problem: Problem) -> Iterator[Step]:
    """Every unit alone, once; then in the order of what it cost."""
    means = problem.table.values([[unit] for unit in problem.units], problem.table.order).mean(1)
    keys = [(-problem.sign * metric, loss, i) for i, (metric, loss) in enumerate(means)]
    yield from _along(problem, [problem.units[key[2]] for key in sorted(keys)])


@register_strategy("proposed")
def proposed(problem: Problem) -> Iterator[Step]:
    """The proposals' own order, one unit at a time: what they are worth without a look at the metric."""
    path: list[str] = []
    for _ in range(problem.length):
        damages = _predictions(problem, path)
        path.append(min(damages, key=damages.__getitem__))
        yield problem.step(path)


@register_strategy("uniform")
def uniform(problem: Problem) -> Iterator[Step]:
    """Spread evenly over the model, whatever the count: every next unit is as far as can be from the linear ones."""
    path: list[int] = []
    for _ in range(problem.length):
        free = [i for i in range(len(problem.units)) if i not in path]
        edges = [*path, -1, len(problem.units)]
        path.append(max(free, key=lambda i: (min(abs(i - j) for j in edges), -i)))
        yield problem.step([problem.units[i] for i in path])


@register_strategy("random")
def random(problem: Problem) -> Iterator[Step]:
    """An order drawn by the seed."""
    order = np.random.default_rng(problem.seed).permutation(len(problem.units))
    yield from _along(problem, [problem.units[i] for i in order])


@register_strategy("fixed")
def fixed(problem: Problem) -> Iterator[Step]:
    """
    An order that the caller gives.

    Raises:
        HybridConfigError: If it is missing, names a unit twice or one that is not there.
    """
    order = check_order(problem.units, problem.order)
    problem.limit = min(problem.length, len(order))
    yield from _along(problem, order)


def check_order(units: Sequence[str], order: Sequence[str] | None) -> list[str]:
    """
    Raises:
        HybridConfigError: If there is none, or it names a unit twice or one that is not there.
    """
    order = list(order or ())
    wrong = next((unit for unit in order if unit not in units or order.count(unit) > 1), None)
    if wrong is not None or not order:
        raise HybridConfigError(f"strategy 'fixed' needs order=, each unit at most once; got {wrong or order!r}.")
    return order


# ---------------------------------------------------------------------------------------------------------------- race


@dataclass
class Race:
    """
    A look at every unit alone on a few rows; then proposals and a race on paired rows: the few units that look cheapest
    run side by side, a block of rows at a time; whoever is clearly behind the leader drops out; of those left when the
    rows end, the best wins. Every few steps an exchange is tried: one linear unit out, another in, which greedy
    replacement never does.

    Args:
        candidates (`int`): How many run.
        block (`int`): Rows at a time.
        max_rows (`int`, *optional*): Rows after which the leader wins, significant or not.
        behind (`float`): Standard errors of the paired difference to the leader at which a candidate drops out. No
            promise rests on it: those are tested on rows that the search does not see.
        exchange_every (`int`): Steps between attempts to exchange; 0 for none.
    """

    candidates: int = 8
    block: int = 16
    max_rows: int | None = 64
    behind: float = 2.0
    exchange_every: int = 5
    # of a unit when it last ran: its damage, in nats or the metric, and what was predicted then
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, problem: Problem) -> Iterator[Step]:
        race = Race(self.candidates, self.block, self.max_rows, self.behind, self.exchange_every)
        path: list[str] = []
        race.qualify(problem)
        while len(path) < problem.length:
            path.append(race.winner(problem, path, race.runners(problem, path)))
            if race.exchange_every and len(path) % race.exchange_every == 0 and len(path) < len(problem.units):
                path = race.exchanged(problem, path)
            yield problem.step(path)

    def qualify(self, problem: Problem) -> None:
        """Every unit alone on one block of rows: a cheap unit that the predictions misjudge gets its chance."""
        rows = problem.table.order[: self.block]
        values = problem.table.values([[], *([unit] for unit in problem.units)], rows).mean(1)
        predicted = _predictions(problem, [])
        for unit, own in zip(problem.units, values[1:], strict=True):
            self.measured[unit] = problem.damage(values[0], own), predicted[unit]

    def runners(self, problem: Problem, path: Sequence[str]) -> list[str]:
        """Those that look cheapest by what is known of them, and a quarter by the predictions alone."""
        order, predicted = self.proposals(problem, path), _predictions(problem, path)
        places = self.candidates - (self.candidates // 4 if problem.predicted is not None else 0)
        others = sorted(order[places:], key=predicted.__getitem__)
        return [*order[:places], *others[: self.candidates - places]]

    def proposals(self, problem: Problem, path: Sequence[str]) -> list[str]:
        """
        The other units, cheapest first: what a unit cost when it last ran, and by how much its prediction has changed
        since. The two are brought to one scale by the units that have both.
        """
        predicted = _predictions(problem, path)
        both = [self.measured[u] for u in predicted if u in self.measured]
        ratios = [max(damage, 0.0) / then for damage, then in both if then > 0]
        scale = float(np.median(ratios)) if ratios else 1.0

        def damage(unit: str) -> float:
            found, then = self.measured.get(unit, (0.0, 0.0))
            return found + scale * (predicted[unit] - then)

        return sorted(predicted, key=damage)

    def winner(self, problem: Problem, path: Sequence[str], runners: Sequence[str]) -> str:
        sets = [[*path, unit] for unit in runners]
        best, rows_of = self._run(problem, sets)
        predicted = _predictions(problem, path)
        for unit, units, rows in zip(runners, sets, rows_of, strict=True):
            after, before = problem.table.values([units, path], rows).mean(1)
            self.measured[unit] = problem.damage(before, after), predicted[unit]
        self.measured.pop(runners[best], None)
        return runners[best]

    def exchanged(self, problem: Problem, path: list[str]) -> list[str]:
        """
        The path, with one unit exchanged if that is clearly better on paired rows and better on all. The last unit
        stays: it just won.
        """
        outside = self.proposals(problem, path)[:2]
        damage_of = {unit: _predictions(problem, [u for u in path if u != unit])[unit] for unit in path[:-1]}
        inside = sorted(damage_of, key=damage_of.__getitem__, reverse=True)[:2]
        moves = [[u if u != out else new for u in path] for out in inside for new in outside]
        if not moves:
            return path
        best, rows_of = self._run(problem, [path, *moves])
        move = [path, *moves][best]
        own, other = problem.table.values([path, move], rows_of[0])
        if best == 0 or not self._is_behind(problem, own, other):
            return path
        return [path, move][problem.better(np.stack([problem.table.means(path), problem.table.means(move)]))]

    def _run(self, problem: Problem, sets: Sequence[Sequence[str]]) -> tuple[int, list[np.ndarray]]:
        """The winner's index, and which rows each set ran."""
        table, limit = problem.table, len(problem.table.order)
        limit = limit if self.max_rows is None else min(limit, self.max_rows)
        alive, rows = list(range(len(sets))), table.order[:0]
        rows_of = [rows for _ in sets]
        while len(rows) < limit and (len(alive) > 1 or not len(rows)):
            rows = table.order[: min(len(rows) + self.block, limit)]
            values = table.values([sets[i] for i in alive], rows)
            lead = problem.better(values.mean(1))
            for i in alive:
                rows_of[i] = rows
            best = alive[lead]
            alive = [i for i, own in zip(alive, values, strict=True) if not self._is_behind(problem, own, values[lead])]
        return best, rows_of

    def _is_behind(self, problem: Problem, own: np.ndarray, leader: np.ndarray) -> bool:
        """Whether the metric is clearly worse than the leader's, or as good as its, and the loss clearly worse."""
        worse = [problem.sign * (leader - own)[:, METRIC], (own - leader)[:, LOSS]]
        metric, loss = (self._significance(difference) for difference in worse)
        return metric > self.behind or (loss > self.behind and metric > -1.0)

    @staticmethod
    def _significance(difference: np.ndarray) -> float:
        if len(difference) < 8 or not difference.any():
            return 0.0
        return float(difference.mean() / max(difference.std(ddof=1) / len(difference) ** 0.5, 1e-12))


STRATEGIES["race"] = Race()


def _predictions(problem: Problem, path: Sequence[str]) -> dict[str, float]:
    """Damage of each of the other units; without proposals all look alike, later layers first."""
    rest = [unit for unit in problem.units if unit not in path]
    if problem.predicted is None:
        return {unit: 1.0 - 1e-6 * problem.units.index(unit) for unit in rest}
    found = problem.predicted(path)
    return {unit: float(found[unit]) for unit in rest}


__all__ = ["STRATEGIES", "Problem", "Race", "Step", "Strategy", "get_strategy", "register_strategy"]
