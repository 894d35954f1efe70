"""The loss of a repair: how far a hybrid's predictions are from its teacher's."""

import torch
from torch.nn import functional as F

from ..errors import DatasetError
from ..ops import divergence


# Rows of logits worked on at a time: a vocabulary of 50,000 in fp32 is 25 MB then, and nothing of the whole size is
# made but the gradient.
ROWS = 128


def forward_kl(
    student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    r"""
    $\frac{\tau^2}{\sum_i w_i} \sum_i w_i \sum_c p_{ic} \log \frac{p_{ic}}{q_{ic}}$ with $p = \mathrm{softmax}(z^T /
    \tau)$ of the teacher and $q$ of the student: the mean over predictions of the forward Kullback-Leibler divergence
    ([Distilling the Knowledge in a Neural Network](https://huggingface.co/papers/1503.02531)).

    Args:
        student, teacher (`torch.Tensor`): Logits `[..., C]`; the teacher's get no gradient.
        weights (`torch.Tensor`, *optional*): `[...]`, bool or a number for each prediction; all count alike by default.
        temperature (`float`, *optional*, defaults to 1.0): $\tau$.

    Returns:
        `torch.Tensor`: A scalar in nats, fp32.

    Raises:
        DatasetError: If shapes differ.
    """
    if student.shape != teacher.shape:
        raise DatasetError(
            f"forward_kl: student and teacher must have logits of one shape; got {list(student.shape)} and "
            f"{list(teacher.shape)}."
        )
    rows = student.flatten(0, -2)
    weights = rows.new_ones(len(rows), dtype=torch.float32) if weights is None else weights.flatten().float()
    total = weights.sum().clamp_min(1e-12)
    return _ForwardKL.apply(rows, teacher.detach().flatten(0, -2), weights / total, temperature)


class _ForwardKL(torch.autograd.Function):
    """
    Both directions in one pass over the logits, a few rows at a time: where autograd would keep four tensors of their
    size in fp32.
    """

    @staticmethod
    def forward(ctx, student, teacher, weights, temperature):
        needs_grad = ctx.needs_input_grad[0]
        done = divergence(student.detach(), teacher, weights, temperature, needs_grad)
        if done is not None:
            losses, grad = done
            ctx.save_for_backward(grad)
            return ((losses * weights).sum() * temperature**2).float()
        total = weights.new_zeros(())
        grad = torch.zeros_like(student) if needs_grad else None
        for start in range(0, len(student), ROWS):
            here = slice(start, start + ROWS)
            log_q = F.log_softmax(student[here].float() / temperature, dim=-1)
            log_p = F.log_softmax(teacher[here].float() / temperature, dim=-1)
            p, weight = log_p.exp(), weights[here].to(log_p.device)
            # 0 log 0 is 0, whatever the student says of a class that the teacher rules out
            terms = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1) * weight
            counts = weight > 0  # what stands in a row that does not count may be anything, NaN included
            total += terms.masked_fill(~counts, 0.0).nan_to_num(nan=torch.inf).sum().to(total) * temperature**2
            if grad is not None:
                rows = log_q.exp_().sub_(p).mul_((weight * temperature).unsqueeze(-1))
                grad[here] = rows.masked_fill(~counts.unsqueeze(-1), 0.0).to(grad.dtype)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        if not (grad_output.is_cpu and bool(grad_output == 1.0)):  # on a CPU looking is cheaper than a product
            grad = grad * grad_output.to(grad.dtype)
        return grad, None, None, None


def scored_predictions(
    labels: torch.Tensor | None, attention_mask: torch.Tensor | None, shape: torch.Size, is_causal: bool
) -> torch.Tensor | None:
    """
    Which predictions of a language model count: those of tokens that exist and, with labels, that have one.

    Args:
        labels (`torch.Tensor`, *optional*): `[B, T]`, -100 for what does not count.
        attention_mask (`torch.Tensor`, *optional*): `[B, T]`.
        shape (`torch.Size`): `[B, T]`, of the predictions.
        is_causal (`bool`): Whether the prediction at `t` is of the token at `t + 1`.

    Returns:
        `torch.Tensor` or `None`: bool `[B, T]`; `None` if all count.
    """
    counts = None
    if attention_mask is not None and attention_mask.shape == shape:
        counts = attention_mask.bool()
    if labels is not None and labels.shape == shape:
        wanted = labels != -100
        if is_causal:
            wanted = F.pad(wanted[:, 1:], (0, 1), value=False)
        counts = wanted if counts is None else counts & wanted
    return counts


__all__ = ["forward_kl", "scored_predictions"]
