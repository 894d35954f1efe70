"""Local losses of blockwise distillation."""

import torch


def head_errors(
    student: torch.Tensor, teacher: torch.Tensor, num_key_value_heads: int, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Squared error of an attention's output before its output projection, and the teacher's energy, per sequence and
    key-value head.

    Args:
        student, teacher (`torch.Tensor`): `[B, T, H, V]`.
        num_key_value_heads (`int`): `H_kv`; consecutive query heads belong together.
        valid (`torch.Tensor`, *optional*): bool `[B, T]`, `False` for padding.

    Returns:
        `(error, energy)`: `[B, H_kv]` each, fp32.
    """
    teacher = teacher.float()
    error, energy = (student.float() - teacher).square(), teacher.square()
    if valid is not None:
        # select, not multiply: what stands at a padded position may be anything, NaN included
        hidden = ~valid[..., None, None]
        error, energy = error.masked_fill(hidden, 0.0), energy.masked_fill(hidden, 0.0)
    groups = (num_key_value_heads, -1)
    return error.unflatten(2, groups).sum((1, 3, 4)), energy.unflatten(2, groups).sum((1, 3, 4))


def normalized_sum(error: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    r"""
    $\frac{1}{B}\sum_b \frac{\sum_h e_{bh}}{\sum_h y_{bh}}$: 0 is perfect, 1 is as good as zeros.

    Divided by the teacher's own energy, so that late layers, whose outputs are larger, do not dominate the sum over
    layers; per sequence, so that the loss of a batch is the mean of the losses of its parts and gradient accumulation
    changes nothing.

    Args:
        error, energy (`torch.Tensor`): `[B, H]`, of [`head_errors`].

    Returns:
        `torch.Tensor`: A scalar, fp32.
    """
    return (error.sum(-1) / energy.sum(-1).clamp_min(1e-12)).mean()


def normalized_mse(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """
    The same of outputs `[B, T, D]`: those of a whole attention block, after its output projection.

    Args:
        student, teacher (`torch.Tensor`): `[B, T, D]`.
        valid (`torch.Tensor`, *optional*): bool `[B, T]`, `False` for padding.

    Returns:
        `torch.Tensor`: A scalar, fp32.
    """
    if student.ndim == 2:  # the pieces of packed pictures, `[T, D]`
        student, teacher = student[None], teacher[None]
    student, teacher = (x.flatten(1, -2)[:, :, None] for x in (student, teacher))
    return normalized_sum(*head_errors(student, teacher, 1, valid))


__all__ = ["head_errors", "normalized_mse", "normalized_sum"]
