"""Every mapping to flash-linear-attention against our own ops, through Triton's interpreter."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


INSTALLED = all(importlib.util.find_spec(name) for name in ("triton", "fla"))


@pytest.mark.slow
@pytest.mark.skipif(
    not INSTALLED, reason="triton and flash-linear-attention (1.3 GB) are not installed; `make test-fla` does both"
)
def test_every_mapped_kernel_agrees_with_torch():
    script = Path(__file__).with_name("fla_interpreter.py")
    result = subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, result.stdout + result.stderr
