"""`RepairArguments`: transformers' `TrainingArguments` and what a repair adds."""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..errors import HybridConfigError, closest
from ..mixers.checks import check_int
from .recall_text import check_recall_share


# What a repair can train, beside each other.
PARTS = ("mixers", "lora", "mlp", "norms")


@dataclass
class RepairArguments(TrainingArguments):
    r"""
    Arguments of [`RepairTrainer`]; every argument of [`~transformers.TrainingArguments`] works as there.

    > Parameters that control what trains

        trained (`str`, *optional*, defaults to `"mixers,lora"`):
            Comma-separated names. `mixers`: the parameters of the linear heads; `lora`: low-rank differences to the
            projections of every attention layer, softmax or not, merged at the end; `mlp`: all other linear layers of
            the model but its heads; `norms`: the weights of normalisations.
        lora_rank (`int`, *optional*, defaults to 16), lora_alpha (`int`, *optional*, defaults to 32):
            Of the differences.
        mixer_learning_rate (`float`, *optional*, defaults to 1e-3):
            Learning rate of the mixers.
        weight_learning_rate (`float`, *optional*, defaults to 1e-5):
            Learning rate of `mlp` and `norms`: weights of the size of the model's own do not stand the others' rate.
        temperature (`float`, *optional*, defaults to 1.0):
            Of both softmaxes in the loss, see [`forward_kl`].

    > Parameters that control the text

        dataset_text_field (`str`, *optional*, defaults to `"text"`):
            Column of a dataset that is not tokenised yet (has no `input_ids`).
        max_length (`int`, *optional*, defaults to 1024):
            Tokens per training sequence when such a dataset is packed.
        recall_share (`float`, *optional*, defaults to 0.25):
            Share of packed rows in which a passage comes again or a key-value line is asked for. Plain text gives back
            perplexity, these rows give back recall (measured in LOG.md).

    With `gradient_accumulation_steps`, the loss of a step is the mean of those of its batches, each the mean over its
    own predictions that count.

    Changed defaults:
        `learning_rate` 3e-4 (of `lora`), `max_steps` 64, `per_device_train_batch_size` 2, `lr_scheduler_type` cosine,
        `warmup_steps` 5, `weight_decay` 0, `adam_beta2` 0.95, `logging_steps` 8, `logging_nan_inf_filter` False.
    """

    trained: str = field(default="mixers,lora", metadata={"help": f"What trains, comma-separated: {', '.join(PARTS)}."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the differences to attention's projections."})
    lora_alpha: int = field(default=32, metadata={"help": "Their factor is lora_alpha / lora_rank."})
    mixer_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the mixers."})
    weight_learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of mlp and norms."})
    temperature: float = field(default=1.0, metadata={"help": "Of both softmaxes in the loss."})
    dataset_text_field: str = field(
        default="text", metadata={"help": "Column of text of a dataset without `input_ids`."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens per packed training sequence."})
    recall_share: float = field(
        default=0.25, metadata={"help": "Share of packed rows in which something earlier is asked for again."}
    )

    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate of lora."})
    max_steps: int = field(default=64, metadata={"help": "Steps; -1 to go by num_train_epochs."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Rows per step and process."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    warmup_steps: float = field(default=5, metadata={"help": "Linear warmup over warmup_steps (a ratio if below 1)."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay for AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 for AdamW."})
    logging_steps: float = field(default=8, metadata={"help": "Log every X updates steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Skip NaN and infinite losses in logs."})

    def __post_init__(self):
        super().__post_init__()
        parts = [part.strip() for part in self.trained.split(",") if part.strip()]
        wrong = next((part for part in parts if part not in PARTS), None)
        if wrong is not None or not parts:
            raise HybridConfigError(
                f"trained must name some of {', '.join(PARTS)}; got {self.trained!r}.{closest(wrong or '', PARTS)}"
            )
        self.trained = ",".join(dict.fromkeys(parts))
        check_int("RepairArguments", "lora_rank", self.lora_rank, 1)
        check_int("RepairArguments", "lora_alpha", self.lora_alpha, 1)
        check_int("RepairArguments", "max_length", self.max_length, 2)
        check_recall_share(self.recall_share)
        if not self.temperature > 0.0:
            raise HybridConfigError(f"temperature must be above 0; got {self.temperature!r}.")

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """`trained` as names."""
        return tuple(self.trained.split(","))


# What a repair takes over from the distillation before it.
TAKEN_OVER = (
    *(
        "use_cpu",
        "bf16",
        "fp16",
        "tf32",
        "seed",
        "report_to",
        "disable_tqdm",
        "per_device_eval_batch_size",
        "max_length",
    ),
    *("dataset_text_field", "dataloader_num_workers", "dataloader_pin_memory", "gradient_checkpointing"),
)


def repair_arguments(args: TrainingArguments, **overrides) -> RepairArguments:
    """Of a repair after a distillation: its own settings, with the machine's and the text's as they were."""
    same = {name: getattr(args, name) for name in TAKEN_OVER}
    settings = {"output_dir": os.path.join(args.output_dir, "repair"), "save_strategy": "no", **same, **overrides}
    return RepairArguments(**settings)


__all__ = ["PARTS", "RepairArguments", "repair_arguments"]
