"""The divergence of logits through the kernels."""

import ctypes

import torch

from .arguments import DivergenceArguments, address
from .build import library
from .eligible import DTYPES


def divergence(student, teacher, weights, temperature: float, needs_grad: bool):
    """
    Args:
        student, teacher (`torch.Tensor`): Logits `[N, C]`, fp32 or bf16.
        weights (`torch.Tensor`): fp32 `[N]`.
        temperature (`float`): Of both softmaxes.
        needs_grad (`bool`): Whether the gradient is wanted.

    Returns:
        `(losses, grad)`: fp64 `[N]` without their weights, and `[N, C]` in the student's dtype of their weighted sum,
        or `None`.
    """
    student, teacher, weights = student.contiguous(), teacher.contiguous(), weights.contiguous()
    losses = torch.empty(len(student), dtype=torch.float64)
    grad = torch.empty_like(student) if needs_grad else None
    structure = DivergenceArguments(
        *student.shape,
        DTYPES[student.dtype],
        DTYPES[teacher.dtype],
        torch.get_num_threads(),
        1.0 / temperature,
        *map(address, (student, teacher, weights, grad, losses)),
    )
    library().hf_hybrid_divergence(ctypes.byref(structure))
    return losses, grad
