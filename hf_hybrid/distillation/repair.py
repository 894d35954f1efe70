"""
`RepairTrainer`: after the replacement, a hybrid learns from its teacher's predictions. The teacher is the same model
with its switch off.

Local distillation gives every layer the right answer to the wrong question once the layers before it have changed; a
short training on the logits gives back what is left, of perplexity and, with rows that ask for it, of recall.
"""

import contextlib
import os

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..conversion.layer import hybrid_layers
from ..errors import HybridConfigError, MetricError, OutputFolderError
from ..modeling_hybrid import HybridModelMixin
from ..objectives.logits import forward_kl, scored_predictions
from .checks import is_finite, last_complete_checkpoint, load_teacher
from .data import check_padding, model_kind, prepare_dataset
from .recall_text import recall_rows
from .repair_arguments import RepairArguments
from .repair_checks import check_repair_arguments, check_repairable, logits_of
from .repair_report import REPORT_FILE, RepairReport
from .repair_saving import SavesRepair
from .repaired_parts import start_training_, tuner_layers


logger = logging.get_logger(__name__)


class RepairTrainer(SavesRepair, Trainer):
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
        check_repair_arguments(args)
        if isinstance(model, str):
            model = load_teacher(model, {})
        check_repairable(model, teacher)
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
        wanted = args.recall_share if kind == "causal_lm" else 0.0
        train_dataset, self.recall_share = recall_rows(train_dataset, wanted, processing_class, args.seed)
        if data_collator is None:
            check_padding(processing_class, train_dataset, eval_dataset)
        self.teacher, self._is_causal = teacher, kind == "causal_lm"
        self._use_cache = getattr(model.config, "use_cache", None)
        self._dtypes = {name: x.dtype for name, x in (*model.named_parameters(), *model.named_buffers())}
        model.__dict__["in_repair"] = True  # until it is finalized, nothing of it can be saved
        try:
            self._parts = start_training_(model, args)
            self._start(model, args, train_dataset, eval_dataset, processing_class, data_collator, kwargs)
        except BaseException:
            self._put_back(model)
            raise

    def _start(self, model, args, train_dataset, eval_dataset, processing_class, data_collator, kwargs):
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
        if self.teacher is not None:
            self.teacher.to(args.device)
        self._check_optimizer(self.optimizer)
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
        self._round_weights()
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
        return {name: float(value) for name, value in wanted.items() if not name.endswith(times)}

    def _round_weights(self) -> None:
        """
        Weights as they will be saved, so that what is measured is what is kept. Differences of a repair are small: in
        half precision many of them are nothing beside the weight.
        """
        lost = moved = 0
        with torch.no_grad():
            for name, parameter in self.unwrapped.named_parameters():
                if name not in self._teacher_weights:
                    continue
                plain = name.replace(".base_layer.", ".")
                kept, before = (
                    parameter.to(self._dtypes[plain]).float(),
                    self._teacher_weights[name].to(parameter.device),
                )
                moved += int((parameter != before).sum())
                lost += int(((parameter != before) & (kept == before)).sum())
                parameter.copy_(kept)
        if lost > moved // 2:
            logger.warning(
                f"{lost:,} of {moved:,} changes to mlp and norms are lost when the weights go back to their own type. "
                "Load the model in float32, or raise weight_learning_rate."
            )

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
        for module in hybrid.modules():  # dropout in either would be noise in the target
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        labels = inputs.get("labels")
        is_encoder_decoder = getattr(hybrid.config, "is_encoder_decoder", False)
        inputs = {k: v for k, v in inputs.items() if k != "labels" or is_encoder_decoder}
        with torch.no_grad(), self._as_teacher(hybrid) as teacher:
            wanted = logits_of(teacher(**inputs), hybrid)
        outputs = model(**inputs)
        logits = logits_of(outputs, hybrid)
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
        modes = {module: module.training for module in hybrid.modules()}
        try:
            for layer in layers:
                layer.linear_heads = ()
            for tuner in tuners:
                tuner._disable_adapters = True  # `enable_adapters` would also freeze what trains
            for name, parameter in parameters.items():
                parameter.data = self._teacher_weights[name].to(parameter.device)
            hybrid.eval()
            yield hybrid
        finally:
            for layer, heads in zip(layers, switches, strict=True):
                layer.linear_heads = heads
            for tuner in tuners:
                tuner._disable_adapters = False
            for name, parameter in parameters.items():
                parameter.data = learnt[name]
            for module, mode in modes.items():
                module.training = mode

    def create_optimizer(self, *args, **kwargs):
        """A learning rate for each part; weight decay as the Trainer gives it."""
        if self.optimizer is not None:
            self._check_optimizer(self.optimizer)
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

    def _check_optimizer(self, optimizer) -> None:
        """Refuse one that was made before what trains was there: losses would look normal."""
        if optimizer is None:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [n for n, p in self.unwrapped.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            raise HybridConfigError(
                f"RepairTrainer: optimizers[0] must hold all that trains; it lacks {len(missing)} parameters, the "
                f"first {missing[0]}. They are made by the trainer: leave `optimizers` out, and choose by `optim` and "
                "rates."
            )


__all__ = ["RepairReport", "RepairTrainer"]
