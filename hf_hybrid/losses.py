"""Local losses of blockwise distillation."""

import torch


def normalized_mse(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    $\frac{1}{B}\sum_b \frac{\sum_{t} \lVert s_{bt} - y_{bt} \rVert^2}{\sum_{t} \lVert y_{bt} \rVert^2}$ over real tokens: 0 is perfect, 1 is as good as zeros.

    Divided by the teacher's own energy, so that late layers, whose outputs are larger, do not dominate the sum over layers; per
    sequence, so that the loss of a batch is the mean of the losses of its parts and gradient accumulation changes nothing.

    Args:
        student, teacher (`torch.Tensor`): `[B, T, D]`, the attention block's output after its output projection.
        valid (`torch.Tensor`, *optional*): bool `[B, T]`, `False` for padding.

    Returns:
        `torch.Tensor`: A scalar, fp32.
    """
    error = (student.float() - teacher.float()).square().sum(-1)  # [B, T]
    energy = teacher.float().square().sum(-1)
    if valid is not None:
        # select, not multiply: what stands at a padded position may be anything, NaN included
        error, energy = (x.masked_fill(~valid, 0.0) for x in (error, energy))
    return (error.sum(-1) / energy.sum(-1).clamp_min(1e-12)).mean()
