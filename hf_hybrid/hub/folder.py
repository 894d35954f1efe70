"""
A checkpoint's folder changes from one whole checkpoint to another: never half of each, and nothing of anybody else's is
touched.
"""

import os
import re
import tempfile
from collections.abc import Callable


CONFIG = "config.json"


def replace_checkpoint(folder: str | os.PathLike, write: Callable[[str], None]) -> None:
    """
    Let `write` fill a temporary folder, then move its files into `folder`.

    `config.json` goes first and comes last, if it is among them: a folder without it is no checkpoint, and new weights
    never meet an old config. Weights of an earlier save of the same variant under another layout (one file, shards) are
    removed, since `from_pretrained` would find them first; other variants, adapters and other files stay.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        write(temporary)
        names = os.listdir(temporary)
        if CONFIG in names and os.path.exists(os.path.join(folder, CONFIG)):
            os.remove(os.path.join(folder, CONFIG))
        for name in sorted(names, key=lambda name: (name == CONFIG, name)):
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    written = {variant for name in names if (variant := _variant(name)) is not None}
    for name in os.listdir(folder):
        if name not in names and _variant(name) in written:
            os.remove(os.path.join(folder, name))


def _variant(name: str) -> str | None:
    """The variant of a model's weight file (`""` for the plain one), or `None` of another file."""
    one_or_shard = re.fullmatch(r"model(?:\.(?P<variant>[^.-]+))?(?:-\d+-of-\d+)?\.safetensors", name)
    index = re.fullmatch(r"model\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json", name)
    match = one_or_shard or index
    return None if match is None else match["variant"] or ""


__all__ = ["replace_checkpoint"]
