"""Picks the implementation of each op. The only module that knows flash-linear-attention (fla).

Same signatures as `naive`. The choice is made once per process, from `HF_HYBRID_OPS` (`torch` or `fla`; unset: fla when it is
installed and the tensors are on CUDA), and can be overridden per call with `backend=`.
"""

import functools
import importlib.util
import os

import torch

from ..errors import HybridConfigError, MissingDependencyError, closest
from . import chunk, step
from .naive import TINY


BACKENDS = ("torch", "fla")


def linear_attention(query, key, value, *, inplace_final_state=False, backend=None, **kwargs):
    """[`naive.naive_linear_attention`], in the fastest form that fits: one token, fla kernel or chunkwise torch."""
    if query.shape[1] == 1:
        inplace = inplace_final_state and kwargs.get("initial_state") is not None
        return step.step_linear_attention(query, key, value, inplace_final_state=inplace, **kwargs)
    if choose_backend(backend, query) == "fla":
        return _fla_linear_attention(query, key, value, **kwargs)
    return chunk.chunk_linear_attention(query, key, value, **kwargs)


def bidirectional_linear_attention(query, key, value, **kwargs):
    """[`naive.naive_bidirectional_linear_attention`]: two products, for which torch needs no kernel of fla."""
    return chunk.bidirectional_linear_attention(query, key, value, **kwargs)


def gated_linear_attention(query, key, value, *, inplace_final_state=False, backend=None, **kwargs):
    """[`naive.naive_gated_linear_attention`], in the fastest form that fits."""
    if query.shape[1] == 1:
        inplace = inplace_final_state and kwargs.get("initial_state") is not None
        return step.step_gated_linear_attention(query, key, value, inplace_final_state=inplace, **kwargs)
    if choose_backend(backend, query) == "fla":
        return _fla_gated_linear_attention(query, key, value, **kwargs)
    return chunk.chunk_gated_linear_attention(query, key, value, **kwargs)


# Up to here a loop over single tokens is faster than preparing a chunk of the delta rule.
LONGEST_DELTA_LOOP = 8


def gated_delta_rule(query, key, value, *, inplace_final_state=False, backend=None, **kwargs):
    """[`naive.naive_gated_delta_rule`], in the fastest form that fits."""
    if query.shape[1] == 1:
        inplace = inplace_final_state and kwargs.get("initial_state") is not None
        return step.step_gated_delta_rule(query, key, value, inplace_final_state=inplace, **kwargs)
    if choose_backend(backend, query) == "fla":
        return _fla_gated_delta_rule(query, key, value, **kwargs)
    return chunk.chunk_gated_delta_rule(query, key, value, **kwargs)


def window_attention(query, key, value, *, inplace_final_state=False, state=None, valid=None, num_sinks, **kwargs):
    """[`naive.naive_window_attention`], in the form that fits the number of new tokens."""
    if query.shape[1] == 1 and valid is None and state is not None and _can_step(state, num_sinks, kwargs["window_size"], query):
        return step.step_window_attention(
            query, key, value, state=state, num_sinks=num_sinks, inplace_final_state=inplace_final_state, **kwargs
        )
    return chunk.chunk_window_attention(query, key, value, state=state, valid=valid, num_sinks=num_sinks, **kwargs)


def _can_step(state, num_sinks, window_size, query) -> bool:
    # a compiled graph cannot look into the state; on a GPU looking would wait for it
    if torch.compiler.is_compiling() or not query.device.type == "cpu":
        return False
    if torch.is_grad_enabled() and (query.requires_grad or any(x is not None and x.requires_grad for x in state)):
        return False
    return state.is_settled(num_sinks, window_size)


def choose_backend(backend: str | None, x: torch.Tensor) -> str:
    """`backend` if given (checked), else the environment's choice, else what fits `x`."""
    if backend is not None and backend not in BACKENDS:
        raise HybridConfigError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}.{closest(str(backend), BACKENDS)}")
    return backend or requested_backend() or ("fla" if x.is_cuda and fla_is_available() else "torch")


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
