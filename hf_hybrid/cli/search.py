"""`hf-hybrid search`: a mixer bank and a task become a hybrid."""

import math
from dataclasses import dataclass, field

from rich.console import Console

from ..distillation.arguments import HybridTrainingArguments
from ..distillation.repair_arguments import repair_arguments
from ..distillation.trainer import HybridTrainer
from ..errors import DatasetError
from ..search.callback import GreedyLayerSwapCallback
from ..search.strategies import STRATEGIES
from .options import ModelArguments, TaskArguments, load_rows


@dataclass
class SearchArguments:
    """The search."""

    mixer_bank: str = field(metadata={"help": "Folder or Hub repository that `hf-hybrid distill` wrote."})
    metric: str = field(
        default="loss",
        metadata={
            "help": "loss, or accuracy with --prompt and --label_words. --greater_is_better says which way it goes, "
            "where its name does not."
        },
    )
    max_drop: str = field(
        default="2%", metadata={"help": 'Allowed loss of the metric: absolute, relative as "2%%", or none.'}
    )
    max_layers: int | None = field(default=None, metadata={"help": "Stop after this many swaps (of heads, by head)."})
    strategy: str = field(
        default="race",
        metadata={
            "help": "How to look: race (a few candidates on paired rows), greedy (the paper's: every candidate on "
            "every row), or one of the controls.",
            "choices": sorted({*STRATEGIES} - {"fixed"}),
        },
    )
    granularity: str = field(
        default="layer",
        metadata={"help": "What is made linear one by one: layers, or key-value heads.", "choices": ["layer", "head"]},
    )
    proposals: str = field(
        default="fisher", metadata={"help": "What a race goes by at first.", "choices": ["fisher", "induction", "none"]}
    )
    cache_share: float | None = field(
        default=None,
        metadata={"help": "Stop when the cache of these layers at --length is this share of the teacher's, e.g. 0.3."},
    )
    length: int = field(default=4096, metadata={"help": "Tokens at which --cache_share is counted."})
    confirmation_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Rows like --eval_dataset that the search does not see: swaps that do not hold there are taken "
            "back."
        },
    )
    confidence: float | None = field(
        default=None,
        metadata={"help": "Promise --max_drop for data like --confirmation_dataset with this probability, e.g. 0.9."},
    )
    keep: str = field(
        default="most_linear", metadata={"help": "Which result to save.", "choices": ["most_linear", "best"]}
    )
    resume: bool = field(default=False, metadata={"help": "Continue an interrupted search in output_dir."})
    repair_steps: int = field(
        default=0,
        metadata={
            "help": "Then train the hybrid for so many steps on its teacher's predictions; see `hf-hybrid repair`."
        },
    )
    repair_dataset: str | None = field(
        default=None, metadata={"help": "Text for that: a name on the Hub, or a .txt, .json, .jsonl … file."}
    )


OPTIONS = (HybridTrainingArguments, ModelArguments, TaskArguments, SearchArguments)


def run(args: HybridTrainingArguments, model: ModelArguments, task: TaskArguments, options: SearchArguments) -> None:
    """Look for layers or heads to make linear, on your data, with a bank's students; save the hybrid to output_dir."""
    tokenizer = model.tokenizer()
    labels = task.task(tokenizer)
    trainer = HybridTrainer(
        model.load(),
        args=args,
        mixer_bank=options.mixer_bank,
        eval_dataset=task.prepared(labels, tokenizer),
        processing_class=tokenizer,
        **({} if labels is None else labels.trainer_kwargs()),
    )
    if not options.resume:
        trainer.check_output_folder()
    other = options.confirmation_dataset
    callback = GreedyLayerSwapCallback(
        options.metric,
        None if options.max_drop.lower() == "none" else options.max_drop,
        args.greater_is_better,  # an option of TrainingArguments, unset unless it is given
        max_layers=options.max_layers,
        keep=options.keep,
        strategy=options.strategy,
        granularity=options.granularity,
        proposals=options.proposals,
        cache_share=options.cache_share,
        length=options.length,
        confidence=options.confidence,
        confirmation_dataset=None if other is None else task.prepared(labels, tokenizer, other),
    )
    if options.repair_steps and options.repair_dataset is None:
        raise DatasetError("--repair_steps needs --repair_dataset: text to train on.")
    report = callback.search(trainer)
    chosen = report.kept(options.keep)
    if options.repair_steps:
        trainer.save_model()  # what the search found is kept, whatever becomes of the repair
        settings = repair_arguments(args, max_steps=options.repair_steps)
        # where projections trained, the teacher is the base model
        teacher = {} if trainer.unwrapped.projections == "shared" else {"teacher": model.load()}
        trainer.repair(load_rows(options.repair_dataset, "train"), settings, **teacher)
    trainer.save_model()
    trainer.create_model_card()
    reached = (trial.metrics[report.metric] for trial in report.commits if trial.swapped == chosen)
    last, count = next(reached, report.base), len(trainer.distill_sites)
    if options.granularity == "head":
        count = sum(len(layer.hybrid.heads) for layer in trainer.distill_sites.values())
    cost = (
        f"{len(report.trials)} trials" if report.layer_forwards is None else f"{report.layer_forwards:,.0f} blocks ran"
    )
    floor = f"floor {report.floor:.4g}" if math.isfinite(report.floor) else "no floor"
    Console().print(
        f"Swapped {len(chosen)} of {count} {options.granularity}s, "
        f"{report.metric} {report.base:.4g} -> {last:.4g} ({floor}, {cost}); "
        f"saved to {args.output_dir}."
        + ("" if report.promise is None else f" {report.promise.sentence()}")
        + ("" if trainer.repair_report is None else f" Repaired for {trainer.repair_report.steps} steps.")
    )
