"""Which way known metrics go. Maximising a loss would swap the worst layer first, so that no name is guessed at."""

from ..errors import HybridConfigError, closest


# lower-case, without `eval_`; a longer name counts by what follows one of its underscores (`val_wer`)
GREATER = """
    acc accuracy balanced_accuracy top1 top5 exact em exact_match match f1 f1_score precision recall sensitivity
    specificity average_precision map mrr ndcg hits pass auc auroc aucpr roc_auc pr_auc iou miou jaccard dice kappa mcc
    matthews_correlation pearson pearsonr spearman spearmanr kendall kendalltau r2 r_squared bleu sacrebleu bleu1 bleu2
    bleu3 bleu4 rouge rouge1 rouge2 rougel rougelsum meteor chrf cider spice bertscore bleurt comet mauve psnr ssim
    likelihood log_likelihood logprob
"""
SMALLER = """
    loss logloss perplexity ppl nll cross_entropy bpb bpc bits_per_byte bits_per_character surprisal kl kld wer cer mer
    wil per ter eer error err error_rate edit_distance mae mse rmse msle mape smape mase mean_absolute_error
    mean_squared_error root_mean_squared_error max_error ece mce brier brier_score fid fpr fnr
"""
GREATER_IS_BETTER, SMALLER_IS_BETTER = frozenset(GREATER.split()), frozenset(SMALLER.split())
# in front of a name, these turn it round, or may
NEGATIONS = frozenset(("neg", "negative", "inverse", "inverted", "minus", "non", "not", "no"))


# of a single row, between 0 and 1
BOUNDED = frozenset(
    [
        "acc",
        "accuracy",
        "top1",
        "top5",
        "exact",
        "em",
        "exact_match",
        "match",
        "f1",
        "precision",
        "recall",
        "iou",
        "jaccard",
        "dice",
        "rouge1",
        "rouge2",
        "rougel",
        "rougelsum",
        "meteor",
        "hit",
        "hits",
        "pass",
    ]
)


def is_bounded(metric: str) -> bool:
    """Whether a metric of this name lies in [0, 1] for a single row: what a bet on its mean needs."""
    words = metric.lower().split("@")[0].removeprefix("eval_").split("_")
    return any("_".join(words[start:]) in BOUNDED for start in range(len(words)))


def known_direction(metric: str) -> bool | None:
    """
    Whether a greater value of `metric` is better, or `None` for a name that no table has. `eval_` in front, a name
    before an underscore and a cut-off after `@` do not matter: `eval_val_wer`, `recall@10`.
    """
    words = metric.lower().split("@")[0].removeprefix("eval_").split("_")
    if NEGATIONS.intersection(words[:-1]):
        return None
    for start in range(len(words)):  # the longest known name first
        name = "_".join(words[start:])
        if name in GREATER_IS_BETTER:
            return True
        if name in SMALLER_IS_BETTER:
            return False
    return False if words[-1].endswith("loss") else None  # as in `TrainingArguments`


def direction(metric: str, greater_is_better: bool | None, where: str) -> bool:
    """
    `greater_is_better` where it is given, else what is known of `metric`.

    Raises:
        HybridConfigError: If neither says which way the metric goes.
    """
    if greater_is_better is not None:
        return bool(greater_is_better)
    known = known_direction(metric)
    if known is None:
        hint = closest(metric.removeprefix("eval_"), GREATER_IS_BETTER | SMALLER_IS_BETTER)
        raise HybridConfigError(
            f"{where}: greater_is_better must be given for the metric {metric!r}, whose direction is not known; got "
            f"None.{hint} Pass greater_is_better=True for a score, False for a loss or an error rate."
        )
    return known
