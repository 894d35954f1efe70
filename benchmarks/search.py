"""Strategies of the search from one bank: what they cost, what they find, and whether the promise holds.

    python benchmarks/search.py minilm [--rows 300] [--depth 24] [--output results/search_minilm.json]
    python benchmarks/search.py smollm2 --bank BANK [--rows 300] [--depth 15] [--strategies race uniform one_shot]

`minilm`: all-MiniLM-L6-v2 fine-tuned on movie-review snippets, by key-value head (72 units). `smollm2`: the demo's task and bank (`hf-hybrid demo` leaves it
in its output folder), by layer (30 units); `--granularity head` for its 90 heads. Cost is counted in layer-forwards, one block on one row; all strategies use the same
scorer. What is found is measured on other rows, by which nothing was chosen; errors are standard errors over rows. `own` is the share of the time outside the scorer (within it, collating and hooks are a few per cent more).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from minilm import QUIET, fine_tuned
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from hf_hybrid import HybridTrainer, HybridTrainingArguments
from hf_hybrid.demo.assets import movie_reviews, teacher_folder
from hf_hybrid.demo.run import LABEL_WORDS, PROMPT
from hf_hybrid.evaluation.label_words import LabelWordTask
from hf_hybrid.search.by_rows import FISHER_ROWS, switch_to
from hf_hybrid.search.proposals import fisher_proposals
from hf_hybrid.search.row_scorer import RowScorer, unit_names
from hf_hybrid.search.row_table import LOSS, METRIC, RowTable
from hf_hybrid.search.rows import row_values
from hf_hybrid.search.searching import Budget, search_path


STRATEGIES = ("race", "greedy", "proposed", "one_shot", "uniform", "random")


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def minilm(folder: str, options):
    """`(trainer, selection rows, other rows)` of the encoder, distilled for a few steps."""
    teacher, tokenizer = fine_tuned(folder, 0)
    collator, reviews = DataCollatorWithPadding(tokenizer), movie_reviews()
    order = np.random.default_rng(0).permutation(len(reviews))

    def rows(indices):
        encoded = tokenizer([reviews[i]["text"] for i in indices], truncation=True, max_length=128)
        return Dataset.from_dict({**encoded, "labels": [reviews[i]["label"] for i in indices]})

    train, selection = rows(order[:6000]), rows(order[6000 : 6000 + options.rows])
    other = rows(order[6000 + options.rows : 6000 + options.rows + options.other])
    settings = {"per_device_train_batch_size": 32, "seed": 0, **QUIET}
    args = TrainingArguments(folder, num_train_epochs=2, learning_rate=5e-5, **settings)
    Trainer(teacher, args, train_dataset=train, data_collator=collator).train()
    distil = HybridTrainingArguments(
        f"{folder}/distilled", max_steps=options.steps, per_device_eval_batch_size=64, **settings
    )
    trainer = HybridTrainer(
        teacher.eval(),
        args=distil,
        train_dataset=train,
        eval_dataset=selection,
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer, selection, other


def smollm2(folder: str, options):
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    task, reviews = LabelWordTask(tokenizer, PROMPT, LABEL_WORDS), movie_reviews()
    order = np.random.default_rng(1).permutation(len(reviews))
    selection = task.dataset([reviews[i] for i in order[: options.rows]])
    other = task.dataset([reviews[i] for i in order[options.rows : options.rows + options.other]])
    trainer = HybridTrainer(
        AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=torch.float32),
        args=HybridTrainingArguments(folder, per_device_eval_batch_size=32, **QUIET),
        mixer_bank=options.bank,
        eval_dataset=selection,
        processing_class=tokenizer,
        **task.trainer_kwargs(),
    )
    return trainer, selection, other


class Timed:
    """A scorer, and the time that went into it."""

    def __init__(self, scorer: RowScorer):
        self.scorer, self.seconds = scorer, 0.0

    def __call__(self, sets, rows):
        start = time.perf_counter()
        found = self.scorer(sets, rows)
        self.seconds += time.perf_counter() - start
        return found


def one(trainer, units, strategy: str, seed: int, options, other) -> dict:
    trainer.swap_layers([])
    scorer = Timed(RowScorer(trainer, "eval_accuracy"))
    table = RowTable(scorer, options.rows, seed=seed)
    start, predicted, backward = time.perf_counter(), None, 0.0
    if strategy in ("race", "proposed"):
        predicted = fisher_proposals(scorer.scorer, units, table.order[:FISHER_ROWS].tolist())
        backward = time.perf_counter() - start
    report = search_path(
        units,
        table,
        metric="eval_accuracy",
        greater_is_better=True,
        strategy=strategy,
        max_drop=None,
        budget=Budget(options.depth),
        predicted=predicted,
        seed=seed,
    )
    total = time.perf_counter() - start
    of_rows = table.values([[], report.most_linear], table.order)
    switch_to(trainer, report.most_linear)
    held = {name: row_values(trainer, f"eval_{name}", other).values for name in ("accuracy", "loss")}
    trainer.swap_layers([])
    row = {
        "layer_forwards": scorer.scorer.layer_forwards,
        "row_evaluations": table.evaluations,
        "own": 1 - (scorer.seconds + backward) / total,
        "accuracy": float(of_rows[1, :, METRIC].mean()),
        "loss": float(of_rows[1, :, LOSS].mean()),
        **{f"other_{name}": float(values.mean()) for name, values in held.items()},
        **{f"other_{name}_error": float(values.std(ddof=1) / len(values) ** 0.5) for name, values in held.items()},
        "units": report.most_linear,
    }
    print(
        f"{strategy + (f' {seed}' if strategy == 'random' else ''):10s} {row['layer_forwards']:12,.0f} "
        f"own {row['own']:5.1%}  selection {row['accuracy']:.3f} {row['loss']:.4f}  other {row['other_accuracy']:.3f} "
        f"+- {row['other_accuracy_error']:.3f}  {row['other_loss']:.4f} +- {row['other_loss_error']:.4f}",
        flush=True,
    )
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["minilm", "smollm2"])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--other", type=int, default=1000)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--steps", type=int, default=100, help="Of the encoder's distillation.")
    parser.add_argument("--bank", help="Of the decoder.")
    parser.add_argument("--granularity", choices=["layer", "head"])
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer, _, other = {"minilm": minilm, "smollm2": smollm2}[options.model](folder, options)
        granularity = options.granularity or ("head" if options.model == "minilm" else "layer")
        units = unit_names(trainer.distill_sites, granularity)
        teacher = row_values(trainer, "eval_accuracy", other).whole
        print(
            f"{len(units)} units to {options.depth}; the teacher has {teacher:.3f} of the other rows right", flush=True
        )
        rows = {}
        for strategy in options.strategies:
            for seed in range(5) if strategy == "random" else (0,):
                name = f"random {seed}" if strategy == "random" else strategy
                rows[name] = one(trainer, units, strategy, seed, options, other)
    if options.output:
        facts = {name: getattr(options, name) for name in ("model", "rows", "other", "depth")}
        record = {**facts, "granularity": granularity, "teacher": teacher, "strategies": rows}
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
