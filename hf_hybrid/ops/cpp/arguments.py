"""The structures that go to the kernels; each mirrors the one of its name in `src/`."""

import ctypes

import torch


int64, pointer = ctypes.c_int64, ctypes.c_void_p


class View(ctypes.Structure):
    """`[B, T, H, K]` in memory, last axis dense."""

    _fields_ = [("data", pointer), ("batch", int64), ("token", int64), ("head", int64)]


def view(x: torch.Tensor) -> View:
    return View(x.data_ptr(), *x.stride()[:3])


def dense(x: torch.Tensor) -> torch.Tensor:
    """Last axis dense, as a kernel reads it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def whole(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


# tokens per block of the backward pass, as in linear.h
BLOCK = 128


class LinearArguments(ctypes.Structure):
    _fields_ = [
        *(
            (name, int64)
            for name in (
                "batch",
                "tokens",
                "heads",
                "kv_heads",
                "key_dim",
                "value_dim",
                "feature_dim",
                "projected_dim",
                "map",
                "dtype",
                "weight_dtype",
                "threads",
                "normalize",
            )
        ),
        ("scale", ctypes.c_float),
        *((name, View) for name in ("query", "key", "value", "output")),
        *(
            (name, pointer)
            for name in ("valid", "weight_q", "weight_k", "initial_state", "final_state", "block_states")
        ),
        *((name, View) for name in ("grad_output", "grad_query", "grad_key", "grad_value")),
        *((name, pointer) for name in ("grad_final_state", "grad_initial_state", "grad_weight_q", "grad_weight_k")),
    ]


class GatedArguments(ctypes.Structure):
    _fields_ = [
        *(
            (name, int64)
            for name in (
                "batch",
                "tokens",
                "heads",
                "kv_heads",
                "state_heads",
                "key_dim",
                "value_dim",
                "dtype",
                "threads",
                "per_channel",
                "l2norm",
            )
        ),
        ("scale", ctypes.c_float),
        ("min_decay", ctypes.c_float),
        *((name, View) for name in ("query", "key", "value", "output", "decay", "beta")),
        *((name, pointer) for name in ("initial_state", "final_state", "block_states")),
        *(
            (name, View)
            for name in (
                "grad_output",
                "grad_query",
                "grad_key",
                "grad_value",
                "grad_decay",
                "grad_beta",
            )
        ),
        *((name, pointer) for name in ("grad_final_state", "grad_initial_state")),
    ]


class LinearStep(ctypes.Structure):
    _fields_ = [
        *(
            (name, int64)
            for name in (
                "batch",
                "heads",
                "kv_heads",
                "key_dim",
                "value_dim",
                "feature_dim",
                "projected_dim",
                "map",
                "dtype",
                "weight_dtype",
                "normalize",
            )
        ),
        ("scale", ctypes.c_float),
    ]


class GatedStep(ctypes.Structure):
    _fields_ = [
        *(
            (name, int64)
            for name in (
                "batch",
                "heads",
                "kv_heads",
                "state_heads",
                "key_dim",
                "value_dim",
                "dtype",
                "per_channel",
                "l2norm",
            )
        ),
        ("scale", ctypes.c_float),
        ("min_decay", ctypes.c_float),
    ]


class WindowState(ctypes.Structure):
    _fields_ = [(name, pointer) for name in ("key", "value", "visible", "counts", "recurrent")]


class WindowArguments(ctypes.Structure):
    _fields_ = [
        ("common", LinearArguments),
        ("window", int64),
        ("sinks", int64),
        ("score_scale", ctypes.c_float),
        ("log_weight", pointer),
        ("before", WindowState),
        ("after", WindowState),
        ("grad_log_weight", pointer),
    ]


class MemoryState(ctypes.Structure):
    _fields_ = [(name, pointer) for name in ("key", "value", "key_sum", "count")]


class MemoryArguments(ctypes.Structure):
    _fields_ = [
        *(
            (name, int64)
            for name in (
                "batch",
                "tokens",
                "heads",
                "kv_heads",
                "key_dim",
                "value_dim",
                "window",
                "sinks",
                "memory",
                "block",
                "dtype",
                "threads",
            )
        ),
        ("scale", ctypes.c_float),
        *((name, View) for name in ("query", "key", "value", "output")),
        ("valid", pointer),
        ("before", MemoryState),
        ("after", MemoryState),
        ("chosen", pointer),
        *((name, View) for name in ("grad_output", "grad_query", "grad_key", "grad_value")),
    ]


class DivergenceArguments(ctypes.Structure):
    _fields_ = [
        *((name, int64) for name in ("rows", "classes", "student_dtype", "teacher_dtype", "threads")),
        ("inverse_temperature", ctypes.c_float),
        *((name, pointer) for name in ("student", "teacher", "weights", "grad", "losses")),
    ]


# the entry points of `kernels.cpp` and what each takes
SIGNATURES = {
    "linear_forward": [ctypes.POINTER(LinearArguments)],
    "bidirectional_forward": [ctypes.POINTER(LinearArguments)],
    "linear_backward": [ctypes.POINTER(LinearArguments)],
    "gated_forward": [ctypes.POINTER(GatedArguments)],
    "gated_backward": [ctypes.POINTER(GatedArguments)],
    "window_forward": [ctypes.POINTER(WindowArguments)],
    "window_backward": [ctypes.POINTER(WindowArguments)],
    "window_step": [ctypes.POINTER(WindowArguments)],
    "memory_forward": [ctypes.POINTER(MemoryArguments)],
    "memory_backward": [ctypes.POINTER(MemoryArguments)],
    "memory_step": [ctypes.POINTER(MemoryArguments)],
    "divergence": [ctypes.POINTER(DivergenceArguments)],
    "linear_step": [ctypes.POINTER(LinearStep), *[pointer] * 9],
    "gated_step": [ctypes.POINTER(GatedStep), *[pointer] * 8],
}
