"""What one of several processes does, for `test_many_processes.py`: `accelerate launch ... worker.py FOLDER RUN...`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import transformers


sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from peft import get_peft_model  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from hf_hybrid import (  # noqa: E402
    GreedyLayerSwapCallback,
    HybridPeftConfig,
    HybridTrainer,
    LinearAttentionConfig,
    RepairArguments,
    RepairTrainer,
    convert_to_hybrid,
)
from hf_hybrid.adapters.bank import BANK_FOLDER, student_state  # noqa: E402
from hf_hybrid.errors import HybridConfigError  # noqa: E402
from hf_hybrid.search.ranks import gathered, rank  # noqa: E402

from conftest import token_dataset  # noqa: E402
from helpers import SMALL_MIXER, toy_arguments  # noqa: E402
from tiny_models import SIZES, tiny_llava, tiny_model  # noqa: E402


# rows in one step and in one batch of an evaluation, all processes together
ROWS, STEPS = 4, 6
TRIALS = 7  # of three layers: the teacher, then 3 + 2 + 1
# a learned feature map beside a window: parameters of several shapes, some with an odd first axis (2 halves of 3 rows)
LEARNED = LinearAttentionConfig(feature_map="hedgehog", window_size=3)


class PerStep(TrainerCallback):
    """Notes every layer's local loss as the processes agreed on it, and ends all processes after step `die_after`."""

    def __init__(self, die_after: int | None = None):
        self.losses, self.die_after, self.trainer = [], die_after, None

    def set_trainer(self, trainer):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "block_loss_mean" in (logs or {}):
            self.losses.append([logs["loss"], *self.trainer.last_block_losses.values()])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.die_after:
            die()


def die():
    """As a machine does: without a word, wherever the other process is."""
    pids = gathered(os.getpid())
    if rank() == 0:
        for pid in reversed(pids):
            os.kill(pid, signal.SIGKILL)


def die_after_trials(trainer, count: int):
    own, calls = trainer.evaluate_silently, []

    def counting(*args):
        if trainer.state.global_step == STEPS:  # not the look before the distillation
            calls.append(1)
        if len(calls) > count:
            die()
        return own(*args)

    trainer.evaluate_silently = counting


def make_trainer(folder, model=None, mixer=SMALL_MIXER, callbacks=(), mixer_bank=None, **arguments) -> HybridTrainer:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = toy_arguments(
        folder,
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": ROWS // processes,
            "per_device_eval_batch_size": ROWS // processes,
            "dataloader_pin_memory": False,
            "lr_scheduler_type": "constant_with_warmup",  # a step too many would show
            **arguments,
        },
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards for accelerators only, though `fully_shard` does not mind: here it takes the two processors for such
        PartialState().distributed_type = DistributedType.MULTI_GPU
    data = {"train_dataset": token_dataset(32), "eval_dataset": token_dataset(8, seed=2)}
    model = model or tiny_model()
    return HybridTrainer(model, mixer, arguments, callbacks=list(callbacks), mixer_bank=mixer_bank, **data)


def scaled(model):
    """At their own scale, random attention scores are near zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 and "embed" not in name and "shared" not in name else 1.0)
    return model


def search_callback(**kwargs):
    return GreedyLayerSwapCallback("eval_loss", "50%", **kwargs)


def outcome(trainer, losses=()) -> dict:
    state = {name: value.double().flatten().tolist() for name, value in student_state(trainer.unwrapped).items()}
    report = trainer.swap_report
    return {
        "losses": list(losses),
        "trials": [[trial.swapped, trial.metrics["eval_loss"]] for trial in report.trials] if report else [],
        "swapped": trainer.swapped_layers(),
        "parameters": state,
        "sharded": sorted(
            {type(part).__name__ for part in trainer.unwrapped.modules() if isinstance(part, FSDPModule)}
        ),
        "steps": trainer.state.global_step,
        "world": trainer.args.world_size,
    }


# ------------------------------------------------------------------------------------------------------- what is run


def whole(folder, name="whole", **arguments):
    """Distil, search, save the hybrid and the bank."""
    steps = PerStep()
    trainer = make_trainer(folder / name, callbacks=[search_callback(), steps], **arguments)
    trainer.train()
    found = outcome(trainer, steps.losses)
    trainer.swap_layers(None, {0: [1], 2: [0, 1]})
    found["eval_loss"] = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / name / "hybrid"))
    return found


def recomputed(folder):
    """With mixers computed again in the backward pass."""
    return whole(folder, "recomputed", activation_checkpointing=True)


def learned(folder):
    steps = PerStep()
    trainer = make_trainer(folder / "learned", mixer=LEARNED, callbacks=[steps], max_steps=3, save_strategy="no")
    trainer.train()
    return outcome(trainer, steps.losses)


def gated(folder):
    """Convolutions and gates, and decays that start at what a few rows of text say."""
    steps = PerStep()
    mixer = {"name": "jet_block", "window_size": 4}
    trainer = make_trainer(folder / "gated", mixer=mixer, callbacks=[steps], max_steps=3, save_strategy="no")
    trainer.train()
    return outcome(trainer, steps.losses)


def finalized(folder):
    """What becomes of the model in the trainer's own hands."""
    trainer = make_trainer(folder / "finalized", max_steps=2, save_strategy="no")
    trainer.train()
    trainer.swap_layers([1])
    before = trainer.evaluate()["eval_loss"]
    try:
        trainer.finalize()
    except HybridConfigError as error:
        return {**outcome(trainer), "message": str(error)}
    return {"world": trainer.args.world_size, "losses": [], "eval_losses": [before, trainer.evaluate()["eval_loss"]]}


def adapter(folder):
    """The mixers belong to a PEFT adapter."""
    model = get_peft_model(tiny_model(), HybridPeftConfig(mixer=SMALL_MIXER.to_dict()))
    steps = PerStep()
    trainer = make_trainer(folder / "adapter", model, mixer=None, callbacks=[search_callback(), steps])
    trainer.train()
    return outcome(trainer, steps.losses)


def accumulated(folder):
    """Two small batches a step on each process."""
    steps = PerStep()
    half = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": ROWS // 2}
    half["per_device_train_batch_size"] //= int(os.environ.get("WORLD_SIZE", "1"))
    trainer = make_trainer(folder / "accumulated", callbacks=[steps], max_steps=3, save_strategy="no", **half)
    trainer.train()
    return outcome(trainer, steps.losses)


def from_bank(folder):
    """A search without a training, with the mixers of `whole`."""
    steps = PerStep()
    trainer = make_trainer(
        folder / "from_bank", mixer=None, callbacks=[steps], mixer_bank=str(folder / "whole" / BANK_FOLDER), max_steps=2
    )
    search_callback().search(trainer)
    found = outcome(trainer)
    trainer.swap_layers([])
    trainer.args.output_dir = str(folder / "from_bank_trained")
    trainer.train()  # what was sharded for the search trains
    return {**found, "losses": steps.losses}


def without_checkpoints(folder):
    """Resumed with nothing but the bank to go on from."""
    for again in (False, True):
        trainer = make_trainer(folder / "without_checkpoints", callbacks=[search_callback()], save_strategy="no")
        trainer.train(resume_from_checkpoint=again)
    return outcome(trainer)


def memory(folder):
    """The processes have different limits for activations."""
    limit = (2 << 30) if rank() == 0 else 1
    trainer = make_trainer(folder / "memory", callbacks=[search_callback(max_reuse_bytes=limit)])
    trainer.train()
    return outcome(trainer)


def pictures(folder):
    """Text alone, for a model of text and pictures: no process reaches the vision tower."""
    steps = PerStep()
    trainer = make_trainer(folder / "pictures", scaled(tiny_llava()), SMALL_MIXER, [steps], max_steps=3)
    trainer.train()
    return outcome(trainer, steps.losses)


def mixed(folder):
    """Pictures on one process only: the other waits for no gradient of the vision tower."""

    def collate(rows):
        batch = transformers.default_data_collator(rows)
        batch["input_ids"].clamp_(max=97)
        if rank() == 0:
            batch["input_ids"][:, :16] = 98  # a picture
            batch["pixel_values"] = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).expand(len(rows), -1, -1, -1)
        return batch

    steps = PerStep()
    trainer = make_trainer(folder / "mixed", scaled(tiny_llava()), SMALL_MIXER, [steps], max_steps=3)
    trainer.data_collator = collate
    trainer.train()
    return outcome(trainer, steps.losses)


def repaired(folder):
    """A hybrid learns from its teacher's predictions."""
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER, heads={"model.layers.0.self_attn": [1]})
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = RepairArguments(
        str(folder / "repaired"), max_steps=4, per_device_train_batch_size=ROWS // processes, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1, warmup_steps=0, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = RepairTrainer(model, args, train_dataset=token_dataset(32))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state = {name: value.double().flatten().tolist() for name, value in trainer.finalize().state_dict().items()}
    trainer.save_model(str(folder / "repaired" / "hybrid"))
    found = {"losses": losses, "parameters": state, "world": args.world_size, "tokens": trainer.repair_report.tokens}
    return found


def encoder_decoder(folder):
    """T5: its cross-attention has no mixers, its decoder is fed the labels."""
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model = scaled(transformers.T5ForConditionalGeneration(transformers.T5Config(**{**SIZES, **sizes})).eval())
    steps = PerStep()
    trainer = make_trainer(folder / "encoder_decoder", model, callbacks=[steps], max_steps=3)
    trainer.train()
    return outcome(trainer, steps.losses)


def killed_in_search(folder):
    trainer = make_trainer(folder / "killed_in_search", callbacks=[search_callback(), PerStep()])
    die_after_trials(trainer, 4)
    trainer.train()


def killed_in_distillation(folder):
    make_trainer(folder / "killed_in_distillation", callbacks=[search_callback(), PerStep(die_after=3)]).train()


def _resumed(folder, name):
    steps = PerStep()
    trainer = make_trainer(folder / name, callbacks=[search_callback(), steps])
    evaluations, own = [], trainer.evaluate_silently
    trainer.evaluate_silently = lambda *args: evaluations.append(1) or own(*args)
    trainer.train(resume_from_checkpoint=True)
    return {**outcome(trainer, steps.losses), "evaluations": len(evaluations)}


def resumed_search(folder):
    return _resumed(folder, "killed_in_search")


def resumed_distillation(folder):
    return _resumed(folder, "killed_in_distillation")


RUNS = [
    whole, recomputed, learned, gated, adapter, finalized, accumulated, from_bank, without_checkpoints, memory, pictures, mixed,
    encoder_decoder, repaired, killed_in_search, killed_in_distillation, resumed_search, resumed_distillation,
]  # fmt: skip


if __name__ == "__main__":
    named = {function.__name__: function for function in RUNS}
    for name in sys.argv[2:]:
        result = named[name](Path(sys.argv[1]))
        Path(sys.argv[1], f"{name}.rank{rank()}.json").write_text(json.dumps(result))
    PartialState().destroy_process_group()
