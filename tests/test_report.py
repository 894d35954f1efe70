"""Measurements, the task, pictures and the card."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_hybrid import convert_to_hybrid
from hf_hybrid.errors import DatasetError, HybridConfigError
from hf_hybrid.model_card import write_model_card
from hf_hybrid.plots import plot_layer_map, plot_trade_off
from hf_hybrid.report import accuracy_interval, compare_speed, compare_times, perplexity, recall_loss, token_loss
from hf_hybrid.selection import greedy_swap
from hf_hybrid.tasks import LabelWordTask

from helpers import SMALL_MIXER
from tiny_models import tiny_model


def test_perplexity_and_recall_are_those_of_the_models_own_loss():
    model, ids = tiny_model(), torch.randint(5, 99, (3, 20))
    with torch.no_grad():
        expected = [model(row[None], labels=row[None]).loss.item() for row in ids]
        assert token_loss(model, ids) == pytest.approx(sum(expected) / 3, rel=1e-5)
        assert perplexity(model, ids) == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)
        twice = torch.cat([ids[:, :10], ids[:, :10]], dim=1)
        logits = model(twice).logits[:, 10:-1]
        second = torch.nn.functional.cross_entropy(logits.flatten(0, 1), twice[:, 11:].flatten()).item()
    assert recall_loss(model, ids) == pytest.approx(second, rel=1e-5)
    with pytest.raises(DatasetError, match=r"input_ids must be \[N, T\] with T > 1; got \(3, 1\)"):
        token_loss(model, ids[:, :1])


def test_the_interval_is_wilsons():
    low, high = accuracy_interval(80, 100)
    assert (round(low, 4), round(high, 4)) == (0.7112, 0.8666)
    assert accuracy_interval(0, 10)[0] == 0 and accuracy_interval(10, 10)[1] == 1


def test_times_are_paired():
    import time

    times = compare_times({"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.005)}, rounds=3)
    assert times["slow"].ratio == 1 and times["fast"].ratio > 2


def test_speed_reports_both_models_and_their_caches():
    teacher, hybrid = tiny_model(), convert_to_hybrid(tiny_model(), SMALL_MIXER)
    speed = compare_speed({"teacher": teacher, "hybrid": hybrid}, 40, decode_tokens=2, rounds=1)
    assert speed["teacher"].cache_bytes == 3 * 2 * 2 * 40 * 8 * 4
    assert speed["hybrid"].cache_bytes < compare_speed({"teacher": teacher}, 80, 1, 1)["teacher"].cache_bytes
    assert speed["hybrid"].prefill.seconds > 0 and speed["hybrid"].decode.ratio > 0


def test_label_words(tokenizer):
    task = LabelWordTask(tokenizer, "w1 {text} w2", ["bad", "good"])
    data = task.dataset([{"text": "w5 w6 w7", "label": 1}, {"text": "w5", "label": 0}])
    assert data["labels"] == [0, 1]  # shortest first
    batch = task.collate([data[0], data[1]])
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]
    assert batch["input_ids"][0, :2].tolist() == [tokenizer.pad_token_id] * 2
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    labels = batch.pop("labels")
    model = tiny_model()
    with torch.no_grad():
        outputs = model(**batch)
        alone = model(torch.tensor([data[0]["input_ids"]])).logits[0, -1, [5, 4]]
    assert torch.allclose(task.label_logits(outputs.logits)[0], alone, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(task.label_logits(outputs.logits), labels)
    assert task.loss(outputs, labels) == expected
    assert task.metrics(EvalPrediction(np.array([[1, 2], [3, 0]]), np.array([1, 1]))) == {"accuracy": 0.5}
    with pytest.raises(DatasetError, match="must not be empty"):
        task.dataset([])
    with pytest.raises(DatasetError, match="needs a tokenizer"):
        LabelWordTask(None, "{text}", ["a", "b"])
    with pytest.raises(HybridConfigError, match="must contain {text}"):
        LabelWordTask(tokenizer, "text", ["bad", "good"])


def test_pictures_and_card(tmp_path):
    sites = ["a", "b", "c"]
    report = greedy_swap(
        sites,
        lambda swapped: {"eval_accuracy": 0.9 - 0.01 * len(swapped)},
        metric="eval_accuracy",
        greater_is_better=True,
        max_drop=0.02,
    )
    plot_trade_off(report, tmp_path / "trade_off.png")
    plot_layer_map(sites, report.most_linear, tmp_path / "layer_map.png")
    for name in ("trade_off.png", "layer_map.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 2000
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER, [1])
    text = Path(write_model_card(model, tmp_path, report, repo_id="me/toy", extra="## More\n\nwords")).read_text()
    assert "1 of its 3 attention layers" in text and "| `model.layers.1.self_attn` | `linear_attention` | 4 |" in text
    assert "0.9 before any swap, floor 0.88" in text and "## More" in text and 'from_pretrained("me/toy")' in text
    assert text.startswith("---\nlibrary_name: transformers")
