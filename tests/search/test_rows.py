"""The metric row by row equals the metric of all rows where it is a mean, and says where it is not."""

import numpy as np
import pytest

from hf_hybrid.search.rows import row_values

from conftest import token_dataset
from helpers import toy_trainer


def hits(prediction):
    """How many of all tokens score below the one that came: a toy model is seldom right, so that accuracy says nothing."""
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    right = logits < np.take_along_axis(logits, labels[..., None], -1)
    return {"accuracy": float(right.mean()), "harmonic": float(2 / (1 / (right.mean() + 0.1) + 2.0))}


@pytest.mark.parametrize("swapped", [0, 2])
def test_a_mean_is_taken_apart(swapped, tmp_path):
    trainer = toy_trainer(tmp_path, compute_metrics=hits)
    trainer.swap_layers(range(swapped))
    found = row_values(trainer, "eval_accuracy", trainer.eval_dataset)
    whole = trainer.evaluate()["eval_accuracy"]
    assert found.is_mean and found.whole == whole
    assert len(found.values) == len(trainer.eval_dataset) and found.values.std() > 0
    assert found.values.mean() == pytest.approx(whole, abs=1e-9)
    assert found.of(np.array([1, 3])) == pytest.approx(found.values[[1, 3]].mean())
    assert trainer.compute_metrics is hits


def test_a_score_of_the_corpus_is_not_a_mean(tmp_path):
    trainer = toy_trainer(tmp_path, compute_metrics=hits)
    found = row_values(trainer, "eval_harmonic", trainer.eval_dataset)
    assert not found.is_mean
    assert found.of(np.arange(len(found.values))) == pytest.approx(found.whole)


def test_losses_of_rows(tmp_path):
    trainer = toy_trainer(tmp_path)
    size = trainer.args.per_device_eval_batch_size
    found = row_values(trainer, "eval_loss", trainer.eval_dataset)
    for row in (0, len(found.values) - 1):
        alone = trainer.evaluate(trainer.eval_dataset.select([row]))["eval_loss"]
        assert found.values[row] == pytest.approx(alone, rel=1e-5)
    assert trainer.args.per_device_eval_batch_size == size and "prediction_step" not in vars(trainer)
    assert found.is_mean and found.values.std() > 0


def test_rows_without_an_order_of_their_own(tmp_path):
    trainer = toy_trainer(tmp_path, compute_metrics=hits, eval_dataset=token_dataset(5, seed=3))
    again = row_values(trainer, "eval_accuracy", trainer.eval_dataset)
    backwards = row_values(trainer, "eval_accuracy", trainer.eval_dataset.select(range(4, -1, -1)))
    assert np.array_equal(again.values, backwards.values[::-1])
