"""
What transformers' Auto classes know of a hybrid, and the file through which they load it where nobody imported this
package.
"""

import os
import shutil

from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    modeling_auto,
    processing_auto,
    tokenization_auto,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass


SHIM_FILE = "modeling_hf_hybrid.py"
AUTO_CLASSES = [
    cls
    for cls in vars(modeling_auto).values()
    if isinstance(cls, type)
    and issubclass(cls, _BaseAutoModelClass)
    and getattr(cls, "_model_mapping", None) is not None
]
PREPROCESSOR_MAPPINGS = [
    tokenization_auto.TOKENIZER_MAPPING,
    image_processing_auto.IMAGE_PROCESSOR_MAPPING,
    feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
    processing_auto.PROCESSOR_MAPPING,
]


def auto_map(model_class: type, config_class: type) -> dict[str, str]:
    """The `auto_map` entry of a checkpoint: which class of the shim each Auto class loads."""
    stem = SHIM_FILE.removesuffix(".py")
    entries = {"AutoConfig": f"{stem}.HybridAttentionConfig"}
    for auto in AUTO_CLASSES:
        registered = auto._model_mapping._extra_content.get(config_class, ())
        if model_class in (registered if isinstance(registered, tuple) else (registered,)):
            entries[auto.__name__] = f"{stem}.{model_class.__name__}"
    return entries


def write_shim(folder: str, model_class: type) -> None:
    """The four lines that let `trust_remote_code=True` load the checkpoint where nobody imported hf_hybrid."""
    text = (
        '"""Loads this checkpoint through the hf_hybrid package: pip install hf_hybrid."""\n'
        "import hf_hybrid\n"
        "from hf_hybrid import HybridAttentionConfig\n"
        f"from hf_hybrid.modeling_hybrid import {model_class.__name__}\n"
    )
    path = os.path.join(folder, SHIM_FILE)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    shutil.move(path + ".tmp", path)


__all__ = ["AUTO_CLASSES", "PREPROCESSOR_MAPPINGS", "SHIM_FILE", "auto_map", "write_shim"]
