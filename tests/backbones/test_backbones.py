"""Every contract on every backbone. `make test` runs a sample that has each kind of model and each reason to refuse; `make test-all` runs them all."""

import json
import pathlib
import re

import pytest

from .contracts import CONTRACTS, check
from .toy_models import pairs


RECORDED = json.loads((pathlib.Path(__file__).parents[2] / "benchmarks/results/backbones.json").read_text())["rows"]
WORDS = {(row["task"], row["model_type"]): row for row in RECORDED}

# Decoders, encoders, encoder-decoders, vision, audio, speech, dual encoders, multimodal, mixtures of experts, shared layers, mixed recurrences.
SAMPLE = [
    ("causal-lm", name)
    for name in (
        "llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "opt", "phi", "mixtral", "deepseek_v3", "falcon_h1", "zamba",
        "llama4_text", "cohere2", "minimax", "stablelm", "xglm", "bart", "qwen3_next", "musicgen",
    )
] + [
    *(("masked-lm", name) for name in ("albert", "bert", "distilbert", "modernbert", "roberta", "esm", "layoutlm")),
    *(("seq2seq-lm", name) for name in ("t5", "bart", "m2m_100", "switch_transformers", "umt5", "t5gemma")),
    *(("image-classification", name) for name in ("vit", "beit", "swin", "dinov2", "siglip2")),
    *(("speech-seq2seq", name) for name in ("whisper", "moonshine", "speech-encoder-decoder")),
    *(("ctc", name) for name in ("wav2vec2", "hubert", "parakeet_ctc")),
    *(("audio-classification", name) for name in ("audio-spectrogram-transformer", "wav2vec2-bert")),
    *(("zero-shot-image", name) for name in ("clip", "siglip", "chinese_clip")),
    *(("image-text-to-text", name) for name in ("llava", "qwen2_vl", "idefics3", "git", "pi0")),
    ("base", "qwen2_5_vl_vision"), ("base", "detr"), ("base", "bark"),
    *(("causal-lm", name) for name in ("mamba", "diffllama", "hrm_text", "deepseek_v32", "gemma3n_text", "xlnet")),
]  # fmt: skip
SAMPLE = [pair for pair in SAMPLE if pair in WORDS]

# How a refusal reads: what of the model, why, and what to do.
REFUSALS = (
    r"computes? attention inline and not through transformers' AttentionInterface. Such families need a port",
    r"none of its modules computes attention that it could find. There is nothing to replace",
    r"calls attention \d+ times per forward",
    r"runs \d+ times per forward of the model, but has one cache slot",
    r"keeps more than keys and values in the cache \(\w+\)",
    r"shares its keys and values with",
    r"reuses the keys and values of another layer",
    r"attends to (another sequence|more or fewer tokens)",
    r"has no forward of its own",
    r"fills a cache with keys and values that",
    r"tracks objects in a session",
    r"remembers what its text encoder made of earlier texts",
    r"is loaded by a from_pretrained of its own",
)


MEASURED = ("causality", "cache", "generation", "left padding", "right padding", "save and load")


def verify(task: str, model_type: str) -> None:
    row, recorded = check(task, model_type), WORDS[task, model_type]
    assert row.word != "fails", row.why
    assert (row.word, row.sites) == (recorded["word"], recorded["sites"]), row.why
    assert set(row.lost) == set(recorded["lost"])
    # whether a host keeps a contract itself is a number against a tolerance, which another processor's rounding can tip
    always = [name for name in CONTRACTS if name not in MEASURED]
    assert [row.contracts.get(name) for name in always] == [recorded["contracts"].get(name) for name in always]
    if row.word == "refused":
        assert any(re.search(pattern, row.why) for pattern in REFUSALS), row.why


@pytest.mark.parametrize(("task", "model_type"), SAMPLE)
def test_contracts_of_a_sample(task, model_type):
    verify(task, model_type)


@pytest.mark.sweep
@pytest.mark.parametrize(("task", "model_type"), [pair for pair in pairs() if pair not in SAMPLE])
def test_contracts_of_every_other_backbone(task, model_type):
    verify(task, model_type)


def test_the_sample_is_wide_enough_and_the_record_is_complete():
    assert len({model_type for _, model_type in SAMPLE}) >= 40
    assert {(row["task"], row["model_type"]) for row in RECORDED} == set(pairs())
    assert not [row for row in RECORDED if row["word"] == "fails"]
    green = {row["model_type"] for row in RECORDED} - {
        row["model_type"] for row in RECORDED if row["word"] not in ("works", "loses")
    }
    assert len(green) >= 220
    assert len({row["model_type"] for row in RECORDED if row["word"] == "harness"}) <= 30
