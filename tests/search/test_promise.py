"""Promises: what they guarantee, how often they can be made, and what they say."""

import numpy as np
import pytest

from hf_hybrid.errors import HybridConfigError, MetricError
from hf_hybrid.search.promise import (
    betting_wealth,
    bootstrap_drop,
    certify,
    certify_corpus,
    promise_power,
    rows_needed,
    too_few_rows,
)


def drawn(rows, different, drop, runs, seed=0):
    """Drops of rows: some where the hybrid fails alone, some where the teacher does."""
    worse, better = (different + drop) / 2, (different - drop) / 2
    return np.random.default_rng(seed).choice([1.0, 0.0, -1.0], p=[worse, 1 - different, better], size=(runs, rows))


@pytest.mark.parametrize("different", [0.02, 0.05, 0.2, 0.6])
def test_a_drop_as_large_as_the_promise_is_certified_seldom(different):
    # at the border of the claim, where the error is largest: 4,000 runs, three standard errors of slack
    drops = drawn(400, different, 0.02, runs=4000)
    broken = (betting_wealth(drops, 0.02).max(1) >= 10).mean()
    assert broken <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 4000)


def test_wealth_is_a_fair_game_at_the_border():
    # E[W] = 1 if the expected drop is max_drop and no more, at every time
    wealth = betting_wealth(drawn(60, 0.3, 0.05, runs=40_000), 0.05)
    error = wealth.std(0) / np.sqrt(len(wealth))
    assert (np.abs(wealth.mean(0) - 1) < 4.5 * error).all()


@pytest.mark.parametrize(
    ("max_drop", "different", "rows", "expected"),
    [
        # ways of betting were compared at these; greater is better
        (0.02, 0.04, 300, 0.42),
        (0.02, 0.04, 600, 0.75),
        (0.02, 0.04, 1000, 0.91),
        (0.02, 0.04, 2000, 0.99),
        (0.02, 0.08, 300, 0.31),
        (0.02, 0.08, 600, 0.54),
        (0.02, 0.08, 1000, 0.68),
        (0.02, 0.08, 2000, 0.87),
        (0.03, 0.04, 300, 0.65),
        (0.03, 0.04, 600, 0.97),
        (0.05, 0.04, 300, 0.97),
        (0.05, 0.08, 300, 0.81),
        (0.05, 0.08, 600, 0.99),
    ],
)
def test_power(max_drop, different, rows, expected):
    assert promise_power(rows, max_drop, 0.9, different, runs=1000) >= expected - 0.05


def test_power_where_half_of_the_promise_is_used_up():
    drops = drawn(1000, 0.04, 0.01, runs=1000)
    assert (betting_wealth(drops, 0.02).max(1) >= 10).mean() >= 0.39 - 0.05


def test_a_path_stops_at_the_first_step_that_does_not_hold():
    path = [["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]]
    drop_of = {1: 0.0, 2: 0.0, 3: 0.2, 4: 0.0}
    asked = []

    def drops(units):
        asked.append(len(units))
        return drawn(800, 0.3 if drop_of[len(units)] else 0.02, drop_of[len(units)], 1, seed=len(units))[0]

    promise = certify(path, drops, metric="accuracy", max_drop=0.05)
    assert promise.certified == ["a", "b"]
    assert asked == [1, 2, 3]  # the fourth would hold, but comes after one that does not
    assert promise.rows == 800 and [step["units"] for step in promise.tested] == [1, 2, 3]
    assert "2 linear" in promise.sentence() and "90%" in promise.sentence()


def test_paths_of_200_splits_are_broken_in_at_most_a_tenth():
    """A pool of scored rows, steps that get worse; every split certifies a step, whose true drop is the pool's."""
    generator = np.random.default_rng(0)
    true, steps, pool = [], 8, 20_000
    scores = []
    for step in range(steps):
        drop = 0.006 * step
        scores.append(drawn(pool, 0.05 + 0.02 * step, drop, 1, seed=step)[0])
        true.append(scores[-1].mean())
    broken = certified = 0
    for _ in range(200):
        rows = generator.integers(0, pool, 600)
        path = [list(range(k + 1)) for k in range(steps)]
        promise = certify(path, lambda units, rows=rows: scores[len(units) - 1][rows], metric="accuracy", max_drop=0.02)
        if promise.certified is not None:
            certified += 1
            broken += true[len(promise.certified) - 1] > 0.02
    assert broken / 200 <= 0.1
    assert certified > 100  # a promise that is never made is never broken


def test_nothing_is_promised_where_nothing_holds():
    promise = certify([["a"]], lambda _: np.ones(50), metric="accuracy", max_drop=0.02)
    assert promise.certified is None
    assert promise.sentence().startswith("Nothing is promised: 50 rows")


def test_too_few_rows_says_how_many_would_do():
    sentence = too_few_rows(100, 0.02)
    assert "100 rows are few" in sentence and f"{rows_needed(0.02):,} rows would do" in sentence
    assert promise_power(rows_needed(0.02), 0.02) >= 0.75
    assert too_few_rows(1000, 0.05) is None


def test_a_corpus_metric_is_bounded_by_its_clusters():
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 5)
    teacher = generator.normal(2.0, 0.3, 200)
    hybrid = teacher + np.repeat(generator.normal(0.02, 0.05, 40), 5)  # what a document costs, its rows share

    def perplexity(losses):
        return lambda rows: -float(np.exp(losses[rows].mean()))

    drop, bound = bootstrap_drop(perplexity(teacher), perplexity(hybrid), clusters)
    _, careless = bootstrap_drop(perplexity(teacher), perplexity(hybrid), np.arange(200))
    assert bound > careless > drop  # rows of a document are no independent evidence
    promise = certify_corpus([["a"]], lambda _: (drop, bound), metric="perplexity", rows=200, max_drop=2 * bound)
    assert not promise.exact and "about 90%" in promise.sentence()
    assert certify_corpus([["a"]], lambda _: (drop, bound), metric="x", rows=200, max_drop=bound / 2).certified is None


def test_bad_input_is_refused():
    with pytest.raises(MetricError, match="must be in .-1, 1.; got 3.0"):
        betting_wealth(np.array([0.0, 3.0]), 0.02)
    with pytest.raises(HybridConfigError, match="confidence must be"):
        betting_wealth(np.zeros(3), 0.02, 1.0)
    with pytest.raises(HybridConfigError, match="max_drop in .0, 1."):
        certify([["a"]], lambda _: np.zeros(3), metric="accuracy", max_drop=0.0)
