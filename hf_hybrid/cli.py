"""`hf-hybrid`: a thin shell over the library's functions, one subcommand each. Options are dataclasses parsed by `HfArgumentParser`."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.utils import logging

from . import dynamic
from .ablation import ablate, state_share
from .bank import load_mixer_bank
from .callbacks import GreedyLayerSwapCallback
from .configuration_hybrid import check_selection
from .distillation import finalize_, swap_layers_
from .errors import DatasetError, HybridConfigError, HybridError, OutputFolderError, UnsupportedModelError
from .mixers import MixerConfig, build_mixer, resolve_mixer_config
from .modeling_hybrid import AUTO_CLASSES, HybridModelMixin, convert_to_hybrid, describe, find_attention_sites
from .ops import fast_fp32_matmul
from .probe import probe_attention
from .report import accuracy_interval, compare_speed, perplexity
from .tasks import LabelWordTask
from .trainer import HybridTrainer, pack_text
from .training_args import HybridTrainingArguments, parse_layers


console = Console()


@dataclass
class ModelArguments:
    """Which model."""

    model: str = field(metadata={"help": "Name on the Hub or path of the model.", "aliases": ["--model_name_or_path"]})
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the weights.", "choices": ["auto", "float32", "bfloat16", "float16"]},
    )

    def load(self):
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype).eval()

    def architecture(self, config) -> type:
        """The model class that the config names: ours, transformers', or of the last Auto class that knows the config (a head rather than none)."""
        name = (config.architectures or [""])[0]
        architecture = getattr(dynamic if name.startswith("Hybrid") else transformers, name, None) if name else None
        if architecture is not None:
            return architecture
        known = [auto._model_mapping[type(config)] for auto in AUTO_CLASSES if type(config) in auto._model_mapping]
        if not known:
            raise UnsupportedModelError(f"{self.model}: no Auto class builds a model of type {config.model_type!r}.")
        return known[-1][0] if isinstance(known[-1], (tuple, list)) else known[-1]

    def probed(self):
        """The model and what its dry forward finds: without its weights (on the meta device), or with them if that cannot be run."""
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
class MixerArguments:
    """Which mixer, with which settings."""

    mixer: str = field(default="linear_attention", metadata={"help": "A registered mixer."})
    window_size: int | None = field(
        default=None, metadata={"help": "Tokens attended exactly; the mixer's default if not given."}
    )
    num_sink_tokens: int | None = field(
        default=None, metadata={"help": "First tokens attended for ever; the mixer's default if not given."}
    )
    feature_map: str | None = field(default=None, metadata={"help": "Feature map; the mixer's default if not given."})
    mixer_config: str | None = field(
        default=None, metadata={"help": "Any other settings as JSON, e.g. '{\"output_gate\": false}'."}
    )

    def config(self) -> MixerConfig:
        given = {k: v for k, v in vars(self).items() if k not in ("mixer", "mixer_config") and v is not None}
        return resolve_mixer_config({"name": self.mixer, **self._other_settings(), **given})

    def _other_settings(self) -> dict:
        if self.mixer_config is None:
            return {}
        try:
            settings = json.loads(self.mixer_config)
        except json.JSONDecodeError as error:
            raise HybridConfigError(f"--mixer_config is not JSON ({error}); got {self.mixer_config!r}.") from None
        if not isinstance(settings, dict):
            raise HybridConfigError(f"--mixer_config must be a JSON object; got {self.mixer_config!r}.")
        return settings


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


@dataclass
class SearchArguments:
    """The search."""

    mixer_bank: str = field(metadata={"help": "Folder or Hub repository that `hf-hybrid distill` wrote."})
    metric: str = field(default="loss", metadata={"help": "loss, or accuracy with --prompt and --label_words."})
    max_drop: str = field(
        default="2%", metadata={"help": 'Allowed loss of the metric: absolute, or relative as "2%%".'}
    )
    max_layers: int | None = field(default=None, metadata={"help": "Stop after this many swaps."})
    keep: str = field(
        default="most_linear", metadata={"help": "Which result to save.", "choices": ["most_linear", "best"]}
    )
    resume: bool = field(default=False, metadata={"help": "Continue an interrupted search in output_dir."})


@dataclass
class ConvertArguments:
    """Conversion without training, or with the students of a bank."""

    output_dir: str = field(metadata={"help": "Where the hybrid checkpoint goes."})
    layers: str | None = field(default=None, metadata={"help": "Comma-separated indices or names; all by default."})
    mixer_bank: str | None = field(default=None, metadata={"help": "Use these students instead of fresh mixers."})


@dataclass
class BenchmarkArguments:
    """What to time."""

    teacher: str | None = field(
        default=None, metadata={"help": "Model to compare with; by default the hybrid's base model."}
    )
    lengths: str = field(default="1024,4096", metadata={"help": "Comma-separated context lengths, in tokens."})
    decode_tokens: int = field(default=8, metadata={"help": "Tokens decoded per round."})
    rounds: int = field(default=3, metadata={"help": "Side-by-side rounds; medians are reported."})


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


def distill(args: HybridTrainingArguments, model: ModelArguments, mixer: MixerArguments, text: TextArguments) -> None:
    """Distil every attention layer on text and write the mixer bank to output_dir."""
    data = load_rows(text.dataset, text.dataset_split)
    trainer = HybridTrainer(model.load(), mixer.config(), args, train_dataset=data, processing_class=model.tokenizer())
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    trainer.save_mixer_bank()
    worst = max(trainer.last_block_losses.items(), key=lambda item: item[1], default=("none", float("nan")))
    console.print(
        f"Distilled {len(trainer.distill_sites)} layers into {args.output_dir}; largest local loss {worst[1]:.3f} ({worst[0]})."
    )


def search(
    args: HybridTrainingArguments, model: ModelArguments, task: TaskArguments, options: SearchArguments
) -> None:
    """Swap layers greedily on your data, with the students of a bank, and save the hybrid to output_dir."""
    tokenizer = model.tokenizer()
    labels = task.task(tokenizer)
    data = task.sequences(tokenizer) if labels is None else task.examples(labels)
    trainer = HybridTrainer(
        model.load(), None, args, mixer_bank=options.mixer_bank, eval_dataset=data, processing_class=tokenizer,
        **({} if labels is None else labels.trainer_kwargs()),
    )  # fmt: skip
    if not options.resume:
        trainer.check_output_folder()
    callback = GreedyLayerSwapCallback(
        options.metric, options.max_drop, max_layers=options.max_layers, keep=options.keep
    )
    report = callback.search(trainer)
    trainer.save_model()
    trainer.create_model_card()
    console.print(
        f"Swapped {len(trainer.swapped_layers())} of {len(trainer.distill_sites)} layers, {report.metric} {report.base:.4g} -> "
        f"{(report.commits[-1].metrics[report.metric] if report.commits else report.base):.4g} (floor {report.floor:.4g}, {len(report.trials)} "
        f"trials); saved to {args.output_dir}."
    )


def convert(model: ModelArguments, mixer: MixerArguments, options: ConvertArguments) -> None:
    """Replace layers without training, or by the students of a bank, and save the hybrid."""
    if os.path.exists(os.path.join(options.output_dir, "config.json")):
        raise OutputFolderError(f"output_dir={options.output_dir!r} holds a model already. Choose another folder.")
    loaded, tokenizer, layers = model.load(), model.tokenizer(), parse_layers(options.layers)
    if options.mixer_bank:
        chosen = (
            check_selection(layers, find_attention_sites(loaded), describe(loaded)) if layers is not None else None
        )
        load_mixer_bank(loaded, options.mixer_bank)
        swap_layers_(loaded, list(loaded.distill_sites) if chosen is None else [site.name for site in chosen])
        finalize_(loaded)
    else:
        convert_to_hybrid(loaded, mixer.config(), layers)
    loaded.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    console.print(f"Saved a hybrid with {len(loaded.config.hybrid['sites'])} linear layers to {options.output_dir}.")


def evaluate(model: ModelArguments, task: TaskArguments) -> None:
    """Perplexity of text, or accuracy of label words, of any model, hybrid or not."""
    loaded, tokenizer = model.load(), model.tokenizer()
    labels = task.task(tokenizer)
    if labels is None:
        ids = torch.tensor(task.sequences(tokenizer)["input_ids"])
        console.print(f"perplexity {perplexity(loaded, ids):.3f} over {ids.numel():,} tokens of {task.eval_dataset}")
        return
    examples, correct = task.examples(labels), 0
    for start in range(0, len(examples), 32):
        batch = labels.collate([examples[i] for i in range(start, min(start + 32, len(examples)))])
        targets = batch.pop("labels")
        with torch.no_grad():
            logits = loaded(**{k: v.to(loaded.device) if torch.is_tensor(v) else v for k, v in batch.items()}).logits
        correct += int((labels.label_logits(logits).argmax(-1).cpu() == targets).sum())
    low, high = accuracy_interval(correct, len(examples))
    console.print(
        f"accuracy {correct / len(examples):.4f} (95 % interval {low:.4f} - {high:.4f}) on {len(examples)} examples of {task.eval_dataset}"
    )


def ablation(model: ModelArguments, text: EvalTextArguments) -> None:
    """What the states of a hybrid with windows contribute: their share of each layer's output, and perplexity without them."""
    loaded, tokenizer = model.load(), model.tokenizer()
    ids = torch.tensor(text.sequences(tokenizer)["input_ids"])
    shares = state_share(loaded, [{"input_ids": row[None].to(loaded.device)} for row in ids])
    table = Table("layer", "share of the state", title=model.model, title_justify="left")
    for name, share in shares.items():
        table.add_row(name.removesuffix(".hybrid"), f"{share:.1%}")
    console.print(table)
    console.print(f"perplexity {perplexity(loaded, ids):.3f} over {ids.numel():,} tokens of {text.eval_dataset}")
    for part, left in (("state", "only windows and sinks"), ("window", "only states")):
        with ablate(loaded, part):
            console.print(f"perplexity {perplexity(loaded, ids):.3f} with {left}")


def benchmark(model: ModelArguments, options: BenchmarkArguments) -> None:
    """Prefill and decode time and cache bytes of a hybrid beside its teacher's."""
    hybrid = model.load()
    if not isinstance(hybrid, HybridModelMixin):
        raise HybridConfigError(
            f"{model.model} is not a hybrid checkpoint; nothing to compare. Make one with `hf-hybrid convert` or `search`."
        )
    name = options.teacher or hybrid.config.hybrid["base_model"]["name_or_path"]
    if not name:
        raise HybridConfigError("The checkpoint does not name its base model. Pass --teacher.")
    teacher = AutoModelForCausalLM.from_pretrained(name, dtype=hybrid.dtype).eval()
    table = Table(
        "tokens", "what", "teacher", "hybrid", "ratio", title=f"{model.model} beside {name}", title_justify="left"
    )
    for length in parse_layers(options.lengths):
        speed = compare_speed({"teacher": teacher, "hybrid": hybrid}, length, options.decode_tokens, options.rounds)
        for what in ("prefill", "decode"):
            ours, theirs = getattr(speed["hybrid"], what), getattr(speed["teacher"], what)
            table.add_row(
                f"{length:,}",
                what,
                f"{theirs.seconds * 1e3:,.1f} ms",
                f"{ours.seconds * 1e3:,.1f} ms",
                f"{ours.ratio:.2f}x",
            )
        ours, theirs = speed["hybrid"].cache_bytes, speed["teacher"].cache_bytes
        table.add_row(
            f"{length:,}", "cache", f"{theirs / 2**20:.2f} MiB", f"{ours / 2**20:.2f} MiB", f"{theirs / ours:.2f}x"
        )
    console.print(table)


def inspect(model: ModelArguments, mixer: MixerArguments) -> None:
    """What can be made linear in a model, what would be lost, and what is kept in place of its cache. Reads the config, not the weights."""
    (skeleton, probed), config = model.probed(), mixer.config()
    linear = skeleton.config.hybrid_sites() if isinstance(skeleton, HybridModelMixin) else {}
    table = Table("#", "site", "now", "heads", "causal", "state")
    caches: list[
        tuple[int, int | None, int | None]
    ] = []  # of each causal site: bytes per token, the host's window, bytes of a state
    more_parameters = 0
    for index, site in enumerate(probed.sites):
        cell, state = "-", None
        try:
            fresh = build_mixer(config.fitted(site.causal), **site.sizes())
        except HybridConfigError:  # no bidirectional form
            cell = "refused"
        else:
            more_parameters += sum(parameter.numel() for parameter in fresh.parameters())
            if site.causal:
                state = fresh.state_bytes(dtype=skeleton.dtype)
                cell = f"{state / 1024:,.0f} KiB"
        if site.causal:
            numbers = probed.cached.get(site.name) or site.num_key_value_heads * (site.head_dim + site.value_dim)
            caches.append((numbers * skeleton.dtype.itemsize, probed.windows.get(site.name), state))
        table.add_row(
            str(index), site.name, linear[site.name][1]["name"] if site.name in linear else "softmax",
            f"{site.num_heads}/{site.num_key_value_heads} x {site.head_dim}", "yes" if site.causal else "no", cell,
        )  # fmt: skip
    console.print(table)
    console.print(f"heads: queries/keys x size; state: of {config.name}, one sequence, {skeleton.dtype}")
    for what, count in Counter(what for per_site in probed.lost.values() for what in per_site).items():
        console.print(f"{count} of these layers would lose {what}")
    for name, reason in probed.excluded.items():
        console.print(f"stays softmax: {name} {reason}")
    console.print(
        f"{len(linear)} of {len(probed.sites)} convertible layers of {model.model} are linear. "
        f"{sum(parameter.numel() for parameter in skeleton.parameters()):,} parameters; {more_parameters:,} more with {config.name} everywhere."
    )
    if caches:
        lengths = Table(
            "tokens", "KV cache", f"all {config.name}", title="the layers above, one sequence", title_justify="left"
        )
        for length in (4096, 32768, 131072):
            keys = [per_token * (length if window is None else min(length, window)) for per_token, window, _ in caches]
            states = [kept if state is None else state for kept, (_, _, state) in zip(keys, caches, strict=True)]
            lengths.add_row(f"{length:,}", f"{sum(keys) / 2**20:,.1f} MiB", f"{sum(states) / 2**20:,.1f} MiB")
        console.print(lengths)


def demo(options) -> None:
    """The whole method on a real pretrained model: SmolLM2-135M becomes a sentiment hybrid."""
    from .demo.run import run_demo

    run_demo(options, console)


def _commands() -> dict[str, tuple[Callable, list[type]]]:
    from .demo.run import DemoArguments

    return {
        "distill": (distill, [HybridTrainingArguments, ModelArguments, MixerArguments, TextArguments]),
        "search": (search, [HybridTrainingArguments, ModelArguments, TaskArguments, SearchArguments]),
        "convert": (convert, [ModelArguments, MixerArguments, ConvertArguments]),
        "evaluate": (evaluate, [ModelArguments, TaskArguments]),
        "ablate": (ablation, [ModelArguments, EvalTextArguments]),
        "benchmark": (benchmark, [ModelArguments, BenchmarkArguments]),
        "inspect": (inspect, [ModelArguments, MixerArguments]),
        "demo": (demo, [DemoArguments]),
    }


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = _commands()
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in commands:
        lines = [f"  {name:10s} {function.__doc__.splitlines()[0]}" for name, (function, _) in commands.items()]
        text = "usage: hf-hybrid COMMAND [options]    (hf-hybrid COMMAND --help)\n\n" + "\n".join(lines)
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(text, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    function, types = commands[arguments[0]]
    parser = HfArgumentParser(types, prog=f"hf-hybrid {arguments[0]}", description=function.__doc__)
    logging.set_verbosity_warning()
    try:
        options = parser.parse_args_into_dataclasses(_model_first(arguments[1:]))
        with fast_fp32_matmul():
            function(*options)
    except KeyboardInterrupt:
        print(
            "interrupted; what was finished is on disk: run again with --resume (distill: --resume_from_checkpoint true) to continue",
            file=sys.stderr,
        )
        return 130
    except Exception as error:  # one line for every error; the traceback is for those who ask
        if os.environ.get("HF_HYBRID_TRACEBACK"):
            raise
        kind = "" if isinstance(error, HybridError) else f"{type(error).__name__}: "
        print(f"hf-hybrid {arguments[0]}: {kind}{error} (HF_HYBRID_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    return 0


def _model_first(arguments: list[str]) -> list[str]:
    """`hf-hybrid inspect NAME …` is `hf-hybrid inspect --model NAME …`."""
    if arguments and not arguments[0].startswith("-"):
        return ["--model", *arguments]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
