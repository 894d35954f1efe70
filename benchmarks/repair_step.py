"""One repair step against one forward of the teacher with all logits, on the same batch and in the same precision, side by side.

    python benchmarks/repair_step.py [--rounds 5] [--output results/repair_step.json]

A step is what RepairTrainer does: the teacher's forward, the hybrid's, the divergence of their logits, backward, optimiser. SmolLM2-135M by the plan of 15 % of the cache, 2 x 1,024
tokens, bf16 autocast (and fp32), all cores, two minutes. The bar is 3.2.
"""

import argparse
import contextlib
import json
import tempfile
from pathlib import Path

import torch
from quality import passages, planned
from transformers import AutoTokenizer

from hf_hybrid import RepairArguments, RepairTrainer
from hf_hybrid.demo.assets import prose, teacher_folder
from hf_hybrid.evaluation.speed import compare_times


BAR = 3.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    batch = passages(tokenizer).view(2, 1024)
    rows = []
    for name, context in (
        ("bf16", lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        ("fp32", contextlib.nullcontext),
    ):
        model, plan = planned("15", "sliding_window", tokenizer)
        plan.convert(model)
        with tempfile.TemporaryDirectory() as folder:
            args = RepairArguments(folder, use_cpu=True, report_to="none", save_strategy="no")
            text = [{"text": text} for text in prose("train")[:4]]
            trainer = RepairTrainer(model, args, train_dataset=text, processing_class=tokenizer)
        optimizer = trainer.create_optimizer()

        def forward(teacher, context=context):
            with torch.no_grad(), context():
                teacher(input_ids=batch, use_cache=False)

        def teacher_forward(trainer=trainer, model=model):
            with trainer._as_teacher(model) as teacher:
                forward(teacher)

        def step(trainer=trainer, model=model, context=context, optimizer=optimizer):
            model.train()
            with context():
                loss = trainer.compute_loss(model, {"input_ids": batch})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        runs = {"step": step, "teacher": teacher_forward, "hybrid": lambda model=model: forward(model)}
        times = compare_times(runs, rounds=options.rounds)
        ratio = times["teacher"].ratio  # median of step / teacher, round by round
        hybrid = ratio / times["hybrid"].ratio
        rows.append({"precision": name, "step_over_teacher_forward": ratio, "hybrid_over_teacher_forward": hybrid})
        print(f"{name}: a step is {ratio:.2f} teacher forwards (bar {BAR}); a hybrid forward is {hybrid:.2f}")
    if options.output:
        machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        options.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0 if rows[0]["step_over_teacher_forward"] <= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
