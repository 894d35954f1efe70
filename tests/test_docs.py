"""Code in README and docs runs, on toy models: what a newcomer copies works."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hf_hybrid import convert_to_hybrid

from conftest import token_dataset
from tiny_models import tiny_model


ROOT = Path(__file__).parent.parent


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.S)


@pytest.fixture
def names(tmp_path, tokenizer, monkeypatch):
    """What the examples take for granted: a teacher, texts, validation rows."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "teacher"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = token_dataset(8)["input_ids"]
    texts = [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in token_dataset(60)["input_ids"]]
    return {"teacher": str(folder), "texts": texts, "ids": ids}


def test_quickstart(names):
    trained, untrained = python_blocks("docs/quickstart.md")
    exec(compile(trained, "quickstart", "exec"), names)
    assert type(names["hybrid"]).__name__ == "HybridLlamaForCausalLM"
    names["model"] = tiny_model()
    exec(compile(untrained, "quickstart", "exec"), names)


def test_readme_example(names):
    (example,) = python_blocks("README.md")
    example = example.replace("HuggingFaceTB/SmolLM2-135M-Instruct", names["teacher"]).replace(
        "max_steps=1000", "max_steps=2, max_length=24"
    )
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    tokenizer = AutoTokenizer.from_pretrained(names["teacher"])
    from datasets import Dataset

    names.update(
        text=Dataset.from_dict({"text": names["texts"]}),
        validation=Dataset.from_dict({"input_ids": names["ids"], "labels": names["ids"]}),
        tokenizer=tokenizer,
        accuracy=lambda prediction: {
            "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
        },
    )
    exec(compile(example, "README", "exec"), names)
    with torch.no_grad():
        assert names["model"](torch.tensor(names["ids"])).logits.isfinite().all()


def test_choosing_a_mixer(names):
    (example,) = python_blocks("docs/how_to/choose_a_mixer.md")
    names.update(hybrid=convert_to_hybrid(tiny_model()), batches=[{"input_ids": torch.tensor(names["ids"][:2])}])
    exec(compile(example, "choose_a_mixer", "exec"), names)


def test_links_between_pages_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} -> {target}"
