"""Hybrid checkpoints: loaded strictly, saved as the switch stands, never half-written, and with a card and a shim."""

import inspect
import json
import os

from huggingface_hub import file_exists
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from ..conversion.offload import load_offloaded_mixer_whole
from ..conversion.published import published_state
from ..errors import CheckpointError, HybridConfigError, OutputFolderError, UnsupportedModelError
from ..mixers import LinearMixer
from .auto_classes import SHIM_FILE, write_shim
from .card import CARD_FILE, is_own_card, write_model_card
from .folder import replace_checkpoint


logger = logging.get_logger(__name__)


class CheckpointMixin:
    """What `HybridModelMixin` does with files."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As in transformers, but strict: a hybrid checkpoint that lacks or has extra weights is an error, not a warning.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        cls._refuse_tensor_parallelism(kwargs)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights of {pretrained_model_name_or_path!r} cannot be read: {error}. The file is truncated or "
                "damaged; save or download it again."
            ) from error
        cls._check_loaded(model, info, str(pretrained_model_name_or_path), kwargs)
        for mixer in (module for module in model.modules() if isinstance(module, LinearMixer)):
            load_offloaded_mixer_whole(mixer)
        return (model, info) if wants_info else model

    @classmethod
    def _refuse_tensor_parallelism(cls, kwargs):
        distributed = kwargs.get("distributed_config")
        given = (kwargs.get("tp_plan"), kwargs.get("tp_size"))
        nested = (getattr(distributed, "tp_plan", None), getattr(distributed, "tp_size", None))
        if any(value is not None for value in given) or any(nested):
            raise UnsupportedModelError(
                f"{cls.__name__}: mixers have parameters per head, for which the family's tensor-parallel plan has no "
                "entries. Load it without tp_plan and tp_size; data parallelism and FSDP work."
            )

    @classmethod
    def _check_loaded(cls, model, info, where: str, kwargs):
        given = kwargs.get("config")
        own_config = given is None or getattr(given, "name_or_path", None) == where
        # the class that was saved must find everything; another head (a classifier on a language model) brings its own,
        # new
        same_class = cls.__name__ in (model.config.architectures or [])
        prefix = cls.base_model_prefix + "."
        new_head_sizes = kwargs.get("ignore_mismatched_sizes", False)
        problems = {
            "missing": [
                k
                for k in info["missing_keys"]
                if own_config and (same_class or ".hybrid." in k or k.startswith(prefix))
            ],
            "unexpected": [k for k in info["unexpected_keys"] if ".hybrid." in k or (own_config and same_class)],
            "of another shape": [k for k in map(str, info["mismatched_keys"]) if ".hybrid." in k or not new_head_sizes],
        }
        for what, keys in problems.items():
            if keys:
                raise CheckpointError(
                    f"The checkpoint {where!r} does not fit its config: {len(keys)} weights are {what}, the first "
                    f"{sorted(keys)[0]!r}. It was truncated or edited; save or download it again."
                )

    @staticmethod
    def _load_pretrained_model(model, *args, **kwargs):
        """
        As in transformers, which loads adapters by it too: one of mixers that lacks tensors, or has others, is an
        error, not a warning.
        """
        info, rest = PreTrainedModel._load_pretrained_model(model, *args, **kwargs)
        adapters = list(getattr(model, "peft_config", {}))
        for what, keys in {"lacks": info.missing_keys, "has foreign": info.unexpected_keys}.items():
            # of the adapter that was added last; transformers reports the tensors of all others as missing
            parts = [f".{kind}.{name}." for kind in ("hybrid_mixer", "hybrid_delta") for name in adapters[-1:]]
            wrong = sorted(key for key in keys if any(part in key for part in parts))
            if wrong:
                model.delete_adapter(adapters[-1])
                raise CheckpointError(
                    f"The adapter {what} tensors: {len(wrong)}, the first {wrong[0]!r}. It was truncated or edited; "
                    "save or "
                    "download it again."
                )
        return info, rest

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs):
        """
        As in transformers: the hybrid as the switch stands, without the mixers of heads that are not linear. Also
        writes the remote-code shim and a model card, and leaves no half-written checkpoint behind.
        """
        if getattr(
            self, "_hf_peft_config_loaded", False
        ):  # an adapter's save: neither the model's config nor its weights are written
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        if self.__dict__.get("in_repair"):
            raise HybridConfigError(
                f"{type(self).__name__} is in a repair, whose differences to the weights lie beside them. Call "
                "RepairTrainer.finalize() first, or RepairTrainer.save_model()."
            )
        self._refuse_folder_of_adapter(save_directory)
        self.refresh_hybrid_config()
        bound = inspect.signature(PreTrainedModel.save_pretrained).bind(self, save_directory, *args, **kwargs)
        state = published_state(self, bound.arguments.get("state_dict"))
        if state is not None:
            args, kwargs = args[:1], {**kwargs, **self._named(args[1:]), "state_dict": state}
        if not self.config.hybrid["sites"]:
            logger.warning(
                f"{type(self).__name__}: no head of any layer is linear, so that what is saved computes what the base "
                "model does. Swap layers first (trainer.swap_layers, or a search)."
            )
        if not bound.arguments.get("is_main_process", True):
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        self.config.auto_map = self.hybrid_auto_map()
        if push_to_hub:  # compares the folder before and after: must write into the folder itself
            os.makedirs(save_directory, exist_ok=True)
            write_shim(save_directory, type(self))
            write_model_card(self, save_directory)
            return super().save_pretrained(save_directory, *args, push_to_hub=True, **kwargs)

        def write(folder):
            super(CheckpointMixin, self).save_pretrained(folder, *args, **kwargs)
            write_shim(folder, type(self))
            if not is_own_card(os.path.join(save_directory, CARD_FILE)):
                write_model_card(self, folder)

        return replace_checkpoint(save_directory, write)

    @staticmethod
    def _refuse_folder_of_adapter(folder) -> None:
        try:
            with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
                kind = json.load(file).get("peft_type")
        except (OSError, ValueError, AttributeError):
            return
        if kind == "HYBRID":
            raise OutputFolderError(
                f"{folder!r} holds an adapter of mixers, which from_pretrained would load on top of the hybrid. Choose "
                "another folder."
            )

    @staticmethod
    def _named(values: tuple) -> dict:
        """Positional arguments of `save_pretrained` after `is_main_process`, by name."""
        names = list(inspect.signature(PreTrainedModel.save_pretrained).parameters)[3:]
        return dict(zip(names, values, strict=False))

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # transformers has put its generic card there; ours says more, but a card that is on the Hub already is
        # somebody's own
        if not file_exists(repo_id, CARD_FILE, token=kwargs.get("token")):
            write_model_card(self, working_dir, repo_id=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _get_files_timestamps(self, working_dir):
        # save_pretrained(push_to_hub=True) uploads what is newer than this snapshot; the shim and card are written
        # before it
        before = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in before.items() if name not in (SHIM_FILE, CARD_FILE)}


__all__ = ["CheckpointMixin"]
