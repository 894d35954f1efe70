"""What version 0.1 wrote loads as before: a checkpoint of schema 1 and banks of every kind, stored beside these tests."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_hybrid import load_mixer_bank, save_mixer_bank
from hf_hybrid.conversion.layer import hybrid_layers
from hf_hybrid.errors import CheckpointError
from hf_hybrid.surgery import linear_heads, set_linear_heads_


STORED = Path(__file__).parent.parent / "stored"
IDS = torch.arange(3, 27)[None]
EXPECTED = load_file(STORED / "logits.safetensors")


def base():
    return AutoModelForCausalLM.from_pretrained(STORED / "base").eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_checkpoint_of_schema_1(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(STORED / "schema_1_checkpoint")
    assert linear_heads(model) == {f"model.layers.{i}.self_attn": (0, 1) for i in (0, 2)}
    assert torch.allclose(logits(model), EXPECTED["schema_1_checkpoint"], atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.hybrid["schema_version"] == 2 and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("projections", ["shared", "low_rank", "full"])
def test_a_bank_of_the_first_format(projections, tmp_path):
    model = load_mixer_bank(base(), STORED / f"schema_1_bank_{projections}")
    assert model.projections == projections
    set_linear_heads_(model, dict.fromkeys(hybrid_layers(model)))
    assert torch.allclose(logits(model), EXPECTED[f"schema_1_bank_{projections}"], atol=1e-5)
    save_mixer_bank(model, tmp_path)
    again = load_mixer_bank(base(), tmp_path)
    set_linear_heads_(again, dict.fromkeys(hybrid_layers(again)))
    assert torch.equal(logits(again), logits(model))


def test_a_damaged_bank_of_the_first_format(tmp_path):
    import json
    import shutil

    shutil.copytree(STORED / "schema_1_bank_shared", tmp_path / "bank")
    weights, config = tmp_path / "bank" / "mixer_bank.safetensors", tmp_path / "bank" / "mixer_bank.json"
    description, whole = json.loads(config.read_text()), weights.read_bytes()
    for key in ("base_model", "base_fingerprint", "projections", "rank", "sites"):
        config.write_text(json.dumps({k: v for k, v in description.items() if k != key}))
        with pytest.raises(CheckpointError, match="The file was edited"):
            load_mixer_bank(base(), tmp_path / "bank")
    config.write_text(json.dumps({**description, "weights_sha256": "0"}))
    with pytest.raises(CheckpointError, match="is not the file mixer_bank.json describes"):
        load_mixer_bank(base(), tmp_path / "bank")
    weights.write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match="is no readable mixer bank"):
        load_mixer_bank(base(), tmp_path / "bank")
    full = base()
    del full.model.layers[2].self_attn.q_proj
    with pytest.raises(CheckpointError, match="belongs to no parameter of the model"):
        load_mixer_bank(full, STORED / "schema_1_bank_full")
