"""Picks the implementation of each op. The only module that knows flash-linear-attention (fla).

Same signatures as `naive`. The choice is made once per process: `HF_HYBRID_OPS` (`torch`, `cpp` or `fla`) if set, else
fla on CUDA and the kernels of `cpp` on a CPU, where they can be had. It can be overridden per call with `backend=`.
What the kernels of `cpp` do not do (other dtypes, gradients of some ops, maps of a user's own, tracing) runs in torch
whatever the choice.
"""

import functools
import importlib.util
import os

import torch

from ..errors import HybridConfigError, MissingDependencyError, closest
from . import chunk, cpp, step
from .cpp.build import kernels
from .naive import TINY, mapped


BACKENDS = ("torch", "cpp", "fla")


def linear_attention(query, key, value, *, inplace_final_state=False, backend=None, **kwargs):
    """
    [`naive.naive_linear_attention`], in the fastest form that fits: fla or compiled kernel, one token or chunkwise
    torch.
    """
    backend = choose_backend(backend, query)
    if backend == "fla":
        return _fla_linear_attention(query, key, value, **kwargs)
    state, maps = kwargs.get("initial_state"), (kwargs.get("feature_map_q"), kwargs.get("feature_map_k"))
    if backend == "cpp" and cpp.can_run(query, key, value, state, valid=kwargs.get("valid"), feature_maps=maps):
        return cpp.linear_attention(query, key, value, inplace_final_state=inplace_final_state, **kwargs)
    if query.shape[1] == 1:
        inplace = inplace_final_state and state is not None and state.is_contiguous()
        return step.step_linear_attention(query, key, value, inplace_final_state=inplace, **kwargs)
    return chunk.chunk_linear_attention(query, key, value, **kwargs)


def bidirectional_linear_attention(query, key, value, *, backend=None, **kwargs):
    """[`naive.naive_bidirectional_linear_attention`]: two products, for which torch needs no kernel of fla."""
    maps = (kwargs.get("feature_map_q"), kwargs.get("feature_map_k"))
    if choose_backend(backend, query) == "cpp" and cpp.can_run(
        query, key, value, valid=kwargs.get("valid"), feature_maps=maps
    ):
        weights = [w for f in maps if f is not None for w in f.weights()]
        if not _needs_grad(query, key, value, *weights):
            return cpp.bidirectional_linear_attention(query, key, value, **kwargs)
    return chunk.bidirectional_linear_attention(query, key, value, **kwargs)


def gated_linear_attention(query, key, value, *, decay, inplace_final_state=False, backend=None, **kwargs):
    """[`naive.naive_gated_linear_attention`], in the fastest form that fits."""
    backend = choose_backend(backend, query)
    if backend == "fla":
        return _fla_gated(query, key, value, decay=decay, **kwargs)
    state = kwargs.get("initial_state")
    if backend == "cpp" and cpp.can_run(query, key, value, decay, state):
        return cpp.gated(query, key, value, decay=decay, inplace_final_state=inplace_final_state, **kwargs)
    if query.shape[1] == 1:
        inplace = inplace_final_state and state is not None and state.is_contiguous()
        return step.step_gated_linear_attention(query, key, value, decay=decay, inplace_final_state=inplace, **kwargs)
    return chunk.chunk_gated_linear_attention(query, key, value, decay=decay, **kwargs)


def gated_delta_rule(query, key, value, *, decay, beta, inplace_final_state=False, backend=None, **kwargs):
    """[`naive.naive_gated_delta_rule`], in the fastest form that fits."""
    backend = choose_backend(backend, query)
    if backend == "fla":
        return _fla_gated(query, key, value, decay=decay, beta=beta, **kwargs)
    state = kwargs.get("initial_state")
    if backend == "cpp" and cpp.can_run(query, key, value, decay, beta, state):
        return cpp.gated(query, key, value, decay=decay, beta=beta, inplace_final_state=inplace_final_state, **kwargs)
    if query.shape[1] == 1:
        inplace = inplace_final_state and state is not None and state.is_contiguous()
        return step.step_gated_delta_rule(
            query, key, value, decay=decay, beta=beta, inplace_final_state=inplace, **kwargs
        )
    return chunk.chunk_gated_delta_rule(query, key, value, decay=decay, beta=beta, **kwargs)


def window_attention(
    query,
    key,
    value,
    *,
    num_sinks,
    state=None,
    valid=None,
    linear=None,
    inplace_final_state=False,
    backend=None,
    **kwargs,
):
    """[`naive.naive_window_attention`], in the form that fits the number of new tokens. On a GPU the window is torch's;
    what is older is fla's where fla is chosen."""
    backend = choose_backend(backend, query)
    kwargs = {**kwargs, "num_sinks": num_sinks, "linear": linear}
    inputs = [query, key, value, *(state or ())]
    maps = (None, None) if linear is None else (linear.feature_map_q, linear.feature_map_k)
    weights = () if linear is None else (linear.log_weight, *(w for part in maps for w in part.weights()))
    # gradients through a cached window are torch's
    if (
        backend == "cpp"
        and not (state is not None and _needs_grad(*inputs, *weights))
        and cpp.can_run(*inputs, valid=valid, feature_maps=maps)
    ):
        return cpp.window_attention(
            query, key, value, state=state, valid=valid, inplace_final_state=inplace_final_state, **kwargs
        )
    if (
        query.shape[1] == 1
        and valid is None
        and state is not None
        and _can_step(state, num_sinks, kwargs["window_size"], query, weights)
    ):
        inplace = inplace_final_state and all(x is None or x.is_contiguous() for x in state)
        return step.step_window_attention(query, key, value, state=state, inplace_final_state=inplace, **kwargs)
    linear_form = functools.partial(linear_attention, backend=backend)
    return chunk.chunk_window_attention(query, key, value, state=state, valid=valid, linear_form=linear_form, **kwargs)


def memory_attention(
    query,
    key,
    value,
    *,
    memory_block_size,
    state=None,
    valid=None,
    linear=None,
    inplace_final_state=False,
    backend=None,
    **kwargs,
):
    """[`naive_memory.naive_memory_attention`], in the form that fits the number of new tokens."""
    backend = choose_backend(backend, query)
    kwargs = {**kwargs, "memory_block_size": memory_block_size}
    inputs = [query, key, value, *(() if state is None else (state.key, state.value, state.seen))]
    # gradients through a cached memory are torch's, and so is what stands under one normaliser with a linear part
    if (
        backend == "cpp"
        and linear is None
        and not (state is not None and _needs_grad(*inputs))
        and cpp.can_run(*inputs, valid=valid)
    ):
        return cpp.memory_attention(
            query, key, value, state=state, valid=valid, inplace_final_state=inplace_final_state, **kwargs
        )
    kwargs["linear"] = linear
    weights = () if linear is None else (linear.log_weight, *linear.feature_map_q.weights())
    if (
        query.shape[1] == 1
        and valid is None
        and state is not None
        and not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and not _needs_grad(query, *state, *weights)
        and (seen := chunk.seen_in_all_rows(state.seen)) is not None
        and seen % memory_block_size
    ):
        inplace = inplace_final_state and all(x is None or x.is_contiguous() for x in state)
        return step.step_memory_attention(query, key, value, state=state, inplace_final_state=inplace, **kwargs)
    return chunk.chunk_memory_attention(query, key, value, state=state, valid=valid, **kwargs)


def divergence(student, teacher, weights, temperature, needs_grad):
    """[`cpp.divergence`], or `None` where the kernels cannot be had or do not take these logits."""
    backend = requested_backend() or default_backend(student.device.type)
    if backend == "cpp" and cpp.can_run(student, student, student, weights) and cpp.can_run(teacher, teacher, teacher):
        return cpp.divergence(student, teacher, weights, temperature, needs_grad)
    return None


def _needs_grad(*tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _can_step(state, num_sinks, window_size, query, weights) -> bool:
    # a compiled graph cannot look into the state; on a GPU looking would wait for it
    if torch.compiler.is_compiling() or query.device.type != "cpu":
        return False
    if _needs_grad(query, *state, *weights):
        return False
    return state.is_settled(num_sinks, window_size)


def choose_backend(backend: str | None, x: torch.Tensor) -> str:
    """`backend` if given (checked), else the environment's choice, else what fits `x`, the query."""
    if x.ndim == 4 and not x.shape[1]:
        raise HybridConfigError(
            f"The query has no tokens; got the shape {list(x.shape)} for [B, T, H, K]. Leave empty calls out."
        )
    if x.is_cpu and torch.compiler.is_compiling():
        return "torch"  # a graph cannot hold the kernels
    device = x.device.type
    if backend is not None:
        if _checked(backend, "backend") == "fla" and not _fla_runs_on(device):
            raise HybridConfigError(
                f"backend=fla runs on a GPU; the tensors are on {device}. Move them, or leave backend out to take what "
                "fits."
            )
        return backend
    requested = requested_backend()
    if requested is None or (requested == "fla" and not _fla_runs_on(device)):  # a model of which a part is on the CPU
        return default_backend(device)
    return requested


@functools.cache
def requested_backend() -> str | None:
    """The backend named by `HF_HYBRID_OPS`, checked; `None` when the variable is unset."""
    name = os.environ.get("HF_HYBRID_OPS")
    return _checked(name, "The environment variable HF_HYBRID_OPS") if name else None


@functools.cache
def default_backend(device_type: str) -> str:
    """fla on CUDA, the compiled kernels on a CPU, each where it can be had; else torch."""
    if device_type == "cuda" and fla_is_available():
        return "fla"
    return "cpp" if device_type == "cpu" and kernels() is not None else "torch"


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise HybridConfigError(
            f"{where} must be one of {', '.join(BACKENDS)}; got {name!r}.{closest(str(name), BACKENDS)}"
        )
    if name == "fla" and not fla_is_available():
        raise MissingDependencyError(
            f"{where}={name} needs flash-linear-attention, which is not installed. Run `pip install hf_hybrid[cuda]`."
        )
    if name == "cpp" and kernels() is None:
        raise MissingDependencyError(
            f"{where}={name} needs a C++ compiler that works (c++, g++ or clang++ on the path, or named by CXX). "
            "Install one, e.g. `apt install g++`."
        )
    return name


@functools.cache
def fla_is_available() -> bool:
    return importlib.util.find_spec("fla") is not None


def _fla_runs_on(device_type: str) -> bool:
    return device_type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


# fla wants one key-value head, and one state, per query head; ours are repeated for the call. Its kernels read and
# write `[B, T, H, K]` and states `[B, H, K, V]` fp32, decay the state before they write and read it after, and take
# natural log-decays, which must be finite.


def _fla_linear_attention(
    query,
    key,
    value,
    *,
    feature_map_q=None,
    feature_map_k=None,
    valid=None,
    initial_state=None,
    output_final_state=False,
    normalize=True,
):
    """
    `fla.ops.linear_attn`, with the ones column of the value as normaliser: fla's own adds an epsilon, so it stays off.
    """
    from fla.ops.linear_attn import chunk_linear_attn, fused_recurrent_linear_attn

    query, key = mapped(query, key, feature_map_q, feature_map_k, valid)
    key_dim, value_dim = key.shape[3], value.shape[3]
    value = _aligned(torch.nn.functional.pad(value, (0, 1), value=1.0))
    query, key = _aligned(query), _aligned(key)
    if initial_state is not None:
        initial_state = _aligned(_aligned(initial_state).transpose(2, 3)).transpose(2, 3)
    kernel = fused_recurrent_linear_attn if query.shape[1] == 1 else chunk_linear_attn
    query, key, value, initial_state, groups = _per_query_head(query, key, value, initial_state, key.shape[2])
    output, state = kernel(
        query,
        key,
        value,
        scale=1.0,
        initial_state=initial_state,
        output_final_state=output_final_state,
        normalize=False,
    )
    output = output[..., : value_dim + 1]
    if normalize:
        weight = output[..., -1:].float()
        output = (output[..., :-1].float() / weight.masked_fill(weight <= TINY, torch.inf)).to(query.dtype)
    return output, (state[:, ::groups, :key_dim, : value_dim + 1] if output_final_state else None)


def _aligned(x):
    """Filled up with zeros along the last axis to 16 bytes of half precision, which the kernels' block loads want."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8))


# more than this is lost in fp32 anyway, and -inf would be NaN in some kernels
STRONGEST_DECAY = -20.0


def _fla_gated(
    query,
    key,
    value,
    *,
    decay,
    scale,
    beta=None,
    qk_l2norm=False,
    min_decay=None,
    initial_state=None,
    output_final_state=False,
):
    """
    `fla.ops.simple_gla`, `gla`, `gated_delta_rule` and `kda`, by whether there is a `beta` and a decay per channel.
    """
    per_channel, one_token = decay.ndim == 4, query.shape[1] == 1
    groups_of_state = query.shape[2] // decay.shape[2]
    strongest = STRONGEST_DECAY if min_decay is None else max(min_decay, STRONGEST_DECAY)
    decay = decay.float().clamp_min(strongest).repeat_interleave(groups_of_state, dim=2).contiguous()
    query, key, value, initial_state, groups = _per_query_head(
        query, key, value, initial_state, decay.shape[2] // groups_of_state
    )
    kwargs = {"scale": scale, "initial_state": initial_state, "output_final_state": output_final_state}
    if beta is not None:
        kwargs["beta"] = beta.float().repeat_interleave(groups_of_state, dim=2).contiguous()
        kwargs["use_qk_l2norm_in_kernel"] = qk_l2norm
    # the one-token kernels have no backward
    step_form = one_token and not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, decay)))
    if beta is None and not per_channel:
        from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

        output, state = (fused_recurrent_simple_gla if step_form else chunk_simple_gla)(
            query, key, value, g=decay, **kwargs
        )
    elif beta is None:
        from fla.ops.gla import chunk_gla, fused_recurrent_gla

        if step_form:
            output, state = fused_recurrent_gla(query, key, value, gk=decay, **kwargs)
        else:
            output, state = chunk_gla(query, key, value, g=decay, **kwargs)
    elif not per_channel:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

        form = fused_recurrent_gated_delta_rule if step_form else chunk_gated_delta_rule
        output, state = form(query, key, value, g=decay, **kwargs)
    else:
        from fla.ops.kda import chunk_kda, fused_recurrent_kda

        output, state = (fused_recurrent_kda if step_form else chunk_kda)(query, key, value, g=decay, **kwargs)
    return output.to(query.dtype), (state[:, ::groups] if output_final_state else None)


def _per_query_head(query, key, value, initial_state, num_states):
    """Everything with as many heads as the query, and how many query heads share one of the `num_states` states."""
    groups = query.shape[2] // num_states
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2).contiguous() for x in (key, value))
    if initial_state is not None:
        initial_state = initial_state.float().repeat_interleave(groups, dim=1).contiguous()
    return query.contiguous(), key, value, initial_state, groups
