"""`hf-hybrid ablate`: what the two halves of a hybrid's mixers are good for."""

import torch
from rich.console import Console
from rich.table import Table

from ..evaluation import ablation
from ..evaluation.perplexity import perplexity
from .options import EvalTextArguments, PlacedModelArguments


OPTIONS = (PlacedModelArguments, EvalTextArguments)


def run(model: PlacedModelArguments, text: EvalTextArguments) -> None:
    """What the states of a hybrid with windows contribute: their share of each output, and perplexity without them."""
    console, tokenizer = Console(), model.tokenizer()
    ids = torch.tensor(text.sequences(tokenizer)["input_ids"])
    loaded = model.load()
    shares = ablation.state_share(loaded, [{"input_ids": row[None].to(loaded.device)} for row in ids])
    table = Table("layer", "share of the state", title=model.model, title_justify="left")
    for name, share in shares.items():
        table.add_row(name.removesuffix(".hybrid"), f"{share:.1%}")
    console.print(table)
    console.print(f"perplexity {perplexity(loaded, ids):.3f} over {ids.numel():,} tokens of {text.eval_dataset}")
    for part, left in (("state", "only windows and sinks"), ("window", "only states")):
        with ablation.ablate(loaded, part):
            console.print(f"perplexity {perplexity(loaded, ids):.3f} with {left}")
