"""`hf-hybrid distill`: a teacher and text become a mixer bank."""

from rich.console import Console

from ..distillation.arguments import HybridTrainingArguments
from ..distillation.trainer import HybridTrainer
from .options import MixerArguments, ModelArguments, TextArguments, load_rows
from .preset_options import PresetArguments


STAGES = ("mixer", "distill")
OPTIONS = (HybridTrainingArguments, ModelArguments, MixerArguments, TextArguments, PresetArguments)


def run(
    args: HybridTrainingArguments,
    model: ModelArguments,
    mixer: MixerArguments,
    text: TextArguments,
    preset: PresetArguments,
) -> None:
    """Distil every attention layer on text and write the mixer bank to output_dir."""
    if preset.dry_run:
        return preset.show(args, mixer)
    trainer = HybridTrainer(
        model.load(),
        mixer=mixer.config(),
        args=args,
        train_dataset=load_rows(text.dataset, text.dataset_split),
        processing_class=model.tokenizer(),
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    trainer.save_mixer_bank(args.output_dir)
    losses, end = trainer.last_block_losses, "."
    if losses:  # none, if the run ended before its first logging step
        worst = max(losses, key=losses.get)
        end = f"; largest local loss {losses[worst]:.3f} ({worst})."
    Console().print(f"Distilled {len(trainer.distill_sites)} layers into {args.output_dir}{end}")
