"""Toy models of every (task, model type) pair, with inputs they accept."""

import contextlib
import importlib

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from hf_hybrid.conversion.dummy_inputs import dummy_inputs

from .toy_configs import toy_config
from .toy_inputs import INPUTS


# Main tasks: each pair of the table is a row of the sweep.
TASKS = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "speech-seq2seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "ctc": modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "audio-classification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "zero-shot-image": modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "image-text-to-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
# For types in none of them: the first of these that knows the type.
OTHER_TASKS = {
    "multimodal-lm": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "base": modeling_auto.MODEL_MAPPING_NAMES,
    **{
        name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES").lower().replace("_", "-"): mapping
        for name, mapping in vars(modeling_auto).items()
        if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING_NAMES")
    },
}
# A config whose sizes our table does not reach would build a model of gigabytes.
MAX_PARAMETERS = 8_000_000


def pairs() -> list[tuple[str, str]]:
    """Every (task, model type) pair of the sweep."""
    found = [(task, model_type) for task, names in TASKS.items() for model_type in names]
    covered = {model_type for _, model_type in found}
    for model_type in CONFIG_MAPPING_NAMES:
        if model_type not in covered:
            task = next((task for task, names in OTHER_TASKS.items() if model_type in names), None)
            if task is not None:
                found.append((task, model_type))
    return found


class ToyConfigError(Exception):
    """The harness could not build or run the untouched model: says nothing about the library."""


def model_class(task: str, model_type: str) -> type:
    name = {**OTHER_TASKS, **TASKS}[task][model_type]
    name = name if isinstance(name, str) else name[0]
    if hasattr(transformers, name):
        return getattr(transformers, name)
    config_module = CONFIG_MAPPING[model_type].__module__  # some classes are not exported
    return getattr(importlib.import_module(config_module.replace(".configuration_", ".modeling_")), name)


@contextlib.contextmanager
def harness_errors():
    """What goes wrong inside is the harness' own business."""
    try:
        yield
    except Exception as error:  # whatever configs and constructors raise
        raise ToyConfigError(f"{type(error).__name__}: {error}".strip()) from error


def toy_model(task: str, model_type: str, seed: int = 0):
    """A toy model in eval mode, weights scaled so that attention matters."""
    with harness_errors():
        cls = model_class(task, model_type)
        config = toy_config(model_type)
        if task == "causal-lm" and not isinstance(config, cls.config_class):
            text = config.get_text_config(decoder=True)  # the language model of a multimodal type
            config = text if isinstance(text, cls.config_class) else config
        if task == "causal-lm" and hasattr(config, "is_decoder"):
            config.is_decoder = True
        # how large it would be, without making it; a constructor that computes with numbers cannot be asked, and is made as it is
        with torch.device("meta"), contextlib.suppress(NotImplementedError):
            probe = cls(config.__class__.from_dict(config.to_dict()))
            size = sum(parameter.numel() for parameter in probe.parameters())
            if size > MAX_PARAMETERS:
                raise ToyConfigError(f"{size:,} parameters, more than {MAX_PARAMETERS:,}")
        torch.manual_seed(seed)
        model = cls(config).eval()
        generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            starts_closed = not parameter.any() and (parameter.ndim > 1 or "gate" in name)
            if starts_closed:  # zeros would hide what comes through a projection or a gate
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(4.0)
    return model


def toy_inputs(model, model_type: str = "", batch_size: int = 2, length: int = 9) -> dict:
    """The first inputs the model accepts: those of the table if it has a row, else the library's own guesses."""
    if model_type in INPUTS:
        candidates = [INPUTS[model_type](model, batch_size, length)]
    else:
        candidates = dummy_inputs(model, batch_size, length)
    first = None
    for inputs in candidates:
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs
        except Exception as error:  # whatever the family raises for arguments it does not want
            first = first or error
    raise ToyConfigError(f"no inputs accepted; first: {type(first).__name__}: {first}")
