"""The mixer bank: the students of all sites, without the backbone. Task-agnostic and small; every task then needs only a search."""

import hashlib
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
# A fingerprint is a random projection of a site's weights, about 1 in size. Rounding weights to bfloat16 moves it by 0.001, a fine-tuning
# that changes them by 5 % by 0.05.
FINGERPRINT_TOLERANCE = 0.01


def student_state(model: DistillModelMixin) -> dict[str, torch.Tensor]:
    """The trainable tensors, named `<site>.student.<parameter>`."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def base_fingerprint(model: PreTrainedModel, sites: Iterable[str]) -> dict[str, float]:
    """A number per site that tells full-attention weights apart: the sum of the weights under fixed random signs, over their norm."""
    prints = {}
    for name in sites:
        attention = model.get_submodule(name)
        attention = attention.teacher if isinstance(attention, DistillSite) else attention
        weights = torch.cat([p.detach().float().cpu().flatten() for p in attention.parameters()])
        signs = torch.randint(0, 2, weights.shape, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
        prints[name] = round((weights.double() @ signs.double() / weights.double().norm().clamp_min(1e-30)).item(), 6)
    return prints


def describe_students(model: DistillModelMixin) -> dict:
    """What must be equal for students to fit a model: base, sites, mixers, projections."""
    sites = {name: (site.site, site.mixer_config.to_dict()) for name, site in model.distill_sites.items()}
    base_model, revision = model.config.name_or_path or None, getattr(model.config, "_commit_hash", None)
    return {
        **hybrid_section(sites, base_model, revision, model.distill_projections),
        "base_model_type": model.config.model_type,
        "base_fingerprint": base_fingerprint(model, sites),
        "rank": model.distill_rank,
    }


def check_students(description: dict, model: PreTrainedModel, where: str) -> dict[str, tuple]:
    """
    The sites of a description, if it fits `model`.

    Raises:
        CheckpointError: If entries are missing, or it describes students of another base model.
    """
    sites = read_hybrid_section(description, where)
    missing = sorted({"base_model", "base_model_type", "base_fingerprint", "projections", "rank"} - set(description))
    theirs = description.get("base_fingerprint")
    if missing or not isinstance(theirs, dict) or set(theirs) != set(sites) or not sites:
        raise CheckpointError(
            f"{where} lacks entries: {', '.join(missing) or 'sites and their fingerprints'}. The file was edited."
        )
    base = (description["base_model"] or {}).get("name_or_path")
    if model.config.model_type != description["base_model_type"]:
        raise CheckpointError(
            f"{where}: distilled from {base!r} (model_type {description['base_model_type']!r}); got {describe(model)}. Load that base model."
        )
    try:
        ours = base_fingerprint(model, sites)
    except AttributeError:  # a site that the model does not have
        ours = {}
    other = [n for n in sites if n not in ours or not abs(ours[n] - theirs[n]) <= FINGERPRINT_TOLERANCE]
    if other:
        raise CheckpointError(
            f"{where}: distilled from {base!r}; the weights of {describe(model)} at {other[0]!r} are others. Load the base model it was "
            "distilled from."
        )
    return sites


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
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        weights, config = os.path.join(temporary, WEIGHTS_FILE), os.path.join(temporary, CONFIG_FILE)
        save_file(
            {k: v.contiguous().cpu() for k, v in student_state(model).items()}, weights, metadata={"format": "pt"}
        )
        # the digest ties the two files together: a kill between the two moves leaves a pair that is refused
        description = {**describe_students(model), "weights_sha256": _sha256(weights)}
        with open(config, "w", encoding="utf-8") as file:
            json.dump(description, file, indent=2)
        os.replace(weights, os.path.join(folder, WEIGHTS_FILE))
        os.replace(config, os.path.join(folder, CONFIG_FILE))


def _sha256(path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


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
    config_path, weights_path = os.path.join(folder, CONFIG_FILE), os.path.join(folder, WEIGHTS_FILE)
    try:
        with open(config_path, encoding="utf-8") as file:
            description = json.load(file)
        tensors = load_file(weights_path)
        digest = _sha256(weights_path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no readable mixer bank ({CONFIG_FILE} and {WEIGHTS_FILE}): {error}. Save or download it again."
        ) from error
    sites = check_students(description, model, config_path)
    if digest != description.get("weights_sha256"):
        raise CheckpointError(
            f"{folder}: {WEIGHTS_FILE} is not the file {CONFIG_FILE} describes. One of them was edited or is of another save."
        )
    mixers = {json.dumps(settings, sort_keys=True) for _, settings in sites.values()}
    if len(mixers) != 1:
        raise CheckpointError(f"The mixer bank {folder} must hold one mixer for all its sites; got {len(mixers)}.")
    config = MixerConfig.from_dict(next(iter(sites.values()))[1])
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
