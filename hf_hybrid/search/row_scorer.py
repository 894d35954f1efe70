"""
The score of a search by rows: batches outside, candidates inside.

Of every batch the mixture that all sets share runs once; every set then starts at its first changed block, from what
that block saw. One batch's activations are held, never all, and they are let go before the next one: memory does not
depend on the number of rows. Nothing is remembered from batch to batch that a process could decide by.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..conversion.layer import HybridAttentionMixin
from ..errors import MetricError
from .greedy import read_metric
from .prefix_reuse import PrefixReuse
from .ranks import all_agree, gathered, rank
from .row_table import METRIC, Units
from .scoring import unwrapped


# what is summed beside other rows is rounded otherwise
TOLERANCE = 1e-3


def unit_names(sites: Mapping[str, HybridAttentionMixin], granularity: str) -> list[str]:
    """`"model.layers.3.self_attn"` for each layer, or `"model.layers.3.self_attn:2"` for each key-value head."""
    if granularity == "layer":
        return list(sites)
    return [f"{name}:{head}" for name, layer in sites.items() for head in layer.hybrid.heads]


def heads_of(units: Iterable[str], sites: Iterable[str]) -> dict[str, list[int] | None]:
    """Which heads of which layer a set of units makes linear; `None` for all of a layer."""
    heads: dict[str, list[int]] = {}
    whole = set()
    for unit in units:
        name, _, head = unit.partition(":")
        heads.setdefault(name, [])
        if head:
            heads[name].append(int(head))
        else:
            whole.add(name)
    return {name: None if name in whole else sorted(heads[name]) for name in sites if name in heads}


class RowScorer:
    """
    Metric and loss of single rows under sets of linear units; a [`RowScore`]. A collective: batches are spread over the
    processes, and all of them get all values.

    Args:
        trainer ([`HybridTrainer`]): Whose model, collator, loss and metric function.
        metric (`str`): `"eval_loss"`, or `"eval_"` and a key of `compute_metrics`, which is called with single rows.
        dataset (*optional*): Prepared rows; the trainer's `eval_dataset` by default.
        max_bytes (`int`, *optional*, defaults to 2 GiB): Of the activations of one batch; more, and whole forwards run.

    Attributes:
        layer_forwards (`float`): Blocks that ran, in units of one block on one row.
    """

    def __init__(self, trainer, metric: str, dataset=None, max_bytes: int = 2 << 30):
        self.trainer, self.metric = trainer, metric
        self.dataset = trainer.eval_dataset if dataset is None else dataset
        self.sites = dict(trainer.distill_sites)
        self.model = unwrapped(trainer)
        self.reuse = PrefixReuse(self.model, self.sites, max_bytes)
        self.reuse.enabled = all_agree(self.reuse.enabled and not trainer.args.torch_compile)
        self.layer_forwards = 0.0
        self._ran = 0.0  # the same, of this process in this call
        self._one_at_a_time: bool | None = None  # whether rows' losses cannot be had from a batch

    def __len__(self) -> int:
        return len(self.dataset)

    def __call__(self, sets: Sequence[Units], rows: np.ndarray) -> np.ndarray:
        values = np.zeros((len(sets), len(rows), 2))
        error: Exception | None = None
        self.model.eval()
        self._ran = 0.0
        with torch.no_grad(), self._switch_restored():
            if self._one_at_a_time is None:
                self._look(rows)
            try:
                for numbers in self._share_of_rank(rows):
                    values[:, numbers] = self._batch(sets, rows[numbers])
            except Exception as raised:  # the other processes must not wait for this one
                error = raised
        parts = gathered((values, self._ran, error))[: 1 if self.trainer.is_fsdp_enabled else None]
        for _, ran, found in parts:
            self.layer_forwards += ran
            if found is not None:
                raise found
        return np.sum([part for part, _, _ in parts], axis=0)

    def _look(self, rows: np.ndarray) -> None:
        """Whether losses can be taken apart and runs begin midway: decided by all processes, on the same rows."""
        by_size = sorted(rows, key=lambda row: _size(self.dataset[int(row)]))
        extremes = np.array([by_size[0], by_size[-1]] if len(rows) > 1 else by_size)
        self._one_at_a_time = not all_agree(self._can_be_taken_apart(extremes))
        rows = rows[: self.trainer.args.eval_batch_size]
        if self.reuse.enabled:
            rows = rows[:1] if self._one_at_a_time else rows
            self._switch([])
            with self.reuse.recording():
                self._run(self._inputs(rows), len(rows), 0)
            self.reuse.verify(1)
            self.reuse.forget()

    def _share_of_rank(self, rows: np.ndarray) -> list[np.ndarray]:
        """Places in `rows` of each batch of this process."""
        size = 1 if self._one_at_a_time else self.trainer.args.eval_batch_size
        batches = [np.arange(len(rows))[start : start + size] for start in range(0, len(rows), size)]
        if self.trainer.is_fsdp_enabled:  # every process gathers every layer: all run all
            return batches
        return batches[rank() :: max(self.trainer.args.world_size, 1)]

    def _batch(self, sets: Sequence[Units], rows: np.ndarray) -> np.ndarray:
        inputs, common, midway = self._inputs(rows), frozenset.intersection(*sets), False
        found: dict[Units, np.ndarray] = {}
        if self.reuse.enabled and len(sets) > 1:
            self._switch(common)
            with self.reuse.recording():
                base = self._run(inputs, len(rows), 0)
            # what one process cannot hold, it runs whole: that costs time and changes no number
            midway = self.reuse._seen.is_usable(1, len(set(self.reuse.block_of.values())))
            if common in sets:
                found[common] = base
        for units in sets:
            if units not in found:
                self._switch(units)
                start = min((self._position(unit) for unit in units - common), default=0) if midway else 0
                with self.reuse._starting_at(start) if midway else contextlib.nullcontext():
                    found[units] = self._run(inputs, len(rows), start)
        self.reuse.forget()
        return np.stack([found[units] for units in sets])

    def _position(self, unit: str) -> int:
        return self.reuse.position(unit.partition(":")[0])

    def _run(self, inputs: dict[str, Any], count: int, start: int) -> np.ndarray:
        """Metric and loss of each row of a batch, `[R, 2]`."""
        trainer = self.trainer
        self._ran += count * ((len(set(self.reuse.block_of.values())) or len(self.sites)) - start)
        prepared = dict(inputs)
        loss, logits, labels = trainer.prediction_step(trainer.model, prepared, False, ignore_keys=None)
        if loss is None and self.metric == "eval_loss":
            raise MetricError(
                "search: the rows of eval_dataset give no loss. Give them labels, or watch another metric."
            )
        if count == 1 or loss is None:
            losses = np.zeros(count) if loss is None else np.array([float(loss.mean())])
        else:
            losses = np.array([float(self._loss_of(logits, labels, row)) for row in range(count)])
        values = np.stack([self._metrics(logits, labels, losses), losses], axis=1)
        if np.isnan(values[:, METRIC]).any():
            raise MetricError(
                f"search: {self.metric!r} of every single row must be a number; a row has none. Leave rows without "
                "labels out, or check compute_metrics."
            )
        return np.nan_to_num(values)  # a row without labels has no loss to decide between equals by

    def _metrics(self, logits, labels, losses: np.ndarray) -> np.ndarray:
        trainer, name = self.trainer, self.metric.removeprefix("eval_")
        if name == "loss":
            return losses
        if trainer.compute_metrics is None:
            read_metric({"loss": losses}, name, "search")
        if trainer.preprocess_logits_for_metrics is not None:
            logits = trainer.preprocess_logits_for_metrics(logits, labels)
        values = []
        for row in range(len(losses)):
            prediction = EvalPrediction(predictions=_numpy(_row(logits, row)), label_ids=_numpy(_row(labels, row)))
            metrics = {key.removeprefix("eval_"): value for key, value in trainer.compute_metrics(prediction).items()}
            values.append(read_metric(metrics, name, "search, a single row"))
        return np.array(values)

    def _can_be_taken_apart(self, rows: np.ndarray) -> bool:
        """Whether loss and metric of a row, from its batch's logits, are those of the row alone; tried on two rows."""
        if len(rows) < 2:
            return True
        try:
            together = self._run(self._inputs(rows), 2, 0)
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):  # a loss of another kind
            return False
        alone = np.concatenate([self._run(self._inputs(rows[row : row + 1]), 1, 0) for row in range(2)])
        return bool((abs(together - alone) <= TOLERANCE * np.maximum(1.0, abs(alone))).all())

    def _loss_of(self, logits, labels, row: int):
        logits, labels = _row(logits, row), _row(labels, row)
        if self.trainer.compute_loss_func is not None:
            return self.trainer.compute_loss_func(SimpleNamespace(logits=logits), labels)
        config: Any = self.model.config
        size = getattr(config.get_text_config(), "vocab_size", None)
        both = {"logits": logits, "pooled_logits": logits}
        loss_function: Any = self.model.loss_function
        return loss_function(**both, labels=labels, vocab_size=size, config=config)

    def _inputs(self, rows: np.ndarray) -> dict[str, Any]:
        trainer = self.trainer
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="evaluation")
        return trainer._prepare_inputs(collate([self.dataset[int(row)] for row in rows]))

    def _switch(self, units: Iterable[str]) -> None:
        self.trainer.swap_layers(None, heads_of(units, self.sites))

    @contextlib.contextmanager
    def _switch_restored(self):
        before = {name: list(layer.linear_heads) for name, layer in self.sites.items() if layer.linear_heads}
        try:
            yield
        finally:
            self.trainer.swap_layers(None, before)


def _size(example: Mapping[str, Any]) -> int:
    """Of an example, how long its longest part is."""
    return max((len(part) for part in example.values() if hasattr(part, "__len__")), default=0)


def _row(value: Any, row: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_row(part, row) for part in value)
    if isinstance(value, Mapping):
        return {key: _row(part, row) for key, part in value.items()}
    return value[row : row + 1] if torch.is_tensor(value) and value.ndim else value


def _numpy(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_numpy(part) for part in value)
    if isinstance(value, Mapping):
        return {key: _numpy(part) for key, part in value.items()}
    if not torch.is_tensor(value):
        return value
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()


__all__ = ["RowScorer", "heads_of", "unit_names"]
