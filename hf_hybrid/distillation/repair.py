"""
`RepairTrainer`: after the replacement, a hybrid learns from its teacher's predictions. The teacher is the same model
with its switch off.

Local distillation gives every layer the right answer to the wrong question once the layers before it have changed; a
short training on the logits gives back what is left, of perplexity and, with rows that ask for it, of recall.
"""

import contextlib
import json
import os

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..conversion.layer import hybrid_layers
from ..errors import CheckpointError, HybridConfigError, MetricError, OutputFolderError, UnsupportedModelError
from ..hub.card import CARD_FILE, is_own_card, write_model_card
from ..modeling_hybrid import HybridModelMixin, describe
from ..objectives.logits import forward_kl, scored_predictions
from .checks import is_finite, last_complete_checkpoint, load_teacher
from .data import check_padding, model_kind, prepare_dataset
from .recall_text import is_plain_text, with_recall
from .repair_arguments import RepairArguments
from .repair_report import REPORT_FILE, RepairReport
from .repaired_parts import merge_, start_training_, tuner_layers


logger = logging.get_logger(__name__)

WEIGHTS_FILE = "repair.safetensors"


class RepairTrainer(Trainer):
    """
    Trains a hybrid on the forward divergence of its predictions from its teacher's ([`forward_kl`]), on text or on the
    task's own rows, and saves it as an ordinary hybrid checkpoint. `evaluate` and `predict` are the Trainer's.

    Teacher and hybrid are one model: for the teacher's forward the switch is off, adapters are off, and weights that
    train are put back to what they were. What trains is kept in fp32.

    Args:
        model (`str` or `PreTrainedModel`): The hybrid: converted, or finalized after a search. It is changed in place.
        args (`RepairArguments`, *optional*): Where to and how.
        train_dataset: Text (packed), chats (`messages`), or rows of `input_ids`. With `labels`, only predictions of
            tokens that have one count (completions).
        eval_dataset (*optional*): Measured before and after, see [`RepairReport`].
        teacher (`PreTrainedModel`, *optional*): Another teacher than the model itself, with the same vocabulary: needed
            where the model's softmax is not its teacher's any more.
        kwargs: Everything else [`~transformers.Trainer`] takes.

    Attributes:
        repair_report (`RepairReport` or `None`): What `train` did.

    Raises:
        HybridConfigError: If the model has no linear head, is in distillation, or nothing of what is to train is there.
        UnsupportedModelError: Under FSDP and DeepSpeed, or for a model that carries an adapter.
        DatasetError: As of [`HybridTrainer`].

    Example:

        >>> trainer = RepairTrainer(hybrid, RepairArguments("repaired"), train_dataset=text, processing_class=tokenizer)
        >>> trainer.train()
        >>> trainer.save_model()
    """

    # the loss is a per-batch mean: the Trainer divides it by the number of accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RepairArguments | None = None,
        *,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_collator=None,
        teacher: PreTrainedModel | None = None,
        **kwargs,
    ):
        args = RepairArguments("repaired") if args is None else args
        _check_arguments(args)
        if isinstance(model, str):
            model = load_teacher(model, {})
        _check_model(model, teacher)
        kind = model_kind(model.config, type(model))
        settings = {
            "processing_class": processing_class,
            "model_config": model.config,
            "model_class": type(model),
            "text_field": args.dataset_text_field,
            "max_length": args.max_length,
            "seed": args.seed,
        }
        train_dataset = prepare_dataset(train_dataset, "train_dataset", **settings, is_training=True)
        eval_dataset = prepare_dataset(eval_dataset, "eval_dataset", **settings, is_training=False)
        self.recall_share = args.recall_share if kind == "causal_lm" and is_plain_text(train_dataset) else 0.0
        if self.recall_share:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            train_dataset = with_recall(train_dataset, self.recall_share, tokenizer, args.seed)
        if data_collator is None:
            check_padding(processing_class, train_dataset, eval_dataset)
        self.teacher, self._is_causal = teacher, kind == "causal_lm"
        self._use_cache = getattr(model.config, "use_cache", None)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._parts = start_training_(model, args)
        model.__dict__["in_repair"] = True  # until it is finalized, nothing of it can be saved
        self._teacher_weights = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if self._parts.get(name) in ("mlp", "norms")
        }
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
        self.repair_report: RepairReport | None = None
        self._tokens, self._before = 0, {}
        self._saving_checkpoint = self._finalized = False

    # ------------------------------------------------------------------------------------------------------- training

    @property
    def unwrapped(self) -> HybridModelMixin:
        """The hybrid itself, without DDP's and `torch.compile`'s wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Repair the hybrid. `resume_from_checkpoint=True` goes on from the last complete checkpoint of `output_dir`.
        """
        if self._finalized:
            raise HybridConfigError("RepairTrainer.train: the repair was finalized. Make a new RepairTrainer.")
        if self.train_dataset is None:
            raise HybridConfigError("RepairTrainer.train: train_dataset is missing. Pass the text to repair on.")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning(f"{self.args.output_dir} holds no complete checkpoint: starting at step 0.")
        elif not resume_from_checkpoint:
            self._check_output_folder()
        if self.eval_dataset is not None and not self._before:
            self._before = self._measured()
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        after = self._measured() if self.eval_dataset is not None else {}
        self.repair_report = RepairReport(
            steps=self.state.global_step,
            tokens=self._tokens,
            trained=list(self.args.trained_parts),
            recall_share=self.recall_share,
            before=self._before,
            after=after,
        )
        self.unwrapped.eval()
        return result

    def _measured(self) -> dict[str, float]:
        metrics = self.evaluate()
        wanted = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
        times = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
        return {name: float(value) for name, value in wanted.items() if name not in times}

    def _check_output_folder(self) -> None:
        folder = self.args.output_dir
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        ours = [name for name in names if name in (REPORT_FILE, "config.json") or name.startswith("checkpoint-")]
        if ours:
            raise OutputFolderError(
                f"output_dir={folder!r} holds another run ({', '.join(ours[:4])}). Pass resume_from_checkpoint=True to "
                "continue it, or choose another folder."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hybrid = self.unwrapped
        if not hybrid.is_activation_checkpointing:
            model.eval()  # dropout in either would be noise in the target
        labels = inputs.get("labels")
        is_encoder_decoder = getattr(hybrid.config, "is_encoder_decoder", False)
        inputs = {k: v for k, v in inputs.items() if k != "labels" or is_encoder_decoder}
        with torch.no_grad(), self._as_teacher(hybrid) as teacher:
            wanted = teacher(**inputs)["logits"]
        outputs = model(**inputs)
        logits = outputs["logits"]
        counted = None
        if logits.ndim == 3:
            is_causal = self._is_causal and not is_encoder_decoder
            mask = None if is_encoder_decoder else inputs.get("attention_mask")
            counted = scored_predictions(labels, mask, logits.shape[:2], is_causal)
        loss = forward_kl(logits, wanted, counted, self.args.temperature)
        if not is_finite(loss.item()):
            raise MetricError(
                f"step {self.state.global_step}: the divergence from the teacher must be finite; got {loss.item()}. "
                f"Lower learning_rate={self.args.learning_rate}, or look for NaN in the model's logits."
            )
        self._tokens += inputs["input_ids"].numel() * self.args.world_size if "input_ids" in inputs else 0
        return (loss, outputs) if return_outputs else loss

    @contextlib.contextmanager
    def _as_teacher(self, hybrid):
        """The teacher, for the duration of the block: the hybrid with everything off that it has learnt."""
        if self.teacher is not None:
            yield self.teacher.eval()
            return
        layers, tuners = list(hybrid_layers(hybrid).values()), tuner_layers(hybrid)
        switches = [layer.linear_heads for layer in layers]
        parameters = {name: p for name, p in hybrid.named_parameters() if name in self._teacher_weights}
        learnt = {name: p.data for name, p in parameters.items()}
        was_training = hybrid.training
        try:
            for layer in layers:
                layer.linear_heads = ()
            for tuner in tuners:
                tuner._disable_adapters = True  # `enable_adapters` would also freeze what trains
            for name, parameter in parameters.items():
                parameter.data = self._teacher_weights[name].to(parameter.device)
            yield hybrid.eval()
        finally:
            for layer, heads in zip(layers, switches, strict=True):
                layer.linear_heads = heads
            for tuner in tuners:
                tuner._disable_adapters = False
            for name, parameter in parameters.items():
                parameter.data = learnt[name]
            hybrid.train(was_training)

    def create_optimizer(self, *args, **kwargs):
        """A learning rate for each part; weight decay as the Trainer gives it."""
        if self.optimizer is not None:
            return self.optimizer
        rates = {"lora": self.args.learning_rate, "mixers": self.args.mixer_learning_rate}
        decays = set(self.get_decay_parameter_names(self.unwrapped))
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.unwrapped.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((self._parts[name], name in decays), []).append(parameter)
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.unwrapped)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": rates.get(part, self.args.weight_learning_rate),
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                }
                for (part, decay), parameters in groups.items()
            ],
            **settings,
        )
        return self.optimizer

    # --------------------------------------------------------------------------------------------------------- saving

    def finalize(self) -> PreTrainedModel:
        """End the repair, in place: differences are merged, weights go back to their types. Returns the hybrid."""
        model = self.unwrapped
        if not self._finalized:
            merge_(model)
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(self._dtypes[name])
                parameter.requires_grad_(True)
                parameter.grad = None
            if self._use_cache is not None:
                model.config.use_cache = self._use_cache
            report = {"trained": list(self.args.trained_parts), "steps": self.state.global_step}
            model.config.hybrid["repair"] = report
            del model.__dict__["in_repair"]
            self._finalized = True
            model.eval()
        return model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Finalize and save the hybrid (inside a training checkpoint: what trains). Call it on every process; the main one
        writes.
        """
        folder = self.args.output_dir if output_dir is None else output_dir
        if self._saving_checkpoint:
            if self.args.should_save:
                os.makedirs(folder, exist_ok=True)
                self._save_trained(folder)
            return
        model = self.finalize()
        if not self.args.should_save:
            return
        model.save_pretrained(folder)
        report = self.repair_report
        if not is_own_card(os.path.join(folder, CARD_FILE)):
            write_model_card(model, folder, extra="" if report is None else report.markdown())
        if report is not None:
            report.save(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args, **kwargs):
        """Write `README.md`: the hybrid's own card. (Same arguments as the Trainer's; they are not needed.)"""
        if self.is_world_process_zero():
            report = self.repair_report
            write_model_card(self.unwrapped, self.args.output_dir, extra="" if report is None else report.markdown())

    def _save_checkpoint(self, model, trial):
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing to push: a checkpoint holds what trains, not a model."""

    def _save_trained(self, folder: str) -> None:
        tensors = {n: p.detach().cpu().contiguous() for n, p in self.unwrapped.named_parameters() if p.requires_grad}
        notes = {"tokens": str(self._tokens), "before": json.dumps(self._before), "trained": self.args.trained}
        path = os.path.join(folder, WEIGHTS_FILE)
        save_file(tensors, path + ".tmp", metadata=notes)
        os.replace(path + ".tmp", path)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        path = os.path.join(resume_from_checkpoint, WEIGHTS_FILE)
        if not os.path.exists(path):
            raise CheckpointError(f"{resume_from_checkpoint} is no checkpoint of a repair: {WEIGHTS_FILE} is missing.")
        tensors = load_file(path)
        own = {name: p for name, p in self.unwrapped.named_parameters() if p.requires_grad}
        wrong = list({*tensors} ^ {*own}) or [n for n, p in own.items() if tensors[n].shape != p.shape]
        if wrong:
            raise CheckpointError(
                f"{path} was written by a repair that trained other weights ({sorted(wrong)[0]}). Use the arguments of "
                "that run, or another folder."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
        self._tokens, self._before = int(notes.get("tokens", 0)), json.loads(notes.get("before", "{}"))


def _check_arguments(args) -> None:
    if not isinstance(args, RepairArguments):
        raise HybridConfigError(f"RepairTrainer: args must be RepairArguments; got {type(args).__name__}.")
    if args.load_best_model_at_end:
        raise HybridConfigError(
            "RepairTrainer: load_best_model_at_end must be False; checkpoints hold what trains, not models."
        )
    if args.n_gpu > 1:
        raise HybridConfigError(
            f"RepairTrainer: one process cannot train on {args.n_gpu} GPUs. Start it with `accelerate launch` or "
            "`torchrun`, or show it one GPU (CUDA_VISIBLE_DEVICES)."
        )
    sharded = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if sharded or args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise UnsupportedModelError(
            "RepairTrainer: weights cannot be sharded (FSDP, DeepSpeed): the teacher is the same model with its switch "
            "off. Use DistributedDataParallel; a repair trains few weights."
        )


def _check_model(model, teacher) -> None:
    if not isinstance(model, HybridModelMixin) or not any(x.linear_heads for x in hybrid_layers(model).values()):
        name = describe(model) if isinstance(model, PreTrainedModel) else type(model).__name__
        raise HybridConfigError(
            f"RepairTrainer: the model must be a hybrid with linear heads; got {name}. Convert it (convert_to_hybrid), "
            "or search first."
        )
    if model.training_objective is not None:
        raise HybridConfigError(
            "RepairTrainer: the model is in distillation. Call HybridTrainer.finalize() first, or trainer.repair(…)."
        )
    if getattr(model, "_hf_peft_config_loaded", False) or tuner_layers(model):
        raise UnsupportedModelError("RepairTrainer: the model carries an adapter. Merge it (merge_and_unload) first.")
    trained_before = model.projections != "shared" or model.repaired
    if teacher is None and trained_before:
        raise HybridConfigError(
            f"RepairTrainer: weights of {describe(model)} were trained after the replacement, so that its softmax is "
            "not its teacher's any more. Pass teacher=, the base model."
        )


__all__ = ["RepairReport", "RepairTrainer"]
