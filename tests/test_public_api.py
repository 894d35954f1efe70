"""What the package promises as a package."""

import subprocess
import sys
from pathlib import Path

import hf_hybrid


ROOT = Path(hf_hybrid.__file__).parent.parent


def test_all_is_sorted_importable_and_documented():
    assert hf_hybrid.__all__ == sorted(hf_hybrid.__all__)
    pages = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    for name in hf_hybrid.__all__:
        assert getattr(hf_hybrid, name).__doc__, f"{name} has no docstring"
        assert f"`{name}`" in pages, f"{name} is not in docs/"


def test_importing_has_no_other_effect():
    code = (
        "import torch, logging, random\n"
        "before = (torch.get_default_dtype(), torch.initial_seed(), logging.getLogger().level, random.getstate())\n"
        "import hf_hybrid, sys\n"
        "assert before == (torch.get_default_dtype(), torch.initial_seed(), logging.getLogger().level, random.getstate())\n"
        "assert 'matplotlib' not in sys.modules and 'fla' not in sys.modules\n"
        "from transformers import AutoConfig\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "assert 'hybrid_attention' in CONFIG_MAPPING\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_mixer_has_a_card():
    for name in hf_hybrid.list_mixers():
        assert (ROOT / "docs" / "mixers" / f"{name}.md").exists(), name
