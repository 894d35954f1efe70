"""One distillation step against one forward of the teacher, on the same batch and in the same dtype, side by side.

    python benchmarks/distillation_step.py [--rounds 5] [--output results/distillation_step.json]

A step is what HybridTrainer does: forward with local losses of all 30 layers, backward, optimiser. Against two forwards of the teacher: with the logits of every token, as a loss
on text needs them, and without logits, which is what a step itself runs. SmolLM2-135M, 4 x 1,024 tokens, fp32, two cores, about four minutes.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hf_hybrid.demo.assets import teacher_folder
from hf_hybrid.evaluation.speed import compare_times
from hf_hybrid.ops import fast_fp32_matmul
from hf_hybrid.surgery import prepare_distillation_


BAR = 1.6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--defaults", action="store_true", help="only the setting that the bar is about")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    batch = torch.randint(0, 49152, (4, 1024), generator=torch.Generator().manual_seed(0))
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=torch.float32).eval()
    model = prepare_distillation_(AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=torch.float32)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    last = torch.zeros(1, dtype=torch.long)

    def forward(**kwargs):
        with torch.no_grad():
            teacher(input_ids=batch, use_cache=False, **kwargs)

    def step():
        model(input_ids=batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    rows = []
    for recompute in (False,) if options.defaults else (False, True):
        model.training_objective.recompute = recompute
        for fast in (False,) if options.defaults else (False, True):
            with fast_fp32_matmul() if fast else torch.enable_grad():
                runs = {"step": step, "forward": forward, "without logits": lambda: forward(logits_to_keep=last)}
                times = compare_times(runs, rounds=options.rounds)
            rows.append(
                {
                    "activation_checkpointing": recompute,
                    "fast_fp32_matmul": fast,
                    "step_over_forward": times["forward"].ratio,
                    "step_over_forward_without_logits": times["without logits"].ratio,
                }
            )
            print(rows[-1], flush=True)
    # the default: no recomputation, fp32 as torch computes it
    ratio = rows[0]["step_over_forward"]
    print(f"bar ({BAR}x, defaults): {'met' if ratio <= BAR else 'MISSED'}, {ratio:.2f}x")
    if options.output:
        result = {"command": "python benchmarks/distillation_step.py", "machine": f"{platform.machine()}, two cores"}
        options.output.write_text(json.dumps({**result, "batch": list(batch.shape), "rows": rows}, indent=2) + "\n")
    return int(ratio > BAR)


if __name__ == "__main__":
    raise SystemExit(main())
