"""The score of a search: the trainer's own evaluation of a mixture of layers, the same on every process."""

import contextlib
import math
import numbers
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..errors import HybridError
from .fingerprint import Fingerprint
from .prefix_reuse import BATCHES_CHANGED, PrefixReuse
from .ranks import all_agree, gathered


logger = logging.get_logger(__name__)

TIE_BREAKER = "eval_loss"
# two processes that hold the same rows and weights differ by rounding at most
RELATIVE_TOLERANCE = 1e-6


def unwrapped(trainer) -> nn.Module:
    """The model whose forward an evaluation runs: within DDP's and `torch.compile`'s wrappers, not within PEFT's."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


def evaluate(trainer, metric: str, dataset=None) -> dict[str, float]:
    """
    `trainer.evaluate_silently`, with rank 0's result on every process. A collective.

    Raises:
        HybridError: If the metric, or the loss that breaks ties, differs between processes.
    """
    # accelerate keeps every loader that it prepared, with its dataset: hundreds in a search
    loaders = trainer.accelerator._dataloaders
    before = len(loaders)
    try:
        metrics = trainer.evaluate_silently(dataset)
    finally:
        del loaders[before:]
    every = gathered(metrics)
    for name in (metric, TIE_BREAKER):
        for rank, other in enumerate(every):
            if name in other and name in every[0] and not _is_close(other[name], every[0][name]):
                raise HybridError(
                    f"The metric {name!r} must be the same on all processes; got {every[0][name]!r} on rank 0 and "
                    f"{other[name]!r} on rank {rank}. compute_metrics is given all rows on each of them: make it "
                    "depend on nothing else."
                )
    return every[0]


class Scorer:
    """
    Scores a set of swapped layers, from the first changed block on where that is exact.

    Args:
        trainer ([`HybridTrainer`]): Whose mixture, data and metrics.
        metric (`str`): The key that decides.
        reuse_activations (`bool`), max_reuse_bytes (`int`): As in [`GreedyLayerSwapCallback`].
    """

    def __init__(self, trainer, metric: str, reuse_activations: bool, max_reuse_bytes: int):
        self.trainer, self.metric = trainer, metric
        self.committed: list[str] = []
        self._recorded: list[str] | None = None
        model = unwrapped(trainer)
        self.reuse = PrefixReuse(model, trainer.distill_sites, max_reuse_bytes)
        # named splits are several sequences of batches; compiled code does not look for hooks that came later
        one_sequence = not isinstance(trainer.eval_dataset, dict) and not trainer.args.torch_compile
        self.reuse.enabled = all_agree(self.reuse.enabled and reuse_activations and one_sequence)

    def __call__(self, swapped: list[str]) -> dict[str, float]:
        if self.reuse.enabled and self._recorded != self.committed:
            self._record()
            if swapped == self.committed:
                return self._last
        changed = [site for site in swapped if site not in self.committed]
        self.trainer.swap_layers(swapped)
        if not self.reuse.enabled or not changed:
            return self._evaluate()
        with self.reuse.starting_at(min(self.reuse.position(site) for site in changed)):
            return self._evaluate()

    def rehearse(self) -> dict[str, float]:
        """
        The metrics of the mixture as it is, and a look at what would stop a search: whether activations can be reused,
        and then whether the batches are the same the second time. Keeps nothing.

        Raises:
            HybridError: If they are not.
        """
        with torch.random.fork_rng(devices=[]):  # every loader draws a seed for its workers; training must not notice
            if not self.reuse.enabled:
                return self._evaluate()
            batches = self._record_whole(only_first_batch=True)
            self.reuse.forget()
            if self.reuse.enabled and not all_agree(batches == self._batches_again()):
                raise HybridError(BATCHES_CHANGED)
            return self._last

    def _evaluate(self) -> dict[str, float]:
        return evaluate(self.trainer, self.metric)

    def _record(self) -> None:
        """One evaluation of the committed mixture, keeping what every block sees."""
        self.trainer.swap_layers(self.committed)
        new = [site for site in self.committed if site not in (self._recorded or [])]
        if self._recorded is not None and new:
            with self.reuse.recording_above(min(self.reuse.position(site) for site in new)):
                self._last = self._evaluate()
        else:
            self._record_whole()
        self._recorded = list(self.committed)

    def _record_whole(self, only_first_batch: bool = False) -> list[str]:
        with _watched_batches(self.trainer) as batches, self.reuse.recording(only_first_batch):
            self._last = self._evaluate()
        if not self.reuse.verify(len(batches)):
            logger.info("Activations cannot be reused between trials of this model: every trial runs the whole model.")
        return batches

    def _batches_again(self) -> list[str]:
        loaders = self.trainer.accelerator._dataloaders
        before = len(loaders)
        batches = [_digest(batch) for batch in self.trainer.get_eval_dataloader()]
        del loaders[before:]
        return batches


@contextlib.contextmanager
def _watched_batches(trainer) -> Iterator[list[str]]:
    """Digests of the batches that the evaluation in here scores, in order."""
    batches: list[str] = []
    own, step = trainer.__dict__.get("prediction_step"), trainer.prediction_step

    def watched(model, inputs, *args, **kwargs):
        batches.append(_digest(inputs))
        return step(model, inputs, *args, **kwargs)

    trainer.prediction_step = watched
    try:
        yield batches
    finally:
        if own is None:
            del trainer.prediction_step
        else:
            trainer.prediction_step = own


def _digest(batch: Any) -> str:
    return Fingerprint().add(batch).hexdigest()


def _is_close(a: Any, b: Any) -> bool:
    if not (isinstance(a, numbers.Real) and isinstance(b, numbers.Real)):
        return a == b
    return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))
