"""How far an accuracy on a few examples may be from the accuracy on all."""

from scipy.stats import binomtest

from ..errors import DatasetError


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """
    95 % interval of an accuracy (Wilson 1927): `(low, high)` in [0, 1].

    Args:
        correct (`int`): Examples that were right.
        total (`int`): Examples, at least 1.

    Raises:
        DatasetError: If `correct` is not in 0..`total`, or there are no examples.
    """
    if not 0 <= correct <= total or total < 1:
        raise DatasetError(
            f"accuracy_interval: correct must be in 0..total and total at least 1; got {correct} of {total}. "
            "Count again."
        )
    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
