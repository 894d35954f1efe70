"""Strategies on made-up scores: no model, so that the right answer is known."""

import itertools
import json

import numpy as np
import pytest

from hf_hybrid.errors import HybridConfigError, MetricError
from hf_hybrid.search.row_table import RowTable
from hf_hybrid.search.searching import Budget, search_path
from hf_hybrid.search.strategies import STRATEGIES, Problem, Race, get_strategy
from hf_hybrid.search.trace import SwapTrace


class World:
    """Rows whose loss grows with what is linear: each unit its own damage, pairs that interact, noise of each row and unit."""

    def __init__(self, units=30, rows=400, noise=0.5, seed=0, pairs=20):
        generator = np.random.default_rng(seed)
        self.units = [f"layer.{i}" for i in range(units)]
        self.damage = np.sort(generator.gamma(0.6, 0.05, units))[generator.permutation(units)]
        self.pairs = np.zeros((units, units))
        for a, b in generator.integers(0, units, (pairs, 2)):
            self.pairs[a, b] += abs(generator.normal(0, 0.05))
        self.pairs = np.triu(self.pairs, 1)
        self.noise = generator.normal(0, noise, (rows, units)) * self.damage
        self.base = generator.normal(1.0, 0.3, rows)
        self.calls = []

    def expected(self, units):
        x = np.isin(self.units, list(units)).astype(float)
        return self.damage @ x + x @ self.pairs @ x

    def __call__(self, sets, rows):
        self.calls.append((len(sets), len(rows)))
        found = []
        for units in sets:
            x = np.isin(self.units, list(units)).astype(float)
            loss = self.base[rows] + self.expected(units) + self.noise[rows] @ x
            found.append(np.stack([(loss < 1.6).astype(float), loss], axis=1))
        return np.array(found)

    def guess(self, error=1.0, seed=1):
        """Proposals that are off by a factor."""
        off = np.exp(np.random.default_rng(seed).normal(0, error, len(self.units)))

        def predicted(linear):
            x = np.isin(self.units, list(linear)).astype(float)
            own = off * (self.damage + (self.pairs + self.pairs.T) @ x)
            return {unit: own[i] for i, unit in enumerate(self.units) if unit not in linear}

        return predicted


def run(world, strategy, limit, metric="eval_loss", **kwargs):
    table = RowTable(
        (lambda sets, rows: world(sets, rows)[..., [1, 1]]) if metric == "eval_loss" else world, len(world.base)
    )
    kwargs = {"max_drop": None, "greater_is_better": metric != "eval_loss", **kwargs}
    report = search_path(world.units, table, metric=metric, strategy=strategy, budget=Budget(limit), **kwargs)
    return report, table


def test_greedy_is_algorithm_1():
    world = World(units=8, rows=50)
    report, table = run(world, "greedy", 4)
    path = []
    for _ in range(4):
        rest = [unit for unit in world.units if unit not in path]
        path.append(min(rest, key=lambda u: world([[*path, u]], np.arange(50))[0, :, 1].mean()))
    assert report.most_linear == path
    assert table.evaluations == 50 * (1 + 8 + 7 + 6 + 5)  # the teacher, then all that remain


@pytest.mark.parametrize("seed", range(5))
def test_a_race_costs_an_eighth_and_ends_as_well(seed):
    world = World(seed=seed)
    exhaustive, everything = run(world, "greedy", 15)
    raced, some = run(world, "race", 15, predicted=world.guess(0.7, seed))
    assert some.evaluations <= everything.evaluations / 8
    losses = [world([r.most_linear], np.arange(400))[0, :, 1] for r in (raced, exhaustive)]
    error = (losses[0] - losses[1]).std(ddof=1) / 20
    assert losses[0].mean() - losses[1].mean() <= max(error, 0.01)
    assert len(set(raced.most_linear)) == 15


@pytest.mark.parametrize("seed", range(3))
def test_a_race_is_no_worse_than_orders_that_look_once(seed):
    world = World(seed=seed, pairs=60)
    raced = world.expected(run(world, "race", 15, predicted=world.guess(0.7, seed))[0].most_linear)
    for name in ("one_shot", "uniform", "random", "proposed"):
        other = world.expected(run(world, name, 15, predicted=world.guess(0.7, seed))[0].most_linear)
        assert raced <= other + 0.02, name


def test_a_race_goes_on_the_metric_and_then_on_the_loss():
    world = World(seed=3)
    report, _ = run(world, "race", 10, metric="eval_accuracy", predicted=world.guess())
    metrics = [trial.metrics["eval_accuracy"] for trial in report.trials]
    assert metrics[0] == world([[]], np.arange(400))[0, :, 0].mean() and len(report.commits) == 10


def test_an_exchange_takes_back_what_greed_took():
    """Two units that are cheap alone and dear together; a third that is always a little dearer."""
    world = World(units=6, rows=200, noise=0.1, pairs=0)
    world.damage = np.array([0.01, 0.011, 0.02, 0.5, 0.6, 0.7])
    world.noise = np.random.default_rng(0).normal(0, 0.001, (200, 6))
    world.pairs[0, 1] = 0.3
    blind = {unit: i for i, unit in enumerate(world.units)}

    def predicted(linear):  # knows nothing of pairs
        return {unit: blind[unit] for unit in world.units if unit not in linear}

    # one runner a round: the proposals decide, and are wrong
    problem = Problem(world.units, RowTable(lambda s, r: world(s, r)[..., [1, 1]], 200), -1.0, predicted, limit=2)
    without = list(Race(candidates=1, exchange_every=0)(problem))[-1].units
    with_exchange = list(Race(candidates=1, exchange_every=2)(problem))[-1].units
    assert without == ("layer.0", "layer.1")
    assert world.expected(with_exchange) < 0.05 < world.expected(without)


def test_an_exchange_by_luck_is_not_made():
    """Units that are all alike: whatever is better on a few rows is noise."""
    world = World(units=12, rows=400, pairs=0)
    world.damage = np.full(12, 0.05)
    world.noise = np.random.default_rng(0).normal(0, 0.3, (400, 12))
    problem = Problem(world.units, RowTable(lambda s, r: world(s, r)[..., [1, 1]], 400), -1.0, limit=9)
    for step in Race(exchange_every=1)(problem):
        # one unit came, and at most one was exchanged for another that is better on all rows
        assert len(step.units) == len(set(step.units))
    race, path = Race(), world.units[:5]
    race.qualify(problem)
    moved = race.exchanged(problem, path)
    assert problem.step(moved).loss <= problem.step(path).loss


@pytest.mark.parametrize("guess", ["good", "reversed"])
def test_predictions_choose_some_of_the_runners(guess):
    world = World(seed=1, noise=3.0)
    predicted = (
        world.guess(0.0)
        if guess == "good"
        else lambda linear: {unit: -damage for unit, damage in world.guess(0.0)(linear).items()}
    )
    problem = Problem(world.units, RowTable(lambda s, r: world(s, r)[..., [1, 1]], 400), -1.0, predicted)
    race = Race()
    race.qualify(problem)
    runners = race.runners(problem, [])
    cheapest = sorted(world.units, key=predicted([]).__getitem__)
    assert len(runners) == len(set(runners)) == 8
    others = [unit for unit in cheapest if unit not in runners[:6]]
    assert runners[6:] == others[:2]


def test_uniform_spreads_and_random_follows_its_seed():
    world = World(units=15, rows=10)
    order = [int(unit.split(".")[1]) for unit in run(world, "uniform", 7)[0].most_linear]
    gaps = np.diff(sorted([*order, -1, 15]))
    assert order[0] == 7 and max(gaps) <= 3
    seeds = [tuple(run(world, "random", 5, seed=seed)[0].most_linear) for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_backward_ends_where_it_began():
    world = World(units=6, rows=30, pairs=0, noise=0.0)
    report, _ = run(world, "backward", 6)
    assert report.most_linear == [world.units[i] for i in np.argsort(world.damage)]


def test_the_floor_stops_and_the_last_step_is_not_kept():
    world = World(units=10, rows=50, pairs=0, noise=0.0)
    order = np.argsort(world.damage)
    drop = float(world.damage[order[:4]].sum()) + 1e-6
    report, _ = run(world, "greedy", None, max_drop=drop)
    assert report.most_linear == [world.units[i] for i in order[:4]] and report.best == []
    assert len(report.commits) == 4 and len(report.trials) == 6  # the teacher, four that hold, one that does not


def test_budgets_of_bytes():
    world = World(units=10, rows=50)
    costs = {unit: 100.0 + i for i, unit in enumerate(world.units)}
    table = RowTable(world, 50)
    settings = {"metric": "eval_accuracy", "greater_is_better": True, "strategy": "greedy"}
    report = search_path(world.units, table, max_drop=None, budget=Budget(costs=costs, target=350.0), **settings)
    assert len(report.most_linear) == 4 and sum(costs[u] for u in report.most_linear) >= 350
    with pytest.raises(MetricError, match="the budget asks to save 900; within the floor"):
        search_path(world.units, table, max_drop=0.0, budget=Budget(costs=costs, target=900.0), **settings)
    with pytest.raises(HybridConfigError, match="all 10 units together save 1045"):
        search_path(world.units, table, max_drop=None, budget=Budget(costs=costs, target=2000.0), **settings)


def test_a_search_that_is_started_again_pays_for_nothing(tmp_path):
    def searched():
        world = World(units=12, rows=60)
        trace = SwapTrace(tmp_path / "trace.jsonl", {"a": 1})
        table = RowTable(world, 60, trace=trace)
        report = search_path(
            world.units,
            table,
            metric="eval_accuracy",
            greater_is_better=True,
            max_drop=None,
            budget=Budget(6),
            predicted=world.guess(),
            trace=trace,
        )
        return report, table

    first, paid = searched()
    lines = (tmp_path / "trace.jsonl").read_text().splitlines()
    again, nothing = searched()
    assert paid.evaluations > 0 == nothing.evaluations
    assert again.to_dict() == first.to_dict()
    # killed in the middle of a line, at any point: what was paid for before is found again
    for kept in (3, len(lines) // 2, len(lines) - 2):
        (tmp_path / "trace.jsonl").write_text("\n".join(lines[:kept]) + "\n" + lines[kept][:40])
        after_kill, rest = searched()
        assert after_kill.to_dict() == first.to_dict()
        known = sum(len(json.loads(line)["rows"]) for line in lines[:kept] if '"rows"' in line and "units" in line)
        assert rest.evaluations == paid.evaluations - known


def test_rows_are_asked_for_once_and_together():
    world = World(units=5, rows=40)
    table = RowTable(world, 40)
    sets = [[a, b] for a, b in itertools.combinations(world.units, 2)]
    first = table.values(sets, np.arange(10))
    assert world.calls == [(10, 10)]
    again = table.values([sets[3][::-1]], np.arange(20))  # the order of units does not matter
    assert world.calls == [(10, 10), (1, 10)] and np.array_equal(again[0, :10], first[3])


def test_names_that_do_not_exist():
    with pytest.raises(HybridConfigError, match="Did you mean 'race'"):
        get_strategy("rase")
    world = World(units=4, rows=5)
    with pytest.raises(HybridConfigError, match="each unit at most once; got 'layer.9'"):
        run(world, "fixed", 2, order=["layer.9"])
    report, _ = run(world, "fixed", None, order=["layer.2", "layer.0"])
    assert report.most_linear == ["layer.2", "layer.0"]
    assert set(STRATEGIES) >= {"race", "greedy", "one_shot", "backward", "uniform", "random", "fixed", "proposed"}
