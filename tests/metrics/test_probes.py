"""Probes, losses of rows, and choices that change places."""

import math

import evaluate
import pytest
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from hf_hybrid.demo.assets import prose, teacher_folder
from hf_hybrid.errors import DatasetError
from hf_hybrid.evaluation.recall import recall_loss
from hf_hybrid.metrics import (
    RowLosses,
    key_value_lookup,
    majority_of_permutations,
    needles,
    permuted_choices,
    repeated_passages,
    row_losses,
)

from tiny_models import tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(teacher_folder())


def test_a_passage_read_twice_is_the_recall_loss():
    ids, model = torch.randint(3, 99, (3, 40), generator=torch.Generator().manual_seed(0)), tiny_model()
    rows = repeated_passages(ids, 20)
    assert rows[0]["input_ids"] == ids[0, :20].tolist() * 2
    # `recall_loss` asks for the second reading's tokens after the first, too
    assert sum(row_losses(model, rows)) / 3 == pytest.approx(recall_loss(model, ids), rel=1e-5)


def test_a_passage_may_come_again_later():
    ids = torch.arange(60).view(2, 30)
    row = repeated_passages(ids, 10, between=15)[1]
    assert row["input_ids"] == [*range(30, 55), *range(30, 40)]
    assert row["labels"] == [-100] * 26 + [*range(31, 40)]
    with pytest.raises(DatasetError, match="length \\+ between = 50"):
        repeated_passages(ids, 10, between=40)


@pytest.mark.slow
def test_needles_ask_for_the_code_that_was_hidden(tokenizer):
    rows = needles(prose("test"), tokenizer, 512, count=3)
    for row in rows:
        text = tokenizer.decode(row["input_ids"])
        answer = tokenizer.decode([token for token in row["labels"] if token != -100])
        assert answer.strip().isdigit() and len(answer.strip()) == 5
        assert text.endswith(answer) and text.count(answer.strip()) == 2
        assert text.count("The secret code of") == 7
        assert len(row["input_ids"]) <= 512
    with pytest.raises(DatasetError, match="at least"):
        needles(["short"], tokenizer, 512)
    with pytest.raises(DatasetError, match="num_needles"):
        needles(prose("test"), tokenizer, 512, num_needles=13)


@pytest.mark.slow
def test_key_values_ask_for_one_of_them(tokenizer):
    for row in key_value_lookup(tokenizer, 20, count=3):
        *lines, last = tokenizer.decode(row["input_ids"]).splitlines()
        assert len(lines) == 20 and last in lines
        answer = tokenizer.decode([token for token in row["labels"] if token != -100])
        assert last.endswith(answer.strip())
    with pytest.raises(DatasetError, match="num_pairs"):
        key_value_lookup(tokenizer, 0)


def test_rows_without_labels_are_refused():
    with pytest.raises(DatasetError, match="other than -100"):
        row_losses(
            tiny_model(), repeated_passages(torch.ones(1, 8, dtype=torch.long), 2).map(lambda r: {"labels": [-100] * 4})
        )


def test_losses_of_rows_in_a_trainer_and_as_a_metric(tmp_path):
    model = tiny_model()
    rows = repeated_passages(torch.randint(3, 99, (6, 16), generator=torch.Generator().manual_seed(0)), 8)
    metric = RowLosses()
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4)
    found = Trainer(model, args, eval_dataset=rows, **metric.trainer_kwargs()).evaluate()
    own = row_losses(model, rows)
    assert found["eval_loss"] == pytest.approx(sum(own) / 6, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(sum(own) / 6), rel=1e-5)
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=[0.1, 0.3], references=[1, 0]) == {
        "loss": pytest.approx(0.2),
        "perplexity": pytest.approx(math.exp(0.2)),
        "exact_match": 0.5,
    }
    combined = evaluate.combine([RowLosses()])
    assert combined.compute(predictions=[0.5], references=[1])["loss"] == 0.5
    with pytest.raises(DatasetError, match="trainer_kwargs"):
        metric.compute_metrics(type("Prediction", (), {"predictions": torch.zeros(2, 3, 4).numpy()}))


def test_options_change_places():
    examples = [{"question": "Which?", "choices": ["a", "b", "c"], "answer": 1}]
    rows = permuted_choices(examples)
    assert [row["choices"][row["answer"]] for row in rows] == ["b", "b", "b"]
    assert sorted(row["answer"] for row in rows) == [0, 1, 2]
    with pytest.raises(DatasetError, match="index of one of them"):
        permuted_choices([{"question": "?", "choices": ["a", "b"], "answer": 2}])


@pytest.mark.slow
def test_a_model_that_always_says_the_same_letter_is_found_out(tokenizer):
    class SaysA(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, use_cache):
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            logits[..., tokenizer(" A", add_special_tokens=False)["input_ids"][-1]] = 1.0
            return {"logits": logits}

    examples = [{"question": f"{i}?", "choices": ["x", "y", "z", "w"], "answer": 0} for i in range(5)]
    found = majority_of_permutations(SaysA(), tokenizer, examples)
    # its dataset says A every time: plain accuracy would be 1
    assert found == {"accuracy": 0.25, "consistent_accuracy": 0.0, "largest_letter_share": 1.0}
