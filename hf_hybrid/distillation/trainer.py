"""`HybridTrainer`: transformers' `Trainer` that distils every attention layer locally and saves hybrids."""

import itertools
import json
import os
from typing import Any

import torch
import transformers
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput
from transformers.utils import logging

from ..adapters.bank import (
    BANK_FOLDER,
    adapter_config,
    check_base,
    load_mixer_bank,
    load_student_state,
    read_adapter,
    student_state,
    write_adapter,
)
from ..adapters.first_format import CONFIG_FILE as FIRST_BANK
from ..conversion.layer import HybridAttentionMixin, hybrid_layers
from ..errors import (
    AlreadyHybridError,
    CheckpointError,
    DatasetError,
    HybridConfigError,
    MetricError,
    OutputFolderError,
)
from ..hub.card import CARD_FILE, is_own_card, write_model_card
from ..mixers import MixerConfig
from ..modeling_hybrid import HybridModelMixin
from ..objectives.local import LocalDistillation, start_distillation_
from ..search.greedy import TRACE_FILE, SwapReport
from ..search.ranks import from_rank_zero
from ..surgery import (
    discard_students_,
    finalize_,
    linear_heads,
    prepare_distillation_,
    set_linear_heads_,
)
from .arguments import HybridTrainingArguments
from .calibration import calibrate_mixers
from .data import check_padding, prepare_dataset


logger = logging.get_logger(__name__)


class HybridTrainer(Trainer):
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
        _check_arguments(mixer, args)
        if isinstance(model, str):
            model = _load_teacher(model, args.model_init_kwargs or {})
        base = base_model(model)
        _check_start(base, mixer, mixer_bank, args)
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
        eval_dataset = prepare_dataset(eval_dataset, "eval_dataset", **self._data_settings, is_training=False)
        if data_collator is None:
            check_padding(processing_class, train_dataset, eval_dataset)
        brought = bool(hybrid_layers(base))
        # the Trainer turns caching off in the config for as long as it trains; a checkpoint says what the teacher said
        self._teacher_use_cache = getattr(base.config, "use_cache", None)
        try:
            if mixer_bank is not None:
                load_mixer_bank(base, mixer_bank)
            elif not brought:
                prepare_distillation_(
                    base,
                    mixer or "linear_attention",
                    args.selected_layers(),
                    projections=args.projections,
                    rank=args.projection_rank,
                    initialization=args.initializations,
                )
            set_linear_heads_(base, {})
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
            self._check_optimizer()
        except BaseException:
            if not brought and isinstance(base, HybridModelMixin):  # the caller's model as it came
                discard_students_(base)
            raise
        self.objective: LocalDistillation = objective
        self.model_accepts_loss_kwargs = False
        adapter_config(base)  # takes the weights' fingerprint, before anything is sharded
        # those of a bank have learnt already
        self._starting_students = not brought and mixer_bank is None
        self.swap_report: SwapReport | None = None
        self.last_block_losses: dict[str, float] = {}
        self.last_head_losses: dict[str, list[float]] = {}
        self._block_losses: torch.Tensor | None = None
        self._head_losses: torch.Tensor | None = None
        self._num_block_losses = 0
        self._saving_checkpoint = False
        self._link_callbacks()

    def _check_optimizer(self):
        optimizer = self.optimizer
        if optimizer is None:
            return
        given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(parameter.requires_grad and id(parameter) in given for parameter in self.model.parameters()):
            raise HybridConfigError(
                "HybridTrainer: optimizers[0] must hold parameters of the mixers; it holds none that train. They are "
                "made by the trainer: leave `optimizers` out and choose by `optim` and `learning_rate`, or call "
                "prepare_distillation_(model) first and pass those with requires_grad."
            )

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

    def _where_to_start(self, resume_from_checkpoint: str | bool | None) -> tuple[str | None, bool]:
        """The checkpoint to go on from, if any, and whether the search alone is left to do."""
        if resume_from_checkpoint is not True:
            if not resume_from_checkpoint:
                self.check_output_folder()
            return resume_from_checkpoint or None, False
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        if checkpoint is None and self._distilled_already():
            return None, True
        if checkpoint is None:
            if os.path.exists(os.path.join(self.args.output_dir, "config.json")):
                self.check_output_folder()  # a model, but no run to go on with
            logger.warning(f"{self.args.output_dir} holds no complete checkpoint to resume from: starting at step 0.")
        return checkpoint, False

    def _distilled_already(self) -> bool:
        """Whether the output folder holds the finished mixers of a run that kept no checkpoints."""
        try:
            state = TrainerState.load_from_json(os.path.join(self._bank_folder, TRAINER_STATE_NAME))
        except (OSError, ValueError, TypeError):
            return False
        finished = 0 < state.max_steps <= state.global_step
        return finished and os.path.exists(os.path.join(self._bank_folder, ADAPTER_CONFIG))

    def _go_on_with_the_search(self) -> TrainOutput:
        logger.info(f"{self.args.output_dir} holds the finished mixers of this run: going on with the search.")
        self._shard()
        self._load_students(self._bank_folder)
        self.state = TrainerState.load_from_json(os.path.join(self._bank_folder, TRAINER_STATE_NAME))
        self.state.init_training_references(self, self.state.max_steps, self.state.num_train_epochs, None)
        self.unwrapped.eval()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, float("nan"), {})

    def _run_epoch(self, *args, **kwargs):
        """
        As the Trainer's, but for a training that has taken its last step: resumed within an epoch, it would take one
        more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

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
        if self.state.global_step == 0 or self.objective is None:
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

    @property
    def _bank_folder(self) -> str:
        return os.path.join(self.args.output_dir, BANK_FOLDER)

    def _check_students_are_there(self):
        if not self._in_distillation():
            raise HybridConfigError(
                "HybridTrainer.train: the model was finalized; there are no students left to train. Make a new "
                "HybridTrainer."
            )

    def check_output_folder(self) -> None:
        """Raise [`OutputFolderError`] if `args.output_dir` holds a run or a model already."""
        folder = self.args.output_dir
        names = os.listdir(folder) if os.path.isdir(folder) else []
        ours = [
            name
            for name in sorted(names)
            if name in (TRACE_FILE, FIRST_BANK, BANK_FOLDER, ADAPTER_CONFIG, "config.json")
            or name.startswith(PREFIX_CHECKPOINT_DIR + "-")
        ]
        if ours:
            raise OutputFolderError(
                f"output_dir={folder!r} holds another run ({', '.join(ours[:4])}). Pass resume_from_checkpoint=True to "
                "continue it, or choose another folder."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (model.training and self._in_distillation()):  # the task's own loss, `compute_loss_func` included
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        losses = outputs["block_losses"]
        if not bool(torch.isfinite(losses).all()):
            bad = [name for name, loss in zip(self.distill_sites, losses.tolist(), strict=True) if not _finite(loss)]
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

    def swap_layers(self, layers, heads: dict | None = None) -> None:
        """
        Make exactly these layers linear; the others keep their softmax.

        Args:
            layers: Names, or indices among the layers that have a mixer; `None` for those that `heads` names.
            heads (`dict`, *optional*): Key-value heads by layer; layers that it does not name become linear whole.

        Raises:
            HybridConfigError: If a layer or head has no mixer.
        """
        names = list(self.distill_sites)
        in_range = range(-len(names), len(names))

        def name_of(layer):
            name = names[layer] if isinstance(layer, int) and layer in in_range else layer
            if name not in names:
                raise HybridConfigError(f"swap_layers: {name!r} has no student. Sites: {names[0]} … {names[-1]}.")
            return name

        some = {name_of(layer): chosen for layer, chosen in (heads or {}).items()}
        wanted = some if layers is None else {name: some.get(name) for name in map(name_of, layers)}
        extra = [name for name in some if name not in wanted]
        if extra:
            raise HybridConfigError(
                f"swap_layers: heads are given for {extra[0]!r}, which is not among the layers. Add it."
            )
        set_linear_heads_(self.unwrapped, wanted)

    def swapped_layers(self) -> list[str]:
        """Names of the layers of which some heads are linear now."""
        return list(linear_heads(self.unwrapped))

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

    def add_callback(self, callback):
        super().add_callback(callback)
        self._link_callbacks()

    def _load_callback_state(self):
        data = {
            type(c): c.confirmation_dataset
            for c in self.callback_handler.callbacks
            if hasattr(c, "confirmation_dataset")
        }
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:  # restored from settings; data is not among them
            if type(callback) in data and callback.confirmation_dataset is None:
                callback.confirmation_dataset = data[type(callback)]
        self._link_callbacks()

    def prepare_dataset(self, dataset, name: str):
        """A dataset as this trainer wants it: checked, and tokenised and packed if it is text."""
        return prepare_dataset(dataset, name, **self._data_settings, is_training=False)

    def _link_callbacks(self):
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "set_trainer"):
                callback.set_trainer(self)

    # --------------------------------------------------------------------------------------------------------- saving

    def save_mixer_bank(self, output_dir: str | None = None) -> None:
        """
        Write all mixers, without the backbone, as an adapter: see [`save_mixer_bank`]. Into `mixer_bank/` of the output
        folder by default, since beside a model transformers would load it on top. Call it on every process.
        """
        folder = output_dir or self._bank_folder
        tensors = student_state(self.unwrapped)  # gathered from all ranks where it is sharded
        if self.args.should_save:
            write_adapter(folder, adapter_config(self.unwrapped), tensors)
            if self.state.global_step:  # a run that kept no checkpoints goes on from here
                self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))

    def finalize(self) -> PreTrainedModel:
        """
        Make the model the hybrid, in place: heads that are linear keep their mixers, the others their softmax. Ends
        distillation.
        """
        model = self.unwrapped
        if self._in_distillation():
            if isinstance(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), PeftModel):
                raise HybridConfigError(
                    "HybridTrainer.finalize: the mixers belong to an adapter. Call merge_and_unload() of the "
                    "PeftModel, or save_model()."
                )
            if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
                raise HybridConfigError(
                    "HybridTrainer.finalize: the weights are sharded. Call save_model(folder) on every process, and "
                    "load the folder with from_pretrained."
                )
            finalize_(model)
            self._restore_use_cache(model)
            model.eval()
        return model

    def _restore_use_cache(self, model):
        if self._teacher_use_cache is not None:
            model.config.use_cache = self._teacher_use_cache

    def _push_from_checkpoint(self, checkpoint_folder):
        """
        Nothing to push: a checkpoint of a distillation holds mixers, not a model. `push_to_hub` publishes the hybrid at
        the end.
        """

    def _determine_best_metric(self, metrics, trial) -> bool:
        """
        Evaluations during distillation run the teacher: no checkpoint is better than another, and the last is the one
        to keep.
        """
        return super()._determine_best_metric(metrics, trial) if not self._in_distillation() else False

    def _save_checkpoint(self, model, trial):
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def _save_optimizer_and_scheduler(self, output_dir):
        """As the Trainer's, but not the shards of a teacher that never changes."""
        if not (self.is_fsdp_enabled and self._in_distillation()):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # the state, which is written next, says that a checkpoint is complete: on all processes
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the hybrid as the switch stands (inside a training checkpoint: the mixers, as an adapter). Call it on every
        process; the main one writes.
        """
        if not self._in_distillation():
            super().save_model(output_dir, _internal_call)
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        if self._saving_checkpoint:
            tensors = student_state(self.unwrapped)
            if self.args.should_save:
                write_adapter(folder, adapter_config(self.unwrapped), tensors)
                torch.save(self.args, os.path.join(folder, "training_args.bin"))
            return
        self._save_hybrid(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_hybrid(self, folder: str) -> None:
        model = self.unwrapped
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        state = self.accelerator.get_state_dict(self.model_wrapped) if is_sharded else None
        if not self.args.should_save:
            return
        use_cache = getattr(model.config, "use_cache", None)
        self._restore_use_cache(model)
        try:
            model.save_pretrained(folder, state_dict=state)
            if not is_own_card(os.path.join(folder, CARD_FILE)):
                write_model_card(model, folder, report=self.swap_report)
        finally:
            if use_cache is not None:
                model.config.use_cache = use_cache
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._in_distillation():
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return self._load_students(resume_from_checkpoint)

    def _load_students(self, folder: str) -> None:
        model, where = self.unwrapped, os.path.join(folder, ADAPTER_CONFIG)
        config, tensors = read_adapter(folder)
        sites, own = check_base(config, model, where), adapter_config(model)
        changed = [
            key for key in ("sites", "projections", "projection_rank") if getattr(config, key) != getattr(own, key)
        ]
        if changed:
            raise CheckpointError(
                f"{folder} was written with other students ({', '.join(changed)} differ). Use the mixer and "
                "projections of that run, or another folder."
            )
        load_student_state(model, tensors, str(folder))
        set_linear_heads_(model, {name: heads for name, heads in (config.linear_heads or {}).items() if name in sites})

    def create_model_card(self, *args, **kwargs):
        """
        Write `README.md`: the hybrid's own card, with the search's result. (Same arguments as the Trainer's; they are
        not needed.)
        """
        if self.is_world_process_zero():
            self.unwrapped.refresh_hybrid_config()
            write_model_card(self.unwrapped, self.args.output_dir, report=self.swap_report)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_arguments(mixer, args) -> None:
    """Refuse what means nothing in a distillation, before anything is loaded or changed."""
    if isinstance(mixer, transformers.TrainingArguments):
        raise HybridConfigError(
            f"HybridTrainer: the second argument is the mixer; got {type(mixer).__name__}. Pass the arguments by name: "
            "HybridTrainer(model, args=args)."
        )
    if not isinstance(args, HybridTrainingArguments):
        raise HybridConfigError(f"HybridTrainer: args must be HybridTrainingArguments; got {type(args).__name__}.")
    if args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
        name = (
            "load_best_model_at_end must be False"
            if args.load_best_model_at_end
            else "save_strategy must not be 'best'"
        )
        raise HybridConfigError(
            f"HybridTrainer: {name}. Evaluations during distillation run the teacher, so that no checkpoint is "
            "better than another; the search runs on the last one."
        )
    if args.n_gpu > 1:
        raise HybridConfigError(
            f"HybridTrainer: one process cannot train on {args.n_gpu} GPUs (DataParallel copies the model without its "
            "students). Start it with `accelerate launch` or `torchrun`, or show it one GPU (CUDA_VISIBLE_DEVICES)."
        )
    _check_sharding(args)


def _check_sharding(args) -> None:
    settings = args.fsdp_plugin_args

    def is_set(name: str) -> bool:
        if settings is not None:
            return bool(settings.get(name, False))
        return os.environ.get("FSDP_" + name.upper(), "false").lower() in ("1", "true")

    if settings is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true"):
        return
    if args.projections != "shared":
        raise HybridConfigError(
            f"HybridTrainer: projections={args.projections!r} cannot be sharded by FSDP, whose units would have to be "
            "gathered twice per layer. Use projections='shared', or DistributedDataParallel."
        )
    if is_set("activation_checkpointing"):
        raise HybridConfigError(
            "HybridTrainer: FSDP's activation_checkpointing must be False; it recomputes whole decoder layers, which "
            "no gradient reaches. Pass "
            "activation_checkpointing=True to HybridTrainingArguments, which recomputes the mixers."
        )
    if is_set("cpu_ram_efficient_loading"):
        raise HybridConfigError(
            "HybridTrainer: FSDP's cpu_ram_efficient_loading must be False; mixers start from the weights they stand "
            "beside, which only the first process would "
            "hold. Set it in the configuration of accelerate, or in fsdp_config."
        )


def _check_start(model: PreTrainedModel, mixer, mixer_bank, args) -> None:
    """Refuse settings that mixers which are there already would leave without effect."""
    layers = hybrid_layers(model)
    if mixer_bank is not None and mixer is not None:
        raise HybridConfigError("HybridTrainer: give either mixer or mixer_bank (which names its mixer); got both.")
    if mixer is not None and layers:
        raise AlreadyHybridError(
            "HybridTrainer: the model has students already, so that mixer would be ignored. Leave mixer out to go on "
            "with them, or load the teacher again."
        )
    if layers and not any(p.requires_grad for layer in layers.values() for p in layer.hybrid.parameters()):
        has_parameters = any(True for layer in layers.values() for _ in layer.hybrid.parameters())
        if has_parameters:
            raise AlreadyHybridError(
                "HybridTrainer: the model's mixers are frozen. Load the adapter with is_trainable=True."
            )
    given = model.projections if layers else None
    if (layers or mixer_bank is not None) and (args.layers is not None or args.projections not in ("shared", given)):
        raise HybridConfigError(
            f"HybridTrainer: the students are there already (projections={given!r}), so that layers={args.layers!r} "
            f"and projections={args.projections!r} would be ignored. Leave them out."
        )


def last_complete_checkpoint(folder: str) -> str | None:
    """
    The newest checkpoint of `folder` that was written to its end, or `None`. The Trainer writes a checkpoint's state
    last and removes older checkpoints only afterwards: a kill while saving leaves one without a readable state, and a
    complete one before it.
    """
    if not os.path.isdir(folder):
        return None
    prefix = PREFIX_CHECKPOINT_DIR + "-"
    numbers = (name.removeprefix(prefix) for name in os.listdir(folder) if name.startswith(prefix))
    for step in sorted((int(number) for number in numbers if number.isdigit()), reverse=True):
        path = os.path.join(folder, f"{prefix}{step}")
        try:
            with open(os.path.join(path, TRAINER_STATE_NAME), encoding="utf-8") as file:
                json.load(file)
        except (OSError, ValueError):
            logger.warning(f"{path} is incomplete (the run was killed while saving it): resuming from an earlier one.")
            continue
        return path
    return None


def _load_teacher(name: str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(
        name, **{k: v for k, v in init_kwargs.items() if k in ("revision", "token", "cache_dir", "subfolder")}
    )
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):  # a name comes from a file
        architecture = AutoModelForCausalLM
    return architecture.from_pretrained(name, **init_kwargs)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
