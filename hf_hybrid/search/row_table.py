"""What is known of sets of linear units, row by row: nothing is scored twice, and any row can be added later."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from .trace import SwapTrace


# columns of a row's values: the metric that decides, and the loss that decides between equals
METRIC, LOSS = 0, 1
Units = frozenset[str]
# (sets, rows) -> [number of sets, number of rows, 2]
RowScore = Callable[[Sequence[Units], np.ndarray], np.ndarray]


class RowTable:
    """
    Args:
        score (`Callable`): Takes sets of linear units and indices of rows; returns metric and loss of every row under
            every set, `[S, R, 2]`. Called with as many sets at a time as there are to know, because what they share is
            then computed once.
        num_rows (`int`): How many rows there are.
        seed (`int`, *optional*, defaults to 0): Of the order in which rows are asked for, the same for all sets.
        trace (`SwapTrace`, *optional*): Where values are kept and found again.
        metric (`str`, *optional*): The metric's name: a trace may hold rows of others.

    Attributes:
        order (`np.ndarray`): The rows in that order.
        evaluations (`int`): Pairs of a set and a row that were scored, those found in the trace not counted.
    """

    def __init__(
        self, score: RowScore, num_rows: int, *, seed: int = 0, trace: SwapTrace | None = None, metric: str = ""
    ):
        self.score, self.trace, self.metric = score, trace, metric
        self.order = np.random.default_rng(seed).permutation(num_rows)
        self.evaluations = 0
        self._known: dict[Units, np.ndarray] = {}
        for entry in trace.rows if trace else ():
            if entry.get("metric") == metric:
                self._of(frozenset(entry["units"]))[entry["rows"]] = entry["values"]

    def _of(self, units: Units) -> np.ndarray:
        if units not in self._known:
            self._known[units] = np.full((len(self.order), 2), np.nan)
        return self._known[units]

    def values(self, sets: Iterable[Iterable[str]], rows: np.ndarray) -> np.ndarray:
        """Metric and loss of these rows under each of these sets, `[S, R, 2]`; what is not known is scored."""
        keys = [frozenset(units) for units in sets]
        missing: dict[bytes, tuple[np.ndarray, list[Units]]] = {}  # sets that lack the same rows go together
        for key in dict.fromkeys(keys):
            lacks = rows[np.isnan(self._of(key)[rows, METRIC])]
            if len(lacks):
                missing.setdefault(lacks.tobytes(), (lacks, []))[1].append(key)
        for lacks, lacking in missing.values():
            found = self.score(lacking, lacks)
            self.evaluations += found.shape[0] * found.shape[1]
            for key, values in zip(lacking, found, strict=True):
                self._of(key)[lacks] = values
                if self.trace:
                    self.trace.add_rows(self.metric, sorted(key), lacks.tolist(), values.tolist())
        return np.stack([self._of(key)[rows] for key in keys])

    def means(self, units: Iterable[str]) -> np.ndarray:
        """Mean metric and mean loss over all rows, `[2]`."""
        return self.values([units], self.order)[0].mean(0)


__all__ = ["LOSS", "METRIC", "RowScore", "RowTable", "Units"]
