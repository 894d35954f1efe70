"""Quality of every mixer on SmolLM2-135M after the same short distillation: which one to pick.

    python benchmarks/mixers.py [--max_steps 8] [--only gla,jet_block] [--output results/mixers.json]

Distils all layers with HybridTrainer's defaults on State of the Union text (8 x 4 sequences of 1,024 tokens), then measures held-out addresses with the 15 odd
layers and with all 30 linear: perplexity, and the loss on the second copy of a repeated passage. Two cores, about three minutes per mixer.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hybrid import (
    GatedDeltaNetConfig,
    GLAConfig,
    HybridTrainer,
    HybridTrainingArguments,
    IdentityConfig,
    JetBlockConfig,
    KimiDeltaConfig,
    LightningConfig,
    LinearAttentionConfig,
    SlidingWindowConfig,
    ablate,
    convert_to_hybrid,
    restore_full_attention,
    state_share,
)
from hf_hybrid.demo.assets import prose, teacher_folder
from hf_hybrid.evaluation.perplexity import perplexity
from hf_hybrid.evaluation.recall import recall_loss
from hf_hybrid.ops import fast_fp32_matmul
from hf_hybrid.surgery import discard_students_


LENGTH = 1024
MIXERS = {
    "sliding_window": SlidingWindowConfig(),
    "identity": IdentityConfig(),
    "linear_attention": LinearAttentionConfig(),
    "lightning": LightningConfig(),
    "gla": GLAConfig(),
    "gated_delta_net": GatedDeltaNetConfig(),
    "kimi_delta": KimiDeltaConfig(),
    "jet_block": JetBlockConfig(),
}
CHOICES = {"odd": list(range(1, 30, 2)), "all": list(range(30))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=8)
    parser.add_argument("--only", help="comma-separated names; all by default")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = teacher_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [tokenizer(text).input_ids[:LENGTH] for text in prose("test")]
    held_out = torch.tensor([row for row in ids if len(row) == LENGTH])
    text = Dataset.from_dict({"text": prose("train")})
    rows = []

    def save():
        if not options.output:
            return
        options.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.output.with_suffix(".tmp")
        tokens = options.max_steps * 4 * LENGTH
        temporary.write_text(
            json.dumps({"command": "python benchmarks/mixers.py", "tokens": tokens, "rows": rows}, indent=1)
        )
        os.replace(temporary, options.output)

    def measure(name, which, hybrid, base=None):
        row = {
            "mixer": name, "layers": which, "perplexity": perplexity(hybrid, held_out), "recall_loss": recall_loss(hybrid, held_out),
        }  # fmt: skip
        row["ratio"] = row["perplexity"] / (base or row["perplexity"])
        rows.append(row)
        print(
            f"{name:30s} {which:5s} {row['perplexity']:8.2f} ({row['ratio']:.3f}x)  recall {row['recall_loss']:.3f}",
            flush=True,
        )
        save()
        return row

    with fast_fp32_matmul():
        base = measure("teacher", "none", model)["perplexity"]
        for name in options.only.split(",") if options.only else MIXERS:
            config = MIXERS[name]
            if config.name in ("sliding_window", "identity"):  # nothing to train
                for which, layers in CHOICES.items():
                    convert_to_hybrid(model, config, layers)
                    measure(name, which, model, base)
                    restore_full_attention(model)
                continue
            with tempfile.TemporaryDirectory() as output:
                args = HybridTrainingArguments(
                    output, max_steps=options.max_steps, per_device_train_batch_size=4, max_length=LENGTH, save_strategy="no",
                    report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
                )  # fmt: skip
                trainer = HybridTrainer(model, config, args, train_dataset=text, processing_class=tokenizer)
                trainer.train()
                for which, layers in CHOICES.items():
                    trainer.swap_layers(layers)
                    row = measure(name, which, trainer.model, base)
                    mixers = [site.hybrid for site in trainer.distill_sites.values()]
                    if mixers[0].has_window_and_state() and which == "odd":
                        shares = state_share(trainer.model, [{"input_ids": held_out[:1]}])
                        swapped = [share for share in shares.values() if share]
                        row["state_share"] = sum(swapped) / len(swapped)
                        with ablate(trainer.model, "state"):
                            row["perplexity_without_state"] = perplexity(trainer.model, held_out)
                        save()
                discard_students_(trainer.model)


if __name__ == "__main__":
    main()
