"""Runs flash-linear-attention's Triton kernels on a CPU, through Triton's interpreter, and compares the ops that map to them with our own.

A program of its own (`test_fla.py` starts it): the interpreter must be chosen before anything imports triton. Prints one line per case and
exits with 1 if one differs.
"""

import os
import sys


os.environ["TRITON_INTERPRET"] = "1"

import ast  # noqa: E402

import torch  # noqa: E402
import triton.runtime.autotuner as autotuner  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402


def prepare_interpreter():
    """Two things fla's kernels need that the interpreter lacks: no benchmark among configurations, and tensors as loop variables."""
    prune = autotuner.Autotuner.prune_configs
    autotuner.Autotuner.prune_configs = lambda self, kwargs: prune(self, kwargs)[:1]

    def visit_for(self, node):
        self.generic_visit(node)
        call = node.iter
        is_range = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range"
        if is_range and isinstance(node.target, ast.Name) and node.target.id != "_":
            name = node.target.id
            node.body.insert(0, ast.parse(f"{name} = interpreter_semantic.to_tensor({name}, False)").body[0])
        return node

    interpreter.ASTTransformer.visit_For = visit_for


prepare_interpreter()

from hf_hybrid.mixers import get_feature_map, list_feature_maps  # noqa: E402
from hf_hybrid.ops import dispatch  # noqa: E402
from hf_hybrid.ops.naive import LinearPart  # noqa: E402


HEADS, KV_HEADS, DIM = 4, 2, 16


def tensors(length, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, heads, DIM, generator=generator).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def feature_maps(name):
    maps = {
        side: get_feature_map(name)(heads, DIM, 6 if name == "taylor" else None)
        for side, heads in (("q", HEADS), ("k", KV_HEADS))
    }
    for part in maps.values():
        part.init_weights()
    return {f"feature_map_{side}": part for side, part in maps.items()}


def cases():
    """`(name, op, arguments, shape of the state)`; of decays and betas the shape after `[B, T]`."""
    for name in list_feature_maps():
        maps = feature_maps(name)
        width = maps["feature_map_k"].output_dim
        yield f"linear_attention/{name}", dispatch.linear_attention, maps, (KV_HEADS, width, DIM + 1)
    relu = {**feature_maps("relu"), "normalize": False}
    yield "linear_attention/relu, not normalised", dispatch.linear_attention, relu, (KV_HEADS, DIM, DIM + 1)
    padded = {**feature_maps("elu"), "valid": 0.7}
    yield "linear_attention/elu, padded", dispatch.linear_attention, padded, (KV_HEADS, DIM, DIM + 1)
    for heads in (KV_HEADS, HEADS):
        for shape in ((heads,), (heads, DIM)):
            kind = f"per {'channel' if len(shape) == 2 else 'head'}, {heads} states"
            state = (heads, DIM, DIM)
            delta = {"decay": shape, "beta": (heads,), "qk_l2norm": True}
            yield f"gated_linear_attention {kind}", dispatch.gated_linear_attention, {"decay": shape}, state
            yield f"gated_delta_rule {kind}", dispatch.gated_delta_rule, delta, state
    floor = {"decay": (KV_HEADS, DIM), "min_decay": -0.5}
    yield "gated_linear_attention, decays cut", dispatch.gated_linear_attention, floor, (KV_HEADS, DIM, DIM)


def compare(name, op, kwargs, state, length, batch=1):
    """Outputs, final states and, for more than one token, gradients of both backends."""
    query, key, value = tensors(length, batch)
    kwargs = dict(kwargs)
    generator = torch.Generator().manual_seed(1)
    state = torch.rand(batch, *state, generator=generator)
    extra = [w for part in ("feature_map_q", "feature_map_k") if part in kwargs for w in kwargs[part].weights()]
    if "decay" in kwargs:
        kwargs["scale"] = DIM**-0.5
        kwargs["decay"] = (-torch.rand(batch, length, *kwargs["decay"], generator=generator)).requires_grad_()
        extra.append(kwargs["decay"])
    if "beta" in kwargs:
        kwargs["beta"] = torch.rand(batch, length, *kwargs["beta"], generator=generator).requires_grad_()
        extra.append(kwargs["beta"])
    if "valid" in kwargs:
        kwargs["valid"] = torch.rand(batch, length, generator=generator) < kwargs["valid"]
    results = {}
    for backend in ("torch", "fla"):
        with torch.set_grad_enabled(length > 1):
            output, final = op(
                query, key, value, initial_state=state, output_final_state=True, backend=backend, **kwargs
            )
        results[backend] = [output, final]
        if length > 1:
            weight = torch.linspace(-1, 1, output.numel()).view_as(output)
            results[backend] += torch.autograd.grad((output * weight).sum() + final.sum(), [query, key, value, *extra])
    return report(f"{name}, T={length}, B={batch}", results)


def report(name, results):
    worst = 0.0
    for ours, theirs in zip(results["torch"], results["fla"], strict=True):
        if ours.shape != theirs.shape or not theirs.isfinite().all():
            return float("inf")
        worst = max(worst, ((ours - theirs).norm() / ours.norm().clamp_min(1e-6)).item())
    print(f"{worst:.1e}  {name}", flush=True)
    return worst


def compare_window(name, continued):
    """The window beside a state whose linear part is fla's, in one go and as a continuation, with gradients where there is no state."""
    maps = list(feature_maps(name).values())
    query, key, value = tensors(40)
    linear = LinearPart(*maps, torch.zeros(HEADS, requires_grad=True))
    kwargs = {"window_size": 5, "num_sinks": 2, "scale": 0.25, "linear": linear}
    results = {}
    for backend in ("torch", "fla"):
        state = None
        with torch.set_grad_enabled(not continued):
            if continued:
                first = [x[:, :23] for x in (query, key, value)]
                _, state = dispatch.window_attention(*first, backend=backend, **kwargs)
            rest = [x[:, 23:] if continued else x for x in (query, key, value)]
            output, final = dispatch.window_attention(*rest, state=state, backend=backend, **kwargs)
        results[backend] = [output, final.recurrent]
        if not continued:
            results[backend] += torch.autograd.grad(output.square().sum(), [query, key, value, linear.log_weight])
    return report(f"window_attention/{name}{', continued' if continued else ''}", results)


def main():
    errors = [compare(*case, length) for case in cases() for length in (1, 37)]
    # more than one block of fla's, more than one row
    errors += [compare(*case, 130, batch=2) for case in cases() if "relu" in case[0] or f"{KV_HEADS} states" in case[0]]
    errors += [compare_window("hedgehog", False), compare_window("relu", True)]
    # the interpreter computes fp32 products exactly: what is left is the order of sums
    sys.exit(int(max(errors) > 1e-5))


if __name__ == "__main__":
    main()
