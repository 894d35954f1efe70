"""An encoder: all-MiniLM-L6-v2, fine-tuned on movie-review snippets, with all attention linear, and with half of its heads.

    python benchmarks/minilm.py [--seeds 0 1 2] [--output results/minilm.json]

Per seed: the teacher is fine-tuned on 6,000 snippets; the hybrid is distilled and repaired on the same snippets; accuracy of both on 1,500 others, by which nothing was chosen, with the
95 % interval of the ratio (bootstrap over snippets). Controls: the same hybrid untrained, and distilled only. The bar is 99 % of the teacher's accuracy. About a quarter of an hour a seed. `results/minilm.json` is of an
older version: 2,000 snippets, 60 steps of distillation and 80 of repair.
`--choose` measures on 1,500 snippets more, those by which numbers of steps, rates and the mixer were chosen.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from real_checkpoints import teacher as load_checkpoint
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hf_hybrid import HybridTrainer, HybridTrainingArguments, RepairArguments, convert_to_hybrid
from hf_hybrid.demo.assets import movie_reviews


TRAIN, TEST = 6000, 1500
BAR = 0.99
QUIET = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 50}


def fine_tuned(folder: str, seed: int):
    """`(classifier, tokenizer)`: MiniLM with a classification head on top."""
    encoder, tokenizer, _ = load_checkpoint("minilm", folder)
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(encoder.config)
    # the encoder has no pooler that was trained for this: it starts from what the checkpoint has
    model.bert.load_state_dict(encoder.state_dict(), strict=False)
    return model, tokenizer


def correct(model, rows: Dataset, collator) -> np.ndarray:
    """Which snippets are judged right."""
    model.eval()
    right = []
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            batch = collator([rows[i] for i in range(start, min(start + 64, len(rows)))])
            labels = batch.pop("labels")
            right.append((model(**batch).logits.argmax(-1) == labels).numpy())
    return np.concatenate(right)


def one_seed(seed: int, options) -> dict:
    reviews = movie_reviews()
    order = np.random.default_rng(seed).permutation(len(reviews))
    with tempfile.TemporaryDirectory() as folder:
        teacher, tokenizer = fine_tuned(folder, seed)
        collator = DataCollatorWithPadding(tokenizer)

        def rows(indices):
            chosen = [reviews[i] for i in indices]
            encoded = tokenizer([r["text"] for r in chosen], truncation=True, max_length=128)
            return Dataset.from_dict({**encoded, "labels": [r["label"] for r in chosen]})

        start = TRAIN + TEST if options.choose else TRAIN
        train, test = rows(order[:TRAIN]), rows(order[start : start + TEST])
        args = TrainingArguments(
            folder, per_device_train_batch_size=32, num_train_epochs=2, learning_rate=5e-5, seed=seed, **QUIET
        )
        Trainer(teacher, args, train_dataset=train, data_collator=collator).train()
        right = {"teacher": correct(teacher, test, collator)}
        weights = {name: value.clone() for name, value in teacher.state_dict().items()}
        heads = {f"bert.encoder.layer.{i}.attention.self": list(range(0, 12, 2)) for i in range(6)}
        mixer = {"name": "linear_attention", **json.loads(options.settings)}
        kinds = {"all heads": None, "half the heads": heads}
        for name, some in ((name, kinds[name]) for name in options.only or kinds):

            def fresh(weights=weights):
                model = transformers.BertForSequenceClassification(teacher.config)
                model.load_state_dict(weights)
                return model.eval()

            right[f"{name}, untrained"] = correct(convert_to_hybrid(fresh(), mixer, heads=some), test, collator)
            distil = HybridTrainingArguments(
                f"{folder}/{name}", max_steps=options.distil_steps, per_device_train_batch_size=32, seed=seed, **QUIET
            )
            trainer = HybridTrainer(
                fresh(), mixer, args=distil, train_dataset=train, processing_class=tokenizer, data_collator=collator
            )
            trainer.train()
            trainer.swap_layers(None, some) if some else trainer.swap_layers(range(6))
            trainer.unwrapped.eval()
            right[f"{name}, distilled"] = correct(trainer.unwrapped, test, collator)
            settings = {
                "max_steps": options.repair_steps,
                "per_device_train_batch_size": 32,
                "learning_rate": options.learning_rate,
                "seed": seed,
                **QUIET,
            }
            trainer.repair(train, RepairArguments(f"{folder}/{name}/repair", **settings), data_collator=collator)
            right[f"{name}, repaired"] = correct(trainer.unwrapped, test, collator)
    return compared(seed, right)


def compared(seed: int, right: dict[str, np.ndarray]) -> dict:
    """Accuracies, their ratios to the teacher's, and intervals of these."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, TEST, (2000, TEST))
    found = {}
    for name, values in right.items():
        ratio = values.mean() / right["teacher"].mean()
        low, high = np.quantile(values[draws].mean(1) / right["teacher"][draws].mean(1), [0.025, 0.975])
        found[name] = {"accuracy": values.mean(), "of_teacher": ratio, "interval": [low, high]}
        print(f"seed {seed}  {name:28s} {values.mean():.4f}  {ratio:.4f} [{low:.4f}, {high:.4f}]", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=["all heads", "half the heads"])
    parser.add_argument("--distil_steps", type=int, default=200)
    parser.add_argument("--repair_steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Of the repair.")
    parser.add_argument("--settings", default="{}", help="Of the mixer, as JSON.")
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = {seed: one_seed(seed, options) for seed in options.seeds}
    if options.output:
        settings = {n: getattr(options, n) for n in ("distil_steps", "repair_steps", "learning_rate", "settings")}
        record = {"train": TRAIN, "test": TEST, "threads": torch.get_num_threads(), **settings, "seeds": found}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(rows[n]["of_teacher"] < BAR for rows in found.values() for n in rows if n.endswith("repaired")))


if __name__ == "__main__":
    raise SystemExit(main())
