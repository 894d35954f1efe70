"""Recall of a passage read before: what a state of fixed size is worst at, and what perplexity hides."""

import torch
from transformers import PreTrainedModel

from .perplexity import token_loss


def recall_loss(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """
    Loss in nats per token on the second copy of a passage that is read twice: low means the model looks it up.

    Args:
        model (`PreTrainedModel`): A causal language model; it is put into eval mode.
        input_ids (`torch.Tensor`): `[N, T]`; the first `T // 2` tokens of a row are its passage.
    """
    half = input_ids.shape[1] // 2
    return token_loss(model, torch.cat([input_ids[:, :half], input_ids[:, :half]], dim=1), first=half + 1)
