"""
Banks that version 0.1 wrote: `mixer_bank.json` and `mixer_bank.safetensors`. They are read, and never written again.
"""

import hashlib
import json
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..configuration_hybrid import read_hybrid_section
from ..errors import CheckpointError
from .config import HybridPeftConfig


WEIGHTS_FILE, CONFIG_FILE = "mixer_bank.safetensors", "mixer_bank.json"
FILES = (WEIGHTS_FILE, CONFIG_FILE)


def is_bank(folder: str | os.PathLike) -> bool:
    """Whether `folder` holds a bank of that format."""
    return os.path.exists(os.path.join(folder, CONFIG_FILE))


def read_bank(folder: str | os.PathLike, model: PreTrainedModel) -> tuple[HybridPeftConfig, dict[str, torch.Tensor]]:
    """
    Config and tensors of a bank, as of an adapter.

    Args:
        folder (`str`): Where it is.
        model (`PreTrainedModel`): Its base: copies of projections become differences to its own.

    Raises:
        CheckpointError: If it is incomplete or edited.
    """
    config_path, weights_path = os.path.join(folder, CONFIG_FILE), os.path.join(folder, WEIGHTS_FILE)
    try:
        with open(config_path, encoding="utf-8") as file:
            description = json.load(file)
        tensors = load_file(weights_path)
        digest = _sha256(weights_path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no readable mixer bank ({CONFIG_FILE} and {WEIGHTS_FILE}): {error}. Save or download it "
            "again."
        ) from error
    sites = read_hybrid_section(description, config_path)
    missing = sorted({"base_model", "base_model_type", "base_fingerprint", "rank"} - set(description))
    if missing or not sites:
        raise CheckpointError(f"{config_path} lacks entries: {', '.join(missing) or 'sites'}. The file was edited.")
    if digest != description.get("weights_sha256"):
        raise CheckpointError(
            f"{folder}: {WEIGHTS_FILE} is not the file {CONFIG_FILE} describes. One of them was edited or is of "
            "another save."
        )
    base = description["base_model"] or {}
    config = HybridPeftConfig(
        mixer=next(iter(sites.values())).mixer,
        projections=description["projections"],
        projection_rank=description["rank"],
        base_model_name_or_path=base.get("name_or_path"),
        revision=base.get("revision"),
    )
    config.describe_sites(sites)
    config.base_fingerprint = description["base_fingerprint"]
    return config, {new: value for name, old in tensors.items() for new, value in [_renamed(name, old, model)]}


def _renamed(name: str, value: torch.Tensor, model: PreTrainedModel) -> tuple[str, torch.Tensor]:
    """
    `<site>.student.hybrid.x`, `<site>.student.q_proj.parametrizations.weight.0.A` and `<site>.student.q_proj.weight`
    under today's names.
    """
    site, _, inside = name.partition(".student.")
    if inside.startswith("hybrid."):
        return f"{site}.{inside}", value
    if ".parametrizations." in inside:
        projection, _, rest = inside.partition(".parametrizations.")
        parameter, _, part = rest.partition(".0.")
        return f"{site}.hybrid_delta.{_key(f'{projection}.{parameter}')}.{part}", value
    try:
        own = model.get_parameter(f"{site}.{inside}")
    except AttributeError:
        raise CheckpointError(
            f"{name!r} of the mixer bank belongs to no parameter of the model. Load its base model."
        ) from None
    return f"{site}.hybrid_delta.{_key(inside)}.D", value.float() - own.detach().float().cpu()


def _key(parameter: str) -> str:
    return parameter.replace(".", "__")


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slowly(file)


def _slowly(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


__all__ = ["CONFIG_FILE", "FILES", "WEIGHTS_FILE", "is_bank", "read_bank"]
