"""The model card: its text, what the Hub reads of it, and what it takes from the base model's card."""

import pytest
from huggingface_hub import ModelCard
from transformers import BertConfig, BertModel, T5Config

from hf_hybrid import convert_to_hybrid
from hf_hybrid.hub.card import CARD_FILE, MARKER, is_own_card, number_of_layers, write_model_card
from hf_hybrid.search.greedy import confirm_swaps, greedy_swap

from helpers import SMALL_MIXER
from tiny_models import tiny_llava, tiny_model


SITES = [f"model.layers.{index}.self_attn" for index in range(3)]


def search(**kwargs):
    """A search over the toy model's layers in which each swap costs one point of accuracy."""
    settings = {"metric": "eval_accuracy", "greater_is_better": True, "max_drop": 0.02, **kwargs}
    return greedy_swap(SITES, lambda swapped: {"eval_accuracy": 0.9 - 0.01 * len(swapped)}, **settings)


def test_the_text(tmp_path):
    report = search()
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER, [1])
    path = write_model_card(model, tmp_path, report, repo_id="me/toy", extra="## More\n\nwords")
    text = (tmp_path / "README.md").read_text()
    assert path == str(tmp_path / "README.md") and list(tmp_path.iterdir()) == [tmp_path / "README.md"]
    assert text.startswith("---\nlibrary_name: transformers")
    assert "1 of its 3 attention layers" in text
    assert "| `model.layers.1.self_attn` | `linear_attention` | 4 | all |" in text
    assert "0.9 before any swap, floor 0.88" in text and "## More" in text and 'from_pretrained("me/toy")' in text
    assert "AutoModelForCausalLM" in text and MARKER in text


def test_the_bytes_are_those_of_the_state(tmp_path):
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER, [1])
    expected = model.model.layers[1].self_attn.hybrid.state_bytes()
    write_model_card(model, tmp_path)
    assert f"| all | {expected:,} |" in (tmp_path / CARD_FILE).read_text()


def test_single_heads_are_named_and_counted(tmp_path):
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER, [0, 1], heads={SITES[1]: [1]})
    whole, one = (model.get_submodule(name).hybrid.state_bytes() for name in SITES[:2])
    assert one == pytest.approx(whole / 2, rel=0.05)  # beside the heads, a state has a counter
    write_model_card(model, tmp_path, search())
    text = (tmp_path / CARD_FILE).read_text()
    assert f"| `{SITES[0]}` | `linear_attention` | 4 | all | {whole:,} |" in text
    assert f"| `{SITES[1]}` | `linear_attention` | 4 | 1 | {one:,} |" in text
    assert not ModelCard.load(tmp_path / CARD_FILE).data.eval_results  # of whole layers, which these are not


def test_the_hub_reads_results_of_exactly_these_layers(tmp_path):
    report = search()
    chosen = report.most_linear
    assert len(chosen) == 2
    confirm_swaps(report, lambda swapped: {"eval_accuracy": 0.8 - 0.005 * len(swapped)}, 0.02)
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER, chosen)
    write_model_card(model, tmp_path, report, repo_id="me/toy")
    data = ModelCard.load(tmp_path / CARD_FILE).data
    assert data.pipeline_tag == "text-generation" and data.model_name == "me/toy"
    found = {(r.dataset_split, r.task_type, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        ("validation", "text-generation", "accuracy"): pytest.approx(0.88),
        ("confirmation", "text-generation", "accuracy"): pytest.approx(0.79),
    }


def test_another_mixture_has_no_results(tmp_path):
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER, [0, 1, 2])
    write_model_card(model, tmp_path, search(max_layers=1))
    data = ModelCard.load(tmp_path / CARD_FILE).data
    assert not data.eval_results and "model-index" not in data.to_dict()


def test_a_model_without_a_task_has_none(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    model = convert_to_hybrid(BertModel(config).eval(), SMALL_MIXER)
    report = greedy_swap(
        ["encoder.layer.0.attention.self"],
        lambda swapped: {"eval_f1": 0.9},
        metric="eval_f1",
        greater_is_better=True,
        max_drop=0.02,
    )
    write_model_card(model, tmp_path, report)
    data = ModelCard.load(tmp_path / CARD_FILE).data
    assert data.pipeline_tag is None and not data.eval_results


def test_a_model_of_several_tasks_has_the_one_of_pictures(tmp_path):
    write_model_card(convert_to_hybrid(tiny_llava(), SMALL_MIXER, ["text"]), tmp_path)
    assert ModelCard.load(tmp_path / CARD_FILE).data.pipeline_tag == "image-text-to-text"


HEADERS = {
    "license: apache-2.0": {"license": "apache-2.0"},
    "license: other\nlicense_name: toy\nlicense_link: LICENSE": {
        "license": "other",
        "license_name": "toy",
        "license_link": "LICENSE",
    },
    "language: en": {},
    "license: [": {},  # not YAML
    "- a list": {},
}


@pytest.mark.parametrize("header", HEADERS)
def test_the_licence_of_a_base_in_a_folder(tmp_path, header):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    (base / CARD_FILE).write_text(f"---\n{header}\n---\n\n# Base\n")
    model = convert_to_hybrid(type(tiny_model()).from_pretrained(base), SMALL_MIXER, [1])
    write_model_card(model, tmp_path)
    data = ModelCard.load(tmp_path / CARD_FILE).data
    names = ("license", "license_name", "license_link")
    assert {name: data.get(name) for name in names if data.get(name)} == HEADERS[header]
    assert data.base_model is None  # a folder means nothing to others


def test_the_licence_of_a_base_from_the_hub(tmp_path, monkeypatch):
    """Only the local cache is read: a save must not wait for a network."""
    snapshot = tmp_path / "models--me--base" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--base" / "refs").mkdir()
    (tmp_path / "models--me--base" / "refs" / "main").write_text("abc")
    (snapshot / CARD_FILE).write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tiny_model()
    for name, licence in (("me/base", "mit"), ("me/other", None), ("./not/a/repository", None)):
        model.config.name_or_path = name
        write_model_card(convert_to_hybrid(tiny_model_named(name), SMALL_MIXER, [1]), tmp_path)
        data = ModelCard.load(tmp_path / CARD_FILE).data
        assert data.license == licence and data.base_model == name


def tiny_model_named(name):
    model = tiny_model()
    model.config._name_or_path = name
    return model


def test_a_card_by_hand_is_known(tmp_path):
    assert not is_own_card(str(tmp_path / "README.md"))
    write_model_card(convert_to_hybrid(tiny_model(), SMALL_MIXER, [1]), tmp_path)
    assert not is_own_card(str(tmp_path / "README.md"))
    (tmp_path / "README.md").write_text("# Mine\n")
    assert is_own_card(str(tmp_path / "README.md"))


def test_layers_are_counted_over_towers_and_halves():
    assert number_of_layers(tiny_llava().config) == 4
    assert number_of_layers(T5Config(num_layers=2, num_decoder_layers=3)) == 5
