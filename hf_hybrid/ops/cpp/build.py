"""Compiles the kernels with the machine's own compiler, once per machine, and loads them.

No compiler, no kernels: the ops then run in plain torch. The library file lies in the cache folder under a name made of
everything it depends on (sources, flags, compiler, processor), so a file that is there is the right one.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from ...cache_folder import cache_folder
from ...errors import MissingDependencyError
from .arguments import SIGNATURES


logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
# For this very processor. No -ffast-math: NaN and infinity mean something.
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
FLAGS = ("-std=c++17", "-O3", NATIVE, "-fPIC", "-w")


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The loaded library, or `None` where it cannot be had: no compiler, or one that fails (which warns)."""
    compiler = find_compiler()
    if compiler is None:
        logger.info("No C++ compiler found: the ops run in plain torch, which is several times slower on a CPU.")
        return None
    failures = []
    # With OpenMP first. The objects are linked without its runtime: torch has brought its own, and two would fight over
    # the cores.
    for openmp in (("-fopenmp",), ("-fopenmp-simd",)):
        try:
            return _declared(ctypes.CDLL(str(_built(compiler, openmp)), mode=os.RTLD_NOW))
        except (OSError, subprocess.CalledProcessError) as error:
            failures.append(getattr(error, "stderr", None) or str(error))
    warnings.warn(
        f"The CPU kernels could not be compiled with {compiler}; the ops run in plain torch, which is several times "
        "slower. Set "
        f"HF_HYBRID_OPS=torch to silence this, or CXX to another compiler. It said: {failures[-1].strip()[:2000]}",
        stacklevel=2,
    )
    return None


def library() -> ctypes.CDLL:
    """[`kernels`], which must be there: the ops ask first."""
    loaded = kernels()
    if loaded is None:
        raise MissingDependencyError(
            "The compiled kernels are not there: no C++ compiler was found. Use HF_HYBRID_OPS=torch."
        )
    return loaded


def find_compiler() -> str | None:
    """`CXX` if set, else the first of c++, g++ and clang++ on the path."""
    if wanted := os.environ.get("CXX"):
        found = shutil.which(wanted.split()[0])
        if found is None:
            warnings.warn(
                f"CXX names {wanted!r}, which is not on the path; without it the ops run in plain torch.", stacklevel=2
            )
        return found
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _built(compiler: str, openmp: tuple[str, ...]) -> Path:
    """Path of the compiled library; compiles it if it is not there."""
    flags = [*FLAGS, *os.environ.get("CXXFLAGS", "").split(), *openmp]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    sources = (source.read_text() for source in sorted(SOURCES.iterdir()))
    key = hashlib.sha256("\0".join([compiler, version, _processor(), *flags, *sources]).encode()).hexdigest()[:16]
    folder = cache_folder() / "kernels"
    target = folder / f"kernels-{key}.so"
    if target.exists():
        return target
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # a read-only home
        folder = Path(tempfile.mkdtemp(prefix="hf_hybrid-"))
        target = folder / target.name
    logger.info("Compiling the CPU kernels into %s (once per machine, a few seconds).", target)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        built, library = Path(work) / "kernels.o", Path(work) / "kernels.so"
        for command in (
            [compiler, *flags, "-c", str(SOURCES / "kernels.cpp"), "-o", str(built)],
            [compiler, "-shared", str(built), "-o", str(library)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(library, target)  # whole or not at all, whoever else is compiling it
    return target


def _processor() -> str:
    """
    What the machine code is for: -march=native means something else on another processor that shares the cache folder.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in SIGNATURES.items():
        function = getattr(library, f"hf_hybrid_{name}")
        function.argtypes, function.restype = arguments, None
    return library
