"""Picks the implementation of each op. The only module that knows flash-linear-attention (fla).

Same signatures as `naive`. The choice is made once per process, from `HF_HYBRID_OPS` (`torch` or `fla`; unset: fla when it is
installed and the tensors are on CUDA), and can be overridden per call with `backend=`.
"""

import contextlib
import functools
import importlib.util
import os

import torch

from ..errors import HybridConfigError, MissingDependencyError, closest
from .chunk import chunk_linear_attention, chunk_sliding_window
from .step import step_linear_attention, step_sliding_window


BACKENDS = ("torch", "fla")


@functools.cache
def requested_backend() -> str | None:
    """The backend named by `HF_HYBRID_OPS`, checked; `None` when the variable is unset."""
    name = os.environ.get("HF_HYBRID_OPS")
    if not name:
        return None
    if name not in BACKENDS:
        raise HybridConfigError(
            f"The environment variable HF_HYBRID_OPS must be one of {', '.join(BACKENDS)}; got {name!r}.{closest(name, BACKENDS)}"
        )
    if name == "fla" and not fla_is_available():
        raise MissingDependencyError(
            "HF_HYBRID_OPS=fla needs flash-linear-attention, which is not installed. Run `pip install hf_hybrid[cuda]`."
        )
    return name


@functools.cache
def fla_is_available() -> bool:
    return importlib.util.find_spec("fla") is not None


def linear_attention(query, key, value, *, initial_state=None, output_final_state=False, normalize=True, backend=None):
    """[`naive.naive_linear_attention`], in the fastest form that fits: one-token, fla kernel or chunkwise torch."""
    kwargs = {"initial_state": initial_state, "output_final_state": output_final_state, "normalize": normalize}
    if query.shape[1] == 1:
        return step_linear_attention(query, key, value, **kwargs)
    backend = backend or requested_backend() or ("fla" if query.is_cuda and fla_is_available() else "torch")
    if backend == "fla":
        return _fla_linear_attention(query, key, value, **kwargs)
    return chunk_linear_attention(query, key, value, **kwargs)


def sliding_window(query, key, value, **kwargs):
    """[`naive.naive_sliding_window`], in the form that fits the number of new tokens."""
    form = step_sliding_window if query.shape[1] == 1 else chunk_sliding_window
    return form(query, key, value, **kwargs)


def _fla_linear_attention(query, key, value, *, initial_state, output_final_state, normalize):
    """Maps our arguments to `fla.ops.linear_attn.chunk_linear_attn`: `[B, T, H, K]`, equal head counts, explicit scale 1.

    The ones column of the value carries the normaliser, so that fla's own (which adds an epsilon) stays off.
    """
    from fla.ops.linear_attn import chunk_linear_attn

    groups = query.shape[2] // key.shape[2]
    value = torch.nn.functional.pad(value, (0, 1), value=1.0)
    key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    if initial_state is not None:
        initial_state = initial_state.repeat_interleave(groups, dim=1).contiguous()
    output, state = chunk_linear_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), scale=1.0, initial_state=initial_state,
        output_final_state=output_final_state, normalize=False,
    )  # fmt: skip
    if normalize:
        output = (output[..., :-1].float() / output[..., -1:].float().clamp_min(1e-30)).to(query.dtype)
    return output, (state[:, ::groups] if output_final_state else None)


@contextlib.contextmanager
def fast_fp32_matmul():
    """
    Let fp32 matrix products on an AVX-512 CPU run through oneDNN instead of MKL: 1.6-1.9x faster on AMD, still computed in fp32.

    Process-wide while it is active, restored on exit even if an exception passes. Does nothing without AVX-512, and nothing with
    AMX, where the same switch would round the operands to bfloat16.
    """
    backend = torch.backends.mkldnn.matmul
    if not (hasattr(backend, "fp32_precision") and _avx512_without_amx()):
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


@functools.cache
def _avx512_without_amx() -> bool:
    cpu = torch.cpu
    has_avx512 = getattr(cpu, "_is_avx512_supported", lambda: False)()
    has_amx = getattr(cpu, "_is_amx_tile_supported", lambda: True)()
    return bool(has_avx512 and not has_amx)
