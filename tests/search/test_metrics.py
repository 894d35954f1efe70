"""Which way metrics go: known by name, never guessed."""

import pytest

from hf_hybrid import GreedyLayerSwapCallback
from hf_hybrid.errors import HybridConfigError
from hf_hybrid.search.metrics import GREATER_IS_BETTER, SMALLER_IS_BETTER, known_direction


SMALLER = [
    "loss",
    "eval_loss",
    "eval_val_loss",
    "lm_loss",
    "hamming_loss",
    "logloss",
    "perplexity",
    "eval_perplexity",
    "wer",
    "eval_val_wer",
    "cer",
    "mae",
    "mse",
    "rmse",
    "ece",
    "ter",
    "word_error_rate",
    "mean_squared_error",
]
GREATER = [
    "accuracy",
    "eval_accuracy",
    "balanced_accuracy",
    "f1",
    "macro_f1",
    "exact_match",
    "bleu",
    "sacrebleu",
    "rouge1",
    "rougeL",
    "eval_rougeLsum",
    "chrf",
    "matthews_correlation",
    "pearson",
    "spearmanr",
    "auc",
    "roc_auc",
    "iou",
    "mean_iou",
    "recall@10",
    "eval_dev_precision",
]
UNKNOWN = [
    "quality",
    "eval_score",
    "answer",
    "f1macro",
    "neg_mean_squared_error",
    "negative_log_likelihood",
    "not_loss",
    "",
]


@pytest.mark.parametrize("name", SMALLER)
def test_smaller_is_better(name):
    assert known_direction(name) is False and GreedyLayerSwapCallback(name).greater_is_better is False


@pytest.mark.parametrize("name", GREATER)
def test_greater_is_better(name):
    assert known_direction(name) is True and GreedyLayerSwapCallback(name).greater_is_better is True


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_names_need_a_direction(name):
    assert known_direction(name) is None
    with pytest.raises(
        HybridConfigError,
        match=f"greater_is_better must be given for the metric '{name}', whose direction is not known",
    ):
        GreedyLayerSwapCallback(name)
    for given in (True, False):
        assert GreedyLayerSwapCallback(name, greater_is_better=given).greater_is_better is given


def test_a_given_direction_is_taken():
    assert GreedyLayerSwapCallback("loss", greater_is_better=True).greater_is_better is True
    with pytest.raises(HybridConfigError, match=r"'acuracy'.* Did you mean 'accuracy'.*\?"):
        GreedyLayerSwapCallback("acuracy")


def test_the_tables_do_not_contradict_each_other():
    assert not GREATER_IS_BETTER & SMALLER_IS_BETTER
    assert all(name == name.lower() for name in GREATER_IS_BETTER | SMALLER_IS_BETTER)
