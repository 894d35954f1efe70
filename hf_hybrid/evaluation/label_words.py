"""A classification task for language models: which of a few label words is the likelier continuation of a prompt?

Everything the Trainer needs for it: prompts, collator, loss, metrics. Only the last position's logits are computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DatasetError, HybridConfigError


if TYPE_CHECKING:
    from evaluate import EvaluationModule


class LabelWordTask:
    """
    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a padding token.
        prompt (`str`): With `{text}` where the example goes, ending where the label word follows.
        label_words (`list[str]`): The word of label 0, of label 1, …, each with its leading space; compared by their
            first token.
        metric (`evaluate.EvaluationModule`, *optional*): What to compute beside the accuracy, of predicted and true
            class indices: `evaluate.load("f1")`, a combination of several, or one of your own.

    Raises:
        DatasetError: If there is no tokenizer or no padding token.
        HybridConfigError: If the prompt has no `{text}`, or two label words begin with the same token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: str,
        label_words: list[str],
        metric: EvaluationModule | None = None,
    ):
        if tokenizer is None:
            raise DatasetError("LabelWordTask needs a tokenizer; got None.")
        if tokenizer.pad_token_id is None:
            raise DatasetError(
                "LabelWordTask needs a padding token, the tokenizer has none. "
                "Set tokenizer.pad_token = tokenizer.eos_token."
            )
        if "{text}" not in prompt:
            raise HybridConfigError(f"prompt must contain {{text}}; got {prompt!r}.")
        self.tokenizer, self.prompt, self.metric = tokenizer, prompt, metric
        self.label_ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in label_words]
        if len(set(self.label_ids)) < max(2, len(label_words)):
            raise HybridConfigError(
                f"label_words must be at least two words that begin with different tokens; got {label_words!r}."
            )

    def dataset(self, rows: list[dict]) -> Dataset:
        """Tokenised prompts of `{"text", "label"}` rows, shortest first so that batches hold little padding."""
        if not rows:
            raise DatasetError("LabelWordTask: the dataset must not be empty; got 0 rows.")
        ids = self.tokenizer([self.prompt.replace("{text}", row["text"]) for row in rows])["input_ids"]
        examples = sorted(
            zip(ids, (int(row["label"]) for row in rows), strict=True), key=lambda example: len(example[0])
        )
        return Dataset.from_dict({"input_ids": [i for i, _ in examples], "labels": [label for _, label in examples]})

    def collate(self, examples: list[dict]) -> dict:
        """Left-padded batch; `labels` are class indices, `[B]`. Sequences without labels (distillation text) pass."""
        if "labels" not in examples[0] or isinstance(examples[0]["labels"], list):
            return {"input_ids": torch.tensor([example["input_ids"] for example in examples])}
        length = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            count = len(example["input_ids"])
            ids[row, length - count :] = torch.tensor(example["input_ids"])
            mask[row, length - count :] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
            "labels": torch.tensor([example["labels"] for example in examples]),
            # an index, not the number 1: the slice that a number makes is not contiguous, and the output projection
            # would copy its weight once per row of the batch
            "logits_to_keep": torch.tensor([length - 1]),
        }

    def loss(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        """Cross-entropy among the label words, in nats; for `compute_loss_func`."""
        return F.cross_entropy(self.label_logits(outputs.logits), labels)

    def label_logits(self, logits, labels=None) -> torch.Tensor:
        """`[B, 1, vocabulary]` -> `[B, number of labels]`; for `preprocess_logits_for_metrics`."""
        return logits[:, -1, self.label_ids].float()

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy in [0, 1], and what `metric` computes; for `compute_metrics`."""
        predicted = np.argmax(prediction.predictions, axis=-1)
        values = {"accuracy": float(np.mean(predicted == prediction.label_ids))}
        if self.metric is not None:
            values |= self.metric.compute(predictions=predicted, references=prediction.label_ids)
        return values

    @torch.no_grad()
    def count_correct(self, model: PreTrainedModel, examples: Dataset, batch_size: int = 32) -> int:
        """How many of the examples that [`~LabelWordTask.dataset`] made `model` answers with the right word."""
        correct = 0
        for start in range(0, len(examples), batch_size):
            batch = self.collate([examples[i] for i in range(start, min(start + batch_size, len(examples)))])
            labels = batch.pop("labels")
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
            correct += int((self.label_logits(logits).argmax(-1).cpu() == labels).sum())
        return correct

    def trainer_kwargs(self) -> dict:
        """What to pass to a Trainer to evaluate this task."""
        return {
            "data_collator": self.collate,
            "compute_loss_func": self.loss,
            "preprocess_logits_for_metrics": self.label_logits,
            "compute_metrics": self.metrics,
        }
