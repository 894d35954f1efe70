"""Perplexity, recall, intervals and times."""

import math
import time

import pytest
import torch

from hf_hybrid import convert_to_hybrid
from hf_hybrid.errors import DatasetError
from hf_hybrid.evaluation.intervals import accuracy_interval
from hf_hybrid.evaluation.perplexity import perplexity, token_loss
from hf_hybrid.evaluation.recall import recall_loss
from hf_hybrid.evaluation.speed import accelerators_of, compare_speed, compare_times

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
    with pytest.raises(DatasetError, match=r"input_ids must be \[N, T\] with N > 0 and T > 1; got \(3, 1\)"):
        token_loss(model, ids[:, :1])
    with pytest.raises(DatasetError, match=r"got \(0, 20\)"):
        perplexity(model, ids[:0])


def test_the_interval_is_wilsons():
    low, high = accuracy_interval(80, 100)
    assert (round(low, 4), round(high, 4)) == (0.7112, 0.8666)
    assert accuracy_interval(0, 10)[0] == 0 and accuracy_interval(10, 10)[1] == 1
    # Newcombe (1998), table I: 15 of 148, and the asymmetric end where a normal interval would fall below 0
    assert [round(x, 4) for x in accuracy_interval(15, 148)] == [0.0624, 0.1605]
    assert [round(x, 4) for x in accuracy_interval(0, 20)] == [0.0, 0.1611]


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_an_interval_needs_examples(correct, total):
    with pytest.raises(DatasetError, match=rf"correct must be in 0..total .* got {correct} of {total}"):
        accuracy_interval(correct, total)


def test_times_are_paired():
    times = compare_times({"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.005)}, rounds=3)
    assert times["slow"].ratio == 1 and times["fast"].ratio > 2


def test_speed_reports_both_models_and_their_caches():
    teacher, hybrid = tiny_model(), convert_to_hybrid(tiny_model(), SMALL_MIXER)
    speed = compare_speed({"teacher": teacher, "hybrid": hybrid}, 40, decode_tokens=2, rounds=1)
    assert speed["teacher"].cache_bytes == 3 * 2 * 2 * 40 * 8 * 4
    assert speed["hybrid"].cache_bytes < compare_speed({"teacher": teacher}, 80, 1, 1)["teacher"].cache_bytes
    assert speed["hybrid"].prefill.seconds > 0 and speed["hybrid"].decode.ratio > 0


def test_what_is_waited_for_is_what_holds_the_models():
    with torch.device("meta"):
        elsewhere = torch.nn.Linear(2, 2)
    assert accelerators_of([tiny_model(), elsewhere]) == []


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_times_on_an_accelerator_include_the_work_it_queued():
    """A product returns to Python at once; without waiting for it, long and short work would take the same time."""
    device = torch.accelerator.current_accelerator()
    x = torch.randn(4096, 4096, device=device)

    def work(count):
        for _ in range(count):
            x @ x

    times = compare_times({"long": lambda: work(200), "short": lambda: work(1)}, rounds=3)
    assert times["short"].ratio > 20
    model = tiny_model().to(device)
    assert accelerators_of([model]) == [next(model.parameters()).device]
    speed = compare_speed({"there": model, "here": tiny_model()}, 40, decode_tokens=2, rounds=1)
    assert speed["there"].cache_bytes == speed["here"].cache_bytes
