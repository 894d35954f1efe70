"""What a search may promise about data it never saw: at most so large a drop, with so much confidence.

The best of many noisy scores is lucky, and a threshold on one split is exceeded on the next: for 7 of 18 tasks in
[Distil-then-Replace](https://huggingface.co/papers/2601.11667). Here the path of a search, from few linear units to
many, is tested on other rows in an order fixed beforehand (fixed-sequence testing, as in
[Learn then Test](https://huggingface.co/papers/2110.01052)), and every step by betting against the claim that the drop
is too large ([2010.09686](https://huggingface.co/papers/2010.09686)). Because the order is fixed, the whole path costs
one error probability. Pure arithmetic: rows in, a promise out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import HybridConfigError, MetricError


# A bet may cost at most this share of the wealth on a row on which the hybrid fails and its teacher does not.
LARGEST_BET = 0.5
# What the bettor believes before the first row: this share of rows differs, as if it had seen so many.
BELIEVED_DIFFERENT, BELIEVED_ROWS = 0.04, 50
RESAMPLES = 2000


def betting_wealth(drops: np.ndarray, max_drop: float, confidence: float = 0.9) -> np.ndarray:
    r"""
    Wealth of a bettor against "the expected drop is `max_drop` or more". If that is so, the wealth exceeds $1/\alpha$
    at any time with probability at most $\alpha$ (Ville): it is then safe to believe the opposite, whenever one looks.

    $W_t = W_{t-1} (1 + \lambda_t (\delta - r_t))$. The stake $\lambda_t$ may depend on earlier rows only. Here it is
    the one that would reach $1/\alpha$ with the rows that are left if the true drop were 0, and never less than
    Kelly's: with few rows, boldness finds more than growth does.

    Args:
        drops (`np.ndarray`): By how much the hybrid is worse than its teacher on each row, in [-1, 1]; rows along the
            last axis, in random order.
        max_drop (`float`): $\delta$, in (0, 1).
        confidence (`float`, *optional*, defaults to 0.9): $1 - \alpha$.

    Returns:
        `np.ndarray`: The wealth after each row, in the shape of `drops`.

    Raises:
        HybridConfigError: If `max_drop` or `confidence` is not in (0, 1).
        MetricError: If a drop lies outside of [-1, 1].
    """
    _check(max_drop, confidence)
    drops = np.asarray(drops, dtype=float)
    if drops.size and not (np.abs(drops) <= 1 + 1e-9).all():
        raise MetricError(
            f"betting_wealth: the drop of a row must be in [-1, 1]; got {drops[~(np.abs(drops) <= 1)][0]}. Divide the "
            "metric by its range, or use `bootstrap_drop`."
        )
    goal, rows = math.log(1 / (1 - confidence)), drops.shape[-1]
    log_wealth = np.zeros(drops.shape[:-1])
    squares = np.full(drops.shape[:-1], BELIEVED_DIFFERENT * BELIEVED_ROWS)
    wealth = np.empty(drops.shape)
    for row in range(rows):
        spread = squares / (BELIEVED_ROWS + row) + max_drop**2
        bold = np.sqrt(2 * np.maximum(goal - log_wealth, 0.01) / ((rows - row) * spread))
        stake = np.minimum(np.maximum(max_drop / spread, bold), LARGEST_BET / (1 - max_drop))
        log_wealth = log_wealth + np.log1p(stake * (max_drop - drops[..., row]))
        squares = squares + drops[..., row] ** 2
        wealth[..., row] = np.exp(np.minimum(log_wealth, 700.0))  # the largest number, not infinity
    return wealth


def bootstrap_drop(
    teacher: Callable[[np.ndarray], float],
    hybrid: Callable[[np.ndarray], float],
    clusters: np.ndarray,
    *,
    confidence: float = 0.9,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """
    How far a metric of a whole corpus (perplexity, BLEU, a micro-averaged F1) has dropped, and an upper bound, by
    drawing whole clusters (documents) with replacement. Approximate: nothing is guaranteed for few clusters.

    Args:
        teacher, hybrid (`Callable`): The metric, greater is better, of the rows with the given indices.
        clusters (`np.ndarray`): Which cluster each row belongs to, `[N]`.

    Returns:
        `(float, float)`: The drop, and the quantile `confidence` of the drops of the resamples.
    """
    members = [np.flatnonzero(clusters == name) for name in np.unique(clusters)]
    generator = np.random.default_rng(seed)
    drops = []
    for _ in range(resamples):
        rows = np.concatenate([members[i] for i in generator.integers(0, len(members), len(members))])
        drops.append(teacher(rows) - hybrid(rows))
    every = np.arange(len(clusters))
    return teacher(every) - hybrid(every), float(np.quantile(drops, confidence))


@dataclass
class Promise:
    """
    What holds beyond the rows at hand.

    Args:
        metric (`str`): Of what.
        max_drop (`float`): At most so much worse than the teacher, in units of the metric.
        confidence (`float`): With this probability.
        rows (`int`): How many rows it rests on.
        certified (`list`): The last step of the path that holds, as the path gave it; `None` if not even the first did.
        tested (`list[dict]`): Every step that was tested: its number of units, the drop found, and the wealth (or the
            bound of the bootstrap).
        exact (`bool`): Whether the probability is guaranteed (bounded means of independent rows) or approximate.
        greater_is_better (`bool`): Which way the metric goes.
    """

    metric: str
    max_drop: float
    confidence: float
    rows: int
    certified: Any = None
    tested: list[dict[str, float]] = field(default_factory=list)
    exact: bool = True
    greater_is_better: bool = True

    def sentence(self) -> str:
        """One sentence for a reader of the report."""
        verb = "drops" if self.greater_is_better else "rises"
        what = f"{self.metric} {verb} by at most {self.max_drop:.4g}"
        if self.certified is None:
            found = f"; {self.tested[0]['drop']:.4g} was found with {self.tested[0]['units']}" if self.tested else ""
            return f"Nothing is promised: {self.rows} rows do not show that {what}{found}."
        about = "" if self.exact else "about "
        return (
            f"With {about}{self.confidence:.0%} confidence, on data like these {self.rows} rows, {what} in expectation "
            f"with {len(self.certified)} linear."
        )


def certify(
    path: Sequence[Sequence[str]],
    drops: Callable[[Sequence[str]], np.ndarray],
    *,
    metric: str,
    max_drop: float,
    confidence: float = 0.9,
    rows: int = 0,
    greater_is_better: bool = True,
) -> Promise:
    """
    Walk a path from few linear units to many and stop at the first step whose drop is not shown to be small.

    Args:
        path (`list[list[str]]`): Nested sets of linear units, smallest first; fixed before any of these rows was seen.
        drops (`Callable`): Of one of them, teacher minus hybrid by row, in [-1, 1], greater is worse; rows in an order
            that does not depend on the set. Called for as many steps as are tested.
        metric (`str`), max_drop (`float`), confidence (`float`): What is promised.
        rows (`int`), greater_is_better (`bool`): For the sentence: how many rows there are, which way the metric goes.

    Returns:
        [`Promise`]
    """
    _check(max_drop, confidence)
    promise = Promise(metric, max_drop, confidence, rows, greater_is_better=greater_is_better)
    for units in path:
        found = np.asarray(drops(units), dtype=float)
        promise.rows = len(found)
        best = float(betting_wealth(found, max_drop, confidence).max(initial=0.0))
        promise.tested.append({"units": len(units), "drop": float(found.mean()), "wealth": best})
        if best < 1 / (1 - confidence) * (1 - 1e-12):
            break
        promise.certified = list(units)
    return promise


def certify_corpus(
    path: Sequence[Sequence[str]],
    bound: Callable[[Sequence[str]], tuple[float, float]],
    *,
    metric: str,
    rows: int,
    max_drop: float,
    confidence: float = 0.9,
    greater_is_better: bool = True,
) -> Promise:
    """
    The same for a metric of the whole corpus: `bound` returns the drop and its upper bound (see [`bootstrap_drop`]).
    The promise is approximate and says so.
    """
    _check(max_drop, confidence, bounded=False)
    promise = Promise(metric, max_drop, confidence, rows, exact=False, greater_is_better=greater_is_better)
    for units in path:
        drop, most = bound(units)
        promise.tested.append({"units": len(units), "drop": drop, "bound": most})
        if most > max_drop:
            break
        promise.certified = list(units)
    return promise


def promise_power(
    rows: int, max_drop: float, confidence: float = 0.9, different: float = 0.04, runs: int = 400
) -> float:
    """
    How likely a step that has cost nothing is certified, where teacher and hybrid differ on the share `different` of
    the rows, one way as often as the other. By simulation, the same each time.
    """
    generator = np.random.default_rng(0)
    halves = [different / 2, 1 - different, different / 2]
    drops = generator.choice([1.0, 0.0, -1.0], p=halves, size=(runs, rows))
    return float((betting_wealth(drops, max_drop, confidence).max(1) >= 1 / (1 - confidence)).mean())


def rows_needed(max_drop: float, confidence: float = 0.9, different: float = 0.04, power: float = 0.8) -> int | None:
    """The smallest of a few numbers of rows with which [`promise_power`] is `power` or more; `None` above 20,000."""
    candidates = [int(round(base * 10**digits)) for digits in range(2, 5) for base in (1, 1.5, 2, 3, 4, 5, 6, 8)]
    for rows in candidates:
        if rows <= 20_000 and promise_power(rows, max_drop, confidence, different, runs=200) >= power:
            return rows
    return None


def too_few_rows(rows: int, max_drop: float, confidence: float = 0.9) -> str | None:
    """A sentence for somebody who has too few rows for the promise that is wanted; `None` if there are enough."""
    power = promise_power(rows, max_drop, confidence)
    if power >= 0.5:
        return None
    needed = rows_needed(max_drop, confidence)
    return (
        f"{rows} rows are few to promise a drop of at most {max_drop:.4g} with {confidence:.0%} confidence: a hybrid "
        f"that differs from its teacher on 4 % of rows, and is no worse, would be certified with probability "
        f"{power:.2f}. "
        + ("More than 20,000 rows would be needed." if needed is None else f"{needed:,} rows would do.")
    )


def _check(max_drop: float, confidence: float, bounded: bool = True) -> None:
    if not (0 < max_drop < 1 if bounded else max_drop > 0):
        raise HybridConfigError(
            f"A promise needs a max_drop {'in (0, 1)' if bounded else 'above 0'}, in units of the metric; got "
            f"{max_drop!r}."
        )
    if not 0 < confidence < 1:
        raise HybridConfigError(f"confidence must be in (0, 1); got {confidence!r}.")


__all__ = [
    "Promise",
    "betting_wealth",
    "bootstrap_drop",
    "certify",
    "certify_corpus",
    "promise_power",
    "rows_needed",
    "too_few_rows",
]
