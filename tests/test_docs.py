"""Code in README and docs runs, on toy models: what a newcomer copies works."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hybrid import GreedyLayerSwapCallback, convert_to_hybrid

from conftest import token_dataset
from helpers import toy_trainer
from tiny_models import tiny_llava, tiny_model


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
    example, again = python_blocks("README.md")
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
    again = again.replace("HuggingFaceTB/SmolLM2-135M-Instruct", names["teacher"]).replace(
        # toy mixers hold more than a toy cache, and a toy teacher is seldom right
        '"accuracy", 0.02, granularity="head", cache_share=0.3',
        '"accuracy", 0.5, granularity="head", length=10_000, cache_share=0.3',
    )
    names.update(rows=names["validation"], other_rows=token_dataset(6, seed=8))
    exec(compile(again, "README", "exec"), names)
    assert names["trainer"].swap_report.promise is not None


def test_choosing_a_mixer(names):
    (example,) = python_blocks("docs/how_to/choose_a_mixer.md")
    names.update(hybrid=convert_to_hybrid(tiny_model()), batches=[{"input_ids": torch.tensor(names["ids"][:2])}])
    exec(compile(example, "choose_a_mixer", "exec"), names)


def test_choosing_layers(names, tmp_path):
    which, search = python_blocks("docs/how_to/choose_layers.md")[0], python_blocks("docs/how_to/choose_layers.md")[2]
    heads = python_blocks("docs/how_to/choose_layers.md")[1]
    for line in re.findall(r"convert_to_hybrid\((?:[^()]|\([^()]*\))*\)", which):  # each on a model of its own
        line = line.replace("site.num_heads > 8", "site.num_heads > 3")
        model = tiny_llava() if "vision" in line else bart() if "encoder" in line else tiny_model()
        exec(compile(line, "choose_layers", "exec"), {"convert_to_hybrid": convert_to_hybrid, "model": model})
        assert model.config.hybrid["sites"]
    model = tiny_model()
    exec(compile(heads, "choose_layers", "exec"), {"convert_to_hybrid": convert_to_hybrid, "model": model})
    assert [site["heads"] for site in model.config.hybrid["sites"].values()] == [[0], [1]]
    names.update(GreedyLayerSwapCallback=GreedyLayerSwapCallback, other_rows=token_dataset(4, seed=3))
    callback = eval(compile(search.strip(), "choose_layers", "eval"), names)
    accuracy = {"compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}}
    report = callback.search(toy_trainer(tmp_path / "run", mixer="sliding_window", **accuracy))
    assert report.confirmed is not None
    race = python_blocks("docs/how_to/choose_layers.md")[3].replace("0.02", "0.5").replace("0.3", "0.9, length=10_000")
    names["trainer"] = toy_trainer(tmp_path / "race", mixer="sliding_window", **accuracy)
    exec(compile(race, "choose_layers", "exec"), names)
    assert names["trainer"].swap_report.promise.rows == 4


def test_publishing(names, tmp_path, monkeypatch):
    """The loading lines of the page, of a folder under the name that they use."""
    convert_to_hybrid(tiny_model(), "sliding_window", [1]).save_pretrained(tmp_path / "user" / "name")
    (example,) = python_blocks("docs/how_to/resume_and_push.md")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    names["AutoModelForCausalLM"] = AutoModelForCausalLM
    exec(compile(example, "resume_and_push", "exec"), names)
    assert type(names["model"]).__name__ == "HybridLlamaForCausalLM"


def test_adapters(names):
    (example,) = python_blocks("docs/how_to/adapters.md")
    names["rows"] = token_dataset(16)
    exec(compile(example, "adapters", "exec"), names)
    assert list(names["hybrid"].config.hybrid["sites"]) == [f"model.layers.{i}.self_attn" for i in (0, 2)]


def test_budgets_and_repairs(names):
    plan, measures = python_blocks("docs/how_to/budget_and_repair.md")
    from datasets import Dataset

    names.update(ids=torch.randint(3, 99, (2, 40)).tolist(), text=Dataset.from_dict({"text": names["texts"]}))
    short = "max_steps=2, max_length=24, report_to=[], use_cpu=True"
    exec(compile(plan.replace("max_steps=96", short), "budget_and_repair", "exec"), names)
    assert names["plan"].share <= 0.15
    assert AutoModelForCausalLM.from_pretrained("hybrid").repaired
    exec(compile(measures, "budget_and_repair", "exec"), names)
    assert len(names["before"]) == len(names["after"]) == 2 and "compute_metrics" in names["settings"]


def bart():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 99}
    more = {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **more)).eval()


def test_links_between_pages_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} -> {target}"


def test_paths_that_pages_name_exist():
    pages = [ROOT / "CONTRIBUTING.md", ROOT / "docs/explanation/design.md", ROOT / "README.md"]
    for page in pages:
        for path in re.findall(
            r"`((?:hf_hybrid|conversion|metrics|mixers|ops|distillation|search|adapters|evaluation|hub|cli|surgery|objectives|tests|docs|benchmarks|examples)/[\w/.]*)`",
            page.read_text(),
        ):
            found = [(folder / path).exists() for folder in (ROOT, ROOT / "hf_hybrid", ROOT / "benchmarks")]
            assert any(found) or "<" in path, f"{page.name} names {path}"
