"""A window with sinks and a memory against torch's softmax attention, one thread: prefill, training, and a token after 8,192.

    python benchmarks/exact_memory.py [--output results/exact_memory.json]

9 query heads, 3 key-value heads of 64; 64 + 4 + 256 tokens. Bars: prefill of 4,096 fp32 3.5x, decoding after 8,192 12x.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
from torch.nn import functional as F

from hf_hybrid.evaluation.speed import compare_times
from hf_hybrid.ops import memory_attention


SIZES = {"window_size": 64, "num_sinks": 4, "num_memory_tokens": 256, "memory_block_size": 32, "scale": 64**-0.5}
STEPS = 64
BARS = {"prefill_4096": 3.5, "decode_8192": 12.0}


def inputs(tokens: int, dtype, requires_grad: bool = False):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, tokens, heads, 64) for heads in (9, 3, 3))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def softmax(query, key, value, is_causal=True):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ratios = {}
        for tokens in (1024, 4096, 8192):
            tensors = inputs(tokens, dtype)
            with torch.no_grad():
                runs = {
                    "softmax": lambda t=tensors: softmax(*t),
                    "memory": lambda t=tensors: memory_attention(*t, **SIZES),
                }
                ratios[f"prefill_{tokens}"] = compare_times(runs, options.rounds)["memory"].ratio
        tensors = inputs(4096, dtype, requires_grad=True)
        runs = {
            "softmax": lambda t=tensors: softmax(*t).sum().backward(),
            "memory": lambda t=tensors: memory_attention(*t, **SIZES)[0].sum().backward(),
        }
        ratios["training_4096"] = compare_times(runs, 3)["memory"].ratio
        with torch.no_grad():
            tensors, one = inputs(8192, dtype), inputs(1, dtype)
            state = [memory_attention(*tensors, **SIZES)[1]]
            key, value = (x.transpose(1, 2).contiguous() for x in tensors[1:])
            query = one[0].transpose(1, 2)

            def softmax_steps(query=query, key=key, value=value):
                for _ in range(STEPS):
                    F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

            def memory_steps(one=one, state=state):
                for _ in range(STEPS):
                    _, state[0] = memory_attention(*one, state=state[0], inplace_final_state=True, **SIZES)

            runs = {"softmax": softmax_steps, "memory": memory_steps}
            ratios["decode_8192"] = compare_times(runs, options.rounds)["memory"].ratio
        rows[name] = ratios
        print(name, ", ".join(f"{key} {ratio:.2f}x" for key, ratio in ratios.items()))
    if options.output:
        machine = f"one thread, {platform.processor() or platform.machine()}, torch {torch.__version__}"
        options.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return int(any(rows["fp32"][key] < bar for key, bar in BARS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
