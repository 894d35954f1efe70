"""A search's path on rows it never saw: which of its steps may be promised."""

from typing import Any

import numpy as np

from ..errors import HybridConfigError
from .by_rows import switch_to
from .fingerprint import Fingerprint
from .greedy import SwapReport, Trial, allowed_drop
from .metrics import is_bounded
from .promise import Promise, bootstrap_drop, certify, certify_corpus, too_few_rows
from .rows import RowValues, row_values


def half_of(max_drop: float | str | None) -> float | str | None:
    """Half of an allowed drop, in the form it was given: what the search keeps to, so that a test can tell."""
    if max_drop is None:
        return None
    value, relative = allowed_drop(max_drop)
    return f"{100 * value / 2}%" if relative else value / 2


def check_disjoint(searched, held_out) -> None:
    """
    Rows that a promise is tested on must be others than those of the search.

    Raises:
        HybridConfigError: If some are in both.
    """

    def digests(data) -> set[str]:
        parts = data.values() if isinstance(data, dict) else [data]
        return {Fingerprint().add(row).hexdigest() for part in parts if hasattr(part, "__len__") for row in part}

    both = len(digests(searched) & digests(held_out))
    if both:
        raise HybridConfigError(
            f"A promise is about rows that the search never saw: {both} rows of confirmation_dataset are in "
            "eval_dataset too. Leave them out of one."
        )


class HeldOut:
    """
    Args:
        trainer ([`HybridTrainer`]): Its model, as the teacher: no layer is linear.
        dataset: Prepared rows that the search does not see.
        metric (`str`), greater_is_better (`bool`), max_drop (`float` or `str`), confidence (`float`): What to promise.
    """

    def __init__(
        self, trainer, dataset, metric: str, greater_is_better: bool, max_drop: float | str, confidence: float
    ):
        self.trainer, self.dataset, self.metric, self.confidence = trainer, dataset, metric, confidence
        self.greater_is_better, self.sign = greater_is_better, 1.0 if greater_is_better else -1.0
        self.teacher = row_values(trainer, metric, dataset)
        value, relative = allowed_drop(max_drop)
        self.max_drop = value * abs(self.teacher.whole) if relative else value
        # losses and scores of a corpus have no bound to bet within, and what the teacher's rows say is no bound
        within = bool(((self.teacher.values >= 0) & (self.teacher.values <= 1)).all())
        self.is_bounded = is_bounded(metric) and self.teacher.is_mean and self.max_drop < 1 and within
        # rows may come sorted; a bet wants them in an order that says nothing
        self.order = np.random.default_rng(trainer.args.seed).permutation(len(self.teacher.values))

    def advice(self) -> str | None:
        """A sentence if the rows are too few for the promise."""
        return too_few_rows(len(self.order), self.max_drop, self.confidence) if self.is_bounded else None

    def certify(self, report: SwapReport) -> Promise:
        """
        Test the steps of `report.path`, from the first swap on. Fills `report.promise`, `report.confirmed`
        and `report.confirmations`, and moves `report.best` to the best of the steps that are promised.
        """
        path = report.path[1:]
        settings: dict[str, Any] = {
            "metric": self.metric,
            "max_drop": self.max_drop,
            "confidence": self.confidence,
            "rows": len(self.order),
            "greater_is_better": self.greater_is_better,
        }
        report.confirmations.append(Trial(0, [], None, {self.metric: self.teacher.whole}))

        def scored(units) -> RowValues:
            switch_to(self.trainer, units)
            hybrid = row_values(self.trainer, self.metric, self.dataset)
            report.confirmations.append(Trial(len(units), list(units), None, {self.metric: hybrid.whole}))
            return hybrid

        def drops(units):
            return (self.sign * (self.teacher.values - scored(units).values))[self.order]

        def bound(units):
            hybrid = scored(units)
            of_teacher, of_hybrid = (lambda rows, of=x.of: self.sign * of(rows) for x in (self.teacher, hybrid))
            # a metric function is called twice for each resample
            resamples = 2000 if self.teacher.is_mean else 200
            return bootstrap_drop(
                of_teacher, of_hybrid, np.arange(len(self.order)), confidence=self.confidence, resamples=resamples
            )

        if self.is_bounded:
            report.promise = certify(path, drops, **settings)
        else:
            report.promise = certify_corpus(path, bound, **settings)
        report.confirmed = report.promise.certified or []
        searched = [report.base, *(trial.metrics[report.metric] for trial in report.commits)]
        held = sum(step["units"] <= len(report.confirmed) for step in report.promise.tested) + 1
        best = max(range(held), key=lambda count: (self.sign * searched[count], count))
        report.best = report.path[best]
        return report.promise


__all__ = ["HeldOut", "half_of"]
