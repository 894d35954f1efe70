"""Classification by label words: batches, loss, metrics."""

import evaluate
import numpy as np
import pytest
import torch
from datasets import Features, Value
from transformers import EvalPrediction

from hf_hybrid.errors import DatasetError, HybridConfigError
from hf_hybrid.evaluation.label_words import LabelWordTask

from tiny_models import tiny_model


def test_label_words(tokenizer):
    task = LabelWordTask(tokenizer, "w1 {text} w2", ["bad", "good"])
    data = task.dataset([{"text": "w5 w6 w7", "label": 1}, {"text": "w5", "label": 0}])
    assert data["labels"] == [0, 1]  # shortest first
    batch = task.collate([data[0], data[1]])
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]
    assert batch["input_ids"][0, :2].tolist() == [tokenizer.pad_token_id] * 2
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    labels = batch.pop("labels")
    model = tiny_model()
    with torch.no_grad():
        outputs = model(**batch)
        alone = model(torch.tensor([data[0]["input_ids"]])).logits[0, -1, [5, 4]]
    assert torch.allclose(task.label_logits(outputs.logits)[0], alone, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(task.label_logits(outputs.logits), labels)
    assert task.loss(outputs, labels) == expected
    assert task.metrics(EvalPrediction(np.array([[1, 2], [3, 0]]), np.array([1, 1]))) == {"accuracy": 0.5}


def test_text_without_labels_passes_as_it_is(tokenizer):
    task = LabelWordTask(tokenizer, "{text}", ["bad", "good"])
    batch = task.collate([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}])
    assert list(batch) == ["input_ids"] and batch["input_ids"].tolist() == [[5, 6], [7, 8]]


def test_right_answers_are_counted_over_batches(tokenizer):
    task, model = LabelWordTask(tokenizer, "{text} w2", ["bad", "good"]), tiny_model()
    data = task.dataset([{"text": " ".join(["w3"] * (1 + i % 4) + [f"w{i}"]), "label": i % 2} for i in range(21)])
    expected = 0
    with torch.no_grad():
        for row in data:
            bad, good = model(torch.tensor([row["input_ids"]])).logits[0, -1, [5, 4]].tolist()
            expected += int(good > bad) == row["labels"]
    assert 0 < expected < 21
    assert task.count_correct(model, data, batch_size=4) == expected


class Disagreements(evaluate.Metric):
    """A metric of the user's own: how many predictions are wrong."""

    def _info(self):
        return evaluate.MetricInfo(
            description="",
            citation="",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def _compute(self, predictions, references):
        return {"disagreements": int(np.sum(np.array(predictions) != np.array(references)))}


def test_metrics_of_the_evaluate_library_come_beside_the_accuracy(tokenizer, tmp_path):
    task = LabelWordTask(tokenizer, "{text}", ["bad", "good"], metric=Disagreements(cache_dir=str(tmp_path)))
    values = task.metrics(EvalPrediction(np.array([[1, 2], [3, 0], [2, 1]]), np.array([1, 1, 1])))
    assert values == {"accuracy": pytest.approx(1 / 3), "disagreements": 2}
    assert task.trainer_kwargs()["compute_metrics"] == task.metrics


def test_bad_tasks_say_what_is_wrong(tokenizer):
    task = LabelWordTask(tokenizer, "{text}", ["bad", "good"])
    with pytest.raises(DatasetError, match="must not be empty"):
        task.dataset([])
    with pytest.raises(DatasetError, match="needs a tokenizer"):
        LabelWordTask(None, "{text}", ["a", "b"])
    with pytest.raises(HybridConfigError, match="must contain {text}"):
        LabelWordTask(tokenizer, "text", ["bad", "good"])
    with pytest.raises(HybridConfigError, match="begin with different tokens; got"):
        LabelWordTask(tokenizer, "{text}", ["good", "good"])
    with pytest.raises(HybridConfigError, match="at least two words"):
        LabelWordTask(tokenizer, "{text}", ["good"])


def test_a_task_needs_padding(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DatasetError, match="needs a padding token, the tokenizer has none"):
        LabelWordTask(tokenizer, "{text}", ["bad", "good"])
