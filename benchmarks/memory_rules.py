"""Which keys a memory should keep: rules compared, training-free.

    python benchmarks/memory_rules.py [--rows 6] [--output results/memory_rules.json]

SmolLM2-135M, 1,024 tokens, the first half of the held-out addresses (the one by which settings are chosen). Every rule gives each token that left the
window a score; every 32 tokens a memory keeps the best of what it holds and what has just left. Two shapes of the same budget: a memory of one size in
every head, and the plan of 8 % (a few heads with large memories). Rules are written as masks over full attention: what is compared is what is kept.

* `keydiff`: least like the mean of all keys behind (what the library does).
* `attended`: the share of attention received, on average over the queries that saw the token while it was in the window.
* `accumulated`: the same, counted on while it is in the memory (as in H2O, 2306.14048).
* `keydiff + attended`: ranks of both, added.
* `recalled worst`: the relative error with which a linear state (elu + 1) of all keys behind gives back the token's value (as in LoLA, 2505.23666).
* `random`, `largest key`: controls.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from quality import Measures, load, planned
from torch.nn import functional as F
from transformers import AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_hybrid.demo.assets import teacher_folder


BLOCK, SINKS, WINDOW = 32, 4, 128
UNIFORM = 96
RULES = ("keydiff", "attended", "accumulated", "keydiff + attended", "recalled worst", "largest key", "random")


class Memories:
    """An attention function of transformers whose heads see sinks, window and what a rule keeps."""

    def __init__(self, rule: str, sizes: dict[int, list[int]], window: int):
        self.rule, self.sizes, self.window = rule, sizes, window

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        heads, tokens, groups = key.shape[1], query.shape[2], query.shape[1] // key.shape[1]
        outputs = []
        for row in range(len(query)):
            q, k, v = (x[row].float() for x in (query, key, value))
            scores = (q.unflatten(0, (heads, groups)) @ k[:, None].transpose(-1, -2)) * scaling  # [H_kv, G, T, T]
            seen = self.visible(scores, k, v, torch.tensor(self.sizes[module.layer_idx]))
            weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
            outputs.append((weights @ v[:, None]).flatten(0, 1).transpose(0, 1))
        assert tokens == key.shape[2]
        return torch.stack(outputs).to(query.dtype), None

    def visible(self, scores, k, v, sizes):
        """Bool `[H_kv, T, T]`: whether a query sees a key."""
        heads, tokens = k.shape[:2]
        seen = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
        held = torch.zeros(heads, tokens, dtype=torch.bool)
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        received, queries = torch.zeros(heads, tokens), torch.zeros(heads, tokens)
        unit, features = F.normalize(k, dim=-1), F.elu(k) + 1
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(heads, tokens, generator=generator)
        for start in range(0, tokens, BLOCK):
            left = max(start - self.window, 0)  # tokens before this one have left the window
            candidates = held.clone()
            candidates[:, max(left - BLOCK, SINKS) : max(left, SINKS)] = True
            if left > SINKS:
                worth = self.worth(start, unit, k, v, features, received / queries.clamp_min(1), noise)
                worth = worth.masked_fill(~candidates, -torch.inf)
                rank = worth.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
                held = candidates & (rank < sizes[:, None])
            stop = min(start + BLOCK, tokens)
            seen[:, start:stop] = held[:, None]
            seen[:, start:stop, left:stop] = True
            seen[:, start:stop, :SINKS] = True
            seen[:, start:stop] &= causal[start:stop]
            if self.rule in ("attended", "accumulated", "keydiff + attended"):
                here = seen[:, start:stop]
                weights = scores[:, :, start:stop].masked_fill(~here[:, None], -torch.inf).softmax(-1).sum(1).sum(1)
                counts = here.sum(1).float()
                if self.rule != "accumulated":  # of what is in the window alone
                    weights[:, :left], counts[:, :left] = 0, 0
                received, queries = received + weights, queries + counts
        return seen

    def worth(self, start, unit, k, v, features, attended, noise):
        if self.rule == "random":
            return noise
        if self.rule == "largest key":
            return k.norm(dim=-1)
        if self.rule in ("attended", "accumulated"):
            return attended
        if self.rule == "recalled worst":
            state = features[:, :start].transpose(1, 2) @ v[:, :start]
            given = (features @ state) / (features @ features[:, :start].sum(1)[..., None])
            return (given - v).norm(dim=-1) / v.norm(dim=-1)
        different = -(unit @ unit[:, :start].mean(1)[..., None])[..., 0]
        if self.rule == "keydiff":
            return different
        return sum(x.argsort(-1).argsort(-1).float() for x in (different, attended))


def sizes_of(shape: str, tokenizer) -> tuple[dict[int, list[int]], int]:
    """Memories by layer, and the window."""
    if shape == "uniform":
        return {layer: [UNIFORM] * 3 for layer in range(30)}, WINDOW
    _, plan = planned("fixed", "sliding_window", tokenizer)
    sizes, window = {}, 0
    for name, mixer in plan.mixers.items():
        own, window = mixer.num_memory_tokens, mixer.window_size
        sizes[int(name.split(".")[2])] = [own] * 3 if isinstance(own, int) else list(own)
    return sizes, window


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    measures = Measures(tokenizer, "choose", quick=False, few=True)
    measures.sets = {name: rows.select(range(min(options.rows, len(rows)))) for name, rows in measures.sets.items()}
    model = load()
    teacher = measures.of(model)
    found: dict = {"rows": options.rows, "teacher": {name: float(np.mean(x)) for name, x in teacher.items()}}
    print(f"{'teacher':40s} {np.mean(teacher['recall_512']):.2f} {np.mean(teacher['needle_1024']):.2f}")
    for shape in ("plan of 8 %", "uniform"):
        sizes, window = sizes_of(shape, tokenizer)
        for rule in RULES:
            ALL_ATTENTION_FUNCTIONS.register("memory_rule", Memories(rule, sizes, window))
            model.set_attn_implementation("memory_rule")
            losses = measures.of(model)
            ratio = float(np.exp(np.mean(losses["ppl_1024"]) - np.mean(teacher["ppl_1024"])))
            recall, needle = (float(np.mean(losses[name])) for name in ("recall_512", "needle_1024"))
            found[f"{shape}: {rule}"] = {"perplexity": ratio, "recall": recall, "needle": needle}
            print(f"{shape + ': ' + rule:40s} {ratio:.3f}x  {recall:.2f}  {needle:.2f}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
