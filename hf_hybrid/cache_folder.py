"""Where the library keeps what it makes once per machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`HF_HYBRID_CACHE`, or `hf_hybrid` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_hybrid"
    return Path(os.environ.get("HF_HYBRID_CACHE", default))
