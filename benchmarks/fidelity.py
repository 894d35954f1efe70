"""Quality of SmolLM2-135M with 15 and 30 of its 30 layers linear, against training-free sliding windows.

    python benchmarks/fidelity.py [--max_steps 48] [--output results/fidelity.json]

Distils with HybridTrainer's defaults on State of the Union text (at most 200k tokens), then measures held-out addresses of 1,024 tokens:
perplexity, and the loss on the second copy of a repeated passage. Two cores, about ten minutes.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hybrid import (
    HybridTrainer,
    HybridTrainingArguments,
    SlidingWindowConfig,
    convert_to_hybrid,
    restore_full_attention,
)
from hf_hybrid.demo.assets import prose, teacher_folder
from hf_hybrid.evaluation.perplexity import perplexity
from hf_hybrid.evaluation.recall import recall_loss
from hf_hybrid.ops import fast_fp32_matmul
from hf_hybrid.surgery import set_linear_heads_


LENGTH = 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=48)
    parser.add_argument("--projections", default="shared")
    parser.add_argument("--learning_rate", type=float, default=None)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    assert options.max_steps * 4 * LENGTH <= 200_000, "the bar allows 200k tokens of distillation"

    folder = teacher_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    held_out = torch.tensor(
        [ids for ids in (tokenizer(t).input_ids[:LENGTH] for t in prose("test")) if len(ids) == LENGTH]
    )
    rows = []

    def measure(name, swapped):
        row = {
            "model": name,
            "linear_layers": len(swapped),
            "perplexity": perplexity(model, held_out),
            "recall_loss": recall_loss(model, held_out),
        }
        row["ratio"] = row["perplexity"] / rows[0]["perplexity"] if rows else 1.0
        rows.append(row)
        print(
            f"{name:44s} {len(swapped):2d} linear  perplexity {row['perplexity']:6.2f} ({row['ratio']:.3f}x)  recall {row['recall_loss']:.3f}",
            flush=True,
        )

    odd, every = list(range(1, 30, 2)), list(range(30))
    with fast_fp32_matmul():
        measure("teacher", [])
        for layers, name in ((odd, "odd layers"), (every, "all layers")):
            convert_to_hybrid(model, SlidingWindowConfig(), layers)
            measure(f"sliding_window 64 + 4, training-free, {name}", layers)
            restore_full_attention(model)
        with tempfile.TemporaryDirectory() as output:
            more = {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
            args = HybridTrainingArguments(
                output, max_steps=options.max_steps, per_device_train_batch_size=4, max_length=LENGTH, save_strategy="no", report_to=[],
                use_cpu=True, logging_steps=4, projections=options.projections, **more,
            )  # fmt: skip
            text = Dataset.from_dict({"text": prose("train")})
            trainer = HybridTrainer(model, "linear_attention", args, train_dataset=text, processing_class=tokenizer)
            trainer.train()
            tokens = options.max_steps * 4 * LENGTH
            for layers, name in ((odd, "odd layers"), (range(0, 30, 2), "even layers"), (every, "all layers")):
                trainer.swap_layers(layers)
                measure(f"linear_attention, {tokens // 1000}k tokens, {name}", trainer.swapped_layers())
            set_linear_heads_(model, {})
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(
            json.dumps({"command": "python benchmarks/fidelity.py", "sequences": len(held_out), "rows": rows}, indent=2)
        )
    by_name = {row["model"]: row for row in rows}
    half, full = rows[3], rows[5]
    window = by_name["sliding_window 64 + 4, training-free, all layers"]
    passed = (
        half["ratio"] <= 1.07
        and full["perplexity"] < window["perplexity"]
        and full["recall_loss"] < window["recall_loss"]
    )
    print("bars:", "met" if passed else "MISSED")
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
