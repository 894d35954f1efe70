"""What two processes do in a search, for `test_ranks.py`: `torchrun ... processes.py FOLDER` writes `rank*.json`."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import Dataset  # noqa: E402

from hf_hybrid import GreedyLayerSwapCallback  # noqa: E402
from hf_hybrid.errors import HybridError  # noqa: E402
from hf_hybrid.search.ranks import all_agree, from_rank_zero, gathered, rank  # noqa: E402

import conftest  # noqa: E402, F401 - offline, one thread
from conftest import token_dataset  # noqa: E402
from helpers import toy_trainer  # noqa: E402


FOLDER = Path(sys.argv[1])
# one row a batch, the odd ones (rank 1's) three times as long: the ranks need different amounts of memory
LENGTHS = [6, 18] * 3
HIDDEN, BLOCKS = 32, 3


def uneven() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 99, (length,), generator=generator).tolist() for length in LENGTHS]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def trainer(name, **kwargs):
    arguments = {"per_device_eval_batch_size": 1, "dataloader_pin_memory": False, **kwargs.pop("arguments", {})}
    data = {"eval_dataset": uneven(), "data_collator": collate, **kwargs}
    return toy_trainer(FOLDER / name, arguments=arguments, **data)


def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def search(of, **kwargs):
    runs = []
    next(iter(of.distill_sites.values())).register_forward_hook(lambda *_: runs.append(1))
    report = GreedyLayerSwapCallback("eval_loss", "50%", **kwargs).search(of)
    trials = [(trial.swapped, trial.metrics["eval_loss"]) for trial in report.trials]
    return {"trials": trials, "runs": len(runs), "swapped": of.swapped_layers()}


def message(function):
    try:
        function()
    except HybridError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def memory():
    """Between what the ranks need: one could reuse, the other could not."""
    small = sum(LENGTHS[::2]) * (BLOCKS * HIDDEN * 4 + 2 * 8)
    return {
        "plenty": search(trainer("plenty")),
        "between": search(trainer("between"), max_reuse_bytes=small + 1),
        "whole": search(trainer("whole"), reuse_activations=False),
    }


def trace():
    """Each rank has a folder of its own, and in rank 1's lies the trace of another search."""
    folder = f"trace{rank()}"
    if rank() == 1:
        (FOLDER / folder).mkdir()
        other = {"type": "header", "identity": {"weights": "others"}}
        trial = {"type": "trial", "swapped": [], "metrics": {"eval_loss": 99.0}}
        (FOLDER / folder / "swap_trace.jsonl").write_text(f"{json.dumps(other)}\n{json.dumps(trial)}\n")
    first = search(trainer(folder))
    again = trainer(folder)
    evaluations, own = [], again.evaluate_silently
    again.evaluate_silently = lambda *args: evaluations.append(1) or own(*args)
    second = search(again)
    lines = (FOLDER / folder / "swap_trace.jsonl").read_text().splitlines()
    return {"first": first["trials"], "second": second["trials"], "evaluations": len(evaluations), "lines": len(lines)}


def refusals():
    """What one rank finds must stop all of them, with the same sentence."""
    if rank() == 0:
        (FOLDER / "foreign").mkdir()
        (FOLDER / "foreign" / "swap_trace.jsonl").write_text('{"type": "header", "identity": {}}\n')
    gathered(None)

    def of_rank(prediction):
        return {"accuracy": 0.5 + 0.1 * rank()}

    def rounding(prediction):
        return {"accuracy": 0.5 + 1e-9 * rank()}

    seen = []

    def changing(rows):  # on rank 1, not the same batch twice
        batch = collate(rows)
        seen.append(1)
        batch["input_ids"] = (batch["input_ids"] + rank() * len(seen)) % 99
        return batch

    same_length = {"eval_dataset": Dataset.from_dict({name: [[*range(8)]] * 4 for name in ("input_ids", "labels")})}
    rounded = trainer("rounded", compute_metrics=rounding, **same_length)
    return {
        "foreign": message(lambda: search(trainer("foreign"))),
        "metric": message(
            lambda: GreedyLayerSwapCallback("accuracy").search(
                trainer("metric", compute_metrics=of_rank, **same_length)
            )
        ),
        "rounding": GreedyLayerSwapCallback("accuracy").search(rounded).base,
        "batches": message(lambda: search(trainer("batches", data_collator=changing))),
    }


def rows():
    """A race by rows and a promise: rows are spread over the processes, and all of them get all values."""
    found = {}
    data = {"compute_metrics": first_logit, "eval_dataset": token_dataset(7, seed=5)}
    for name, size in (("rows", 1), ("rows_of_two", 2)):
        of = trainer(name, arguments={"per_device_eval_batch_size": size}, **data)
        other = token_dataset(5, seed=6)
        settings = {"granularity": "head", "max_layers": 4, "confirmation_dataset": other, "confidence": 0.5}
        report = of.search("accuracy", 0.9, **settings)
        found[name] = {**report.to_dict(), "heads": {k: list(v.linear_heads) for k, v in of.distill_sites.items()}}
    path = FOLDER / "rows" / "swap_trace.jsonl"
    gathered(None)
    lines = path.read_text().splitlines()
    gathered(None)
    if rank() == 0:  # killed in the middle of a line
        path.write_text("\n".join(lines[:9]) + "\n" + lines[9][:20])
    gathered(None)
    again = trainer("rows", **data)
    found["again"] = again.search("accuracy", 0.9, **settings).to_dict()
    return found


def first_logit(prediction):
    return {"accuracy": float(1 / (1 + np.exp(-prediction.predictions[:, 0, :5].mean())))}


def agreement():
    broken = "nothing"
    try:
        from_rank_zero(lambda: (FOLDER / "missing").read_text())
    except OSError as error:
        broken = type(error).__name__
    return {
        "gathered": gathered(rank() * 10),
        "all": [all_agree(True), all_agree(rank() == 0), all_agree(False)],
        "zero": from_rank_zero(lambda: rank() + 5),
        "broken": broken,
    }


if __name__ == "__main__":
    trainer("start")  # starts the process group
    functions = (rows,) if "RANK" not in os.environ else (agreement, memory, trace, refusals, rows)
    results = {function.__name__: function() for function in functions}
    with open(FOLDER / f"rank{os.environ.get('RANK', 'alone')}.json", "w") as file:
        json.dump(results, file)
