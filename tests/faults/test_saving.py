"""A save removes nothing that it did not write, and writes what the model is."""

import json
import logging
import os

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from hf_hybrid import GreedyLayerSwapCallback, HybridTrainer, convert_to_hybrid
from hf_hybrid.errors import HybridConfigError, OutputFolderError
from hf_hybrid.surgery import linear_heads, prepare_distillation_

from conftest import token_dataset
from helpers import SMALL_MIXER, toy_arguments, toy_trainer
from tiny_models import tiny_model


IDS = torch.randint(5, 99, (2, 9), generator=torch.Generator().manual_seed(0))


def hybrid(**kwargs):
    return convert_to_hybrid(tiny_model(**kwargs), SMALL_MIXER)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_an_adapters_save_touches_neither_config_nor_weights(tmp_path):
    hybrid().save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_variant_replaces_its_own_files_only(shard, tmp_path):
    model = hybrid()
    expected = logits(model)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    plain = {name for name in os.listdir(tmp_path) if name.startswith("model")}
    model.half().save_pretrained(tmp_path, variant="fp16", max_shard_size=shard)
    assert plain <= set(os.listdir(tmp_path))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert torch.equal(half.state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])
    # the same variant under another layout goes
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB" if shard == "5GB" else "5GB")
    names = [name for name in os.listdir(tmp_path) if "fp16" in name]
    assert ("model.fp16.safetensors" in names) == (shard == "20KB") and plain <= set(os.listdir(tmp_path))


def test_somebody_elses_weights_are_left_alone(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"foreign")
    hybrid().save_pretrained(tmp_path)
    assert (tmp_path / "pytorch_model.bin").read_bytes() == b"foreign"


def test_the_last_checkpoint_is_kept_whatever_the_metric_says(tmp_path):
    settings = {
        "save_total_limit": 1,
        "metric_for_best_model": "eval_loss",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 6,
    }
    trainer = toy_trainer(tmp_path, arguments=settings)
    trainer.train()
    assert [name for name in os.listdir(tmp_path) if name.startswith("checkpoint")] == ["checkpoint-6"]
    with pytest.raises(HybridConfigError, match="save_strategy must not be 'best'"):
        toy_trainer(
            tmp_path / "b",
            arguments={"save_strategy": "best", "metric_for_best_model": "eval_loss", "eval_strategy": "steps"},
        )


def test_a_run_without_checkpoints_goes_on_with_its_search(tmp_path):
    settings = {"save_strategy": "no"}
    whole = toy_trainer(tmp_path / "a", arguments=settings, callbacks=[GreedyLayerSwapCallback("eval_loss", "50%")])
    whole.train()

    class Killed(Exception):
        pass

    class Kill(GreedyLayerSwapCallback):
        def search(self, trainer):
            raise Killed

    first = toy_trainer(tmp_path / "b", arguments=settings, callbacks=[Kill("eval_loss", "50%")])
    with pytest.raises(Killed):
        first.train()
    before = (tmp_path / "b" / "mixer_bank" / "adapter_model.safetensors").read_bytes()
    again = toy_trainer(tmp_path / "b", arguments=settings, callbacks=[GreedyLayerSwapCallback("eval_loss", "50%")])
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and again.swap_report.most_linear == whole.swap_report.most_linear
    assert (tmp_path / "b" / "mixer_bank" / "adapter_model.safetensors").read_bytes() == before


def test_a_pruned_hybrid_is_saved_with_the_layers_it_has(tmp_path):
    model = hybrid()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected) and len(linear_heads(loaded)) == 2


def test_a_hybrid_without_linear_layers_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(hf_logging.get_logger("hf_hybrid"), "propagate", True)
    monkeypatch.setattr(hf_logging.get_logger("transformers"), "propagate", True)
    trainer = toy_trainer(tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.save_model()
    assert "no head of any layer is linear" in caplog.text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(tiny_model()))


def test_a_hybrid_is_not_put_beside_a_bank(tmp_path):
    trainer = toy_trainer(tmp_path / "run", callbacks=[GreedyLayerSwapCallback("eval_loss", "50%", max_layers=1)])
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert list(linear_heads(loaded)) == trainer.swapped_layers()  # and not all that the bank has
    trainer.save_mixer_bank(tmp_path / "bank")
    with pytest.raises(OutputFolderError, match="holds an adapter of mixers, which from_pretrained would load on top"):
        trainer.save_model(tmp_path / "bank")
    again = HybridTrainer(tiny_model(), None, toy_arguments(tmp_path / "c"), mixer_bank=str(tmp_path / "run"))
    assert len(again.distill_sites) == 3  # the output folder of a run is a bank too


def test_fingerprints_are_taken_once(tmp_path):
    trainer = toy_trainer(tmp_path)
    before = dict(trainer.model.base_fingerprint)
    with torch.no_grad():  # as sharding would leave them
        for layer in trainer.distill_sites.values():
            layer.q_proj.weight.zero_()
    trainer.save_mixer_bank(tmp_path / "bank")
    config = json.loads((tmp_path / "bank" / "adapter_config.json").read_text())
    assert config["base_fingerprint"] == before


def test_full_projections_of_a_bf16_teacher_train_in_fp32_at_a_rate_of_their_own(tmp_path):
    trainer = toy_trainer(tmp_path, model=tiny_model().bfloat16(), arguments={"projections": "full", "max_steps": 1})
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (1e-4 if ".hybrid_delta." in name else 1e-2), name


def test_prepared_models_can_be_pruned_too(tmp_path):
    model = prepare_distillation_(tiny_model(), SMALL_MIXER)
    model.model.layers = model.model.layers[1:]
    trainer = HybridTrainer(model, None, toy_arguments(tmp_path), train_dataset=token_dataset(8))
    trainer.train()
    assert list(trainer.last_block_losses) == [f"model.layers.{i}.self_attn" for i in (0, 1)]
