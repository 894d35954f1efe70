"""`GreedyLayerSwapCallback`: settings, what is refused and when, what the trainer ends up with."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_hybrid import GreedyLayerSwapCallback
from hf_hybrid.errors import HybridConfigError, MetricError, OutputFolderError

from conftest import token_dataset
from helpers import toy_trainer
from tiny_models import tiny_model


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]))}


def by_rows(values, default):
    """A metric function that returns `values[number of rows]`: tells validation from confirmation data."""
    return lambda prediction: {"accuracy": values.get(len(prediction.label_ids), default)}


def evaluations(trainer):
    """A list that grows by the number of rows of every evaluation."""
    rows, own = [], trainer.evaluate_silently

    def counted(dataset=None):
        rows.append(len(trainer.eval_dataset if dataset is None else dataset))
        return own(dataset)

    trainer.evaluate_silently = counted
    return rows


def test_settings_survive_a_checkpoint():
    callback = GreedyLayerSwapCallback(
        "quality",
        "3%",
        greater_is_better=False,
        floor=1.5,
        max_layers=2,
        keep="best",
        reuse_activations=False,
        max_reuse_bytes=7,
    )
    state = json.loads(json.dumps(callback.state()))
    again = GreedyLayerSwapCallback.from_state(state)
    assert again.state() == callback.state() and again.greater_is_better is False and again.max_layers == 2


def test_one_callback_serves_several_trainers(tmp_path):
    callback = GreedyLayerSwapCallback("eval_loss", 5.0, max_layers=1, confirmation_dataset=token_dataset(4, seed=9))
    first = toy_trainer(tmp_path / "a", callbacks=[callback])
    second = toy_trainer(tmp_path / "b", callbacks=[callback], model=tiny_model(seed=3))
    second_alone = toy_trainer(
        tmp_path / "c",
        model=tiny_model(seed=3),
        callbacks=[
            GreedyLayerSwapCallback("eval_loss", 5.0, max_layers=1, confirmation_dataset=token_dataset(4, seed=9))
        ],
    )
    first.train()  # linked before the second
    assert first.swap_report is not None and second.swap_report is None and second.swapped_layers() == []
    second.train()
    second_alone.train()
    for trial, alone in zip(second.swap_report.trials, second_alone.swap_report.trials, strict=True):
        assert trial.swapped == alone.swapped and trial.metrics["eval_loss"] == alone.metrics["eval_loss"]
    assert first.swap_report.base != second.swap_report.base
    assert len(first.swapped_layers()) == len(second.swapped_layers()) == 1
    assert (tmp_path / "a" / "swap_trace.jsonl").exists() and (tmp_path / "b" / "swap_trace.jsonl").exists()


def test_confirmation_text_is_prepared_by_each_trainer(tokenizer, tmp_path):
    from datasets import Dataset

    text = Dataset.from_dict({"text": ["w1 w2 w3 " * 30]})
    callback = GreedyLayerSwapCallback("eval_loss", 5.0, max_layers=1, confirmation_dataset=text)
    lengths = []
    for length in (12, 8):
        arguments = {"max_length": length}
        trainer = toy_trainer(tmp_path / str(length), processing_class=tokenizer, arguments=arguments)
        rows = evaluations(trainer)
        callback.search(trainer)
        lengths.append(rows[-1])
    assert lengths == [91 // 12, 91 // 8] and callback.confirmation_dataset is text


@pytest.mark.parametrize(("keep", "layers"), [("most_linear", 2), ("best", 1)])
def test_whatever_is_kept_is_confirmed(keep, layers, tmp_path):
    # validation says 3 linear layers are best; on the 4 rows of the confirmation data 1 and 2 hold
    holds = {0: 0.9, 1: 0.9, 2: 0.85, 3: 0.5}
    trainer_of = []

    def compute_metrics(prediction):
        count = len(trainer_of[0].swapped_layers())
        value = 0.8 + (0.01 * count if count != 2 else 0.0) if len(prediction.label_ids) == 8 else holds[count]
        return {"accuracy": value}

    trainer_of.append(toy_trainer(tmp_path, compute_metrics=compute_metrics))
    data = token_dataset(4, seed=9)
    report = GreedyLayerSwapCallback("accuracy", 0.1, keep=keep, confirmation_dataset=data).search(trainer_of[0])
    assert len(report.most_linear) == 3 and len(report.confirmed) == 2 and len(report.best) == 1
    assert sorted(trainer_of[0].swapped_layers()) == sorted(report.most_linear[:layers])


def test_a_floor_that_the_teacher_misses_on_confirmation_data_is_refused_first(tmp_path):
    settings = {"floor": 0.7, "confirmation_dataset": token_dataset(4, seed=9)}
    metrics = {"compute_metrics": by_rows({4: 0.6}, 0.8)}
    message = "got floor=0.7 for eval_accuracy on the confirmation data, which starts at 0.6"
    trainer = toy_trainer(tmp_path / "a", callbacks=[GreedyLayerSwapCallback("accuracy", **settings)], **metrics)
    with pytest.raises(MetricError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0  # before the distillation
    trainer = toy_trainer(tmp_path / "b", **metrics)
    rows = evaluations(trainer)
    with pytest.raises(MetricError, match=message):
        GreedyLayerSwapCallback("accuracy", **settings).search(trainer)
    assert rows == [4] and trainer.swap_report is None  # before the search
    with pytest.raises(MetricError, match="got floor=0.9 for eval_accuracy, which starts at 0.8"):
        GreedyLayerSwapCallback("accuracy", floor=0.9).search(toy_trainer(tmp_path / "c", **metrics))
    report = GreedyLayerSwapCallback(
        "accuracy", floor=0.5, confirmation_dataset=settings["confirmation_dataset"]
    ).search(toy_trainer(tmp_path / "d", **metrics))
    assert report.confirmed == report.most_linear and len(report.confirmed) == 3


def test_a_failed_confirmation_leaves_no_layer_swapped(tmp_path):
    trainer_of = []

    def compute_metrics(prediction):
        return {"accuracy": float("nan") if len(prediction.label_ids) == 4 and trainer_of[0].swapped_layers() else 0.5}

    trainer_of.append(toy_trainer(tmp_path, compute_metrics=compute_metrics))
    with pytest.raises(
        MetricError, match="confirmation of 3 swaps: the metric 'eval_accuracy' must be a finite number"
    ):
        GreedyLayerSwapCallback("accuracy", confirmation_dataset=token_dataset(4)).search(trainer_of[0])
    assert trainer_of[0].swapped_layers() == []


def test_another_floor_or_metric_costs_no_evaluation(tmp_path):
    first = GreedyLayerSwapCallback("eval_loss", 5.0).search(toy_trainer(tmp_path, compute_metrics=accuracy))
    assert len(first.most_linear) == 3
    for kwargs, linear in (({"max_drop": 0.0, "max_layers": 1}, None), ({"floor": 50.0}, 3), ({"max_drop": "90%"}, 3)):
        trainer = toy_trainer(tmp_path, compute_metrics=accuracy)
        rows = evaluations(trainer)
        report = GreedyLayerSwapCallback("eval_loss", **kwargs).search(trainer)
        assert rows == [] and (linear is None or len(report.most_linear) == linear)
    trainer = toy_trainer(tmp_path, compute_metrics=accuracy)
    rows = evaluations(trainer)
    GreedyLayerSwapCallback("accuracy", 1.0, max_layers=1).search(trainer)
    assert rows == []


def other_mlp():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("changed", "after"),
    [
        ("data", {"eval_dataset": token_dataset(8, seed=3).with_format("torch")}),
        ("weights", {"model": other_mlp}),
        ("compute_metrics", {"compute_metrics": accuracy}),
    ],
)
def test_a_search_of_something_else_is_not_continued(changed, after, tmp_path):
    GreedyLayerSwapCallback().search(toy_trainer(tmp_path, eval_dataset=token_dataset(8, seed=2).with_format("torch")))
    same = {"eval_dataset": token_dataset(8, seed=2), **after}
    if "model" in same:
        same["model"] = same["model"]()
    with pytest.raises(OutputFolderError, match=f"holds another search: {changed} changed since"):
        GreedyLayerSwapCallback().search(toy_trainer(tmp_path, **same))


def test_what_a_loss_of_any_name_does(tmp_path):
    """Perplexity is minimised without being told so: the most harmful layer does not go first."""

    def compute_metrics(prediction):
        logits, labels = torch.tensor(prediction.predictions[:, :-1]), torch.tensor(prediction.label_ids[:, 1:])
        return {"perplexity": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).exp().item()}

    by_loss = GreedyLayerSwapCallback("loss", "50%").search(toy_trainer(tmp_path / "a"))
    trainer = toy_trainer(tmp_path / "b", compute_metrics=compute_metrics)
    by_perplexity = GreedyLayerSwapCallback("perplexity", "900%").search(trainer)
    assert by_perplexity.most_linear == by_loss.most_linear and by_perplexity.floor > by_perplexity.base
    with pytest.raises(HybridConfigError, match="greater_is_better must be given for the metric 'quality'"):
        GreedyLayerSwapCallback("quality")


def correct_by_layers(trainer_of, wrong_rows):
    """A metric of single rows: those in `wrong_rows[number of linear layers]` are wrong; rows are told by their first token."""

    def compute_metrics(prediction):
        wrong = wrong_rows[len(trainer_of[0].swapped_layers())]
        return {"accuracy": float(np.mean([int(first) not in wrong for first in prediction.label_ids[:, 0]]))}

    return compute_metrics


def numbered_rows(count):
    """Rows whose first token is their number, modulo the vocabulary."""
    rows = token_dataset(count, seed=9)["input_ids"]
    rows = [[i, *row[1:]] for i, row in enumerate(rows)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def test_a_promise_holds_the_search_to_steps_that_are_shown(tmp_path):
    # on 60 rows: one and two layers cost nothing, three cost half of the rows
    trainer_of = []
    metric = correct_by_layers(trainer_of, {0: (), 1: (), 2: (), 3: range(0, 60, 2)})
    trainer_of.append(toy_trainer(tmp_path, compute_metrics=metric, eval_dataset=numbered_rows(1)))
    # the row of the search is number 0, which only three layers get wrong: the search stops at two
    callback = GreedyLayerSwapCallback("accuracy", 0.2, confirmation_dataset=numbered_rows(60), confidence=0.9)
    report = callback.search(trainer_of[0])
    assert len(report.most_linear) == 2 and report.confirmed == report.most_linear
    assert report.promise.rows == 60 and report.promise.exact and len(report.promise.certified) == 2
    assert [trial.metrics["eval_accuracy"] for trial in report.confirmations] == [1.0, 1.0, 1.0]
    assert "at most 0.2" in report.promise.sentence()
    assert json.loads(json.dumps(report.to_dict()))["promise"]["certified"] == report.confirmed
    assert sorted(trainer_of[0].swapped_layers()) == sorted(report.confirmed)


def test_a_step_that_costs_too_much_on_other_rows_is_not_promised(tmp_path):
    trainer_of = []
    metric = correct_by_layers(trainer_of, {0: (), 1: (), 2: range(1, 60, 2), 3: ()})
    trainer_of.append(toy_trainer(tmp_path, compute_metrics=metric, eval_dataset=numbered_rows(1)))
    callback = GreedyLayerSwapCallback("accuracy", 0.2, confirmation_dataset=numbered_rows(60), confidence=0.9)
    report = callback.search(trainer_of[0])
    # row 0 is never wrong: the search goes all the way, the promise does not, though three layers would hold
    assert len(report.most_linear) == 3 and len(report.confirmed) == 1 and len(report.best) <= 1
    assert [step["units"] for step in report.promise.tested] == [1, 2]
    assert len(trainer_of[0].swapped_layers()) == 1


def test_a_promise_about_a_loss_is_approximate(tmp_path):
    trainer = toy_trainer(tmp_path)
    data = token_dataset(12, seed=9)
    report = GreedyLayerSwapCallback("eval_loss", 5.0, confirmation_dataset=data, confidence=0.8).search(trainer)
    assert not report.promise.exact and len(report.confirmed) == 3
    assert "about 80%" in report.promise.sentence()


def test_too_few_rows_for_a_promise_are_said_before_the_search(tmp_path, caplog):
    trainer_of = []
    metric = correct_by_layers(trainer_of, {0: (), 1: (), 2: (), 3: ()})
    trainer_of.append(toy_trainer(tmp_path, compute_metrics=metric, eval_dataset=numbered_rows(1)))
    callback = GreedyLayerSwapCallback("accuracy", 0.02, confirmation_dataset=numbered_rows(20), confidence=0.9)
    report = callback.search(trainer_of[0])
    assert "20 rows are few to promise a drop of at most 0.02" in caplog.text and "rows would do" in caplog.text
    assert report.promise.certified is None and report.confirmed == [] and trainer_of[0].swapped_layers() == []


def test_settings_of_a_promise_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(HybridConfigError, match="confidence must be in"):
        GreedyLayerSwapCallback("accuracy", confidence=90)
    with pytest.raises(HybridConfigError, match="promises max_drop"):
        GreedyLayerSwapCallback("accuracy", floor=0.5, confidence=0.9)
    trainer = toy_trainer(tmp_path, compute_metrics=accuracy)
    with pytest.raises(HybridConfigError, match="needs a confirmation_dataset"):
        GreedyLayerSwapCallback("accuracy", 0.1, confidence=0.9).search(trainer)
