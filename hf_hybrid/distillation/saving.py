"""
What a distillation leaves on disk: mixers as an adapter (checkpoints, the bank), and the hybrid as the switch stands.
"""

import os

import torch
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

from ..adapters.bank import (
    adapter_config,
    check_base,
    load_student_state,
    read_adapter,
    student_state,
    with_all_settings,
    write_adapter,
)
from ..errors import (
    CheckpointError,
    HybridConfigError,
)
from ..hub.card import CARD_FILE, is_own_card, write_model_card
from ..surgery import (
    finalize_,
    set_linear_heads_,
)


logger = logging.get_logger(__name__)


class SavesMixers:
    """Put in front of the Trainer: its checkpoints are adapters, its saves hybrids."""

    def save_mixer_bank(self, output_dir: str | None = None) -> None:
        """
        Write all mixers, without the backbone, as an adapter: see [`save_mixer_bank`]. Into `mixer_bank/` of the output
        folder by default, since beside a model transformers would load it on top. Call it on every process.
        """
        folder = output_dir or self._bank_folder
        tensors = student_state(self.unwrapped)  # gathered from all ranks where it is sharded
        if self.args.should_save:
            config = adapter_config(self.unwrapped)
            if self.swap_report is not None and config.linear_heads is None:
                # a search left every layer as it was; without one, all that have a mixer are meant
                config.linear_heads = {}
            write_adapter(folder, config, tensors)
            if self.state.global_step:  # a run that kept no checkpoints goes on from here
                self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))

    def finalize(self) -> PreTrainedModel:
        """
        Make the model the hybrid, in place: heads that are linear keep their mixers, the others their softmax. Ends
        distillation.
        """
        model = self.unwrapped
        if self._in_distillation():
            if isinstance(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), PeftModel):
                raise HybridConfigError(
                    "HybridTrainer.finalize: the mixers belong to an adapter. Call merge_and_unload() of the "
                    "PeftModel, or save_model()."
                )
            if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
                raise HybridConfigError(
                    "HybridTrainer.finalize: the weights are sharded. Call save_model(folder) on every process, and "
                    "load the folder with from_pretrained."
                )
            finalize_(model)
            self._restore_use_cache(model)
            model.eval()
        return model

    def _restore_use_cache(self, model):
        if self._teacher_use_cache is not None:
            model.config.use_cache = self._teacher_use_cache

    def _push_from_checkpoint(self, checkpoint_folder):
        """
        Nothing to push: a checkpoint of a distillation holds mixers, not a model. `push_to_hub` publishes the hybrid at
        the end.
        """

    def _determine_best_metric(self, metrics, trial) -> bool:
        """
        Evaluations during distillation run the teacher: no checkpoint is better than another, and the last is the one
        to keep.
        """
        return super()._determine_best_metric(metrics, trial) if not self._in_distillation() else False

    def _save_checkpoint(self, model, trial):
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def _save_optimizer_and_scheduler(self, output_dir):
        """As the Trainer's, but not the shards of a teacher that never changes."""
        if not (self.is_fsdp_enabled and self._in_distillation()):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # the state, which is written next, says that a checkpoint is complete: on all processes
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the hybrid as the switch stands (inside a training checkpoint: the mixers, as an adapter). Call it on every
        process; the main one writes.
        """
        if not self._in_distillation():
            super().save_model(output_dir, _internal_call)
            folder = self.args.output_dir if output_dir is None else output_dir
            known = self.swap_report is not None or self.repair_report is not None
            if known and self.args.should_save and not is_own_card(os.path.join(folder, CARD_FILE)):
                self._write_card(folder)
            if self.repair_report is not None and self.args.should_save:
                self.repair_report.save(folder)
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        if self._saving_checkpoint:
            tensors = student_state(self.unwrapped)
            if self.args.should_save:
                write_adapter(folder, adapter_config(self.unwrapped), tensors)
                torch.save(self.args, os.path.join(folder, "training_args.bin"))
            return
        self._save_hybrid(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_hybrid(self, folder: str) -> None:
        model = self.unwrapped
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        state = self.accelerator.get_state_dict(self.model_wrapped) if is_sharded else None
        if not self.args.should_save:
            return
        use_cache = getattr(model.config, "use_cache", None)
        self._restore_use_cache(model)
        try:
            model.save_pretrained(folder, state_dict=state)
            if not is_own_card(os.path.join(folder, CARD_FILE)):
                write_model_card(model, folder, report=self.swap_report)
        finally:
            if use_cache is not None:
                model.config.use_cache = use_cache
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._in_distillation():
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return self._load_students(resume_from_checkpoint)

    def _load_students(self, folder: str) -> None:
        model, where = self.unwrapped, os.path.join(folder, ADAPTER_CONFIG)
        config, tensors = read_adapter(folder)
        sites, own = check_base(config, model, where), adapter_config(model)
        config.sites = with_all_settings(config.sites)
        changed = [
            key for key in ("sites", "projections", "projection_rank") if getattr(config, key) != getattr(own, key)
        ]
        if changed:
            raise CheckpointError(
                f"{folder} was written with other students ({', '.join(changed)} differ). Use the mixer and "
                "projections of that run, or another folder."
            )
        load_student_state(model, tensors, str(folder))
        switched = {name: heads for name, heads in (config.linear_heads or {}).items() if name in sites}
        set_linear_heads_(model, switched, remember=False)

    def create_model_card(self, *args, **kwargs):
        """
        Write `README.md`: the hybrid's own card, with the search's result. (Same arguments as the Trainer's; they are
        not needed.)
        """
        if self.is_world_process_zero():
            self.unwrapped.refresh_hybrid_config()
            self._write_card(self.args.output_dir)

    def _write_card(self, folder: str) -> None:
        repair = "" if self.repair_report is None else self.repair_report.markdown()
        write_model_card(self.unwrapped, folder, report=self.swap_report, extra=repair)
