"""The hybrid of 15 % of the cache against its teacher, beside the same model with no attention at all: what could be won.

    python benchmarks/hybrid_speed.py [--length 8192] [--output results/hybrid_speed.json]

SmolLM2-135M, batch 1, all cores. Reported: how many times as fast as the teacher each is, and the hybrid's share of the speed-up that removing attention gives. The bar is 0.7.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
from quality import load, planned
from transformers import AutoTokenizer

from hf_hybrid import convert_to_hybrid
from hf_hybrid.demo.assets import teacher_folder
from hf_hybrid.evaluation.speed import compare_speed
from hf_hybrid.ops import fast_fp32_matmul


BAR = 0.7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plan", default="15")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    rows = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        hybrid, plan = planned(options.plan, "sliding_window", tokenizer)
        plan.convert(hybrid)
        models = {"teacher": load(), "hybrid": hybrid, "no attention": convert_to_hybrid(load(), "identity")}
        models = {key: model.to(dtype) for key, model in models.items()}
        with fast_fp32_matmul():
            speeds = compare_speed(models, options.length, decode_tokens=16, rounds=options.rounds)
        row = {}
        for what in ("prefill", "decode"):
            own, most = (getattr(speeds[key], what).ratio for key in ("hybrid", "no attention"))
            row[what] = {"hybrid": own, "no_attention": most, "share": own / most}
            print(f"{name} {what} at {options.length}: hybrid {own:.2f}x, no attention {most:.2f}x, {own / most:.2f}")
        rows[name] = row
    if options.output:
        machine = f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
        record = {"machine": machine, "length": options.length, "plan": options.plan, "rows": rows}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(part["share"] < BAR for row in rows.values() for part in row.values()))


if __name__ == "__main__":
    raise SystemExit(main())
