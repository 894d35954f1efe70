"""`GreedyLayerSwapCallback`: runs the search of `selection` with the Trainer's own evaluation as the score."""

import hashlib
import json
import os
import weakref

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .capture import PrefixReuse
from .errors import HybridConfigError, MetricError
from .selection import (
    TRACE_FILE,
    SwapReport,
    SwapTrace,
    Trial,
    allowed_drop,
    check_floor,
    confirm_swaps,
    greedy_swap,
    read_metric,
)


logger = logging.get_logger(__name__)


class GreedyLayerSwapCallback(TrainerCallback, ExportableState):
    """
    When training ends, replaces layers one by one, always the one that costs the validation metric least, until the metric would fall
    below its floor ([Distil-then-Replace](https://huggingface.co/papers/2601.11667), Algorithm 1). Forward passes only.

    The result is in `trainer.swap_report`; the trainer's model then runs the layers of `keep`. Every trial is written to
    `swap_trace.jsonl` in the output folder as it happens; `trainer.train(resume_from_checkpoint=True)` continues a killed search.

    Args:
        metric (`str`, *optional*, defaults to `"eval_loss"`): What to watch: a key of `compute_metrics`, with or without `eval_`.
        max_drop (`float` or `str`, *optional*, defaults to 0.02): How much worse than the teacher's the metric may get: a number in the
            metric's units, or a percentage of its starting value such as `"2%"`.
        greater_is_better (`bool`, *optional*): As in `TrainingArguments`: by default, `False` for names that end in `loss`, else `True`.
        floor (`float`, *optional*): The worst allowed value itself; takes the place of `max_drop`.
        max_layers (`int`, *optional*): Stop after this many swaps.
        keep (`str`, *optional*, defaults to `"most_linear"`): Which result the trainer's model ends up with: `"most_linear"` (its confirmed part,
            if there is confirmation data) or `"best"`.
        confirmation_dataset (*optional*): Data beside `eval_dataset`. The search picks the best of hundreds of noisy scores; with this, swaps
            are taken back from the end until the metric holds here too.
        reuse_activations (`bool`, *optional*, defaults to `True`): Start every trial at its first changed block, from what that block saw before.
            Exactness is checked on the model at hand; where it does not hold, whole forwards are run.
        max_reuse_bytes (`int`, *optional*, defaults to 2 GiB): Memory for those activations.

    Raises:
        MetricError: From the search, if the metric is missing or not finite, or `floor` is above where it starts.
    """

    def __init__(
        self,
        metric: str = "eval_loss",
        max_drop: float | str = 0.02,
        greater_is_better: bool | None = None,
        *,
        floor: float | None = None,
        max_layers: int | None = None,
        keep: str = "most_linear",
        confirmation_dataset=None,
        reuse_activations: bool = True,
        max_reuse_bytes: int = 2 << 30,
    ):
        allowed_drop(max_drop)
        if keep not in ("most_linear", "best"):
            raise HybridConfigError(f"GreedyLayerSwapCallback: keep must be 'most_linear' or 'best'; got {keep!r}.")
        if max_layers is not None and (not isinstance(max_layers, int) or max_layers < 1):
            raise HybridConfigError(f"GreedyLayerSwapCallback: max_layers must be at least 1; got {max_layers!r}.")
        self.metric, self.max_drop, self.floor = metric, max_drop, floor
        self.greater_is_better = not metric.endswith("loss") if greater_is_better is None else greater_is_better
        self.max_layers, self.keep, self.confirmation_dataset = max_layers, keep, confirmation_dataset
        self.reuse_activations, self.max_reuse_bytes = reuse_activations, max_reuse_bytes
        self._trainer: weakref.ref | None = None

    def set_trainer(self, trainer) -> None:
        """Called by [`HybridTrainer`]: callbacks are given the model only."""
        self._trainer = weakref.ref(trainer)
        if self.confirmation_dataset is not None:
            self.confirmation_dataset = trainer.prepare_dataset(self.confirmation_dataset, "confirmation_dataset")

    def state(self) -> dict:
        names = (
            "metric",
            "max_drop",
            "greater_is_better",
            "floor",
            "max_layers",
            "keep",
            "reuse_activations",
            "max_reuse_bytes",
        )
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {},
        }  # data is never part of a checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        """What would stop the search is better known before the distillation: one evaluation of the teacher."""
        trainer = self._linked_trainer()
        self._check_data(trainer)
        value = read_metric(trainer.evaluate_silently(), self._metric_key(), "before distillation")
        if self.floor is not None:
            check_floor(self._metric_key(), value, self.floor, self.greater_is_better)
        trace = os.path.join(args.output_dir, TRACE_FILE)
        if state.global_step < state.max_steps and os.path.exists(trace) and trainer.is_world_process_zero():
            os.replace(trace, trace + ".superseded")
            logger.warning(
                f"Training goes on, so that the earlier search is void: {trace} is now {TRACE_FILE}.superseded."
            )

    def on_train_end(self, args, state, control, **kwargs):
        trainer = self._linked_trainer()
        trainer.save_mixer_bank()  # a kill during the search must not cost the students
        self.search(trainer)

    def _linked_trainer(self):
        trainer = self._trainer() if self._trainer else None
        if trainer is None:
            raise HybridConfigError(
                "GreedyLayerSwapCallback needs a HybridTrainer; a plain Trainer has no students to swap."
            )
        return trainer

    def _metric_key(self) -> str:
        return self.metric if self.metric.startswith("eval_") else f"eval_{self.metric}"

    def _check_data(self, trainer):
        if trainer.eval_dataset is None:
            raise MetricError(
                f"GreedyLayerSwapCallback watches {self.metric!r} on eval_dataset, which is missing. Pass it to HybridTrainer."
            )

    def search(self, trainer) -> SwapReport:
        """Search now, with the students as they are; `trainer.train` is not needed for this."""
        self._check_data(trainer)
        metric = self._metric_key()
        model = trainer.accelerator.unwrap_model(trainer.model)
        sites = list(model.distill_sites)
        trace = SwapTrace(
            os.path.join(trainer.args.output_dir, TRACE_FILE),
            identity={
                "sites": sites,
                "metric": metric,
                "greater_is_better": self.greater_is_better,
                "max_drop": self.max_drop,
                "floor": self.floor,
                "mixers": {name: site.mixer_config.to_dict() for name, site in model.distill_sites.items()},
                "weights": _weights_digest(model),
                "data": _data_digest(trainer.eval_dataset),
            },
            write=trainer.is_world_process_zero(),
        )
        score = _Scorer(trainer, sites, self.reuse_activations, self.max_reuse_bytes)
        bar = tqdm(
            desc="greedy search",
            unit="trial",
            disable=trainer.args.disable_tqdm or not trainer.is_world_process_zero(),
        )

        def on_trial(trial: Trial, left: int):
            bar.total = bar.n + 1 + left
            bar.update()
            bar.set_postfix_str(f"round {trial.round}, {metric} {trial.metrics[metric]:.4g}")

        def on_commit(trial: Trial):
            score.committed = list(trial.swapped)
            bar.write(
                f"swapped {len(trial.swapped):2d}/{len(sites)}: {trial.candidate}  {metric} {trial.metrics[metric]:.4g}"
            )

        try:
            report = greedy_swap(
                sites, score, metric=metric, greater_is_better=self.greater_is_better, max_drop=self.max_drop, floor=self.floor,
                max_layers=self.max_layers, trace=trace, on_trial=on_trial, on_commit=on_commit,
            )  # fmt: skip
        finally:
            bar.close()
            trainer.swap_layers([])
        if self.confirmation_dataset is not None:
            confirm_swaps(report, lambda swapped: self._confirm(trainer, swapped), self.max_drop, self.floor)
            trace.add_event("confirmed", confirmed=report.confirmed)
        trainer.swap_report = report
        most_linear = report.most_linear if report.confirmed is None else report.confirmed
        trainer.swap_layers(most_linear if self.keep == "most_linear" else report.best)
        logger.info(
            f"Swapped {len(report.most_linear)} of {len(sites)} layers with {metric} within {report.floor:.4g} (started at {report.base:.4g}); "
            f"{metric} is best with {len(report.best)}."
        )
        return report

    def _confirm(self, trainer, swapped):
        trainer.swap_layers(swapped)
        return trainer.evaluate_silently(self.confirmation_dataset)


class _Scorer:
    """Scores a set of swapped layers by the trainer's evaluation, from the first changed block on where that is exact."""

    def __init__(self, trainer, sites: list[str], reuse_activations: bool, max_reuse_bytes: int):
        self.trainer = trainer
        self.committed: list[str] = []
        self._recorded: list[str] | None = None
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.reuse = PrefixReuse(model, sites, max_reuse_bytes)
        # on several ranks or in named splits, batches are not one fixed sequence
        self.reuse.enabled &= reuse_activations and not isinstance(trainer.eval_dataset, dict)

    def __call__(self, swapped: list[str]) -> dict[str, float]:
        if self.reuse.enabled and self._recorded != self.committed:
            self._record()
            if swapped == self.committed:
                return self._last
        changed = [site for site in swapped if site not in self.committed]
        self.trainer.swap_layers(swapped)
        if not self.reuse.enabled or not changed:
            return self.trainer.evaluate_silently()
        with self.reuse.starting_at(min(self.reuse.position(site) for site in changed)):
            return self.trainer.evaluate_silently()

    def _record(self):
        """One evaluation of the committed mixture, keeping what every block sees."""
        self.trainer.swap_layers(self.committed)
        new = [site for site in self.committed if site not in (self._recorded or [])]
        if self._recorded is not None and new:
            with self.reuse.recording_above(min(self.reuse.position(site) for site in new)):
                self._last = self.trainer.evaluate_silently()
        else:
            with self.reuse.recording():
                self._last = self.trainer.evaluate_silently()
            if not self.reuse.verify():
                logger.info(
                    "Activations cannot be reused between trials of this model: every trial runs the whole model."
                )
        self._recorded = list(self.committed)


def _weights_digest(model) -> str:
    """Digest of teachers and students: a trace is only continued with the weights that wrote it."""
    digest = hashlib.sha256()
    for name, site in model.distill_sites.items():
        for parameter_name, tensor in site.named_parameters():
            digest.update(f"{name}.{parameter_name}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _data_digest(dataset) -> str | None:
    """Digest of the validation rows, as far as they are numbers and text; `None` for streams."""
    if isinstance(dataset, dict):
        return "+".join(f"{name}:{_data_digest(part)}" for name, part in dataset.items())
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return None
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        row = dataset[index]
        digest.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()[:16]
