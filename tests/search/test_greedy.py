"""The search itself, on made-up scores: no models here."""

import json
import math

import pytest
import torch

from hf_hybrid.errors import HybridConfigError, MetricError
from hf_hybrid.search.greedy import allowed_drop, confirm_swaps, greedy_swap


SITES = ["a", "b", "c", "d"]
COST = {"a": 0.05, "b": 0.01, "c": 0.03, "d": 0.2}


def accuracy(swapped):
    return {"eval_accuracy": 0.9 - sum(COST[site] for site in swapped)}


def search(score=accuracy, **kwargs):
    settings = {"metric": "eval_accuracy", "greater_is_better": True, "max_drop": 0.1, **kwargs}
    return greedy_swap(SITES, score, **settings)


def test_the_cheapest_layer_goes_first_until_the_floor():
    report = search()
    assert report.most_linear == ["b", "c", "a"]
    assert report.best == []  # every swap costs something
    assert report.base == 0.9 and report.floor == pytest.approx(0.8)
    # rounds of 4, 3, 2 and the refused last one, and the start
    assert len(report.trials) == 1 + 4 + 3 + 2 + 1
    assert [trial.candidate for trial in report.commits] == ["b", "c", "a"]


def test_best_is_the_most_linear_of_the_best():
    gains = {"a": 0.01, "b": 0.02, "c": -0.02, "d": -0.5}
    report = search(lambda swapped: {"eval_accuracy": 0.9 + sum(gains[s] for s in swapped)})
    assert report.best == ["b", "a"] and report.most_linear == ["b", "a", "c"]
    equal = search(lambda swapped: {"eval_accuracy": 0.9})
    assert equal.best == equal.most_linear == SITES  # ties: the model's order, and as many as possible


def test_every_round_scores_again():
    # a and b are each cheap and together ruinous
    def score(swapped):
        return {"eval_accuracy": 0.9 - (0.5 if {"a", "b"} <= set(swapped) else 0.001 * len(swapped))}

    assert search(score).most_linear == ["a", "c", "d"]


def test_losses_go_the_other_way():
    report = greedy_swap(
        SITES,
        lambda swapped: {"eval_loss": 2 + sum(COST[s] for s in swapped)},
        metric="eval_loss",
        greater_is_better=False,
        max_drop="3%",
    )
    assert report.floor == pytest.approx(2.06) and report.most_linear == ["b", "c"]


def test_equal_metrics_are_told_apart_by_the_loss():
    def score(swapped):
        return {"eval_accuracy": 0.5, "eval_loss": sum({"a": 3, "b": 2, "c": 1, "d": 4}[s] for s in swapped)}

    assert search(score).most_linear == ["c", "b", "a", "d"]
    assert search(score, tie_breaker=None).most_linear == SITES


def test_a_metric_on_the_floor_is_allowed():
    assert search(max_drop=0.04).most_linear == ["b", "c"]  # 0.9 - 0.04 in floating point is not exactly 0.86
    assert search(max_drop=0).most_linear == []
    assert search(floor=0.89).most_linear == ["b"]
    assert search(max_layers=1).most_linear == ["b"]


@pytest.mark.parametrize(
    ("given", "expected"), [(0.02, (0.02, False)), ("2%", (0.02, True)), (" 0.5 ", (0.5, False)), (0, (0.0, False))]
)
def test_allowed_drop(given, expected):
    assert allowed_drop(given) == pytest.approx(expected)


@pytest.mark.parametrize("given", [-0.1, "x", "-2%", math.nan, math.inf, [1]])
def test_a_senseless_drop_is_refused(given):
    with pytest.raises(HybridConfigError, match="max_drop must be a number >= 0"):
        search(max_drop=given)


def test_a_missing_metric_names_the_closest():
    with pytest.raises(
        MetricError,
        match=r"before the first swap: the metric 'eval_accurracy' is not among .* Did you mean 'eval_accuracy'\?",
    ):
        search(metric="eval_accurracy")


@pytest.mark.parametrize("bad", [math.nan, math.inf, "high"])
def test_a_metric_that_is_no_number_stops_the_search(bad):
    with pytest.raises(MetricError, match="round 1, trial of c: the metric 'eval_accuracy' must be a finite number"):
        search(lambda swapped: {"eval_accuracy": bad if swapped == ["c"] else 0.9})
    with pytest.raises(MetricError, match="the metric 'eval_loss' must be a finite number"):
        search(lambda swapped: {"eval_accuracy": 0.9, "eval_loss": math.nan})


def test_a_floor_above_the_start_is_refused():
    with pytest.raises(MetricError, match="got floor=0.95 for eval_accuracy, which starts at 0.9"):
        search(floor=0.95)


@pytest.mark.parametrize("floor", [math.nan, math.inf, "0.5"])
def test_a_floor_that_is_no_number_is_refused(floor):
    with pytest.raises(HybridConfigError, match="floor must be a finite number; got"):
        search(floor=floor)


def test_confirmation_takes_swaps_back():
    report = search()
    confirm_swaps(report, lambda swapped: {"eval_accuracy": 0.85 - (0.2 if "a" in swapped else 0)}, 0.1)
    assert report.confirmed == ["b", "c"]
    assert [len(trial.swapped) for trial in report.confirmations] == [0, 3, 2]
    with pytest.raises(MetricError, match="confirmation of 0 swaps"):
        confirm_swaps(report, lambda swapped: {}, 0.1)


def test_confirmation_has_a_floor_of_its_own():
    # the search started at 0.9, this data at 0.85: 0.77 is below the former's floor (0.8), above the latter's
    report = search()
    confirm_swaps(report, lambda swapped: {"eval_accuracy": 0.77 if swapped else 0.85}, 0.1)
    assert report.confirmed == report.most_linear == ["b", "c", "a"]
    # and where this data is easier than the search's, it is stricter
    report = search()
    confirm_swaps(report, lambda swapped: {"eval_accuracy": 0.83 if "a" in swapped else 0.95}, 0.1)
    assert report.confirmed == ["b", "c"]


def test_a_loss_is_confirmed_the_other_way():
    report = search(
        lambda swapped: {"eval_loss": 1 + len(swapped)}, metric="eval_loss", greater_is_better=False, max_drop=9
    )
    confirm_swaps(report, lambda swapped: {"eval_loss": 2.0 + len(swapped) ** 2}, 5)
    assert len(report.most_linear) == 4 and len(report.confirmed) == 2  # 2 + 4 is within 5 of 2, 2 + 9 is not


def test_best_is_chosen_among_what_is_confirmed():
    gains = {"a": 0.01, "b": 0.03, "c": 0.02, "d": -0.05}
    report = search(lambda swapped: {"eval_accuracy": 0.8 + sum(gains[site] for site in swapped)})
    assert report.best == ["b", "c", "a"] and report.most_linear == ["b", "c", "a", "d"]
    # on other data a costs too much, and c alone does; with d it happens to hold again
    other = {0: 0.8, 1: 0.8, 2: 0.6, 3: 0.6, 4: 0.75}
    confirm_swaps(report, lambda swapped: {"eval_accuracy": other[len(swapped)]}, 0.1)
    assert report.confirmed == ["b", "c", "a", "d"] and report.best == ["b"]
    assert [len(trial.swapped) for trial in report.confirmations] == [0, 4, 3, 2, 1]
    # where nothing holds, both are the teacher
    confirm_swaps(report, lambda swapped: {"eval_accuracy": 0.5 if swapped else 0.8}, 0.1)
    assert report.confirmed == report.best == []


def test_a_floor_that_the_teacher_misses_on_the_confirmation_data():
    report = search(floor=0.85)
    before, calls = list(report.most_linear), []

    def score(swapped):
        calls.append(swapped)
        return {"eval_accuracy": 0.84}

    with pytest.raises(
        MetricError, match="got floor=0.85 for eval_accuracy on the confirmation data, which starts at 0.84"
    ):
        confirm_swaps(report, score, 0.1, floor=0.85)
    assert calls == [[]] and report.most_linear == before and report.confirmed is None  # nothing was taken back


@pytest.mark.parametrize("value", ["0.75", torch.tensor(0.75)])
def test_a_metric_may_be_anything_that_reads_as_a_number(value):
    report = search(lambda swapped: {"eval_accuracy": value})
    assert report.most_linear == SITES and report.trials[-1].metrics == {"eval_accuracy": 0.75}


def test_a_report_as_plain_values():
    result = json.loads(json.dumps(search().to_dict()))
    assert result["most_linear"] == ["b", "c", "a"] and result["trials"] == 11 and len(result["commits"]) == 3
