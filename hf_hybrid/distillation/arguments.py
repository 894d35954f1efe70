"""`HybridTrainingArguments`: transformers' `TrainingArguments` and what distillation adds."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..errors import HybridConfigError
from ..mixers import INITIALIZATIONS, check_initialization
from ..mixers.checks import check_int
from .recall_text import check_recall_share


@dataclass
class HybridTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`HybridTrainer`]; every argument of [`~transformers.TrainingArguments`] works as there.

    > Parameters that control the teacher

        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained`, used when `model` is given as a name or path.

    > Parameters that control the students

        layers (`str`, *optional*):
            Attention sites to distil, as a list of indices and names or a comma-separated string; all of them by
            default.
        projections (`str`, *optional*, defaults to `"shared"`):
            What trains beside the mixers: nothing (`"shared"`), low-rank differences to the attention's projections
            (`"low_rank"`), or copies of them (`"full"`).
        projection_rank (`int`, *optional*, defaults to 8):
            Rank of those differences.
        projection_learning_rate (`float`, *optional*):
            Learning rate of what is added to the projections. By default that of the mixers for `"low_rank"`, and 1e-4
            for `"full"`: weights of the size of the model's own do not stand the mixers' rate.
        initialization (`str`, *optional*, defaults to `"all"`):
            What fresh mixers take from the pretrained layer: `"all"`, `"none"`, or comma-separated names.
            `identity_maps`: learned feature maps start as the identity; `quiet_state`: beside a window, the state
            starts at next to no weight; `neutral_gates`: output gates start at 1; `half_lives` and `output_scale`: how
            long and how loud a state speaks is read off the layer's own softmax, see [`calibrate_mixers`].
        calibration_batches (`int`, *optional*, defaults to 2):
            Training batches for the last two.
        window_dropout (`float`, *optional*, defaults to 0.0):
            Share of training forwards, drawn per layer, in which a mixer does without its window, so that its state
            learns to do without.

    > Parameters that control the text

        dataset_text_field (`str`, *optional*, defaults to `"text"`):
            Column of a dataset that is not tokenised yet (has no `input_ids`).
        max_length (`int`, *optional*, defaults to 1024):
            Tokens per training sequence when such a dataset is packed. A linear layer learns to look as far back as it
            is trained.
        recall_share (`float`, *optional*, defaults to 0.0):
            Share of the rows of plain text in which a passage comes again or a key-value line is asked for, see
            [`RepairArguments`].

    Changed defaults:
        `learning_rate` 1e-2 (mixers are few and start useful; measured), `lr_scheduler_type` cosine, `warmup_steps` 3,
        `weight_decay` 0, `adam_beta2` 0.95, `logging_steps` 10,
        `logging_nan_inf_filter` False (a NaN is an error, not something to skip), `save_only_model` False.
    """

    # the fields that HfArgumentParser may receive as a JSON string
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained`, when the model is given as a name or path."}
    )
    layers: str | None = field(
        default=None,
        metadata={"help": "Attention sites to distil, as comma-separated indices or names; all by default."},
    )
    projections: str = field(
        default="shared",
        metadata={"help": "What trains beside the mixers.", "choices": ["shared", "low_rank", "full"]},
    )
    projection_rank: int = field(default=8, metadata={"help": "Rank of the low-rank differences."})
    projection_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of what is added to projections; 1e-4 for full by default."}
    )
    initialization: str = field(
        default="all",
        metadata={"help": f"all, none, or comma-separated: {', '.join(INITIALIZATIONS)}."},
    )
    calibration_batches: int = field(
        default=2, metadata={"help": "Training batches from which half_lives and output_scale are read."}
    )
    window_dropout: float = field(
        default=0.0, metadata={"help": "Share of training forwards in which a mixer does without its window."}
    )
    dataset_text_field: str = field(
        default="text", metadata={"help": "Column of text of a dataset without `input_ids`."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens per packed training sequence."})
    recall_share: float = field(
        default=0.0, metadata={"help": "Share of packed rows in which something earlier is asked for again."}
    )

    learning_rate: float = field(default=1e-2, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    warmup_steps: float = field(default=3, metadata={"help": "Linear warmup over warmup_steps (a ratio if below 1)."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay for AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 for AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X updates steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Skip NaN and infinite losses in logs."})

    def __post_init__(self):
        super().__post_init__()
        if self.projections == "full" and self.projection_learning_rate is None:
            self.projection_learning_rate = 1e-4
        self.layers = str(self.layers) if isinstance(self.layers, int) else self.layers
        if self.layers is not None and not isinstance(self.layers, str):  # the fields are JSON and command-line values
            self.layers = ",".join(str(layer) for layer in self.layers)
        if self.max_length < 2:
            raise HybridConfigError(f"max_length must be at least 2 tokens; got {self.max_length}.")
        self.initialization = ",".join(check_initialization(self.initialization)) or "none"
        check_int("HybridTrainingArguments", "calibration_batches", self.calibration_batches, 1)
        check_recall_share(self.recall_share)
        if not isinstance(self.window_dropout, int | float) or not 0.0 <= self.window_dropout < 1.0:
            raise HybridConfigError(f"window_dropout must be a number in [0, 1); got {self.window_dropout!r}.")

    @property
    def initializations(self) -> tuple[str, ...]:
        """`initialization` as names."""
        return check_initialization(self.initialization)

    def selected_layers(self) -> list[int | str] | None:
        """`layers` as what `convert_to_hybrid` takes."""
        return parse_layers(self.layers)


def parse_layers(text: str | None) -> list[int | str] | None:
    """`"1,3,model.layers.5.self_attn"` -> `[1, 3, "model.layers.5.self_attn"]`; `None` stays."""
    if text is None or text.strip() == "all":
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [int(part) if part.lstrip("-").isdigit() else part for part in parts]
