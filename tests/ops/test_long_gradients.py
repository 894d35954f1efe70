"""Gradients after many thousand tokens: nothing drifts."""

import copy

import pytest
import torch

from hf_hybrid.mixers import get_feature_map, list_feature_maps
from hf_hybrid.ops import dispatch
from hf_hybrid.ops.cpp import build
from hf_hybrid.ops.naive import LinearPart


HEADS, KV_HEADS, DIM, SCALE = 4, 2, 32, 32**-0.5
BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(build.kernels() is None, reason="needs a C++ compiler")),
]
GATED = {
    "lightning": (dispatch.gated_linear_attention, (KV_HEADS,), {}),
    "gla": (dispatch.gated_linear_attention, (KV_HEADS, DIM), {"min_decay": -2.0}),
    "gated_delta_net": (dispatch.gated_delta_rule, (KV_HEADS,), {"qk_l2norm": True}),
    "kimi_delta": (dispatch.gated_delta_rule, (KV_HEADS, DIM), {"qk_l2norm": True, "min_decay": -5.0}),
}


def tensors(length, generator):
    return [torch.randn(1, length, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def maps_of(name):
    torch.manual_seed(1)
    maps = [get_feature_map(name)(heads, DIM, 8 if name == "taylor" else None) for heads in (HEADS, KV_HEADS)]
    for part in maps:
        part.init_weights()
    return maps


def worst_error(op, inputs, modules, backend):
    """Of output and gradients in fp32, against the chunkwise torch form in fp64, which the contracts compare with the recurrences."""
    results = []
    for dtype, form in ((torch.float32, backend), (torch.float64, "torch")):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        parts = [copy.deepcopy(part).to(dtype) for part in modules]
        output = op(leaves, parts, form)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        parameters = [parameter for part in parts for parameter in part.parameters()]
        results.append([output.detach(), *torch.autograd.grad((output * weight).sum(), [*leaves, *parameters])])
    errors = [((x - y).norm() / y.norm()).item() for x, y in zip(*results, strict=True)]
    # of a weight per head the gradient adds up differences between two halves, each several times larger: five times the rounding
    return max(error / (5 if y.ndim == 1 else 1) for error, y in zip(errors, results[1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list_feature_maps())
def test_linear_attention(name, backend):
    def op(leaves, parts, form):
        return dispatch.linear_attention(*leaves, feature_map_q=parts[0], feature_map_k=parts[1], backend=form)[0]

    inputs = tensors(16384, torch.Generator().manual_seed(0))
    assert worst_error(op, inputs, maps_of(name), backend) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [None, "hedgehog", "elu"])
def test_windows_with_sinks(name, backend):
    class LogWeight(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((HEADS,), -2.0))

    def op(leaves, parts, form):
        linear = LinearPart(parts[0], parts[1], parts[2].weight) if parts else None
        return dispatch.window_attention(
            *leaves, window_size=64, num_sinks=4, scale=SCALE, linear=linear, backend=form
        )[0]

    inputs = tensors(16384, torch.Generator().manual_seed(0))
    modules = [] if name is None else [*maps_of(name), LogWeight()]
    assert worst_error(op, inputs, modules, backend) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GATED)
def test_gated(name, backend):
    """Half-lives from 30 to 4,000 tokens, writes of all strengths."""
    call, shape, settings = GATED[name]
    generator = torch.Generator().manual_seed(0)
    inputs = tensors(16384, generator)
    rate = torch.logspace(-1.6, -3.8, KV_HEADS).view(-1, *(1,) * (len(shape) - 1))
    inputs.append(-2 * rate * torch.rand(1, 16384, *shape, generator=generator))
    delta = "delta" in name
    if delta:
        inputs.append(torch.rand(1, 16384, KV_HEADS, generator=generator))

    def op(leaves, parts, form):
        gates = {"decay": leaves[3], **({"beta": leaves[4]} if delta else {})}
        return call(*leaves[:3], **gates, scale=SCALE, backend=form, **settings)[0]

    assert worst_error(op, inputs, [], backend) <= (1e-5 if delta else 2e-6)
