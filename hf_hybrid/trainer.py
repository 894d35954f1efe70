"""`HybridTrainer`: transformers' `Trainer` that distils every attention site locally and saves hybrids."""

import contextlib
import itertools
import json
import os
from typing import Any

import torch
import transformers
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .bank import WEIGHTS_FILE as BANK_WEIGHTS_FILE
from .bank import (
    check_students,
    describe_students,
    load_mixer_bank,
    load_student_state,
    save_mixer_bank,
    student_state,
)
from .calibration import calibrate_mixers
from .distillation import (
    DistillModelMixin,
    DistillSite,
    as_hybrid,
    finalize_,
    prepare_distillation_,
    swap_layers_,
    swapped_layers,
)
from .errors import (
    AlreadyHybridError,
    CheckpointError,
    DatasetError,
    HybridConfigError,
    MetricError,
    OutputFolderError,
)
from .mixers import MixerConfig
from .model_card import CARD_FILE, is_own_card, write_model_card
from .selection import TRACE_FILE, SwapReport
from .training_args import HybridTrainingArguments


logger = logging.get_logger(__name__)


STUDENTS_FILE, SWAPS_FILE = "model.safetensors", "hybrid_students.json"


class HybridTrainer(Trainer):
    """
    Trains a linear-attention student at every attention site of a frozen teacher, each on the teacher's own inputs and outputs
    ([blockwise local distillation](https://huggingface.co/papers/2411.19146)), and saves the result as a hybrid checkpoint. With a
    [`GreedyLayerSwapCallback`], training ends with the search for the layers to replace.

    `evaluate` and `predict` are the Trainer's: they run the current mixture of teachers and students on the task. `train_dataset` is plain
    text (a `text` column is tokenised and packed) or `input_ids`; its labels, if any, are not used.

    Args:
        model (`str` or `PreTrainedModel`): The teacher; a name or path is loaded by the architecture its config names.
        mixer (`str`, `dict` or `MixerConfig`, *optional*, defaults to `"linear_attention"`): What replaces the softmax.
        args (`HybridTrainingArguments`, *optional*): Where to and how.
        mixer_bank (`str`, *optional*): Start from the students of this folder or Hub repository instead of fresh ones.
        kwargs: Everything else [`~transformers.Trainer`] takes.

    Attributes:
        swap_report (`SwapReport` or `None`): What the search found.
        last_block_losses (`dict[str, float]`): Mean local loss of every site over the last logging interval.

    Raises:
        DatasetError: If a dataset is empty or too short, or needs a tokenizer or a padding token that is not there.
        OutputFolderError: From `train`, if the output folder holds another run.
    """

    # the local loss is a per-batch mean: the Trainer divides it by the number of accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | PreTrainedModel,
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
        if not isinstance(args, HybridTrainingArguments):
            raise HybridConfigError(f"HybridTrainer: args must be HybridTrainingArguments; got {type(args).__name__}.")
        if isinstance(model, str):
            model = _load_teacher(model, args.model_init_kwargs or {})
        self._check_arguments(args)
        had_students = mixer_bank is not None or isinstance(model, DistillModelMixin)
        if mixer_bank is not None:
            if mixer is not None:
                raise HybridConfigError(
                    "HybridTrainer: give either mixer or mixer_bank (which names its mixer); got both."
                )
            load_mixer_bank(model, mixer_bank)
        elif not isinstance(model, DistillModelMixin):
            prepare_distillation_(
                model,
                mixer or "linear_attention",
                args.selected_layers(),
                projections=args.projections,
                rank=args.projection_rank,
                initialization=args.initializations,
            )
        elif mixer is not None:
            raise AlreadyHybridError(
                "HybridTrainer: the model has students already, so that mixer would be ignored. Leave mixer out to go on with them, or load the "
                "teacher again."
            )
        if had_students and (args.layers is not None or args.projections not in ("shared", model.distill_projections)):
            raise HybridConfigError(
                f"HybridTrainer: the students are there already (projections={model.distill_projections!r}), so that layers={args.layers!r} and "
                f"projections={args.projections!r} would be ignored. Leave them out."
            )
        swap_layers_(model, [])
        # the Trainer turns caching off in the config for as long as it trains; a checkpoint says what the teacher said
        self._teacher_use_cache = getattr(model.config, "use_cache", None)
        train_dataset = _prepare_dataset(train_dataset, "train_dataset", processing_class, args)
        eval_dataset = _prepare_dataset(eval_dataset, "eval_dataset", processing_class, args)
        if data_collator is None:
            _check_padding(processing_class, train_dataset, eval_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        self.model.recompute_students = bool(args.activation_checkpointing)
        self.model.window_dropout = args.window_dropout
        self._starting_students = not had_students  # those of a bank have learnt already
        self.swap_report: SwapReport | None = None
        self.last_block_losses: dict[str, float] = {}
        self._block_losses: torch.Tensor | None = None
        self._num_block_losses = 0
        self._saving_checkpoint = False
        self._link_callbacks()

    @staticmethod
    def _check_arguments(args):
        if args.load_best_model_at_end:
            raise HybridConfigError(
                "HybridTrainer: load_best_model_at_end must be False. Evaluations during distillation run the teacher, so that no checkpoint is "
                "better than another; the search runs on the last one."
            )
        if args.n_gpu > 1:
            raise HybridConfigError(
                f"HybridTrainer: one process cannot train on {args.n_gpu} GPUs (DataParallel copies the model without its students). Start it with "
                "`accelerate launch` or `torchrun`, or show it one GPU (CUDA_VISIBLE_DEVICES)."
            )

    # ------------------------------------------------------------------------------------------------------- training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Distil, then (with a [`GreedyLayerSwapCallback`]) swap. `resume_from_checkpoint=True` continues either after an interruption."""
        if self.train_dataset is None:
            raise DatasetError(
                "HybridTrainer.train: train_dataset is missing. Pass the text to distil on; the task's labels are not needed."
            )
        self._check_students_are_there()
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            name = next(iter(self.distill_sites.values())).mixer_config.name
            raise HybridConfigError(
                f"HybridTrainer.train: {name} has nothing to train with projections={self.args.projections!r}. Search right away with "
                "GreedyLayerSwapCallback(…).search(trainer), or train its projections."
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                if os.path.exists(os.path.join(self.args.output_dir, "config.json")):
                    self.check_output_folder()  # a model, but no run to go on with
                logger.warning(
                    f"{self.args.output_dir} holds no complete checkpoint to resume from: starting at step 0."
                )
        elif not resume_from_checkpoint:
            self.check_output_folder()
        if not resume_from_checkpoint and self._starting_students:
            self._calibrate()
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._warn_of_unreached_sites()
        return result

    def _warn_of_unreached_sites(self):
        model = self.accelerator.unwrap_model(self.model)
        if self.state.global_step == 0 or not isinstance(model, DistillModelMixin):
            return
        unreached = [name for name, site in model.distill_sites.items() if not site.was_reached]
        if unreached and len(unreached) < len(model.distill_sites):
            logger.warning(
                f"No batch reached {len(unreached)} of {len(model.distill_sites)} attention sites, the first {unreached[0]}: their students are as they "
                "began. Train on data that uses them (pictures, sounds), or leave them out of `layers`."
            )

    def _calibrate(self):
        """Starting values of the mixers from a few training rows, the same on every process: drawn by `seed`, or the first of an iterable dataset."""
        wanted = {name: name in self.args.initializations for name in ("half_lives", "output_scale")}
        if not any(wanted.values()):
            return
        size, data = self.args.per_device_train_batch_size, self.train_dataset
        count = size * self.args.calibration_batches
        if hasattr(data, "__len__"):
            chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.args.seed))[
                :count
            ].tolist()
            examples = [data[index] for index in chosen]
        else:
            examples = list(itertools.islice(iter(data), count))
        collate = self._get_collator_with_removed_columns(self.data_collator, description="calibration")
        batches = [collate(examples[start : start + size]) for start in range(0, len(examples), size)]
        calibrate_mixers(self.accelerator.unwrap_model(self.model), batches, **wanted)
        self._starting_students = False

    def _check_students_are_there(self):
        if not isinstance(self.accelerator.unwrap_model(self.model), DistillModelMixin):
            raise HybridConfigError(
                "HybridTrainer.train: the model was finalized; there are no students left to train. Make a new HybridTrainer."
            )

    def check_output_folder(self) -> None:
        """Raise [`OutputFolderError`] if `args.output_dir` holds a run or a model already."""
        folder = self.args.output_dir
        names = os.listdir(folder) if os.path.isdir(folder) else []
        ours = [
            name
            for name in sorted(names)
            if name in (TRACE_FILE, BANK_WEIGHTS_FILE, "config.json") or name.startswith(PREFIX_CHECKPOINT_DIR + "-")
        ]
        if ours:
            raise OutputFolderError(
                f"output_dir={folder!r} holds another run ({', '.join(ours[:4])}). Pass resume_from_checkpoint=True to continue it, or choose "
                "another folder."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:  # the task's own loss, `compute_loss_func` included
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        losses = outputs["block_losses"]
        if not bool(torch.isfinite(losses).all()):
            bad = [name for name, loss in zip(self.distill_sites, losses.tolist(), strict=True) if not _finite(loss)]
            raise MetricError(
                f"step {self.state.global_step}: the local loss of {bad[0]} must be finite; {len(bad)} of {len(losses)} sites are not. Lower "
                f"learning_rate={self.args.learning_rate}, or look for NaN in the teacher's activations."
            )
        self._block_losses = losses if self._block_losses is None else self._block_losses + losses
        self._num_block_losses += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._block_losses is not None and "loss" in logs:
            means = self._block_losses / self._num_block_losses
            if self.args.world_size > 1:
                means = self.accelerator.reduce(means, "mean")
            logs["block_loss_mean"] = round(means.mean().item(), 6)
            logs["block_loss_max"] = round(means.max().item(), 6)
            self.last_block_losses = dict(zip(self.distill_sites, means.tolist(), strict=True))
            self._block_losses, self._num_block_losses = None, 0
        super().log(logs, start_time)

    @property
    def distill_sites(self) -> dict[str, DistillSite]:
        """The containers of teacher and student by site name, in the model's order."""
        return self.accelerator.unwrap_model(self.model).distill_sites

    # --------------------------------------------------------------------------------------------------------- search

    def swap_layers(self, layers) -> None:
        """Make exactly these layers (site names, or indices among the distilled sites) linear; the others keep their softmax."""
        names = list(self.distill_sites)
        in_range = range(-len(names), len(names))
        wanted = [names[layer] if isinstance(layer, int) and layer in in_range else layer for layer in layers]
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise HybridConfigError(f"swap_layers: {unknown[0]!r} has no student. Sites: {names[0]} … {names[-1]}.")
        swap_layers_(self.accelerator.unwrap_model(self.model), wanted)

    def swapped_layers(self) -> list[str]:
        """Names of the layers that are linear now."""
        return swapped_layers(self.accelerator.unwrap_model(self.model))

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
        return _prepare_dataset(dataset, name, self.processing_class, self.args)

    def _link_callbacks(self):
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "set_trainer"):
                callback.set_trainer(self)

    # --------------------------------------------------------------------------------------------------------- saving

    def save_mixer_bank(self, output_dir: str | None = None) -> None:
        """Write all students, without the backbone: see [`save_mixer_bank`]."""
        if self.args.should_save:
            save_mixer_bank(self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir)

    def finalize(self) -> PreTrainedModel:
        """Make `trainer.model` the hybrid, in place: swapped layers keep their student, the others their softmax. Ends distillation."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, DistillModelMixin):
            finalize_(model)
            self._restore_use_cache(model)
            model.eval()
        return model

    @contextlib.contextmanager
    def _published(self):
        """For the duration of the block, the model is the hybrid as a checkpoint shows it."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, DistillModelMixin):
            yield model
            return
        use_cache = getattr(model.config, "use_cache", None)
        self._restore_use_cache(model)
        try:
            with as_hybrid(model):
                yield model
        finally:
            if use_cache is not None:
                model.config.use_cache = use_cache

    def _restore_use_cache(self, model):
        if self._teacher_use_cache is not None:
            model.config.use_cache = self._teacher_use_cache

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing to push: a checkpoint of a distillation holds students, not a model. `push_to_hub` publishes the hybrid at the end."""

    def _save_checkpoint(self, model, trial):
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, DistillModelMixin):
            return super()._save(output_dir, state_dict)
        if not self._saving_checkpoint:  # save_model, push_to_hub: the hybrid as it stands
            with self._published():
                super()._save(output_dir, None)
                if self.args.should_save and not is_own_card(
                    os.path.join(output_dir or self.args.output_dir, CARD_FILE)
                ):
                    write_model_card(model, output_dir or self.args.output_dir, report=self.swap_report)
                return None
        # a training checkpoint: what trains, and which layers are swapped
        os.makedirs(output_dir, exist_ok=True)
        tensors = (
            student_state(model)
            if state_dict is None
            else {k: v for k, v in state_dict.items() if k in student_state(model)}
        )
        save_file(
            {k: v.contiguous().cpu() for k, v in tensors.items()},
            os.path.join(output_dir, STUDENTS_FILE),
            metadata={"format": "pt"},
        )
        with open(os.path.join(output_dir, SWAPS_FILE), "w", encoding="utf-8") as file:
            json.dump({**describe_students(model), "swapped": swapped_layers(model)}, file)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        if not isinstance(model, DistillModelMixin):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        try:
            tensors = load_file(os.path.join(resume_from_checkpoint, STUDENTS_FILE))
            with open(os.path.join(resume_from_checkpoint, SWAPS_FILE), encoding="utf-8") as file:
                description = json.load(file)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{resume_from_checkpoint} is no readable checkpoint of a HybridTrainer: {error}. Delete it and resume from an earlier one."
            ) from error
        check_students(description, model, os.path.join(resume_from_checkpoint, SWAPS_FILE))
        expected = describe_students(model)
        changed = [key for key in ("sites", "projections", "rank") if description[key] != expected[key]]
        if changed:
            raise CheckpointError(
                f"{resume_from_checkpoint} was written with other students ({', '.join(changed)} differ). Use the mixer and projections of that "
                "run, or another folder."
            )
        load_student_state(model, tensors, str(resume_from_checkpoint))
        swap_layers_(model, description.get("swapped", []))
        return None

    def create_model_card(self, *args, **kwargs):
        """Write `README.md`: the hybrid's own card, with the search's result. (Same arguments as the Trainer's; they are not needed.)"""
        if self.is_world_process_zero():
            with self._published() as model:
                write_model_card(model, self.args.output_dir, report=self.swap_report)


def last_complete_checkpoint(folder: str) -> str | None:
    """
    The newest checkpoint of `folder` that was written to its end, or `None`. The Trainer writes a checkpoint's state last and removes older
    checkpoints only afterwards: a kill while saving leaves one without a readable state, and a complete one before it.
    """
    if not os.path.isdir(folder):
        return None
    prefix = PREFIX_CHECKPOINT_DIR + "-"
    steps = [
        int(name.removeprefix(prefix))
        for name in os.listdir(folder)
        if name.removeprefix(prefix).isdigit() and name.startswith(prefix)
    ]
    for step in sorted(steps, reverse=True):
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
    architecture = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    return architecture.from_pretrained(name, **init_kwargs)


def _prepare_dataset(dataset, name: str, processing_class, args: HybridTrainingArguments):
    """Check a dataset, and tokenise and pack it if it is text."""
    if dataset is None or not hasattr(dataset, "__len__"):
        return dataset
    if isinstance(dataset, dict):
        return {
            key: _prepare_dataset(part, f"{name}[{key!r}]", processing_class, args) for key, part in dataset.items()
        }
    if len(dataset) == 0:
        raise DatasetError(f"{name} must not be empty; got 0 rows.")
    columns = (
        dataset.column_names
        if isinstance(dataset, Dataset)
        else list(dataset[0])
        if isinstance(dataset[0], dict)
        else []
    )
    if args.dataset_text_field not in columns or "input_ids" in columns:
        return dataset
    if processing_class is None:
        raise DatasetError(
            f"{name} has a {args.dataset_text_field!r} column but no tokenizer was given. Pass processing_class=tokenizer."
        )
    texts = (
        dataset[args.dataset_text_field]
        if isinstance(dataset, Dataset)
        else [row[args.dataset_text_field] for row in dataset]
    )
    packed = pack_text(texts, processing_class, args.max_length, name)
    # evaluation needs labels; distillation has its teacher
    return packed if name == "train_dataset" else packed.map(lambda row: {"labels": row["input_ids"]})


def pack_text(texts, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str = "dataset") -> Dataset:
    """
    Tokenise texts, join them with the end-of-text token between, and cut the stream into sequences of `max_length` tokens. The last,
    shorter piece is dropped.

    Raises:
        DatasetError: If the texts do not fill one sequence.
    """
    stream: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream += ids
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    count = len(stream) // max_length
    if count == 0:
        raise DatasetError(
            f"{name} must hold at least max_length={max_length} tokens; got {len(stream)}. Add text, or lower max_length."
        )
    return Dataset.from_dict({"input_ids": [stream[i * max_length : (i + 1) * max_length] for i in range(count)]})


def _check_padding(processing_class, *datasets) -> None:
    """Sequences of different lengths need a padding token, which many causal models do not have."""
    for dataset in datasets:
        if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
            continue
        lengths = {len(ids) for ids in dataset[: min(len(dataset), 64)]["input_ids"]}
        if len(lengths) > 1 and getattr(processing_class, "pad_token_id", None) is None:
            have = "no tokenizer was given" if processing_class is None else "the tokenizer has no padding token"
            raise DatasetError(
                f"The dataset has sequences of different lengths ({min(lengths)} to {max(lengths)} tokens), but {have}. Pass "
                "processing_class=tokenizer with tokenizer.pad_token = tokenizer.eos_token, or a data_collator."
            )


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
