"""`hf-hybrid evaluate`: how good a model is, hybrid or not."""

import torch
from rich.console import Console

from ..evaluation.intervals import accuracy_interval
from ..evaluation.perplexity import perplexity
from .options import PlacedModelArguments, TaskArguments


OPTIONS = (PlacedModelArguments, TaskArguments)


def run(model: PlacedModelArguments, task: TaskArguments) -> None:
    """Perplexity of text, or accuracy of label words, of any model, hybrid or not."""
    tokenizer, console = model.tokenizer(), Console()
    labels = task.task(tokenizer)
    if labels is None:
        ids = torch.tensor(task.sequences(tokenizer)["input_ids"])
        loss = perplexity(model.load(), ids)
        console.print(f"perplexity {loss:.3f} over {ids.numel():,} tokens of {task.eval_dataset}")
        return
    examples = task.examples(labels)
    correct = labels.count_correct(model.load(), examples)
    low, high = accuracy_interval(correct, len(examples))
    console.print(
        f"accuracy {correct / len(examples):.4f} (95 % interval {low:.4f} - {high:.4f}) on {len(examples)} examples of "
        f"{task.eval_dataset}"
    )
