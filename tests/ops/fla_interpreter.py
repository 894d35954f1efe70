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

from hf_hybrid.mixers import get_feature_map  # noqa: E402
from hf_hybrid.ops import dispatch  # noqa: E402
from hf_hybrid.ops.naive import LinearPart  # noqa: E402


HEADS, KV_HEADS, DIM = 4, 2, 16


def tensors(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, length, heads, DIM, generator=generator).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def cases():
    for feature_map in ("relu", "hedgehog"):
        maps = {
            "feature_map_q": get_feature_map(feature_map)(HEADS, DIM),
            "feature_map_k": get_feature_map(feature_map)(KV_HEADS, DIM),
        }
        for part in maps.values():
            part.init_weights()
        width = 2 * DIM if feature_map == "hedgehog" else DIM
        state = torch.rand(1, KV_HEADS, width, DIM + 1)
        yield f"linear_attention/{feature_map}", dispatch.linear_attention, maps, state
        yield (
            f"linear_attention/{feature_map}, not normalised",
            dispatch.linear_attention,
            {**maps, "normalize": False},
            state,
        )
    for heads in (KV_HEADS, HEADS):
        for shape in ((heads,), (heads, DIM)):
            kind = "per channel" if len(shape) == 2 else "per head"
            state = torch.randn(1, heads, DIM, DIM)
            yield (
                f"gated_linear_attention {kind}, {heads} states",
                dispatch.gated_linear_attention,
                {"decay": shape},
                state,
            )
            yield (
                f"gated_delta_rule {kind}, {heads} states",
                dispatch.gated_delta_rule,
                {"decay": shape, "beta": (heads,), "qk_l2norm": True},
                state,
            )


def compare(name, op, kwargs, state, length):
    """Outputs, final states and, for more than one token, gradients of both backends."""
    query, key, value = tensors(length)
    kwargs = dict(kwargs)
    generator = torch.Generator().manual_seed(1)
    extra = []
    if "decay" in kwargs:
        kwargs["scale"] = DIM**-0.5
        kwargs["decay"] = (-torch.rand(1, length, *kwargs["decay"], generator=generator)).requires_grad_()
        extra.append(kwargs["decay"])
    if "beta" in kwargs:
        kwargs["beta"] = torch.rand(1, length, *kwargs["beta"], generator=generator).requires_grad_()
        extra.append(kwargs["beta"])
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
    worst = 0.0
    for ours, theirs in zip(results["torch"], results["fla"], strict=True):
        if ours.shape != theirs.shape or not theirs.isfinite().all():
            return float("inf")
        worst = max(worst, ((ours - theirs).norm() / ours.norm().clamp_min(1e-6)).item())
    print(f"{worst:.1e}  T={length:<3} {name}", flush=True)
    return worst


def compare_window():
    """The window beside a state whose linear part is fla's."""
    maps = [get_feature_map("hedgehog")(heads, DIM) for heads in (HEADS, KV_HEADS)]
    for part in maps:
        part.init_weights()
    query, key, value = tensors(40)
    linear = LinearPart(*maps, torch.zeros(HEADS))
    outputs = [
        dispatch.window_attention(
            query, key, value, window_size=5, num_sinks=2, scale=0.25, linear=linear, backend=backend
        )[0]
        for backend in ("torch", "fla")
    ]
    error = ((outputs[0] - outputs[1]).norm() / outputs[0].norm()).item()
    print(f"{error:.1e}  T=40  window_attention", flush=True)
    return error


def main():
    errors = [compare(*case, length) for case in cases() for length in (1, 37)]
    errors.append(compare_window())
    # the interpreter computes fp32 products exactly: what is left is the order of sums
    sys.exit(int(max(errors) > 1e-5))


if __name__ == "__main__":
    main()
