"""Speed of the ops on one CPU thread, side by side with the softmax attention of torch and with transformers' own torch code.

    python benchmarks/ops.py --quick                # prefill of 4,096 tokens, under a minute
    python benchmarks/ops.py --json results.json    # everything: prefill, training, decoding, crossover, whole layers, memory
    python benchmarks/ops.py --strict               # exit status 1 if one of the figures the project holds itself to is missed
    HF_HYBRID_OPS=torch python benchmarks/ops.py    # the plain torch forms instead of the compiled kernels

Geometry of SmolLM2-135M: 9 query heads, 3 key-value heads of size 64, batch 1. Every candidate of a comparison runs once per round, in an order that
is shuffled anew each round: the first after SDPA finds the caches empty. A ratio is the median over rounds of the ratios within a round, of CPU
time of this single-threaded process. Inputs are random, laid out as transformers hands them over. Before anything is timed, the output of
every candidate of the prefill is compared with the fp64 form, and transformers' forms with ours; gradients, steps and layers are the tests' business.
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next import modeling_qwen3_next

from hf_hybrid.mixers import get_feature_map
from hf_hybrid.ops import (
    LinearPart,
    bidirectional_linear_attention,
    gated_delta_rule,
    gated_linear_attention,
    linear_attention,
    window_attention,
)
from hf_hybrid.ops.dispatch import choose_backend


HEADS, KV_HEADS, DIM = 9, 3, 64
SCALE = DIM**-0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def unwrapped(function):
    """transformers decorates its torch forms to look for kernels; the function itself is what is timed."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


hf_chunk_delta = unwrapped(modeling_qwen3_next.torch_chunk_gated_delta_rule)
hf_step_delta = unwrapped(modeling_qwen3_next.torch_recurrent_gated_delta_rule)


class ZeroGate(torch.nn.Module):
    def forward(self, x):
        return x.new_zeros(1)


class HFLightning:
    """transformers' MiniMax lightning attention without its projections, activation, norm and output gate."""

    def __init__(self, dtype):
        config = MiniMaxConfig(
            hidden_size=HEADS * DIM,
            num_attention_heads=HEADS,
            head_dim=DIM,
            num_hidden_layers=1,
            num_key_value_heads=HEADS,
        )
        self.module = MiniMaxLightningAttention(config, layer_idx=0).to(dtype)
        for name in ("qkv_proj", "norm", "out_proj"):
            setattr(self.module, name, torch.nn.Identity())
        self.module.act_fn = torch.nn.Identity()
        self.module.output_gate = ZeroGate()

    def prepare(self, query, key, value):
        """The three side by side per head, as the module's own projection would leave them."""
        return torch.cat([query, key, value], dim=-1).flatten(2)

    def __call__(self, hidden_states):
        return self.module(hidden_states, position_embeddings=None, attention_mask=None)


class Problem:
    """Random inputs of one length and dtype, and everything that runs on them."""

    def __init__(self, length, dtype, requires_grad=False):
        self.length, self.dtype = length, dtype
        generator = torch.Generator().manual_seed(0)

        def make(heads, *size):
            return torch.randn(1, length, heads, *size, generator=generator)

        self.query, self.key, self.value = (make(h, DIM).to(dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
        self.full_key, self.full_value = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (self.key, self.value))
        self.decay = {heads: F.logsigmoid(make(heads)) for heads in (KV_HEADS, HEADS)}
        self.beta = {heads: make(heads).sigmoid() for heads in (KV_HEADS, HEADS)}
        self.channel_decay = F.logsigmoid(make(KV_HEADS, DIM)) / 16
        self.fixed_decay = {
            heads: -torch.exp2(-8 * torch.arange(1, heads + 1) / heads).expand(1, length, -1)
            for heads in (KV_HEADS, HEADS)
        }
        self.leaves = [self.query, self.key, self.value, self.full_key, self.full_value]
        for x in self.leaves:
            x.requires_grad_(requires_grad)
        self.maps = {}
        for name in ("elu", "relu", "hedgehog", "softmax", "dpfp", "taylor"):
            pair = [get_feature_map(name)(heads, DIM).to(dtype) for heads in (HEADS, KV_HEADS)]
            for feature_map in pair:
                feature_map.init_weights()
                feature_map.requires_grad_(requires_grad)
            self.maps[name] = dict(zip(("feature_map_q", "feature_map_k"), pair, strict=True))
        self.log_weight = torch.full((HEADS,), -4.0)

    def sdpa(self, causal=True):
        q, k, v = (x.transpose(1, 2) for x in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def linear(self, name):
        return linear_attention(self.query, self.key, self.value, **self.maps[name])[0]

    def bidirectional(self, name):
        return bidirectional_linear_attention(self.query, self.key, self.value, **self.maps[name])

    def window(self, linear=True):
        part = LinearPart(**self.maps["hedgehog"], log_weight=self.log_weight) if linear else None
        return window_attention(
            self.query, self.key, self.value, window_size=64, num_sinks=4, scale=SCALE, linear=part
        )[0]

    def lightning(self, heads=KV_HEADS):
        key, value = (self.key, self.value) if heads == KV_HEADS else (self.full_key, self.full_value)
        return gated_linear_attention(self.query, key, value, decay=self.fixed_decay[heads], scale=SCALE)[0]

    def gla(self, min_decay=-2.0):
        return gated_linear_attention(
            self.query, self.key, self.value, decay=self.channel_decay, scale=SCALE, min_decay=min_decay
        )[0]

    def delta(self, heads=KV_HEADS, channels=False):
        key, value = (self.key, self.value) if heads == KV_HEADS else (self.full_key, self.full_value)
        decay = self.channel_decay if channels else self.decay[heads]
        return gated_delta_rule(
            self.query,
            key,
            value,
            decay=decay,
            beta=self.beta[heads],
            scale=SCALE,
            qk_l2norm=True,
            min_decay=-5.0 if channels else None,
        )[0]

    def hf_delta(self):
        return hf_chunk_delta(
            self.query,
            self.full_key,
            self.full_value,
            g=self.decay[HEADS],
            beta=self.beta[HEADS],
            use_qk_l2norm_in_kernel=True,
        )[0]

    def prefill_candidates(self):
        lightning = HFLightning(self.dtype)
        hidden = lightning.prepare(self.query, self.full_key, self.full_value)
        return {
            "sdpa": self.sdpa,
            "linear_attention/elu": lambda: self.linear("elu"),
            "linear_attention/relu": lambda: self.linear("relu"),
            "linear_attention/hedgehog": lambda: self.linear("hedgehog"),
            "linear_attention/softmax": lambda: self.linear("softmax"),
            "linear_attention/dpfp": lambda: self.linear("dpfp"),
            "linear_attention/taylor": lambda: self.linear("taylor"),
            "linear_attention/hedgehog+window": self.window,
            "sliding_window": lambda: self.window(linear=False),
            "lightning": self.lightning,
            "lightning/equal_heads": lambda: self.lightning(HEADS),
            "gla": self.gla,
            "gla/safe": lambda: self.gla(min_decay=-4.0),
            "gated_delta_net": self.delta,
            "gated_delta_net/equal_heads": lambda: self.delta(HEADS),
            "kimi_delta": lambda: self.delta(channels=True),
            "transformers/lightning": lambda: lightning(hidden),
            "transformers/gated_delta_net": self.hf_delta,
        }


# which of transformers' own forms an op is compared with
COUNTERPART = {
    "lightning": "transformers/lightning",
    "lightning/equal_heads": "transformers/lightning",
    "gated_delta_net": "transformers/gated_delta_net",
    "gated_delta_net/equal_heads": "transformers/gated_delta_net",
}


def compare(candidates, rounds, inner=1):
    """CPU seconds per call of every candidate, a list over rounds."""
    times = {name: [] for name in candidates}
    for function in candidates.values():
        function()
    order, shuffler = list(candidates.items()), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name, function in order:
            start = time.process_time()
            for _ in range(inner):
                function()
            times[name].append((time.process_time() - start) / inner)
    return times


def ratio(times, slow, fast):
    return round(statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True)), 2)


def rows_of(times, phase, dtype, length, base="sdpa", extra=(), best=None):
    rows = []
    for name, values in times.items():
        if name == base or name.startswith("transformers/") or name in extra:
            continue
        rows.append(
            {
                "op": name, "phase": phase, "dtype": dtype, "length": length,
                "milliseconds": round(1e3 * statistics.median(values), 3),
                "speedup_vs_sdpa": ratio(times, base, name),
                "speedup_vs_transformers": ratio(times, COUNTERPART[name], name) if COUNTERPART.get(name) in times else None,
            }
        )  # fmt: skip
        if best is not None:
            rows[-1].update(best_attention=best, speedup_vs_best_attention=ratio(times, best, name))
        print_row(rows[-1])
    return rows


def print_row(row):
    against = "" if row["speedup_vs_transformers"] is None else f"{row['speedup_vs_transformers']:6.2f}x transformers"
    best = f"{row['speedup_vs_best_attention']:7.2f}x best attention " if "speedup_vs_best_attention" in row else ""
    print(
        f"{row['phase']:8} {row['dtype']:9} {row['length']:6}  {row['op']:34} {row['milliseconds']:10.3f} ms "
        f"{row['speedup_vs_sdpa']:7.2f}x sdpa {best}{against}",
        flush=True,
    )


def verify():
    """What is timed is right: 300 tokens against the torch forms in fp64; transformers' own forms against ours with equal heads."""
    with torch.no_grad():
        exact = {name: f() for name, f in Problem(300, torch.float64).prefill_candidates().items()}
        for dtype_name, dtype in DTYPES.items():
            outputs = {name: f() for name, f in Problem(300, dtype).prefill_candidates().items()}
            for name, output in outputs.items():
                expected = exact[name]
                if (
                    name == "transformers/lightning"
                ):  # (output [B, T, H * V], ...) without the scale, through a gate of one half
                    output, expected = output[0], exact["lightning/equal_heads"].flatten(2) / SCALE / 2
                elif name == "transformers/gated_delta_net":
                    expected = exact["gated_delta_net/equal_heads"]
                error = ((output - expected).norm() / expected.norm()).item()
                # MiniMax' slopes carry a factor of 1 + 1e-5; bf16 rounds the inputs (2^-9) and the gates
                limit = 1e-4 if dtype_name == "float32" else 3e-2
                if not error <= limit:
                    raise SystemExit(f"{name} in {dtype_name} is wrong: relative error {error:.1e} > {limit:.0e}")


def prefill(length, rounds):
    rows = []
    for name, dtype in DTYPES.items():
        problem = Problem(length, dtype)
        with torch.no_grad():
            rows += rows_of(compare(problem.prefill_candidates(), rounds), "prefill", name, length)
            both = {
                "sdpa": lambda problem=problem: problem.sdpa(causal=False),
                "linear_attention/elu/bidirectional": lambda problem=problem: problem.bidirectional("elu"),
                "linear_attention/hedgehog/bidirectional": lambda problem=problem: problem.bidirectional("hedgehog"),
            }
            rows += rows_of(compare(both, rounds), "prefill", name, length)
    return rows


def train(length, rounds):
    rows = []
    for name, dtype in DTYPES.items():
        problem = Problem(length, dtype, requires_grad=True)

        def step(forward, problem=problem):
            parameters = [p for pair in problem.maps.values() for m in pair.values() for p in m.parameters()]

            def run():
                for x in (*problem.leaves, *parameters):
                    x.grad = None
                output = forward()
                output.backward(torch.ones_like(output))

            return run

        candidates = {
            "sdpa": problem.sdpa,
            "linear_attention/elu": lambda problem=problem: problem.linear("elu"),
            "linear_attention/relu": lambda problem=problem: problem.linear("relu"),
            "linear_attention/hedgehog": lambda problem=problem: problem.linear("hedgehog"),
            "linear_attention/hedgehog+window": problem.window,
            "lightning": problem.lightning,
            "gla": problem.gla,
            "gated_delta_net": problem.delta,
            "gated_delta_net/equal_heads": lambda problem=problem: problem.delta(HEADS),
            "kimi_delta": lambda problem=problem: problem.delta(channels=True),
            "transformers/gated_delta_net": problem.hf_delta,
        }
        rows += rows_of(compare({k: step(f) for k, f in candidates.items()}, rounds), "train", name, length)
    return rows


# A model has many layers: by the time a layer's turn comes again, other layers' keys or states have passed through the cache.
LAYERS = 30


def decode(context, rounds):
    """Four tokens after `context`, each in turn on the caches of `LAYERS` layers, as a model does; the time of one token in one layer."""
    rows = []
    for name, dtype in DTYPES.items():
        past, new = Problem(context, dtype), Problem(1, dtype)
        query, key, value = new.query, new.key, new.value
        q = query.transpose(1, 2)
        packed = q.view(1, KV_HEADS, HEADS // KV_HEADS, DIM)
        caches = [tuple(x.transpose(1, 2).contiguous() for x in (past.key, past.value)) for _ in range(LAYERS)]

        def two_products(k, v, packed=packed):
            return torch.bmm((torch.bmm(packed[0], k[0].transpose(1, 2)) * SCALE).softmax(-1), v[0])

        def linear(kind, past=past, query=query, key=key, value=value):
            maps = past.maps[kind]
            state = linear_attention(past.query, past.key, past.value, output_final_state=True, **maps)[1]
            return [state.clone() for _ in range(LAYERS)], lambda state: linear_attention(
                query, key, value, initial_state=state, output_final_state=True, inplace_final_state=True, **maps
            )

        def delta(heads, channels=False, new=new):
            k, v = (new.key, new.value) if heads == KV_HEADS else (new.full_key, new.full_value)
            decay = new.channel_decay if channels else new.decay[heads]
            return [torch.zeros(1, heads, DIM, DIM) for _ in range(LAYERS)], lambda state: gated_delta_rule(
                new.query, k, v, decay=decay, beta=new.beta[heads], scale=SCALE, qk_l2norm=True, initial_state=state,
                output_final_state=True, inplace_final_state=True,
            )  # fmt: skip

        def gated(decay, query=query, key=key, value=value):
            return [torch.zeros(1, KV_HEADS, DIM, DIM) for _ in range(LAYERS)], lambda state: gated_linear_attention(
                query,
                key,
                value,
                decay=decay,
                scale=SCALE,
                initial_state=state,
                output_final_state=True,
                inplace_final_state=True,
            )

        def window(with_state, past=past, query=query, key=key, value=value):
            part = LinearPart(**past.maps["hedgehog"], log_weight=past.log_weight) if with_state else None
            settings = {"window_size": 64, "num_sinks": 4, "scale": SCALE, "linear": part, "inplace_final_state": True}
            states = [window_attention(past.query, past.key, past.value, **settings)[1] for _ in range(LAYERS)]
            return states, lambda state: window_attention(query, key, value, state=state, **settings)

        def hf(new=new):
            return [torch.zeros(1, HEADS, DIM, DIM) for _ in range(LAYERS)], lambda state: hf_step_delta(
                new.query, new.full_key, new.full_value, g=new.decay[HEADS], beta=new.beta[HEADS], initial_state=state,
                output_final_state=True, use_qk_l2norm_in_kernel=True,
            )  # fmt: skip

        candidates = {
            "sdpa": (caches, lambda c, q=q: F.scaled_dot_product_attention(q, *c, enable_gqa=True)),
            "sdpa, packed": (caches, lambda c, p=packed: F.scaled_dot_product_attention(p, *c)),
            "two products": (caches, lambda c, f=two_products: f(*c)),
            "linear_attention/elu": linear("elu"),
            "linear_attention/relu": linear("relu"),
            "linear_attention/hedgehog": linear("hedgehog"),
            "linear_attention/hedgehog+window": window(True),
            "sliding_window": window(False),
            "lightning": gated(new.fixed_decay[KV_HEADS]),
            "gla": gated(new.channel_decay),
            "gated_delta_net": delta(KV_HEADS),
            "gated_delta_net/equal_heads": delta(HEADS),
            "kimi_delta": delta(KV_HEADS, channels=True),
            "transformers/gated_delta_net": hf(),
        }

        def in_turn(layers, function):
            def run():
                for layer in layers:
                    function(layer)

            return run

        with torch.no_grad():
            times = compare({k: in_turn(*pair) for k, pair in candidates.items()}, rounds, inner=4)
        times = {k: [x / LAYERS for x in values] for k, values in times.items()}
        best = min(("sdpa, packed", "two products"), key=lambda name: statistics.median(times[name]))
        rows += rows_of(times, "decode", name, context, extra=("sdpa, packed", "two products"), best=best)
    return rows


def crossover(rounds):
    """First tested length from which an op is never slower than SDPA."""
    lengths = (16, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512)
    names = ("linear_attention/elu", "linear_attention/relu", "linear_attention/hedgehog", "linear_attention/hedgehog+window",
             "lightning", "gla", "gated_delta_net", "kimi_delta")  # fmt: skip
    rows = []
    for dtype_name, dtype in DTYPES.items():
        slower_at = dict.fromkeys(names, 0)
        for length in lengths:
            candidates = Problem(length, dtype).prefill_candidates()
            with torch.no_grad():
                times = compare({k: candidates[k] for k in ("sdpa", *names)}, rounds, inner=5)
            for name in names:
                if ratio(times, "sdpa", name) < 1.0:
                    slower_at[name] = length
        for name in names:
            first = next((length for length in lengths if length > slower_at[name]), None)
            rows.append(
                {
                    "op": name, "phase": "crossover", "dtype": dtype_name, "length": first, "speedup_vs_sdpa": None,
                    "speedup_vs_transformers": None,
                }
            )  # fmt: skip
            print(f"crossover {dtype_name:9} {name:34} {first} tokens", flush=True)
    return rows


def layer(length, rounds):
    """A whole SmolLM2-135M layer (random weights), attention replaced, in the model's own code with its own caches."""
    from transformers import DynamicCache, LlamaConfig, LlamaModel

    from hf_hybrid import GatedDeltaNetConfig, LinearAttentionConfig, convert_to_hybrid

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3, vocab_size=64,
        max_position_embeddings=2 * length,
    )  # fmt: skip
    mixers = {
        "layer/linear_attention/relu": LinearAttentionConfig(feature_map="relu", window_size=0),
        "layer/linear_attention/elu": LinearAttentionConfig(feature_map="elu", window_size=0),
        "layer/linear_attention/hedgehog": LinearAttentionConfig(window_size=0),
        "layer/linear_attention/hedgehog+window": LinearAttentionConfig(),
        "layer/gated_delta_net": GatedDeltaNetConfig(window_size=0),
        "layer/identity": "identity",  # no attention at all: what no mixer can exceed
    }
    rows = []
    for dtype_name, dtype in DTYPES.items():
        torch.manual_seed(0)
        teacher = LlamaModel(config).to(dtype).eval()
        models = {"sdpa": teacher}
        for name, mixer in mixers.items():
            torch.manual_seed(0)
            models[name] = convert_to_hybrid(LlamaModel(config).eval(), mixer).to(dtype)
        tokens = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            prompt = {k: lambda m=m, t=tokens: m(t, use_cache=False) for k, m in models.items()}
            times = compare(prompt, rounds)
            rows += rows_of(times, "prefill", dtype_name, length)
            caches = {k: DynamicCache(config=m.config) for k, m in models.items()}
            for k, m in models.items():
                m(tokens, past_key_values=caches[k])
            step = {k: lambda m=m, c=caches[k], t=tokens: m(t[:, :1], past_key_values=c) for k, m in models.items()}
            rows += rows_of(compare(step, 8 * rounds, inner=2), "decode", dtype_name, length)
    return rows


def keeps_everything(problem, name):
    """Linear attention as a textbook has it: every chunk's scores and state in one tensor each, left to autograd. Grouped heads share a state."""
    feature_map_q, feature_map_k = problem.maps[name].values()
    chunk, groups = 64, HEADS // KV_HEADS
    q = feature_map_q(problem.query.transpose(1, 2)).unflatten(2, (-1, chunk)).unflatten(1, (KV_HEADS, groups))
    q = q.transpose(2, 3)  # [B, H_kv, N, G, C, F]
    k = feature_map_k(problem.key.transpose(1, 2)).unflatten(2, (-1, chunk))  # [B, H_kv, N, C, F]
    v = F.pad(problem.value, (0, 1), value=1.0).transpose(1, 2).unflatten(2, (-1, chunk))
    states = (k.mT @ v).cumsum(2)
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], dim=2)
    rows = q.flatten(3, 4)
    scores = (rows @ k.mT).unflatten(3, (groups, chunk)).tril().flatten(3, 4)
    output = (scores @ v + rows @ states).unflatten(3, (groups, chunk))
    return (output[..., :-1] / output[..., -1:]).transpose(2, 3).flatten(1, 2).flatten(2, 3).transpose(1, 2)


MEMORY = {
    "linear_attention/elu": (lambda p: p.linear("elu"), lambda p: keeps_everything(p, "elu")),
    "linear_attention/hedgehog": (lambda p: p.linear("hedgehog"), lambda p: keeps_everything(p, "hedgehog")),
    "gated_delta_net": (lambda p: p.delta(), lambda p: p.hf_delta()),
}


def memory_of(name, which, length):
    """MiB above the inputs at the peak of one forward and backward pass, in this fresh process."""
    run = MEMORY[name][which]

    def step(problem):
        output = run(problem)
        output.backward(torch.ones_like(output))

    step(Problem(64, torch.float32, requires_grad=True))  # first-call allocations of the libraries
    problem = Problem(length, torch.float32, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    before = peak_kibibytes()
    step(problem)
    return (peak_kibibytes() - before) / 1024


def peak_kibibytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def memory(length):
    """Beside what every form has to hold: the output, its gradient, and the gradients of queries, keys and values."""
    held = 4 * length * DIM * (3 * HEADS + 2 * KV_HEADS) / 2**20
    rows = []
    for name in MEMORY:
        used = []
        for which in (0, 1):
            command = [sys.executable, __file__, "--memory_of", name, str(which), str(length)]
            used.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        # transformers' own form repeats keys and values first: their gradients are as large as the query's
        others = held if which == 0 or name.startswith("linear") else 4 * length * DIM * 4 * HEADS / 2**20
        ours, kept = max(used[0] - held, 1.0), used[1] - others
        row = {
            "op": name, "phase": "memory", "dtype": "float32", "length": length, "mebibytes": round(used[0], 1),
            "kept_mebibytes": round(used[1], 1), "working_mebibytes": round(ours, 1), "kept_working_mebibytes": round(kept, 1),
            "working_share": round(ours / kept, 4),
            "speedup_vs_sdpa": None, "speedup_vs_transformers": None,
        }  # fmt: skip
        rows.append(row)
        print(
            f"memory   {name:34} {length} tokens: {used[0]:.0f} MiB, keeping everything {used[1]:.0f} MiB; beside outputs and gradients "
            f"{ours:.1f} and {kept:.0f} MiB ({kept / ours:.0f}x)",
            flush=True,
        )
    return rows


# The figures the project holds itself to: (op, phase, dtype, length, what, at least). Set on a machine (AMD Zen 5, one thread) whose SDPA takes 251 ms in
# fp32 and 268 ms in bf16 at 4,096 tokens; with a matrix unit (AMX) SDPA in bf16 is five times as fast, and most of the bf16 ratios are out of reach.
BARS = [
    *(
        (op, "prefill", dtype, 4096, "speedup_vs_sdpa", bar)
        for op, *bars in (
            ("linear_attention/elu", 13, 20),
            ("linear_attention/relu", 13, 20),
            ("linear_attention/hedgehog", 7.3, 13),
            ("linear_attention/hedgehog+window", 5.5, 9),
            ("lightning", 14, 20),
            ("gla", 13, 17),
            ("gla/safe", 7.5, 8.5),
            ("gated_delta_net", 8.3, 9.5),
        )
        for dtype, bar in zip(DTYPES, bars, strict=True)
    ),
    ("linear_attention/elu/bidirectional", "prefill", "float32", 4096, "speedup_vs_sdpa", 25),
    ("lightning", "prefill", "float32", 4096, "speedup_vs_transformers", 2.5),
    ("lightning", "prefill", "bfloat16", 4096, "speedup_vs_transformers", 1),
    ("gated_delta_net", "prefill", "float32", 4096, "speedup_vs_transformers", 3),
    ("gated_delta_net/equal_heads", "prefill", "float32", 4096, "speedup_vs_transformers", 2),
    ("linear_attention/elu", "train", "float32", 4096, "speedup_vs_sdpa", 15),
    ("linear_attention/relu", "train", "float32", 4096, "speedup_vs_sdpa", 15),
    ("linear_attention/hedgehog", "train", "float32", 4096, "speedup_vs_sdpa", 12),
    ("gated_delta_net", "train", "float32", 4096, "speedup_vs_transformers", 4),
    ("linear_attention/elu", "decode", "float32", 8192, "speedup_vs_sdpa", 70),
    ("linear_attention/relu", "decode", "float32", 8192, "speedup_vs_sdpa", 70),
    ("linear_attention/hedgehog", "decode", "float32", 8192, "speedup_vs_sdpa", 38),
    ("gated_delta_net", "decode", "float32", 8192, "speedup_vs_sdpa", 34),
    ("linear_attention/hedgehog+window", "decode", "float32", 8192, "speedup_vs_sdpa", 18),
    ("gated_delta_net", "decode", "float32", 8192, "speedup_vs_transformers", 3),
    ("linear_attention/elu", "decode", "float32", 8192, "speedup_vs_best_attention", 50),
    ("linear_attention/elu", "decode", "bfloat16", 8192, "speedup_vs_best_attention", 20),
    *(
        (f"linear_attention/{op}", "crossover", dtype, None, "length", -80)
        for op in ("elu", "relu")
        for dtype in DTYPES
    ),
    *(
        (op, "crossover", dtype, None, "length", -256)
        for op in ("linear_attention/hedgehog", "gated_delta_net")
        for dtype in DTYPES
    ),
    ("layer/linear_attention/relu", "prefill", "float32", 8192, "speedup_vs_sdpa", 2.0),
    ("layer/linear_attention/relu", "prefill", "bfloat16", 8192, "speedup_vs_sdpa", 4.6),
    ("layer/linear_attention/relu", "decode", "float32", 8192, "speedup_vs_sdpa", 6),
    ("layer/linear_attention/relu", "decode", "bfloat16", 8192, "speedup_vs_sdpa", 8),
    *(
        (op, "memory", "float32", 16384, "working_share", -1 / 8)
        for op in ("linear_attention/elu", "linear_attention/hedgehog", "gated_delta_net")
    ),
]


def judge(rows):
    """Prints what of `BARS` belongs to the phases and lengths that ran, met or missed; a negative bar is an upper one. Returns the number missed."""
    ran = {
        (row["phase"], None if row["phase"] == "crossover" else row["length"], row["op"].startswith("layer/"))
        for row in rows
    }
    found = {
        (row["op"], row["phase"], row["dtype"], *([] if row["phase"] == "crossover" else [row["length"]])): row
        for row in rows
    }
    missed = 0
    for op, phase, dtype, length, what, bar in BARS:
        if (phase, length, op.startswith("layer/")) not in ran:
            continue
        value = found.get((op, phase, dtype, *([] if length is None else [length])), {}).get(what)
        met = value is not None and (value <= -bar if bar < 0 else value >= bar)
        missed += not met
        limit = f"at most {-bar:g}" if bar < 0 else f"at least {bar:g}"
        print(f"{'met   ' if met else 'MISSED'}  {phase:9} {dtype:9} {op:36} {what:26} {value} ({limit})", flush=True)
    return missed


def processor():
    """Name and model number, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|model|cpu family)\s*: (.*)$", cpuinfo.read_text(), flags=re.MULTILINE))
    return f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="prefill of 4,096 tokens only")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--phases", default="prefill,train,decode,crossover,layer,memory", help="which parts to run")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a figure of BARS is missed")
    parser.add_argument("--memory_of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        name, which, length = options.memory_of
        print(memory_of(name, int(which), int(length)))
        return
    phases = {
        "prefill": lambda: [row for n, r in ((512, 15), (4096, 15), (16384, 1)) for row in prefill(n, r)],
        "train": lambda: train(4096, 7),
        "decode": lambda: decode(8192, 15),
        "crossover": lambda: crossover(15),
        "layer": lambda: layer(8192, 3),
        "memory": lambda: memory(16384),
    }
    verify()
    rows = prefill(4096, 9) if options.quick else [row for name in options.phases.split(",") for row in phases[name]()]
    if options.json:
        machine = {
            "processor": processor(), "torch": torch.__version__, "transformers": transformers.__version__, "threads": 1,
            "amx": torch.cpu._is_amx_tile_supported(), "ops": choose_backend(None, torch.zeros(1)),
        }  # fmt: skip
        temporary = options.json + ".tmp"
        with open(temporary, "w") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=1)
        os.replace(temporary, options.json)
    missed = judge(rows)
    sys.exit(int(options.strict and missed > 0))


if __name__ == "__main__":
    main()
