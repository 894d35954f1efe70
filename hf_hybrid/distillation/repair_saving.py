"""What a repair leaves on disk: what trains (checkpoints), and the repaired hybrid."""

import json
import os

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..hub.card import CARD_FILE, is_own_card, write_model_card
from .repair_checks import identity_of
from .repaired_parts import merge_


WEIGHTS_FILE = "repair.safetensors"


class SavesRepair:
    """Put in front of the Trainer: its checkpoints hold what trains, its saves are hybrids."""

    def finalize(self) -> PreTrainedModel:
        """End the repair, in place: differences are merged, weights go back to their types. Returns the hybrid."""
        model = self.unwrapped
        if not self._finalized:
            self._put_back(model)
            if self._use_cache is not None:
                model.config.use_cache = self._use_cache
            report = {"trained": list(self.args.trained_parts), "steps": self.state.global_step}
            model.config.hybrid["repair"] = report
            self._finalized = True
            model.eval()
        return model

    def _put_back(self, model) -> None:
        """Merge what was learnt, and undo all else that `start_training_` did."""
        merge_(model)
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            x.data = x.data.to(self._dtypes.get(name, x.dtype))
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)
        model.__dict__.pop("in_repair", None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Finalize and save the hybrid (inside a training checkpoint: what trains). Call it on every process; the main one
        writes.
        """
        folder = self.args.output_dir if output_dir is None else output_dir
        if self._saving_checkpoint:
            if self.args.should_save:
                os.makedirs(folder, exist_ok=True)
                self._save_trained(folder)
            return
        model = self.finalize()
        if not self.args.should_save:
            return
        model.save_pretrained(folder)
        report = self.repair_report
        if not is_own_card(os.path.join(folder, CARD_FILE)):
            write_model_card(model, folder, extra="" if report is None else report.markdown())
        if report is not None:
            report.save(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args, **kwargs):
        """Write `README.md`: the hybrid's own card. (Same arguments as the Trainer's; they are not needed.)"""
        if self.is_world_process_zero():
            report = self.repair_report
            write_model_card(self.unwrapped, self.args.output_dir, extra="" if report is None else report.markdown())

    def _save_checkpoint(self, model, trial):
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing to push: a checkpoint holds what trains, not a model."""

    def _save_trained(self, folder: str) -> None:
        tensors = {n: p.detach().cpu().contiguous() for n, p in self.unwrapped.named_parameters() if p.requires_grad}
        notes = {
            "sites": identity_of(self.unwrapped),
            "tokens": str(self._tokens),
            "before": json.dumps(self._before),
            "trained": self.args.trained,
        }
        path = os.path.join(folder, WEIGHTS_FILE)
        save_file(tensors, path + ".tmp", metadata=notes)
        os.replace(path + ".tmp", path)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        path = os.path.join(resume_from_checkpoint, WEIGHTS_FILE)
        if not os.path.exists(path):
            raise CheckpointError(f"{resume_from_checkpoint} is no checkpoint of a repair: {WEIGHTS_FILE} is missing.")
        tensors = load_file(path)
        own = {name: p for name, p in self.unwrapped.named_parameters() if p.requires_grad}
        wrong = list({*tensors} ^ {*own}) or [n for n, p in own.items() if tensors[n].shape != p.shape]
        if wrong:
            raise CheckpointError(
                f"{path} was written by a repair that trained other weights ({sorted(wrong)[0]}). Use the arguments of "
                "that run, or another folder."
            )
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
        if notes.get("sites") != identity_of(self.unwrapped):
            raise CheckpointError(
                f"{path} was written by the repair of another hybrid: other weights, linear heads or mixers. Use the "
                "model of that run, or another folder."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        self._tokens, self._before = int(notes.get("tokens", 0)), json.loads(notes.get("before", "{}"))


__all__ = ["WEIGHTS_FILE", "SavesRepair"]
