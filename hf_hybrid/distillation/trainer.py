"""`HybridTrainer`: transformers' `Trainer` that distils every attention layer locally and saves hybrids."""

import itertools

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..adapters.bank import adapter_config
from ..conversion.layer import HybridAttentionMixin, hybrid_layers
from ..errors import DatasetError, HybridConfigError, MetricError
from ..mixers import MixerConfig
from ..modeling_hybrid import HybridModelMixin
from ..objectives.local import LocalDistillation, start_distillation_
from ..search.greedy import SwapReport
from ..search.ranks import from_rank_zero
from ..surgery import linear_heads, set_linear_heads_
from .arguments import HybridTrainingArguments
from .calibration import calibrate_mixers
from .checks import base_model, check_arguments, check_optimizer, check_start, is_finite, load_teacher
from .data import check_padding, prepare_dataset
from .recall_text import recall_rows
from .repair import RepairTrainer
from .repair_arguments import RepairArguments, repair_arguments
from .repair_report import RepairReport
from .resuming import Resumes
from .saving import SavesMixers
from .students import put_back, put_mixers
from .swapping import Swaps


logger = logging.get_logger(__name__)


class HybridTrainer(Resumes, SavesMixers, Swaps, Trainer):
    """
    Trains a mixer beside every attention layer of a frozen model, each on the layer's own queries, keys, values and
    outputs ([blockwise local distillation](https://huggingface.co/papers/2411.19146)), and saves the result as a hybrid
    checkpoint. With a [`GreedyLayerSwapCallback`], training ends with the search for the layers to replace.

    `evaluate` and `predict` are the Trainer's: they run the model as its switch stands. `train_dataset` is plain text
    (a `text` column is tokenised and packed), chats (`messages`), or `input_ids`; its labels, if any, are not used.
    Teacher and hybrid are one model: nothing is held twice.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The teacher; a name or path is loaded by the architecture its
            config names. A `PeftModel` with a [`HybridPeftConfig`] brings its mixers.
        mixer (`str`, `dict` or `MixerConfig`, *optional*, defaults to `"linear_attention"`): What replaces the softmax.
        args (`HybridTrainingArguments`, *optional*): Where to and how.
        mixer_bank (`str`, *optional*): Start from the mixers of this folder or Hub repository instead of fresh ones.
        kwargs: Everything else [`~transformers.Trainer`] takes.

    Attributes:
        swap_report (`SwapReport` or `None`): What the search found.
        repair_report (`RepairReport` or `None`): What `repair` did.
        last_block_losses (`dict[str, float]`): Mean local loss of every layer over the last logging interval.
        last_head_losses (`dict[str, list[float]]`): The same of every key-value head that has a mixer.

    Raises:
        DatasetError: If a dataset is empty or too short, or needs a tokenizer or a padding token that is not there.
        HybridConfigError: If an argument means nothing in a distillation.
        OutputFolderError: From `train`, if the output folder holds another run.
    """

    # the local loss is a per-batch mean: the Trainer divides it by the number of accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        mixer: str | dict | MixerConfig | None = None,
        args: HybridTrainingArguments | None = None,
        *,
        mixer_bank: str | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_collator=None,
        **kwargs,
    ):
        args = HybridTrainingArguments("hybrid") if args is None else args
        check_arguments(mixer, args)
        if isinstance(model, str):
            model = load_teacher(model, args.model_init_kwargs or {})
        base = base_model(model)
        check_start(base, mixer, mixer_bank, args)
        # everything that can be wrong with the data is found before the model is touched
        self._data_settings = {
            "processing_class": processing_class,
            "model_config": base.config,
            "model_class": type(base),
            "text_field": args.dataset_text_field,
            "max_length": args.max_length,
            "seed": args.seed,
        }
        train_dataset = prepare_dataset(train_dataset, "train_dataset", **self._data_settings, is_training=True)
        self._text = train_dataset  # as a repair reads it: with its own share of rows that ask for recall
        train_dataset, _ = recall_rows(train_dataset, args.recall_share, processing_class, args.seed)
        eval_dataset = prepare_dataset(eval_dataset, "eval_dataset", **self._data_settings, is_training=False)
        if data_collator is None:
            check_padding(processing_class, train_dataset, eval_dataset)
        brought, before = bool(hybrid_layers(base)), (linear_heads(base), getattr(base, "training_objective", None))
        # the Trainer turns caching off in the config for as long as it trains; a checkpoint says what the teacher said
        self._teacher_use_cache = getattr(base.config, "use_cache", None)
        try:
            put_mixers(base, mixer, mixer_bank, args)
            set_linear_heads_(base, {}, remember=False)
            objective = start_distillation_(
                base, recompute=bool(args.activation_checkpointing), window_dropout=args.window_dropout
            )
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                data_collator=data_collator,
                **kwargs,
            )
            check_optimizer(self.optimizer, self.model)
        except BaseException:
            put_back(base, brought, *before)
            raise
        self.objective: LocalDistillation = objective
        self.model_accepts_loss_kwargs = False
        adapter_config(base)  # takes the weights' fingerprint, before anything is sharded
        # those of a bank have learnt already
        self._starting_students = not brought and mixer_bank is None
        self._begin_counting()
        self._saving_checkpoint = False
        self._link_callbacks()

    def _begin_counting(self):
        self.swap_report: SwapReport | None = None
        self.repair_report: RepairReport | None = None
        self.last_block_losses: dict[str, float] = {}
        self.last_head_losses: dict[str, list[float]] = {}
        self._block_losses: torch.Tensor | None = None
        self._head_losses: torch.Tensor | None = None
        self._num_block_losses = 0

    # ------------------------------------------------------------------------------------------------------- training

    def create_optimizer(self, *args, **kwargs):
        """As the Trainer's, with a learning rate of their own for differences to projections, where one is given."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.projection_learning_rate
        if not fresh or rate is None:
            return optimizer
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in list(optimizer.param_groups):
            slow = [p for p in group["params"] if ".hybrid_delta." in names.get(id(p), "")]
            if slow:
                group["params"] = [p for p in group["params"] if all(p is not other for other in slow)]
                settings = {key: value for key, value in group.items() if key not in ("params", "lr")}
                optimizer.add_param_group({**settings, "params": slow, "lr": rate})
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Distil, then (with a [`GreedyLayerSwapCallback`]) swap. `resume_from_checkpoint=True` continues either after an
        interruption.
        """
        if self.train_dataset is None:
            raise DatasetError(
                "HybridTrainer.train: train_dataset is missing. Pass the text to distil on; the task's labels are not "
                "needed."
            )
        self._check_students_are_there()
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            name = next(iter(self.distill_sites.values())).hybrid_config.name
            raise HybridConfigError(
                f"HybridTrainer.train: {name} has nothing to train with projections={self.args.projections!r}. Search "
                "right away with GreedyLayerSwapCallback(…).search(trainer), or train its projections."
            )
        # one process looks, all do the same
        resume_from_checkpoint, only_search = from_rank_zero(lambda: self._where_to_start(resume_from_checkpoint))
        if only_search:
            return self._go_on_with_the_search()
        if not resume_from_checkpoint and self._starting_students:
            self._calibrate()
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._warn_of_unreached_sites()
        self.unwrapped.eval()  # its forward is the task's again
        return result

    def _shard(self):
        """
        Shard the model, if it is to be and is not yet: accelerate does so together with an optimizer, and the Trainer
        when it trains.
        """
        if self.is_fsdp_enabled and not self.accelerator._models:
            self._prepare_for_training(max_steps=1, train_dataloader=None, resume_from_checkpoint=None)

    def evaluation_loop(self, *args, **kwargs):
        """As the Trainer's; also before a training that shards."""
        self._shard()
        return super().evaluation_loop(*args, **kwargs)

    def _warn_of_unreached_sites(self):
        names = list(hybrid_layers(self.unwrapped))
        if self.state.global_step == 0 or not self.is_world_process_zero():
            return
        unreached = [name for name in names if name not in self.objective.reached]
        if unreached and len(unreached) < len(names):
            logger.warning(
                f"No batch reached {len(unreached)} of {len(names)} attention sites, the first {unreached[0]}: their "
                "students are as they "
                "began. Train on data that uses them (pictures, sounds), or leave them out of `layers`."
            )

    def _calibrate(self):
        """
        Starting values of the mixers from a few training rows, drawn by `seed`, or the first of an iterable dataset.
        The same on every process, and on any number of them that share the rows of a step.
        """
        wanted = {name: name in self.args.initializations for name in ("half_lives", "output_scale")}
        wanted["closed_form"] = any(hasattr(layer.hybrid, "fit") for layer in self.distill_sites.values())
        if not any(wanted.values()):
            return
        size, data = self.args.per_device_train_batch_size, self.train_dataset
        count = size * self.args.world_size * self.args.calibration_batches
        if hasattr(data, "__len__"):
            generator = torch.Generator().manual_seed(self.args.seed)
            examples = [data[index] for index in torch.randperm(len(data), generator=generator)[:count].tolist()]
        else:
            examples = list(itertools.islice(iter(data), count))
        collate = self._get_collator_with_removed_columns(self.data_collator, description="calibration")
        batches = [collate(examples[start : start + size]) for start in range(0, len(examples), size)]
        calibrate_mixers(self.unwrapped, batches, **wanted)
        self._starting_students = False

    @property
    def unwrapped(self) -> HybridModelMixin:
        """The hybrid itself, without DDP's, `torch.compile`'s and PEFT's wrappers."""
        return base_model(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _in_distillation(self) -> bool:
        return getattr(self.unwrapped, "training_objective", None) is not None

    def _check_students_are_there(self):
        if not self._in_distillation():
            raise HybridConfigError(
                "HybridTrainer.train: the model was finalized; there are no students left to train. Make a new "
                "HybridTrainer."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (model.training and self._in_distillation()):  # the task's own loss, `compute_loss_func` included
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        losses = outputs["block_losses"]
        if not bool(torch.isfinite(losses).all()):
            bad = [name for name, loss in zip(self.distill_sites, losses.tolist(), strict=True) if not is_finite(loss)]
            raise MetricError(
                f"step {self.state.global_step}: the local loss of {bad[0]} must be finite; {len(bad)} of "
                f"{len(losses)} sites are not. Lower "
                f"learning_rate={self.args.learning_rate}, or look for NaN in the teacher's activations."
            )
        heads = outputs["head_losses"]
        self._block_losses = losses if self._block_losses is None else self._block_losses + losses
        self._head_losses = heads if self._head_losses is None else self._head_losses + heads
        self._num_block_losses += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._block_losses is not None and "loss" in logs:
            means, heads = self._block_losses / self._num_block_losses, self._head_losses / self._num_block_losses
            if self.args.world_size > 1:
                means, heads = (self.accelerator.reduce(x, "mean") for x in (means, heads))
            logs["block_loss_mean"] = round(means.mean().item(), 6)
            logs["block_loss_max"] = round(means.max().item(), 6)
            self.last_block_losses = dict(zip(self.distill_sites, means.tolist(), strict=True))
            counts = [layer.hybrid.num_key_value_heads for layer in self.distill_sites.values()]
            of_heads = (part.tolist() for part in heads.split(counts))
            self.last_head_losses = dict(zip(self.distill_sites, of_heads, strict=True))
            self._block_losses, self._head_losses, self._num_block_losses = None, None, 0
        super().log(logs, start_time)

    @property
    def distill_sites(self) -> dict[str, HybridAttentionMixin]:
        """The layers that have a mixer, by name, in the model's order."""
        return hybrid_layers(self.unwrapped)

    # --------------------------------------------------------------------------------------------------------- search

    def repair(self, train_dataset=None, args: RepairArguments | None = None, **kwargs) -> RepairReport:
        """
        Finalize the model as the switch stands and train it on its teacher's predictions, see [`RepairTrainer`]. Then
        save it with [`save_model`].

        Args:
            train_dataset (*optional*): By default what was distilled on.
            args (`RepairArguments`, *optional*): By default as they are, with `repair/` in the output folder, and with
                this trainer's precision, batch size, device, seed and reports.
            kwargs: Everything else [`RepairTrainer`] takes; `eval_dataset` and the collator are this trainer's.
        """
        data = self._text if train_dataset is None else train_dataset
        if self.unwrapped.projections != "shared" and kwargs.get("teacher") is None:
            raise HybridConfigError(
                f"HybridTrainer.repair: projections={self.unwrapped.projections!r} train beside the mixers, so that "
                "the finalized model's softmax is not its teacher's. Pass teacher=, the base model."
            )
        args = repair_arguments(self.args) if args is None else args
        settings = {
            "eval_dataset": self.eval_dataset,
            "processing_class": self.processing_class,
            "data_collator": self.data_collator if train_dataset is None else None,
            "compute_metrics": self.compute_metrics,
            "preprocess_logits_for_metrics": self.preprocess_logits_for_metrics,
            **kwargs,
        }
        repairer = RepairTrainer(self.finalize(), args, train_dataset=data, **settings)
        repairer.train()
        repairer.finalize()
        self.repair_report = repairer.repair_report
        return self.repair_report

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """As the Trainer's; text is tokenised and packed on the way."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.prepare_dataset(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        """As the Trainer's; text is tokenised and packed on the way."""
        return super().predict(self.prepare_dataset(test_dataset, "test_dataset"), *args, **kwargs)

    def evaluate_silently(self, eval_dataset=None) -> dict[str, float]:
        """`evaluate` without progress bars, logs and callbacks: a search calls it hundreds of times."""
        handler, callbacks = self.callback_handler, self.callback_handler.callbacks
        history = len(self.state.log_history)
        handler.callbacks = []
        try:
            return self.evaluate(eval_dataset)
        finally:
            handler.callbacks = callbacks
            del self.state.log_history[history:]

    def prepare_dataset(self, dataset, name: str):
        """A dataset as this trainer wants it: checked, and tokenised and packed if it is text."""
        return prepare_dataset(dataset, name, **self._data_settings, is_training=False)
