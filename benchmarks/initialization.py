"""What each starting value of a mixer is worth: local loss of students of SmolLM2-135M with all of them, and with each left out.

    python benchmarks/initialization.py [--max_steps 12] [--output results/initialization.json]

Six of the 30 layers, State of the Union text, 512 tokens per sequence. The loss is the squared error of the layer's output over the teacher output's
mean square, mean over layers, on held-out addresses: before training and after `max_steps` x 4 sequences. Two cores, about twenty minutes.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_hybrid import (
    GatedDeltaNetConfig,
    GLAConfig,
    HybridTrainer,
    HybridTrainingArguments,
    LightningConfig,
    LinearAttentionConfig,
)
from hf_hybrid.demo.assets import prose, teacher_folder
from hf_hybrid.mixers import INITIALIZATIONS
from hf_hybrid.ops import fast_fp32_matmul
from hf_hybrid.surgery import discard_students_


LENGTH, LAYERS = 512, "3,8,13,18,23,28"
MIXERS = {
    "linear_attention, no window": (LinearAttentionConfig(window_size=0), ("identity_maps", "output_scale")),
    "linear_attention": (LinearAttentionConfig(), ("identity_maps", "quiet_state")),
    "lightning, no window": (LightningConfig(window_size=0), ("output_scale", "neutral_gates")),
    "gla, no window": (GLAConfig(window_size=0), ("half_lives", "output_scale", "neutral_gates")),
    "gla": (GLAConfig(), ("half_lives", "output_scale", "neutral_gates", "quiet_state")),
    "gated_delta_net, no window": (
        GatedDeltaNetConfig(window_size=0),
        ("half_lives", "output_scale", "neutral_gates"),
    ),
    "gated_delta_net": (GatedDeltaNetConfig(), ("half_lives", "output_scale", "neutral_gates", "quiet_state")),
}


def held_out_loss(model, batches):
    training = model.training
    model.train()
    with torch.no_grad():
        losses = torch.stack([model(input_ids=batch)["block_losses"].mean() for batch in batches])
    model.train(training)
    return losses.mean().item()


class AtStart(TrainerCallback):
    """Measures once everything is initialised and nothing is trained."""

    def __init__(self, batches):
        self.batches, self.loss = batches, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.loss = held_out_loss(model, self.batches)


def wrong_head_order(model):
    """Key-value heads as if they had been repeated one after the other: query head h reads head h % H_kv instead of h // G."""
    for module in model.modules():
        if not hasattr(module, "hybrid"):
            continue
        mixer = module.hybrid
        heads, kv = mixer.num_heads, mixer.num_key_value_heads
        order = torch.arange(heads).view(heads // kv, kv).T.flatten()  # the query heads that read each key-value head
        mixer.register_forward_pre_hook(lambda _, args, order=order: (args[0][:, :, order], *args[1:]))
        mixer.register_forward_hook(lambda _, args, out, order=order: (out[0][:, :, order.argsort()], *out[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=12)
    parser.add_argument("--only", help="semicolon-separated names of mixers; all by default")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = teacher_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [tokenizer(text).input_ids[:LENGTH] for text in prose("test")]
    batches = list(torch.tensor([row for row in ids if len(row) == LENGTH][:8]).split(4))
    text = Dataset.from_dict({"text": prose("train")})
    rows = []

    def run(name, config, variant, initialization, change=None):
        torch.manual_seed(0)
        start = AtStart(batches)
        with tempfile.TemporaryDirectory() as output:
            args = HybridTrainingArguments(
                output, max_steps=options.max_steps, per_device_train_batch_size=4, max_length=LENGTH, save_strategy="no", report_to=[],
                use_cpu=True, disable_tqdm=True, layers=LAYERS, initialization=initialization, logging_strategy="no",
            )  # fmt: skip
            trainer = HybridTrainer(
                model, config, args, train_dataset=text, processing_class=tokenizer, callbacks=[start]
            )
            if change is not None:
                change(trainer.model)
            trainer.train()
            row = {
                "mixer": name,
                "variant": variant,
                "before": start.loss,
                "after": held_out_loss(trainer.model, batches),
            }
            discard_students_(trainer.model)
        rows.append(row)
        print(f"{name:28s} {variant:24s} before {row['before']:.4f}  after {row['after']:.4f}", flush=True)

    with fast_fp32_matmul():
        for name, (config, parts) in MIXERS.items():
            if options.only and name not in options.only.split(";"):
                continue
            run(name, config, "all", list(INITIALIZATIONS))
            for part in parts:
                run(name, config, f"without {part}", [x for x in INITIALIZATIONS if x != part])
        config = GatedDeltaNetConfig(window_size=0, state_per_query_head=True)
        run("gated_delta_net, no window", config, "one state per query head", list(INITIALIZATIONS))
        run("gated_delta_net, no window", config, "the same, heads misread", list(INITIALIZATIONS), wrong_head_order)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(
            json.dumps(
                {"command": "python benchmarks/initialization.py", "max_steps": options.max_steps, "rows": rows},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
