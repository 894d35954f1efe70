"""The divergence of a repair against torch's own, and what it counts."""

import pytest
import torch
from torch.nn import functional as F

from hf_hybrid.errors import DatasetError
from hf_hybrid.objectives.logits import forward_kl, scored_predictions

from helpers import assert_close


def reference(student, teacher, weights, temperature):
    terms = F.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    weights = torch.ones_like(terms) if weights is None else weights.to(terms)
    return (terms * weights).sum() / weights.sum() * temperature**2


@pytest.fixture(params=["torch", "cpp"])
def backend(request, ops_backend):
    ops_backend(request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_are_torchs(backend, dtype, temperature, weighted):
    torch.manual_seed(0)
    student = torch.randn(3, 70, 1001).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(3, 70, 1001)).to(dtype)
    weights = torch.rand(3, 70) > 0.4 if weighted else None
    wide = student.detach().double().requires_grad_()
    expected = reference(wide, teacher.double(), weights, temperature)
    loss = forward_kl(student, teacher, weights, temperature)
    assert_close("loss", loss, expected, 1e-6)
    (wanted,) = torch.autograd.grad(expected, wide)
    (grad,) = torch.autograd.grad(2.0 * loss, student)
    scale = wanted.abs().max()  # the gradient is rounded to the dtype of the logits
    assert_close("gradient", grad / scale, 2.0 * wanted / scale, 2**-7 if dtype == torch.bfloat16 else 2e-6)
    if weighted:
        assert not grad[~weights].any()


def test_equal_logits_diverge_by_nothing(backend):
    logits = torch.randn(4, 33)
    assert forward_kl(logits, logits + 5.0).item() == pytest.approx(0.0, abs=1e-6)


def test_what_the_teacher_rules_out_counts_nothing(backend):
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]])
    student = torch.tensor([[0.0, 0.0, -3e4]], requires_grad=True)
    loss = forward_kl(student, teacher)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_nan_is_not_hidden(backend):
    student = torch.tensor([[0.0, float("nan")], [0.0, 1.0]], requires_grad=True)
    assert not torch.isfinite(forward_kl(student, torch.zeros(2, 2)))


def test_what_does_not_count_may_be_anything(backend):
    student = torch.tensor([[0.0, float("nan")], [0.0, 1.0]], requires_grad=True)
    loss = forward_kl(student, torch.zeros(2, 2), torch.tensor([0.0, 1.0]))
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and grad[0].tolist() == [0.0, 0.0]


def test_shapes_must_agree():
    with pytest.raises(DatasetError, match=r"one shape; got \[2, 3\] and \[2, 4\]"):
        forward_kl(torch.zeros(2, 3), torch.zeros(2, 4))


def test_what_counts():
    labels = torch.tensor([[-100, -100, 7, 8, -100]])
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    shape = labels.shape
    assert scored_predictions(None, None, shape, True) is None
    assert scored_predictions(None, mask, shape, True).tolist() == [[False, True, True, True, True]]
    # the prediction of token 2 is made at token 1
    assert scored_predictions(labels, mask, shape, True).tolist() == [[False, True, True, False, False]]
    assert scored_predictions(labels, mask, shape, False).tolist() == [[False, False, True, True, False]]
