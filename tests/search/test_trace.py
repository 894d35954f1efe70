"""The trace: every trial on disk, none of them paid for twice, none of another search continued."""

import json

import pytest

from hf_hybrid.errors import CheckpointError, MetricError, OutputFolderError
from hf_hybrid.search.greedy import greedy_swap
from hf_hybrid.search.trace import SwapTrace


SITES = ["a", "b", "c", "d"]
COST = {"a": 0.05, "b": 0.01, "c": 0.03, "d": 0.2}


def accuracy(swapped):
    return {"eval_accuracy": 0.9 - sum(COST[site] for site in swapped), "eval_loss": 1.0 * len(swapped)}


def search(score=accuracy, **kwargs):
    settings = {"metric": "eval_accuracy", "greater_is_better": True, "max_drop": 0.1, **kwargs}
    return greedy_swap(SITES, score, **settings)


def test_a_killed_search_continues_where_it_was(tmp_path):
    path, calls = tmp_path / "swap_trace.jsonl", []

    def counting(limit):
        def score(swapped):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(list(swapped))
            return accuracy(swapped)

        return score

    whole = search()
    with pytest.raises(KeyboardInterrupt):
        search(counting(6), trace=SwapTrace(path, {"run": 1}))
    with open(path, "a") as file:
        file.write('{"type": "trial", "swapped": ["b", "c"')  # a line cut off by the kill
    report = search(counting(None), trace=SwapTrace(path, {"run": 1}))
    assert report.most_linear == whole.most_linear and [t.swapped for t in report.trials] == [
        t.swapped for t in whole.trials
    ]
    assert len(calls) == len({tuple(call) for call in calls}) == len(whole.trials)  # nothing was scored twice
    rows = [json.loads(line) for line in path.read_text().splitlines()]  # every line is whole
    assert [row["type"] for row in rows].count("commit") >= 3
    assert rows[-1]["type"] == "result" and rows[-1]["most_linear"] == ["b", "c", "a"]


def test_a_failed_start_leaves_no_trace(tmp_path):
    path = tmp_path / "t.jsonl"
    for wrong in ({"metric": "eval_f1"}, {"floor": 0.95}):
        with pytest.raises(MetricError):
            search(trace=SwapTrace(path, {"run": 1}), **wrong)
    assert not path.exists()


def test_a_damaged_trace_is_not_cut(tmp_path):
    path = tmp_path / "t.jsonl"
    search(trace=SwapTrace(path, {"run": 1}))
    lines = path.read_text().splitlines(keepends=True)
    again = search(trace=SwapTrace(path, {"run": 1}))
    assert (
        again.most_linear == ["b", "c", "a"] and path.read_text().splitlines(keepends=True) == lines
    )  # nothing is said twice
    path.write_text("".join([*lines[:3], "garbage\n", *lines[4:]]))
    with pytest.raises(CheckpointError, match="line 4: cannot be read; got b'garbage"):
        SwapTrace(path, {"run": 1})
    assert len(path.read_text().splitlines()) == len(lines)


def test_another_searchs_trace_is_refused(tmp_path):
    search(trace=SwapTrace(tmp_path / "t.jsonl", {"metric": "a", "sites": ["x"]}))
    with pytest.raises(OutputFolderError, match="holds another search: metric changed since"):
        SwapTrace(tmp_path / "t.jsonl", {"metric": "b", "sites": ["x"]})


def never(swapped):
    raise AssertionError(f"{swapped} was scored again")


def test_another_floor_or_metric_reads_what_was_paid_for(tmp_path):
    path = tmp_path / "t.jsonl"
    search(trace=SwapTrace(path, {"run": 1}))
    stricter = search(never, max_drop=0.04, trace=SwapTrace(path, {"run": 1}))
    assert stricter.most_linear == ["b", "c"]
    other = search(
        never, metric="eval_loss", greater_is_better=False, max_drop=1, max_layers=1, trace=SwapTrace(path, {"run": 1})
    )
    assert other.most_linear == ["a"]
    results = [row for row in map(json.loads, path.read_text().splitlines()) if row["type"] == "result"]
    assert [(row["metric"], row["most_linear"]) for row in results] == [
        ("eval_accuracy", ["b", "c", "a"]),
        ("eval_accuracy", ["b", "c"]),
        ("eval_loss", ["a"]),
    ]


def test_the_order_of_swaps_does_not_matter(tmp_path):
    trace = SwapTrace(tmp_path / "t.jsonl", {})
    trace.add_trial(["a", "b"], {"eval_loss": 1.0}, round=2, candidate="b")
    assert SwapTrace(tmp_path / "t.jsonl", {}).lookup(["b", "a"]) == trace.lookup(["b", "a"]) == {"eval_loss": 1.0}
    assert trace.lookup(["a"]) is None


def test_a_missing_header_is_another_search(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"type": "trial", "swapped": [], "metrics": {}}\n')
    with pytest.raises(OutputFolderError, match="holds another search: sites changed since"):
        SwapTrace(path, {"sites": ["x"]})
