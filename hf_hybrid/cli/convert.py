"""`hf-hybrid convert`: a model becomes a hybrid without a search."""

import os
from dataclasses import dataclass, field

from rich.console import Console
from transformers import PreTrainedModel

from ..adapters.bank import load_mixer_bank
from ..conversion.sites import select_heads
from ..distillation.arguments import parse_layers
from ..errors import HybridConfigError, OutputFolderError
from ..modeling_hybrid import describe
from ..surgery import convert_to_hybrid, finalize_, find_attention_sites, hybrid_layers, set_linear_heads_
from .options import MixerArguments, ModelArguments, json_object


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


OPTIONS = (ModelArguments, MixerArguments, ConvertArguments)


def run(model: ModelArguments, mixer: MixerArguments, options: ConvertArguments) -> None:
    """Replace layers or single heads without training, or by the students of a bank, and save the hybrid."""
    if os.path.exists(os.path.join(options.output_dir, "config.json")):
        raise OutputFolderError(f"output_dir={options.output_dir!r} holds a model already. Choose another folder.")
    layers = parse_layers(options.layers)
    heads = None if options.heads is None else json_object("--heads", options.heads)
    loaded, tokenizer = model.load(), model.tokenizer()
    if options.mixer_bank:
        given = [name for name, value in vars(mixer).items() if value != getattr(MixerArguments, name, None)]
        if given:
            raise HybridConfigError(
                f"--mixer_bank names its mixer, so that --{given[0]} would be ignored. Leave it out, or leave the bank "
                "out."
            )
        _use_bank(loaded, options.mixer_bank, layers, heads)
    else:
        convert_to_hybrid(loaded, mixer.config(), layers, heads=heads)
    loaded.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    Console().print(f"Saved a hybrid with {len(loaded.config.hybrid['sites'])} linear layers to {options.output_dir}.")


def _use_bank(model: PreTrainedModel, folder: str, layers: list[int | str] | None, heads: dict | None) -> None:
    """Make `model` a hybrid of the bank's students at these layers and heads: all that the bank has, by default."""
    wanted = None
    if layers is not None or heads is not None:
        selected = select_heads(layers, heads, find_attention_sites(model), describe(model))
        # without --heads, all heads that the bank has of a layer
        wanted = {name: None if heads is None else some for name, (_, some) in selected.items()}
    load_mixer_bank(model, folder)
    set_linear_heads_(model, dict.fromkeys(hybrid_layers(model)) if wanted is None else wanted)
    finalize_(model)
