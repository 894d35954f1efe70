"""Where the local loss of a distillation is taken: before the output projection (the default) or after it; quality and cost of both.

    python benchmarks/loss_placement.py [--max_steps 32] [--output results/loss_placement.json]

SmolLM2-135M, every layer `linear_attention`, 32 steps of 4 x 1,024 tokens of State of the Union text for each form, the same rows and seed. Measured on
held-out addresses that no setting was chosen by: perplexity and recall with all layers linear, beside the training-free window, with
95 % intervals of the difference by a bootstrap over addresses. The cost is a training step against a forward of the teacher, side by side. Two cores, about a quarter of an hour.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hybrid import HybridTrainer, HybridTrainingArguments, SlidingWindowConfig, convert_to_hybrid
from hf_hybrid.demo.assets import prose, teacher_folder
from hf_hybrid.evaluation.perplexity import token_loss
from hf_hybrid.evaluation.recall import recall_loss
from hf_hybrid.evaluation.speed import compare_times
from hf_hybrid.objectives.local import LocalDistillation
from hf_hybrid.ops import fast_fp32_matmul


LENGTH = 1024


class AfterProjection(LocalDistillation):
    """The layer runs twice, and its outputs are compared after the output projection."""

    @staticmethod
    def _shares_projections(layer):
        return False


FORMS = {"before": LocalDistillation, "after": AfterProjection}


def losses(model, rows) -> dict[str, list[float]]:
    """Per address, in nats."""
    return {
        "loss": [token_loss(model, row[None]) for row in rows],
        "recall": [recall_loss(model, row[None]) for row in rows],
    }


def interval(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Mean of `first - second` and its 95 % interval, by 10,000 resamples of addresses."""
    difference = np.array(first) - np.array(second)
    draws = np.random.default_rng(0).integers(0, len(difference), (10_000, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=32)
    parser.add_argument("--rows", type=int, default=12, help="held-out addresses")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = teacher_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = (tokenizer(text).input_ids[:LENGTH] for text in prose("test"))
    rows = torch.tensor([ids for ids in texts if len(ids) == LENGTH][: options.rows])
    batch = torch.randint(0, 49152, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    text = Dataset.from_dict({"text": prose("train")})
    every = list(range(30))
    measured, cost = {}, {}

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def note(name, model):
        measured[name] = losses(model, rows)
        mean = {key: float(np.mean(values)) for key, values in measured[name].items()}
        print(f"{name:40s} perplexity {np.exp(mean['loss']):.3f}  recall {mean['recall']:.3f}", flush=True)

    with fast_fp32_matmul():
        teacher = load()
        note("teacher", teacher)
        for layers, word in ((every, "all"),):
            note(f"window 64 + 4, training-free, {word}", convert_to_hybrid(load(), SlidingWindowConfig(), layers))
        for name, form in FORMS.items():
            with tempfile.TemporaryDirectory() as output:
                args = HybridTrainingArguments(
                    output,
                    max_steps=options.max_steps,
                    per_device_train_batch_size=4,
                    max_length=LENGTH,
                    seed=options.seed,
                    save_strategy="no",
                    report_to=[],
                    use_cpu=True,
                    logging_steps=8,
                )
                trainer = HybridTrainer(
                    load(), "linear_attention", args, train_dataset=text, processing_class=tokenizer
                )
                trainer.objective.__class__ = form
                trainer.train()
                model = trainer.model

                def step(model=model):
                    model.train()
                    model(input_ids=batch)["loss"].backward()

                def forward():
                    with torch.no_grad():
                        teacher(input_ids=batch, use_cache=False)

                times = compare_times({"step": step, "forward": forward}, rounds=2)
                cost[name] = times["forward"].ratio
                print(f"{name}: a step without its update is {cost[name]:.2f} forwards of the teacher", flush=True)
                for layers, word in ((every, "all"),):
                    trainer.swap_layers(layers)
                    note(f"{name}, {word}", model)
    differences = {
        f"{other} - before, {word}, {key}": interval(
            measured[f"{other}, {word}"][key], measured[f"before, {word}"][key]
        )
        for other in list(FORMS)[1:]
        for word in ("all",)
        for key in ("loss", "recall")
    }
    for name, (mean, low, high) in differences.items():
        print(f"{name:50s} {mean:+.4f} nats [{low:+.4f}, {high:+.4f}]")
    if options.output:
        result = {"command": "python benchmarks/loss_placement.py", "steps": options.max_steps, "rows": len(rows)}
        result |= {"measured": measured, "step over forward": cost, "differences": differences}
        options.output.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
