"""The metric of a mixture row by row, by the Trainer's own evaluation: a promise needs more than a mean."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import EvalPrediction

from .greedy import read_metric
from .scoring import evaluate


# a mean of rows is summed in another order than the metric of all of them
TOLERANCE = 1e-5


@dataclass
class RowValues:
    """
    Args:
        values (`np.ndarray`): The metric of each row by itself, `[N]`, in the order of the dataset.
        whole (`float`): The metric of all of them.
        of (`Callable`): The metric of the rows with the given indices.
        is_mean (`bool`): Whether `whole` is the mean of `values`; perplexity and corpus scores are not.
    """

    values: np.ndarray
    whole: float
    of: Callable[[np.ndarray], float]
    is_mean: bool


def row_values(trainer, metric: str, dataset) -> RowValues:
    """
    Evaluate the trainer's mixture as it is. A collective.

    Args:
        trainer ([`HybridTrainer`]): With its model, metric function and collator.
        metric (`str`): `"eval_loss"`, or `"eval_"` and a key of `compute_metrics`, which is called with single rows.
        dataset: Prepared rows.

    Raises:
        MetricError: If the metric is missing, or not finite on some row.
    """
    if metric == "eval_loss" or trainer.compute_metrics is None:
        return _losses(trainer, metric, dataset)
    with _kept_predictions(trainer) as kept:
        whole = read_metric(evaluate(trainer, metric, dataset), metric, "evaluation by rows")
    prediction, name = kept[-1], metric.removeprefix("eval_")

    def of(rows: np.ndarray) -> float:
        metrics = trainer.compute_metrics(_selected(prediction, rows))
        return read_metric({key.removeprefix("eval_"): value for key, value in metrics.items()}, name, f"rows {rows}")

    count = len(_first(prediction.predictions))
    values = np.array([of(np.array([row])) for row in range(count)])
    return RowValues(values, whole, of, bool(abs(values.mean() - whole) <= TOLERANCE * max(1.0, abs(whole))))


def _losses(trainer, metric: str, dataset) -> RowValues:
    """The loss of every row, alone in its batch: a mean over a batch cannot be taken apart."""
    losses: list[float] = []
    own, step, size = (
        trainer.__dict__.get("prediction_step"),
        trainer.prediction_step,
        trainer.args.per_device_eval_batch_size,
    )

    def watched(model, inputs, prediction_loss_only, *args, **kwargs):
        result = step(model, inputs, prediction_loss_only, *args, **kwargs)
        if result[0] is not None:
            losses.extend(trainer.accelerator.gather_for_metrics(result[0].detach().reshape(1)).tolist())
        return result

    trainer.prediction_step = watched
    trainer.args.per_device_eval_batch_size = 1
    try:
        read_metric(evaluate(trainer, metric, dataset), metric, "evaluation by rows")
    finally:
        trainer.args.per_device_eval_batch_size = size
        if own is None:
            del trainer.prediction_step
        else:
            trainer.prediction_step = own
    values = np.array(losses)
    return RowValues(values, float(values.mean()), lambda rows: float(values[rows].mean()), True)


@contextlib.contextmanager
def _kept_predictions(trainer) -> Iterator[list[EvalPrediction]]:
    """What `compute_metrics` is given in here."""
    own, kept = trainer.compute_metrics, []

    def compute_metrics(prediction, *args, **kwargs):
        kept.append(prediction)
        return own(prediction, *args, **kwargs)

    trainer.compute_metrics = compute_metrics
    try:
        yield kept
    finally:
        trainer.compute_metrics = own


def _selected(prediction: EvalPrediction, rows: np.ndarray) -> EvalPrediction:
    def some(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(some(part) for part in value)
        if isinstance(value, dict):
            return {key: some(part) for key, part in value.items()}
        return value if value is None else value[rows]

    parts = {"predictions": some(prediction.predictions), "label_ids": some(prediction.label_ids)}
    for name in ("inputs", "losses"):
        if getattr(prediction, name, None) is not None:
            parts[name] = some(getattr(prediction, name))
    return EvalPrediction(**parts)


def _first(value: Any):
    while isinstance(value, (tuple, list, dict)):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value


__all__ = ["RowValues", "row_values"]
