"""`hf-hybrid repair`: a hybrid and text become a hybrid that has learnt from its teacher's predictions."""

from dataclasses import dataclass, field

from rich.console import Console

from ..distillation.repair import RepairTrainer
from ..distillation.repair_arguments import RepairArguments
from .options import ModelArguments, TextArguments, load_rows
from .preset_options import PresetArguments


@dataclass
class EvalArguments:
    """What is measured before and after."""

    eval_dataset: str | None = field(
        default=None, metadata={"help": "Name on the Hub, or a .txt, .json, .jsonl, .csv or .parquet file of text."}
    )
    eval_split: str = field(default="validation", metadata={"help": "Split of a dataset from the Hub."})


STAGES = ("repair",)
OPTIONS = (RepairArguments, ModelArguments, TextArguments, EvalArguments, PresetArguments)


def run(
    args: RepairArguments, model: ModelArguments, text: TextArguments, measured: EvalArguments, preset: PresetArguments
) -> None:
    """Train a hybrid on its teacher's predictions, the teacher being itself with its switch off; save it."""
    if preset.dry_run:
        return preset.show(args)
    tokenizer = model.tokenizer()
    trainer = RepairTrainer(
        model.load(),
        args,
        train_dataset=load_rows(text.dataset, text.dataset_split),
        eval_dataset=None if measured.eval_dataset is None else load_rows(measured.eval_dataset, measured.eval_split),
        processing_class=tokenizer,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    trainer.save_model()
    report = trainer.repair_report
    changed = "".join(
        f"; {name} {report.before[name]:.4g} -> {value:.4g}"
        for name, value in report.after.items()
        if name in report.before
    )
    Console().print(
        f"Repaired for {report.steps} steps ({report.tokens:,} tokens){changed}; saved to {args.output_dir}."
    )
