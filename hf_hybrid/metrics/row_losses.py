"""The loss of each row on its labels: of the probes, of completions, of text."""

import math

import datasets
import evaluate
import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import DatasetError


IGNORED = -100


@torch.no_grad()
def row_losses(model: PreTrainedModel, rows: Dataset) -> list[float]:
    """
    Mean loss in nats per labelled token of each row, one row at a time.

    Args:
        model (`PreTrainedModel`): A causal language model; it is put into eval mode.
        rows (`Dataset`): Rows of `input_ids` and `labels` (-100: not asked for), such as a probe's.
    """
    model.eval()
    losses = []
    for row in rows:
        ids, labels = (torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels"))
        asked = labels[0, 1:] != IGNORED
        if not bool(asked.any()):
            raise DatasetError("row_losses: every row must have a label other than -100; got one without.")
        logits = model(input_ids=ids, use_cache=False)["logits"][0, :-1][asked.to(model.device)]
        losses.append(F.cross_entropy(logits.float(), labels[0, 1:][asked]).item())
    return losses


class RowLosses(evaluate.Metric):
    """
    Mean loss, perplexity and exact match of causal language modelling rows, as a metric of `evaluate` and, bound to a
    trainer, as its `compute_metrics`. Rows count alike, whatever their lengths, and every row is a value of its own.

    As a metric, `predictions` are the losses of rows in nats and `references` whether every token was the likeliest (0
    or 1):

        >>> RowLosses().compute(predictions=[0.1, 0.3], references=[1, 0])
        {'loss': 0.2, 'perplexity': 1.221..., 'exact_match': 0.5}

    In a trainer, without ever holding the logits of more than a batch:

        >>> trainer = HybridTrainer(model, args=args, eval_dataset=rows, **RowLosses().trainer_kwargs())
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Mean loss, perplexity and exact match of rows of labelled tokens.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        loss = float(np.mean(predictions))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "exact_match": float(np.mean(references))}

    def trainer_kwargs(self) -> dict:
        """`compute_metrics` and `preprocess_logits_for_metrics` of a trainer."""
        return {"compute_metrics": self.compute_metrics, "preprocess_logits_for_metrics": self.losses_of_batch}

    @staticmethod
    def losses_of_batch(logits, labels):
        """`[B, T, C]` -> `[B, 2]`: loss and exact match of each row."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        logits, labels = logits[:, :-1], labels[:, 1:].to(logits.device)
        result = []
        for row, wanted in zip(logits, labels, strict=True):  # a row at a time: the vocabulary in fp32 is large
            asked = wanted != IGNORED
            row, wanted = row[asked].float(), wanted[asked]
            result.append(torch.stack([F.cross_entropy(row, wanted), (row.argmax(-1) == wanted).all().float()]))
        return torch.stack(result)

    def compute_metrics(self, prediction) -> dict[str, float]:
        """Of a trainer whose `preprocess_logits_for_metrics` is [`RowLosses.losses_of_batch`]."""
        values = np.asarray(prediction.predictions, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != 2:
            raise DatasetError(
                f"RowLosses: predictions must be [N, 2]; got {list(values.shape)}. Pass trainer_kwargs() to the "
                "trainer, which also reduces logits."
            )
        if not np.isfinite(values).all():
            raise DatasetError(
                "RowLosses: every row must have a label other than -100, and a finite loss; got "
                f"{int((~np.isfinite(values)).any(1).sum())} rows without."
            )
        return self._compute(values[:, 0], values[:, 1])


__all__ = ["RowLosses", "row_losses"]
