"""The mixer bank: the students of all sites, without the backbone. Task-agnostic and small; every task then needs only a search."""

import json
import os
import tempfile
from collections.abc import Iterable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .configuration_hybrid import hybrid_section, read_hybrid_section
from .distillation import DistillModelMixin, DistillSite, discard_students_, prepare_distillation_
from .errors import AlreadyHybridError, CheckpointError
from .mixers import MixerConfig
from .modeling_hybrid import describe


WEIGHTS_FILE, CONFIG_FILE = "mixer_bank.safetensors", "mixer_bank.json"
# Fingerprints are means of |weight| per site: equal up to the rounding of a dtype, far apart between different checkpoints.
FINGERPRINT_TOLERANCE = 5e-3


def student_state(model: DistillModelMixin) -> dict[str, torch.Tensor]:
    """The trainable tensors, named `<site>.student.<parameter>`."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def base_fingerprint(model: PreTrainedModel, sites: Iterable[str]) -> dict[str, float]:
    """Mean magnitude of the full-attention weights at each site: tells whether a bank was distilled from these weights."""
    prints = {}
    for name in sites:
        attention = model.get_submodule(name)
        attention = attention.teacher if isinstance(attention, DistillSite) else attention
        weights = [p.detach().float().abs().mean() for p in attention.parameters() if p.ndim > 1]
        prints[name] = round(torch.stack(weights).mean().item(), 8) if weights else 0.0
    return prints


def save_mixer_bank(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """
    Write the students of a model in distillation to `folder`: `mixer_bank.safetensors` and `mixer_bank.json`.

    Raises:
        AlreadyHybridError: If the model has no students.
    """
    if not isinstance(model, DistillModelMixin):
        raise AlreadyHybridError(
            f"{describe(model)} has no students to save: a mixer bank is written between distillation and finalize."
        )
    sites = {name: (site.site, site.mixer_config.to_dict()) for name, site in model.distill_sites.items()}
    description = {
        **hybrid_section(sites, model.config.name_or_path or None, getattr(model.config, "_commit_hash", None)),
        "base_model_type": model.config.model_type,
        "base_fingerprint": base_fingerprint(model, sites),
        "projections": model.distill_projections,
        "rank": model.distill_rank,
    }
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        weights, config = os.path.join(temporary, WEIGHTS_FILE), os.path.join(temporary, CONFIG_FILE)
        save_file(
            {k: v.contiguous().cpu() for k, v in student_state(model).items()}, weights, metadata={"format": "pt"}
        )
        with open(config, "w", encoding="utf-8") as file:
            json.dump(description, file, indent=2)
        os.replace(weights, os.path.join(folder, WEIGHTS_FILE))
        os.replace(config, os.path.join(folder, CONFIG_FILE))


def load_mixer_bank(model: PreTrainedModel, folder: str | os.PathLike, **hub_kwargs) -> PreTrainedModel:
    """
    Put the students of a bank beside the attention of `model`, in place: ready for a search, or for more distillation.

    Args:
        model (`PreTrainedModel`): The full-attention model the bank was distilled from.
        folder (`str`): A local folder or a Hub repository.
        hub_kwargs: `revision`, `token`, `cache_dir`, … of `huggingface_hub.snapshot_download`, for a repository.

    Raises:
        CheckpointError: If the bank is incomplete, edited, or belongs to another base model.
    """
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(str(folder), allow_patterns=[WEIGHTS_FILE, CONFIG_FILE], **hub_kwargs)
    try:
        with open(os.path.join(folder, CONFIG_FILE), encoding="utf-8") as file:
            description = json.load(file)
        tensors = load_file(os.path.join(folder, WEIGHTS_FILE))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no readable mixer bank ({CONFIG_FILE} and {WEIGHTS_FILE}): {error}. Save or download it again."
        ) from error
    sites = read_hybrid_section(description, os.path.join(folder, CONFIG_FILE))
    base = description["base_model"]["name_or_path"]
    if model.config.model_type != description.get("base_model_type"):
        raise CheckpointError(
            f"The mixer bank {folder} was distilled from {base!r} (model_type {description.get('base_model_type')!r}); got {describe(model)}. "
            "Load that base model."
        )
    mixers = {json.dumps(settings, sort_keys=True) for _, settings in sites.values()}
    if len(mixers) != 1:
        raise CheckpointError(f"The mixer bank {folder} must hold one mixer for all its sites; got {len(mixers)}.")
    config = MixerConfig.from_dict(next(iter(sites.values()))[1])
    theirs = description["base_fingerprint"]
    try:
        ours = base_fingerprint(model, sites)
    except AttributeError:
        ours = {}
    other = [n for n in sites if n not in ours or not abs(ours[n] - theirs[n]) <= FINGERPRINT_TOLERANCE * abs(ours[n])]
    if other:
        raise CheckpointError(
            f"The mixer bank {folder} was distilled from {base!r} by hf_hybrid {description['hf_hybrid_version']}; the weights of "
            f"{describe(model)} at {other[0]!r} are others. Load the base model it was distilled from."
        )
    prepare_distillation_(model, config, list(sites), projections=description["projections"], rank=description["rank"])
    try:
        load_student_state(model, tensors, str(folder))
    except CheckpointError:
        discard_students_(model)
        raise
    return model


def load_student_state(model: DistillModelMixin, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy `tensors` into the students; every name and shape must fit, both ways."""
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted(set(own) ^ set(tensors)) or sorted(n for n in own if own[n].shape != tensors[n].shape)
    if wrong:
        raise CheckpointError(
            f"{where} does not fit the students: {len(wrong)} tensors differ, the first {wrong[0]!r}. It was edited."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
