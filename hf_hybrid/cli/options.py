"""Options that several verbs share, and what they stand for: models, mixers, text, labelled examples."""

import json
import os
from dataclasses import dataclass, field, replace

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .. import modeling_hybrid
from ..conversion.probe import ProbedModel, probe_attention
from ..distillation.data import pack_text
from ..errors import DatasetError, HybridConfigError, UnsupportedModelError
from ..evaluation.label_words import LabelWordTask
from ..hub.auto_classes import AUTO_CLASSES
from ..mixers import MixerConfig, resolve_mixer_config


@dataclass
class ModelArguments:
    """Which model."""

    model: str = field(metadata={"help": "Name on the Hub or path of the model.", "aliases": ["--model_name_or_path"]})
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the weights.", "choices": ["auto", "float32", "bfloat16", "float16"]},
    )

    def load(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype).eval()

    def architecture(self, config: PreTrainedConfig) -> type[PreTrainedModel]:
        """
        The model class that the config names, ours or transformers'; else that of the last Auto class that knows the
        config (a head rather than none). What the file names is looked up, never imported.
        """
        name = (config.architectures or [""])[0]
        base = getattr(transformers, name.removeprefix("Hybrid"), None) if name else None
        if isinstance(base, type) and issubclass(base, PreTrainedModel):
            return getattr(modeling_hybrid, name) if name.startswith("Hybrid") else base
        mappings = [auto._model_mapping for auto in AUTO_CLASSES]
        known = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
        if not known:
            raise UnsupportedModelError(f"{self.model}: no Auto class builds a model of type {config.model_type!r}.")
        return known[-1][0] if isinstance(known[-1], (tuple, list)) else known[-1]

    def probed(self) -> tuple[PreTrainedModel, ProbedModel]:
        """
        The model and what its dry forward finds: without its weights (on the meta device), or with them if that cannot
        be run.
        """
        config = AutoConfig.from_pretrained(self.model)
        architecture = self.architecture(config)
        dtype = getattr(torch, self.dtype) if self.dtype != "auto" else (config.dtype or torch.float32)
        with torch.device("meta"):
            model = architecture(config).eval().to(dtype)
        try:
            return model, probe_attention(model)
        except UnsupportedModelError as error:
            if error.__cause__ is None:  # the forward ran: the model has no sites
                raise
        model = architecture.from_pretrained(self.model, dtype=self.dtype).eval()
        return model, probe_attention(model)

    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.model)


@dataclass
class PlacedModelArguments(ModelArguments):
    """Which model, and where it runs."""

    device: str | None = field(
        default=None,
        metadata={"help": "Where it runs, e.g. cuda:1 or cpu. By default the accelerator, if there is one."},
    )

    def load(self) -> PreTrainedModel:
        return load_on(self.model, self.dtype, self.chosen_device())

    def chosen_device(self) -> str:
        """
        Raises:
            HybridConfigError: If this machine has no such device.
        """
        known = ["cpu"]
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None:
            kind = accelerator.type
            known = [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count())), "cpu"]
        if self.device is None:
            return known[0]
        if self.device not in known:
            raise HybridConfigError(
                f"--device must be a device of this machine ({', '.join(known)}); got {self.device!r}. Choose one of "
                "them, or leave it out."
            )
        return self.device


def load_on(name: str, dtype: str | torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """A causal language model in eval mode, loaded right onto `device` (quantised ones cannot be moved later)."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device).eval()


@dataclass
class MixerArguments:
    """Which mixer, with which settings."""

    mixer: str = field(default="linear_attention", metadata={"help": "A registered mixer."})
    window_size: int | None = field(
        default=None, metadata={"help": "Tokens attended exactly; the mixer's default if not given."}
    )
    num_sink_tokens: int | None = field(
        default=None, metadata={"help": "First tokens attended for ever; the mixer's default if not given."}
    )
    num_memory_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens beyond the window attended exactly, per head; the mixer's default if not given."},
    )
    feature_map: str | None = field(default=None, metadata={"help": "Feature map; the mixer's default if not given."})
    mixer_config: str | None = field(
        default=None, metadata={"help": "Any other settings as JSON, e.g. '{\"output_gate\": false}'."}
    )

    def config(self) -> MixerConfig:
        given = {k: v for k, v in vars(self).items() if k not in ("mixer", "mixer_config") and v is not None}
        return resolve_mixer_config({"name": self.mixer, **json_object("--mixer_config", self.mixer_config), **given})


@dataclass
class TextArguments:
    """Text to distil on."""

    dataset: str = field(metadata={"help": "Name on the Hub, or a .txt, .json, .jsonl, .csv or .parquet file."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset from the Hub."})


@dataclass
class EvalTextArguments:
    """Text to measure on."""

    eval_dataset: str = field(metadata={"help": "Name on the Hub, or a .txt, .json, .jsonl, .csv or .parquet file."})
    eval_split: str = field(default="validation", metadata={"help": "Split of a dataset from the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    max_examples: int | None = field(default=None, metadata={"help": "Use the first N examples."})
    eval_length: int = field(default=1024, metadata={"help": "Tokens per sequence when measuring text."})

    def wanted_columns(self) -> list[str]:
        return [self.text_column]

    def rows(self):
        data = load_rows(self.eval_dataset, self.eval_split)
        missing = [column for column in self.wanted_columns() if column not in data.column_names]
        if missing:
            raise DatasetError(
                f"{self.eval_dataset} has no column {missing[0]!r}; it has {', '.join(data.column_names)}."
            )
        return data if self.max_examples is None else data.select(range(min(self.max_examples, len(data))))

    def sequences(self, tokenizer):
        packed = pack_text(self.rows()[self.text_column], tokenizer, self.eval_length, self.eval_dataset)
        return packed.map(lambda row: {"labels": row["input_ids"]})


@dataclass
class TaskArguments(EvalTextArguments):
    """Data to measure on: text (loss, perplexity), or labelled examples (accuracy of label words)."""

    label_column: str = field(default="label", metadata={"help": "Column with the class index."})
    prompt: str | None = field(
        default=None, metadata={"help": "Prompt with {text}, ending where the label word follows."}
    )
    label_words: str | None = field(
        default=None, metadata={"help": "Comma-separated words of label 0, 1, …, with leading spaces."}
    )

    def wanted_columns(self) -> list[str]:
        return [self.text_column] if self.prompt is None else [self.text_column, self.label_column]

    def task(self, tokenizer) -> LabelWordTask | None:
        if (self.prompt is None) != (self.label_words is None):
            raise HybridConfigError("--prompt and --label_words belong together; got one of them.")
        return None if self.prompt is None else LabelWordTask(tokenizer, self.prompt, self.label_words.split(","))

    def examples(self, task: LabelWordTask):
        return task.dataset([{"text": row[self.text_column], "label": row[self.label_column]} for row in self.rows()])

    def prepared(self, task: LabelWordTask | None, tokenizer, other: str | None = None):
        """Rows to measure on: `--eval_dataset`, or all of another file or dataset of the same kind."""
        if other is not None:
            return replace(self, eval_dataset=other, max_examples=None).prepared(task, tokenizer)
        return self.sequences(tokenizer) if task is None else self.examples(task)


def load_rows(name: str, split: str):
    """A `datasets.Dataset` from a Hub name or a local file."""
    from datasets import load_dataset

    kinds = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    extension = os.path.splitext(name)[1]
    if extension in kinds:
        if not os.path.exists(name):
            raise DatasetError(f"The file {name!r} does not exist.")
        return load_dataset(kinds[extension], data_files=name, split="train")
    return load_dataset(name, split=split)


def json_object(option: str, text: str | None) -> dict:
    """
    The JSON object in the value of an option; empty if the option was not given.

    Raises:
        HybridConfigError: If it is anything else.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise HybridConfigError(f"{option} is not JSON ({error}); got {text!r}.") from None
    if not isinstance(value, dict):
        raise HybridConfigError(f"{option} must be a JSON object; got {text!r}.")
    return value
