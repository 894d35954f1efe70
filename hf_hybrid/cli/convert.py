"""`hf-hybrid convert`: a model becomes a hybrid without a search."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from transformers import PreTrainedModel

from ..adapters.bank import load_mixer_bank
from ..conversion.sites import select_heads
from ..distillation.arguments import parse_layers
from ..distillation.data import pack_text
from ..errors import DatasetError, HybridConfigError, OutputFolderError
from ..mixers import MixerConfig
from ..modeling_hybrid import describe
from ..search.row_scorer import heads_of
from ..search.trace import steps_of
from ..surgery import (
    HeadPlan,
    convert_to_hybrid,
    finalize_,
    find_attention_sites,
    hybrid_layers,
    plan_heads,
    set_linear_heads_,
)
from .options import MixerArguments, ModelArguments, json_object, load_rows
from .preset_options import PresetArguments


@dataclass
class ConvertArguments:
    """Conversion without training, or with the students of a bank."""

    output_dir: str = field(metadata={"help": "Where the hybrid checkpoint goes."})
    layers: str | None = field(default=None, metadata={"help": "Comma-separated indices or names; all by default."})
    heads: str | None = field(
        default=None,
        metadata={
            "help": "Key-value heads that become linear, by the name of the site as JSON, e.g. "
            "'{\"model.layers.3.self_attn\": [0, 2]}'. Without --layers, these layers alone become linear."
        },
    )
    mixer_bank: str | None = field(default=None, metadata={"help": "Use these students instead of fresh mixers."})
    trace: str | None = field(
        default=None,
        metadata={
            "help": "A search's swap_trace.jsonl: convert what was linear after --layers N of its swaps. Needs "
            "--mixer_bank."
        },
    )


@dataclass
class PlanArguments:
    """A budget of cache, shared out among the heads: see `plan_heads`."""

    share: float | None = field(
        default=None,
        metadata={"help": "Plan all heads for this share of the cache at --length tokens, in (0, 1]; needs --dataset."},
    )
    length: int = field(default=4096, metadata={"help": "Tokens at which the share is counted."})
    num_kept_heads: float = field(
        default=0, metadata={"help": "Of a plan: heads that keep their softmax; below 1, a share of all heads."}
    )
    large_memory_tokens: int | None = field(
        default=None, metadata={"help": "Of a plan: memory of heads that look things up; 1,000 tokens with all else."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Text by which a plan ranks heads: a name on the Hub, or a .txt, .json, .jsonl … file."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a dataset from the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})

    def plan(self, model: PreTrainedModel, tokenizer, mixer: MixerConfig, num_memory_tokens: int | None) -> HeadPlan:
        """
        Raises:
            DatasetError: Without text of a passage's length.
        """
        if self.dataset is None:
            raise DatasetError("--share needs --dataset: text by which heads are ranked.")
        rows = load_rows(self.dataset, self.dataset_split)
        if self.text_column not in rows.column_names:
            raise DatasetError(
                f"{self.dataset} has no column {self.text_column!r}; it has {', '.join(rows.column_names)}."
            )
        texts = rows[: min(len(rows), TEXTS)][self.text_column]
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * PASSAGE
        passages = pack_text(texts, tokenizer, min(PASSAGE, longest // 2), self.dataset)[:PASSAGES]["input_ids"]
        kept = self.num_kept_heads
        return plan_heads(
            model,
            torch.tensor(passages),
            share=self.share,
            length=self.length,
            mixer=mixer,
            num_kept_heads=float(kept) if 0 < kept < 1 else int(kept),
            large_memory_tokens=self.large_memory_tokens,
            **({} if num_memory_tokens is None else {"num_memory_tokens": num_memory_tokens}),
        )


# What a plan reads: so many passages of so many tokens, of the first texts.
PASSAGES, PASSAGE, TEXTS = 4, 512, 1000
STAGES = ("mixer", "plan")
OPTIONS = (ModelArguments, MixerArguments, ConvertArguments, PlanArguments, PresetArguments)


def run(
    model: ModelArguments,
    mixer: MixerArguments,
    options: ConvertArguments,
    budget: PlanArguments,
    preset: PresetArguments,
) -> None:
    """Replace layers or single heads without training, or by the students of a bank, and save the hybrid."""
    if preset.dry_run:
        return preset.show(mixer, options, budget)
    if os.path.exists(os.path.join(options.output_dir, "config.json")):
        raise OutputFolderError(f"output_dir={options.output_dir!r} holds a model already. Choose another folder.")
    layers = None if options.trace is not None else parse_layers(options.layers)
    heads = None if options.heads is None else json_object("--heads", options.heads)
    loaded, tokenizer = model.load(), model.tokenizer()
    if options.mixer_bank:
        if budget.share is not None:
            raise HybridConfigError("--share plans fresh mixers; got --mixer_bank too. Leave one of them out.")
        given = [name for name, value in vars(mixer).items() if value != getattr(MixerArguments, name, None)]
        if given:
            raise HybridConfigError(
                f"--mixer_bank names its mixer, so that --{given[0]} would be ignored. Leave it out, or leave the bank "
                "out."
            )
        if options.trace is not None:
            layers, heads = _step(options, [site.name for site in find_attention_sites(loaded)])
        _use_bank(loaded, options.mixer_bank, layers, heads)
    elif options.trace is not None:
        raise HybridConfigError("--trace names a bank's students: pass --mixer_bank, the bank that was searched.")
    elif budget.share is not None:
        if layers is not None or heads is not None:
            raise HybridConfigError("--share plans every head, so that --layers and --heads would be ignored.")
        budget.plan(loaded, tokenizer, mixer.config(), mixer.num_memory_tokens).convert(loaded)
    else:
        convert_to_hybrid(loaded, mixer.config(), layers, heads=heads)
    loaded.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    Console().print(f"Saved a hybrid with {len(loaded.config.hybrid['sites'])} linear layers to {options.output_dir}.")


def _step(options: ConvertArguments, sites: list[str]) -> tuple[list[str] | None, dict | None]:
    """Layers, or heads by layer, of a point on a search's path."""
    steps = steps_of(options.trace)
    try:
        count = int(options.layers or max(steps))
    except ValueError:
        count = -1
    if count not in steps or options.heads is not None:
        raise HybridConfigError(
            f"--trace {options.trace} takes --layers N, a number of swaps from {min(steps)} to {max(steps)}, and no "
            f"--heads; got --layers {options.layers}."
        )
    found = heads_of(steps[count], sites)
    return (list(found), None) if None in found.values() else (None, found)


def _use_bank(model: PreTrainedModel, folder: str, layers: Sequence[int | str] | None, heads: dict | None) -> None:
    """Make `model` a hybrid of the bank's students at these layers and heads: all that the bank has, by default."""
    wanted = None
    if layers is not None or heads is not None:
        selected = select_heads(layers, heads, find_attention_sites(model), describe(model))
        # without --heads, all heads that the bank has of a layer
        wanted = {name: None if heads is None else some for name, (_, some) in selected.items()}
    load_mixer_bank(model, folder)
    set_linear_heads_(model, dict.fromkeys(hybrid_layers(model)) if wanted is None else wanted)
    finalize_(model)
