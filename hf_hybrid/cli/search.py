"""`hf-hybrid search`: a mixer bank and a task become a hybrid."""

from dataclasses import dataclass, field

from rich.console import Console

from ..distillation.arguments import HybridTrainingArguments
from ..distillation.repair_arguments import repair_arguments
from ..distillation.trainer import HybridTrainer
from ..errors import DatasetError
from ..search.callback import GreedyLayerSwapCallback
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
        default="2%", metadata={"help": 'Allowed loss of the metric: absolute, or relative as "2%%".'}
    )
    max_layers: int | None = field(default=None, metadata={"help": "Stop after this many swaps."})
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
    """Swap layers greedily on your data, with the students of a bank, and save the hybrid to output_dir."""
    tokenizer = model.tokenizer()
    labels = task.task(tokenizer)
    trainer = HybridTrainer(
        model.load(),
        args=args,
        mixer_bank=options.mixer_bank,
        eval_dataset=task.sequences(tokenizer) if labels is None else task.examples(labels),
        processing_class=tokenizer,
        **({} if labels is None else labels.trainer_kwargs()),
    )
    if not options.resume:
        trainer.check_output_folder()
    callback = GreedyLayerSwapCallback(
        options.metric,
        options.max_drop,
        args.greater_is_better,  # an option of TrainingArguments, unset unless it is given
        max_layers=options.max_layers,
        keep=options.keep,
    )
    if options.repair_steps and options.repair_dataset is None:
        raise DatasetError("--repair_steps needs --repair_dataset: text to train on.")
    report = callback.search(trainer)
    swapped_names = sorted(trainer.swapped_layers())
    if options.repair_steps:
        trainer.save_model()  # what the search found is kept, whatever becomes of the repair
        settings = repair_arguments(args, max_steps=options.repair_steps)
        # where projections trained, the teacher is the base model
        teacher = {} if trainer.unwrapped.projections == "shared" else {"teacher": model.load()}
        trainer.repair(load_rows(options.repair_dataset, "train"), settings, **teacher)
    trainer.save_model()
    trainer.create_model_card()
    reached = (trial.metrics[report.metric] for trial in report.commits if sorted(trial.swapped) == swapped_names)
    last = next(reached, report.base)
    Console().print(
        f"Swapped {len(swapped_names)} of {len(trainer.distill_sites)} layers, "
        f"{report.metric} {report.base:.4g} -> {last:.4g} (floor {report.floor:.4g}, {len(report.trials)} trials); "
        f"saved to {args.output_dir}."
        + ("" if trainer.repair_report is None else f" Repaired for {trainer.repair_report.steps} steps.")
    )
