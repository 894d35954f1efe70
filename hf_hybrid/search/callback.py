"""`GreedyLayerSwapCallback`: the search at the end of a training, with the Trainer's own evaluation as the score."""

import contextlib
import os
import weakref
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..errors import HybridConfigError, MetricError
from ..surgery import linear_heads, set_linear_heads_
from .by_rows import RowSearch, check_search, check_settings, search_by_rows, switch_to
from .greedy import SwapReport, Trial, allowed_drop, check_floor, confirm_swaps, greedy_swap, read_metric
from .holdout import HeldOut, check_disjoint, half_of
from .identity import search_identity
from .metrics import direction
from .scoring import TIE_BREAKER, Scorer, evaluate
from .strategies import get_strategy
from .trace import TRACE_FILE, SwapTrace


logger = logging.get_logger(__name__)

SETTINGS = (
    "metric",
    "max_drop",
    "greater_is_better",
    "floor",
    "confidence",
    "max_layers",
    "keep",
    "strategy",
    "granularity",
    "proposals",
    "cache_share",
    "length",
    "order",
    "reuse_activations",
    "max_reuse_bytes",
)


class GreedyLayerSwapCallback(TrainerCallback, ExportableState):
    """
    When training ends, replaces layers one by one, always the one that costs the validation metric least, until the
    metric would fall below its floor ([Distil-then-Replace](https://huggingface.co/papers/2601.11667), Algorithm 1).
    Forward passes only.

    The result is in `trainer.swap_report`; the trainer's model then runs the layers of `keep`. Every trial is written
    to `swap_trace.jsonl` in the output folder as it happens; `trainer.train(resume_from_checkpoint=True)` continues a
    killed search. One callback may serve several trainers.

    Args:
        metric (`str`, *optional*, defaults to `"eval_loss"`): What to watch: a key of `compute_metrics`, with or
            without `eval_`.
        max_drop (`float` or `str`, *optional*, defaults to 0.02): How much worse than the teacher's the metric may get:
            a number in the metric's units, or a percentage of its starting value such as `"2%"`. `None` for no floor,
            where `max_layers` or `cache_share` ends the search.
        greater_is_better (`bool`, *optional*): The metric's direction; needed unless its name (or what follows an
            underscore in it) is known: `accuracy`, `f1`, `rougeL`, `loss`, `perplexity`, `wer`, `mae`, ...
        floor (`float`, *optional*): The worst allowed value itself; takes the place of `max_drop`.
        max_layers (`int`, *optional*): Stop after this many swaps (of heads, with `granularity="head"`).
        keep (`str`, *optional*, defaults to `"most_linear"`): Which result the trainer's model ends up with:
            `"most_linear"`, or `"best"` for the mixture with the best metric. Either is confirmed, if there is
            confirmation data.
        confirmation_dataset (*optional*): Data beside `eval_dataset`. The search picks the best of hundreds of noisy
            scores; with this, swaps are taken back from the end until the metric holds here too. `"best"` is then
            chosen among the mixtures on the way there that hold here as well.
        confidence (`float`, *optional*): Promise `max_drop` for data like `confirmation_dataset`, with this
            probability, such as 0.9: the search itself then keeps to half of the drop, and its swaps are tested on the
            confirmation rows from the first on, until one is not shown to hold (see [`~search.promise.certify`]).
            Needs a few hundred rows; says how many if they are too few. What is promised is in
            `swap_report.promise`.
        strategy (`str`, *optional*, defaults to `"greedy"`): `"greedy"` scores every remaining layer in every round, as
            the paper does. `"race"` ends as well for about a fifteenth of the cost: a look at every unit on a few rows,
            then rounds in which the few that look cheapest run on paired rows until the best is clear, and exchanges.
            For comparison: `"one_shot"`, `"proposed"`, `"backward"`, `"uniform"`, `"random"`, `"fixed"`.
        granularity (`str`, *optional*, defaults to `"layer"`): What is made linear one by one: a `"layer"`, or a
            key-value `"head"`.
        proposals (`str` or `dict`, *optional*, defaults to `"fisher"`): What a race goes by at first: `"fisher"` (a
            backward pass for each of 32 rows), `"local_loss"` (of the distillation), `"induction"` (decoders),
            `"none"`, or scores by unit, smaller is cheaper. Not of `"greedy"`.
        cache_share (`float`, *optional*): Stop when the cache of these layers is this share of the teacher's.
        length (`int`, *optional*, defaults to 4096): Tokens at which the cache is counted.
        order (`list[str]`, *optional*): Of the strategy `"fixed"`.
        reuse_activations (`bool`, *optional*, defaults to `True`): Start every trial at its first changed block, from
            what that block saw before. Exactness is checked on the model at hand; where it does not hold, or where the
            metric function runs the model itself, whole forwards are run.
        max_reuse_bytes (`int`, *optional*, defaults to 2 GiB): Memory for those activations, on each process.

    Raises:
        HybridConfigError: If the metric's direction is not known, or an argument is out of range.
        MetricError: From training or the search, if the metric is missing or not finite, or the teacher itself is below
            `floor`, on `eval_dataset` or `confirmation_dataset`.
        HybridError: From training or the search, if evaluations are not deterministic, or differ between processes.
    """

    def __init__(
        self,
        metric: str = "eval_loss",
        max_drop: float | str | None = 0.02,
        greater_is_better: bool | None = None,
        *,
        floor: float | None = None,
        max_layers: int | None = None,
        keep: str = "most_linear",
        confirmation_dataset=None,
        confidence: float | None = None,
        strategy: str = "greedy",
        granularity: str = "layer",
        proposals: str | dict[str, float] = "fisher",
        cache_share: float | None = None,
        length: int = 4096,
        order: list[str] | None = None,
        reuse_activations: bool = True,
        max_reuse_bytes: int = 2 << 30,
    ):
        get_strategy(strategy)
        check_settings(strategy, granularity, proposals, max_drop, cache_share)
        if max_drop is None and floor is None and max_layers is None and cache_share is None and strategy != "fixed":
            raise HybridConfigError(
                "GreedyLayerSwapCallback: max_drop=None needs something else that ends the search: max_layers, "
                "cache_share or floor."
            )
        if max_drop is None and floor is None and confirmation_dataset is not None:
            raise HybridConfigError(
                "GreedyLayerSwapCallback: confirmation_dataset takes back swaps that break max_drop or floor; got "
                "neither."
            )
        if keep not in ("most_linear", "best"):
            raise HybridConfigError(f"GreedyLayerSwapCallback: keep must be 'most_linear' or 'best'; got {keep!r}.")
        if max_layers is not None and (not isinstance(max_layers, int) or max_layers < 1):
            raise HybridConfigError(f"GreedyLayerSwapCallback: max_layers must be at least 1; got {max_layers!r}.")
        if confidence is not None and not 0 < confidence < 1:
            raise HybridConfigError(f"GreedyLayerSwapCallback: confidence must be in (0, 1); got {confidence!r}.")
        if confidence is not None and (floor is not None or max_drop is None or allowed_drop(max_drop)[0] == 0):
            raise HybridConfigError(
                "GreedyLayerSwapCallback: confidence promises max_drop, which must be above 0, and knows no floor; got "
                f"max_drop={max_drop!r}, floor={floor!r}."
            )
        self.metric, self.max_drop, self.floor, self.confidence = metric, max_drop, floor, confidence
        self.greater_is_better = direction(metric, greater_is_better, "GreedyLayerSwapCallback")
        self.max_layers, self.keep, self.confirmation_dataset = max_layers, keep, confirmation_dataset
        self.strategy, self.granularity, self.proposals, self.order = strategy, granularity, proposals, order
        self.cache_share, self.length = cache_share, length
        self.reuse_activations, self.max_reuse_bytes = reuse_activations, max_reuse_bytes
        # of every trainer served: the confirmation data as given, and as it wants them
        self._trainers: weakref.WeakKeyDictionary[Any, tuple] = weakref.WeakKeyDictionary()

    def set_trainer(self, trainer) -> None:
        """Called by [`HybridTrainer`]: callbacks are given the model only."""
        data = self.confirmation_dataset
        if trainer not in self._trainers or self._trainers[trainer][0] is not data:
            prepared = None if data is None else trainer.prepare_dataset(data, "confirmation_dataset")
            self._trainers[trainer] = data, prepared

    def state(self) -> dict:
        """What a checkpoint keeps: the settings. Data is never part of it."""
        return {"args": {name: getattr(self, name) for name in SETTINGS}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        """What would stop the search is better known before the distillation: one evaluation of the teacher."""
        trainer = self._trainer_of(state)
        self._check_data(trainer)
        metric = self._metric_key()
        value = read_metric(self._scorer(trainer).rehearse(), metric, "before distillation")
        if self.floor is not None:
            check_floor(metric, value, self.floor, self.greater_is_better)
        self._check_confirmation_floor(trainer)
        trace = os.path.join(args.output_dir, TRACE_FILE)
        if state.global_step < state.max_steps and os.path.exists(trace) and trainer.is_world_process_zero():
            os.replace(trace, trace + ".superseded")
            logger.warning(
                f"Training goes on, so that the earlier search is void: {trace} is now {TRACE_FILE}.superseded."
            )

    def on_train_end(self, args, state, control, **kwargs):
        """The search."""
        trainer = self._trainer_of(state)
        trainer.save_mixer_bank()  # a kill during the search must not cost the mixers
        self.search(trainer)

    def search(self, trainer) -> SwapReport:
        """
        Search now, with the mixers as they are; `trainer.train` is not needed for this.

        Args:
            trainer ([`HybridTrainer`]): Its model ends up with the layers of `keep` linear.

        Returns:
            [`SwapReport`]: Also in `trainer.swap_report`.
        """
        self.set_trainer(trainer)
        self._check_data(trainer)
        before = linear_heads(trainer.unwrapped)
        self._check_confirmation_floor(trainer)
        metric = self._metric_key()
        trace = SwapTrace(os.path.join(trainer.args.output_dir, TRACE_FILE), search_identity(trainer))
        held_out = self._held_out(trainer)
        max_drop = self.max_drop if held_out is None else half_of(self.max_drop)
        try:
            if self._scores_rows():
                report = self._search_by_rows(trainer, max_drop, trace)
            else:
                report = self._search_by_layers(trainer, max_drop, trace)
            if held_out is not None:
                held_out.certify(report)
                trace.add_event("promised", metric=metric, confirmed=report.confirmed, best=report.best)
            elif self._trainers[trainer][1] is not None:
                confirm_swaps(report, lambda swapped: self._confirm(trainer, swapped), self.max_drop, self.floor)
                trace.add_event("confirmed", metric=metric, confirmed=report.confirmed, best=report.best)
        except BaseException:
            set_linear_heads_(trainer.unwrapped, before)
            raise
        self._settle(trainer, report)
        return report

    def _scores_rows(self) -> bool:
        """Whether single rows are looked at; the paper's search by layers is not in need of them."""
        return self.strategy != "greedy" or self.granularity != "layer" or self.cache_share is not None

    def _search_by_layers(self, trainer, max_drop, trace: SwapTrace) -> SwapReport:
        """The paper's search, with whatever the trainer's evaluation returns."""
        metric, sites, score = self._metric_key(), list(trainer.distill_sites), self._scorer(trainer)
        if trace.has_searches:  # by rows; or their steps and these would be told for one path
            settings = {"metric": metric, "max_drop": max_drop, "floor": self.floor, "max_layers": self.max_layers}
            trace.start_search({"strategy": "greedy, whole evaluations", **settings})
        with _progress(trainer, metric, len(sites)) as (on_trial, say):

            def on_commit(trial: Trial):
                score.committed = list(trial.swapped)
                say(trial)

            return greedy_swap(
                sites,
                score,
                metric=metric,
                greater_is_better=self.greater_is_better,
                max_drop=max_drop,
                floor=self.floor,
                tie_breaker=TIE_BREAKER,
                max_layers=self.max_layers,
                trace=trace,
                on_trial=on_trial,
                on_commit=on_commit,
            )

    def _search_by_rows(self, trainer, max_drop, trace: SwapTrace) -> SwapReport:
        silent = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
        metric = self._metric_key()
        with tqdm(desc=f"{self.strategy} by {self.granularity}", unit="step", disable=silent) as bar:

            def on_step(step):
                bar.update()
                bar.set_postfix_str(f"{step.units[-1]}, {metric} {step.metric:.4g}")

            return search_by_rows(trainer, self._row_search(max_drop), trace, on_step)

    def _row_search(self, max_drop) -> RowSearch:
        return RowSearch(
            metric=self._metric_key(),
            greater_is_better=self.greater_is_better,
            strategy=self.strategy,
            granularity=self.granularity,
            proposals=self.proposals,
            max_drop=max_drop,
            floor=self.floor,
            max_units=self.max_layers,
            cache_share=self.cache_share,
            length=self.length,
            order=self.order,
        )

    def _settle(self, trainer, report: SwapReport) -> None:
        """The trainer's model runs what was found."""
        trainer.swap_report = report
        switch_to(trainer, report.kept(self.keep))
        logger.info(
            f"Swapped {len(report.most_linear)} {self.granularity}s with {report.metric} within "
            f"{report.floor:.4g} (started at {report.base:.4g}); {report.metric} is best with {len(report.best)}."
            + ("" if report.promise is None else f" {report.promise.sentence()}")
        )

    def _held_out(self, trainer) -> HeldOut | None:
        """The rows that a promise is tested on, with the teacher's values; says so if they are too few."""
        if self.confidence is None or self.max_drop is None:
            return None
        trainer.swap_layers([])
        data, metric = self._trainers[trainer][1], self._metric_key()
        held_out = HeldOut(trainer, data, metric, self.greater_is_better, self.max_drop, self.confidence)
        if (advice := held_out.advice()) and trainer.is_world_process_zero():
            logger.warning(f"GreedyLayerSwapCallback: {advice}")
        return held_out

    def _scorer(self, trainer) -> Scorer:
        return Scorer(trainer, self._metric_key(), self.reuse_activations, self.max_reuse_bytes)

    def _trainer_of(self, state):
        """The trainer whose event this is: callbacks are given its state, which no other has."""
        trainer = next((trainer for trainer in self._trainers if trainer.state is state), None)
        if trainer is None:
            raise HybridConfigError(
                "GreedyLayerSwapCallback needs a HybridTrainer; a plain Trainer has no mixers to swap in."
            )
        return trainer

    def _metric_key(self) -> str:
        return self.metric if self.metric.startswith("eval_") else f"eval_{self.metric}"

    def _check_data(self, trainer) -> None:
        if trainer.eval_dataset is None:
            raise MetricError(
                f"GreedyLayerSwapCallback watches {self.metric!r} on eval_dataset, which is missing. Pass it to "
                "HybridTrainer."
            )
        if self.confidence is not None and self._trainers[trainer][1] is None:
            raise HybridConfigError(
                "GreedyLayerSwapCallback: confidence needs a confirmation_dataset: rows that the search does not see."
            )
        if self.confidence is not None:
            check_disjoint(trainer.eval_dataset, self._trainers[trainer][1])
        if self._scores_rows():
            check_search(trainer, self._row_search(self.max_drop))

    def _check_confirmation_floor(self, trainer) -> None:
        if self.floor is None or self._trainers[trainer][1] is None:
            return
        metric = self._metric_key()
        value = read_metric(self._confirm(trainer, []), metric, "confirmation of 0 swaps")
        check_floor(metric, value, self.floor, self.greater_is_better, " on the confirmation data")

    def _confirm(self, trainer, swapped: list[str]) -> dict[str, float]:
        switch_to(trainer, swapped)
        return evaluate(trainer, self._metric_key(), self._trainers[trainer][1])


@contextlib.contextmanager
def _progress(trainer, metric: str, sites: int) -> Iterator[tuple]:
    """A progress bar, as what to call after every trial and after every commit."""
    silent = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
    with tqdm(desc="greedy search", unit="trial", disable=silent) as bar:

        def on_trial(trial: Trial, left: int):
            bar.total = bar.n + 1 + left
            bar.update()
            bar.set_postfix_str(f"round {trial.round}, {metric} {trial.metrics[metric]:.4g}")

        def on_commit(trial: Trial):
            count, value = len(trial.swapped), trial.metrics[metric]
            if not bar.disable:
                bar.write(f"swapped {count:2d}/{sites}: {trial.candidate}  {metric} {value:.4g}")

        yield on_trial, on_commit
