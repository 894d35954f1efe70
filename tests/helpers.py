"""Checks and small tools shared by the tests."""

import torch
from torch import nn

from hf_hybrid import HybridTrainer, HybridTrainingArguments, LinearAttentionConfig
from hf_hybrid.conversion.layer import hybrid_layers

from conftest import token_dataset
from tiny_models import tiny_model


SMALL_MIXER = LinearAttentionConfig(window_size=4, num_sink_tokens=2)


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest expected value (at least 1)."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    if not expected.numel():
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all(), f"{name}: not finite"
    error = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def set_swapped(model: nn.Module, swapped: bool) -> None:
    """Make every converted layer run its mixer, or the host's softmax inside our interception."""
    for layer in hybrid_layers(model).values():
        layer.linear_heads = layer.hybrid.heads if swapped else ()


def toy_arguments(folder, **overrides) -> HybridTrainingArguments:
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_steps": 2, "logging_steps": 1, "max_length": 24,
    }  # fmt: skip
    return HybridTrainingArguments(str(folder), **{**settings, **overrides})


def toy_trainer(
    folder, family: str = "llama", mixer=SMALL_MIXER, callbacks=(), arguments=None, **overrides
) -> HybridTrainer:
    """A HybridTrainer over a toy host and random tokens."""
    kwargs = {"train_dataset": token_dataset(32), "eval_dataset": token_dataset(8, seed=2), **overrides}
    model = kwargs.pop("model", None) or tiny_model(family)
    return HybridTrainer(model, mixer, toy_arguments(folder, **(arguments or {})), callbacks=list(callbacks), **kwargs)
