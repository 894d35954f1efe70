"""Which key-value heads look things up: on a passage read twice, how much they attend to what came next last time."""

import warnings

import torch
from transformers import PreTrainedModel

from ..conversion.layer import HybridAttentionMixin, hybrid_layers
from ..errors import DatasetError, UnsupportedModelError
from ..mixers import SlidingWindowConfig
from ..modeling_hybrid import describe
from .convert import convert_to_hybrid, find_attention_sites, restore_full_attention


# Query rows worked on at a time: their weights over all keys are [H, ROWS, T].
ROWS = 256
# The first tokens of the second reading have little behind them to be told by.
SKIPPED = 8


@torch.no_grad()
def induction_scores(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, list[float]]:
    """
    Attention paid, when a passage is read a second time, to the token that followed the current one the first time: the
    mark of an induction head ([In-context Learning and Induction Heads](https://huggingface.co/papers/2209.11895)),
    without which a model cannot copy from far back. Of the query heads that read one key-value head, the largest
    counts.

    Args:
        model (`PreTrainedModel`): A causal language model, not hybrid; it comes back unchanged.
        input_ids (`torch.Tensor`): Passages, `[N, T]`; every one is read twice, alone in its batch.

    Returns:
        `dict[str, list[float]]`: By the name of the attention site, one number in [0, 1] for each key-value head;
        causal sites only.

    Raises:
        DatasetError: If passages are shorter than 32 tokens, or longer than half of what the model reads.
        UnsupportedModelError: If no causal attention of the model can be observed.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 32:
        raise DatasetError(
            f"induction_scores: input_ids must be [N, T] with T of 32 or more; got {list(input_ids.shape)}. Pass "
            "longer passages."
        )
    causal = [site.name for site in find_attention_sites(model) if site.causal]
    if not causal:
        raise UnsupportedModelError(f"induction_scores: {describe(model)} has no causal attention.")
    modes = {module: module.training for module in model.modules()}
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and 2 * input_ids.shape[1] > longest:
        raise DatasetError(
            f"induction_scores: passages are read twice, so that they must be at most {longest // 2} tokens long for "
            f"{describe(model)}; got {input_ids.shape[1]}. Cut them."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a linear layer would lose: none runs
        convert_to_hybrid(model, SlidingWindowConfig(), layers=causal)
    try:
        model.eval()
        return observed_induction(model, input_ids)
    finally:
        restore_full_attention(model)
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def observed_induction(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, list[float]]:
    """The same of a model whose attention layers have mixers, in eval mode, with all heads softmax."""
    observer = _Induction(input_ids.shape[1])
    try:
        for name, layer in hybrid_layers(model).items():
            observer.names[layer] = name
            layer.local_objective = observer
        for passage in input_ids.to(model.device).split(1):
            model(input_ids=torch.cat([passage, passage], dim=1), use_cache=False)
    finally:
        for layer in hybrid_layers(model).values():
            layer.local_objective = None
    if not observer.scores:
        raise UnsupportedModelError(
            f"induction_scores: no attention of {describe(model)} shows its queries and keys (it computes its softmax "
            "inline)."
        )
    return {name: (total / len(input_ids)).tolist() for name, total in observer.scores.items()}


class _Induction:
    """Runs a layer as its host does, and looks at queries and keys."""

    def __init__(self, length: int):
        self.length = length
        self.names: dict[HybridAttentionMixin, str] = {}
        self.scores: dict[str, torch.Tensor] = {}

    def run_layer(self, layer, args, kwargs):
        return layer.observed_forward(self, args, kwargs)

    def observe(self, layer, inputs, target) -> None:
        query, key = (x[0].transpose(0, 1).float() for x in (inputs.query, inputs.key))  # [H, T, K]
        groups = query.shape[0] // key.shape[0]
        query = query.unflatten(0, (-1, groups)) * query.shape[-1] ** -0.5
        total = query.new_zeros(query.shape[:2])
        for start in range(self.length + SKIPPED, 2 * self.length, ROWS):
            rows = torch.arange(start, min(start + ROWS, 2 * self.length), device=query.device)
            weights = query[:, :, rows] @ key[:, None].transpose(-1, -2)  # [H_kv, G, R, T]
            later = torch.arange(key.shape[1], device=key.device) > rows[:, None]
            weights = weights.masked_fill_(later, -torch.inf).softmax(-1)
            next_time = (rows - self.length + 1)[None, None, :, None].expand(*weights.shape[:2], -1, 1)
            total += weights.gather(3, next_time).sum((2, 3))
        score = total.amax(1) / (self.length - SKIPPED)
        name = self.names[layer]
        self.scores[name] = self.scores[name] + score if name in self.scores else score


__all__ = ["induction_scores"]
