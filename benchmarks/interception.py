"""
What the interception costs: a model whose layers are all converted but run the host's softmax, beside the untouched host.

    python benchmarks/interception.py --output benchmarks/results/interception.json      # one minute

SmolLM2's sizes with 6 layers, random weights, 512 tokens, batch 1, fp32, one thread. Medians of interleaved rounds; bar: at most 2 % slower.
"""

import argparse
import copy
import json
import pathlib
import random
import statistics
import sys
import time

import torch
import transformers

from hf_hybrid import convert_to_hybrid
from hf_hybrid.conversion.layer import is_hybrid_attention


BAR = 1.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1000,
    )
    host = transformers.LlamaForCausalLM(config).eval()
    inside = convert_to_hybrid(copy.deepcopy(host), "linear_attention")
    for module in inside.modules():
        if is_hybrid_attention(module):
            module.linear_heads = ()
    ids = torch.randint(5, 1000, (1, options.tokens))
    times: dict[str, list[float]] = {"host": [], "inside": []}
    with torch.no_grad():
        assert torch.equal(host(ids).logits, inside(ids).logits)
        for _ in range(options.rounds):
            order = [("host", host), ("inside", inside)]
            random.shuffle(order)
            for name, model in order:
                start = time.perf_counter()
                model(ids, use_cache=False)
                times[name].append(time.perf_counter() - start)
    ratio = statistics.median(i / h for i, h in zip(times["inside"], times["host"], strict=True))
    result = {"tokens": options.tokens, "rounds": options.rounds, "ratio": ratio, "bar": BAR}
    print(
        f"softmax inside the interception, {options.tokens} tokens: {ratio:.4f} times the host's time (bar {BAR}): {'met' if ratio <= BAR else 'MISSED'}"
    )
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
    return int(ratio > BAR)


if __name__ == "__main__":
    sys.exit(main())
