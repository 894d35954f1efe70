"""Loss and perplexity of text: what a causal language model expects of the next token."""

import math
import statistics

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import DatasetError


@torch.no_grad()
def token_loss(model: PreTrainedModel, input_ids: torch.Tensor, first: int = 1) -> float:
    """
    Mean cross-entropy in nats per token over positions `first` and later.

    Args:
        model (`PreTrainedModel`): A causal language model; it is put into eval mode.
        input_ids (`torch.Tensor`): `[N, T]`, run row by row to bound memory.
        first (`int`, *optional*, defaults to 1): First predicted position.

    Raises:
        DatasetError: If the rows are not longer than `first` tokens.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] <= first:
        raise DatasetError(
            f"token_loss: input_ids must be [N, T] with N > 0 and T > {first}; got {tuple(input_ids.shape)}. "
            "Pass longer rows."
        )
    model.eval()
    losses = []
    for row in input_ids.to(model.device).split(1):
        logits = model(input_ids=row, use_cache=False).logits[0, first - 1 : -1].float()
        losses.append(F.cross_entropy(logits, row[0, first:].to(logits.device)).item())
    return statistics.fmean(losses)


def perplexity(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """`exp` of the mean loss per token of `[N, T]` token ids."""
    return math.exp(token_loss(model, input_ids))
