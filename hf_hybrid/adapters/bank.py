"""
The mixer bank: the mixers of all layers without the backbone, on disk a PEFT adapter. Small and task-agnostic; every
task then needs only a search.
"""

import os
import tempfile
from collections.abc import Mapping

import torch
from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..configuration_hybrid import LinearSite
from ..conversion.layer import hybrid_layers
from ..errors import AlreadyHybridError, CheckpointError, HybridError, OutputFolderError
from ..mixers import MixerConfig
from ..modeling_hybrid import describe
from ..surgery import discard_students_, linear_heads, prepare_distillation_
from . import first_format
from .config import HybridPeftConfig
from .fingerprint import TOLERANCE, base_fingerprint


PREFIX = "base_model.model."
# Where a trainer keeps the bank inside its output folder: beside a model, transformers would load it on top of that
# model.
BANK_FOLDER = "mixer_bank"


def student_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """
    What an adapter holds of a model with mixers, by parameter name; collective where parameters are sharded: call it on
    every rank.
    """
    return {name: _whole(parameter) for name, parameter in _student_parameters(model).items()}


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    value = parameter.detach()
    if hasattr(parameter, "ds_id"):  # DeepSpeed's ZeRO-3, between two uses
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _student_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """
    Parameters of mixers, and of differences to projections, by `<site>.hybrid.<name>` whoever holds them: the layer
    itself, or the active adapter.
    """
    found = {}
    for name, layer in hybrid_layers(model).items():
        parts = {"hybrid": layer.hybrid, "hybrid_delta": layer.hybrid_delta}
        for kind, part in parts.items():
            own = {} if part is None else dict(part.named_parameters())
            found.update({f"{name}.{kind}.{inner}": parameter for inner, parameter in own.items()})
    return found


def adapter_config(model: PreTrainedModel) -> HybridPeftConfig:
    """The adapter that the mixers of a model are, with the switch as it stands."""
    layers = hybrid_layers(model)
    sites = {
        name: LinearSite(layer.hybrid_site, layer.hybrid_config.to_dict(), layer.hybrid.heads)
        for name, layer in layers.items()
    }
    config = HybridPeftConfig(
        mixer=common_mixer(sites),
        projections=model.projections,
        projection_rank=model.__dict__.get("distill_rank", 8),
        base_model_name_or_path=model.config.hybrid["base_model"]["name_or_path"],
        revision=model.config.hybrid["base_model"]["revision"],
        inference_mode=True,
    )
    config.describe_sites(sites)
    config.base_fingerprint = base_fingerprint(model, layers)
    switched = linear_heads(model)
    config.linear_heads = {name: list(heads) for name, heads in switched.items()} or None
    return config


def with_all_settings(sites: Mapping[str, dict] | None) -> dict[str, dict] | None:
    """Sites as an adapter's config has them, with the settings that mixers did not have yet when it was written."""
    if sites is None:
        return None
    return {name: {**site, "mixer": MixerConfig.from_dict(site["mixer"]).to_dict()} for name, site in sites.items()}


def common_mixer(sites: Mapping[str, LinearSite]) -> dict:
    """
    The settings that the mixers of all layers come from: those of a causal one, since bidirectional layers take part of
    them only.
    """
    return next((site.mixer for site in sites.values() if site.site.causal), next(iter(sites.values())).mixer)


def adapter_key(name: str) -> str:
    """
    The name in `adapter_model.safetensors` of a parameter of the model: PEFT's tuner layer holds mixers under its own
    prefix.
    """
    return PREFIX + name.replace(".hybrid.", ".hybrid_mixer.")


def write_adapter(folder: str | os.PathLike, config: HybridPeftConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Write `adapter_config.json` and `adapter_model.safetensors`, both or neither: the config goes first and comes last.
    """
    if os.path.exists(os.path.join(folder, "config.json")):
        raise OutputFolderError(
            f"{str(folder)!r} holds a model, on top of which from_pretrained would load the mixers. Choose another "
            "folder."
        )
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        config.save_pretrained(temporary)
        # cloned: parameters of one mixer may share memory, which the format does not allow
        named = {adapter_key(name): value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(named, os.path.join(temporary, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        if os.path.exists(os.path.join(folder, CONFIG_NAME)):
            os.remove(os.path.join(folder, CONFIG_NAME))
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))


def read_adapter(folder: str | os.PathLike) -> tuple[HybridPeftConfig, dict[str, torch.Tensor]]:
    """
    Config and tensors of an adapter, by parameter name.

    Raises:
        CheckpointError: If they cannot be read.
    """
    try:
        config = HybridPeftConfig.from_pretrained(str(folder))
        tensors = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
    except HybridError:
        raise
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no readable adapter of mixers ({CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}): {error}. Save "
            "or download it again."
        ) from error
    if not isinstance(config, HybridPeftConfig) or not isinstance(config.sites, dict):
        raise CheckpointError(
            f"{folder}: {CONFIG_NAME} is not of a HYBRID adapter that was trained. Save or download it again."
        )
    named = {key.removeprefix(PREFIX).replace(".hybrid_mixer.", ".hybrid."): value for key, value in tensors.items()}
    return config, named


def check_base(config: HybridPeftConfig, model: PreTrainedModel, where: str) -> dict[str, LinearSite]:
    """
    The layers of an adapter, if it was made for this model.

    Raises:
        CheckpointError: If entries are missing, or it was made for another base model.
    """
    sites = config.linear_sites(where)
    theirs = config.base_fingerprint
    if not sites or not isinstance(theirs, dict) or set(theirs) != set(sites):
        raise CheckpointError(f"{where} lacks entries: sites and their fingerprints. The file was edited.")
    base = config.base_model_name_or_path
    try:
        ours = base_fingerprint(model, sites)
    except (AttributeError, KeyError):
        missing = next(name for name in sites if not _has(model, name))
        raise CheckpointError(
            f"{where}: distilled from {base!r}; {describe(model)} has no layer {missing!r}. Load that base model."
        ) from None
    other = [name for name in sites if not abs(ours[name] - theirs[name]) <= TOLERANCE]
    if other:
        raise CheckpointError(
            f"{where}: distilled from {base!r}; the weights of {describe(model)} at {other[0]!r} are others. Load the "
            "base model it was distilled from."
        )
    return sites


def _has(model: torch.nn.Module, name: str) -> bool:
    return name in hybrid_layers(model) or any(path == name for path, _ in model.named_modules())


def save_mixer_bank(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """
    Write the mixers of a model in distillation to `folder`, as a PEFT adapter: `adapter_config.json` and
    `adapter_model.safetensors`.

    Raises:
        AlreadyHybridError: If the model has no mixers.
    """
    if not hybrid_layers(model):
        raise AlreadyHybridError(
            f"{describe(model)} has no students to save: a mixer bank is written between distillation and finalize."
        )
    write_adapter(folder, adapter_config(model), student_state(model))


def load_mixer_bank(model: PreTrainedModel, folder: str | os.PathLike, **hub_kwargs) -> PreTrainedModel:
    """
    Put the mixers of a bank beside the attention of their base model, in place: the model is in distillation, with all
    switches off.

    Args:
        model (`PreTrainedModel`): The base model.
        folder (`str`): A folder, or a repository on the Hub; also one that an earlier version of this package wrote.
        hub_kwargs: Arguments of `snapshot_download`, for a repository.

    Raises:
        CheckpointError: If the bank is incomplete, edited, or belongs to another base model.
    """
    if not os.path.isdir(folder):
        wanted = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *first_format.FILES, f"{BANK_FOLDER}/*"]
        folder = snapshot_download(str(folder), allow_patterns=wanted, **hub_kwargs)
    inside = os.path.join(folder, BANK_FOLDER)
    if not os.path.exists(os.path.join(folder, CONFIG_NAME)) and os.path.isdir(inside):
        folder = inside  # the output folder of a trainer
    if first_format.is_bank(folder):
        config, tensors = first_format.read_bank(folder, model)
    else:
        config, tensors = read_adapter(folder)
    sites = check_base(config, model, os.path.join(folder, CONFIG_NAME))
    config.mixer = common_mixer(sites)
    fitted = {name: config.mixer_config.fitted(site.site.causal).to_dict() for name, site in sites.items()}
    kinds = {str(sorted(site.mixer.items())) for site in sites.values()}
    # a file may be older than a setting
    if any(fitted[name] != MixerConfig.from_dict(site.mixer).to_dict() for name, site in sites.items()):
        raise CheckpointError(f"The mixer bank {folder} must hold one mixer for all its sites; got {len(kinds)}.")
    partial = {
        name: list(site.heads) for name, site in sites.items() if len(site.heads) < site.site.num_key_value_heads
    }
    prepare_distillation_(
        model,
        config.mixer_config,
        list(sites),
        heads=partial or None,
        projections=config.projections,
        rank=config.projection_rank,
    )
    try:
        load_student_state(model, tensors, str(folder))
    except CheckpointError:
        discard_students_(model)
        raise
    return model


def load_student_state(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """
    Copy `tensors` into the mixers; every name and shape must fit, both ways.

    Raises:
        CheckpointError: If one does not; nothing was copied.
    """
    own = _student_parameters(model)
    wrong = sorted(set(own) ^ set(tensors)) or sorted(n for n in own if own[n].shape != tensors[n].shape)
    if wrong:
        raise CheckpointError(
            f"{where} does not fit the students: {len(wrong)} tensors differ, the first {wrong[0]!r}. It was edited."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            value = tensors[name].to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


__all__ = [
    "BANK_FOLDER",
    "adapter_config",
    "check_base",
    "load_mixer_bank",
    "load_student_state",
    "read_adapter",
    "save_mixer_bank",
    "student_state",
    "write_adapter",
]
