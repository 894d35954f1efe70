"""Two processes search together: one path, one set of numbers, one trace, and nobody waits for the other in vain."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_hybrid.search.ranks import all_agree, from_rank_zero, gathered, rank


pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parent / "processes.py"


def test_a_process_alone_agrees_with_itself():
    assert rank() == 0 and gathered("x") == ["x"] and all_agree(True) and not all_agree(False)
    assert from_rank_zero(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        from_rank_zero(lambda: 1 / 0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(PROGRAM), str(folder)], capture_output=True, text=True, env=environment, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{number}.json").read_text()) for number in (0, 1)]


def test_a_race_on_two_processes_is_that_of_one(results, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    alone = json.loads((tmp_path / "rankalone.json").read_text())["rows"]
    first, second = (result["rows"] for result in results)
    assert first == second and len(first["rows"]["most_linear"]) == 4
    for name in ("rows", "rows_of_two"):
        for key in ("most_linear", "confirmed", "heads", "best"):
            assert first[name][key] == alone[name][key], (name, key)
        for one, other in zip(first[name]["commits"], alone[name]["commits"], strict=True):
            assert one["metrics"] == pytest.approx(other["metrics"], abs=1e-6)
    for ranks in (first, second):  # after a kill, from rank 0's trace
        before, again = dict(ranks["rows"]), dict(ranks["again"])
        assert again.pop("layer_forwards") < before.pop("layer_forwards")
        assert before.pop("heads") and again == before


def test_what_processes_tell_each_other(results):
    for result in results:
        agreement = result["agreement"]
        assert agreement["gathered"] == [0, 10] and agreement["all"] == [True, False, False] and agreement["zero"] == 5
        assert agreement["broken"] == "FileNotFoundError"  # also on the rank that did not look


def test_a_limit_between_the_needs_of_two_ranks_is_decided_for_both(results):
    first, second = (result["memory"] for result in results)
    for name in ("plenty", "between", "whole"):
        assert first[name]["trials"] == second[name]["trials"] and first[name]["swapped"] == second[name]["swapped"]
        assert first[name]["trials"] == first["whole"]["trials"] and len(first[name]["trials"]) == 7
    for memory in (first, second):  # neither reused, also not the one that had the room
        assert memory["plenty"]["runs"] < memory["between"]["runs"] == memory["whole"]["runs"]


def test_only_the_trace_of_rank_zero_counts(results):
    first, second = (result["trace"] for result in results)
    assert first["first"] == first["second"] == second["first"] == second["second"]
    assert first["evaluations"] == second["evaluations"] == 0  # everything was in rank 0's
    assert first["lines"] == 1 + 7 + 3 + 1 and second["lines"] == 2  # rank 1 wrote nothing


def test_what_one_rank_finds_stops_both(results):
    first, second = (result["refusals"] for result in results)
    assert first == second
    assert first["foreign"].startswith("OutputFolderError") and "holds another search" in first["foreign"]
    assert (
        "HybridError: The metric 'eval_accuracy' must be the same on all processes; got 0.5 on rank 0 and 0.6 on rank 1"
        in first["metric"]
    )
    assert first["rounding"] == 0.5  # rank 0's, on both
    assert first["batches"].startswith("HybridError: The validation batches changed between two trials")
