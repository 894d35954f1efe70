"""The bank as a PEFT adapter: made, trained, saved, loaded in every way that PEFT and transformers know."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_hybrid import HybridPeftConfig, convert_to_hybrid, load_mixer_bank, save_mixer_bank
from hf_hybrid.conversion.layer import hybrid_layers
from hf_hybrid.errors import AlreadyHybridError, CheckpointError, HybridConfigError, UnsupportedModelError
from hf_hybrid.surgery import linear_heads, prepare_distillation_, set_linear_heads_

from conftest import token_dataset
from helpers import SMALL_MIXER, toy_trainer
from tiny_models import tiny_llava, tiny_model


IDS = torch.randint(5, 99, (2, 15), generator=torch.Generator().manual_seed(3))
NAME = "model.layers.1.self_attn"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def perturb(model, scale=0.3):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hybrid_" in name or ".hybrid." in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return str(folder)


def load(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


def adapted(base, **settings):
    config = HybridPeftConfig(mixer=SMALL_MIXER, task_type="CAUSAL_LM", **settings)
    return perturb(get_peft_model(load(base), config)).eval()


CASES = {
    "whole": {},
    "heads": {"heads": {NAME: [1], "model.layers.2.self_attn": [0, 1]}},
    "low_rank": {"projections": "low_rank", "projection_rank": 2},
    "full": {"projections": "full", "layers": [0, 2]},
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_loaded_four_ways_bit_equal(case, base, tmp_path):
    model = adapted(base, **CASES[case])
    expected = logits(model)
    assert not torch.equal(expected, logits(load(base)))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(base)))
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    by_hand = load(base)
    by_hand.load_adapter(str(tmp_path))
    ways = {
        "PeftModel.from_pretrained": PeftModel.from_pretrained(load(base), tmp_path),
        "low_cpu_mem_usage": PeftModel.from_pretrained(load(base), tmp_path, low_cpu_mem_usage=True),
        "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained(tmp_path),
        "load_adapter": by_hand,
    }
    for way, loaded in ways.items():
        assert torch.equal(logits(loaded.eval()), expected), way


@pytest.mark.parametrize("case", CASES)
def test_merge_and_unload_gives_the_hybrid(case, base, tmp_path):
    model = adapted(base, **CASES[case])
    expected, switched = logits(model), linear_heads(model.get_base_model())
    hybrid = model.merge_and_unload()
    assert type(hybrid).__name__ == "HybridLlamaForCausalLM" and not any(
        "hybrid_" in n for n, _ in hybrid.named_parameters()
    )
    assert torch.equal(logits(hybrid), expected) and linear_heads(hybrid) == switched
    hybrid.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_unload_gives_the_base_back(base):
    model = adapted(base).unload()
    assert type(model) is type(load(base)) and type(model.config) is type(load(base).config)
    assert torch.equal(logits(model), logits(load(base)))
    assert list(model.state_dict()) == list(load(base).state_dict())


def test_several_adapters_take_turns(base, tmp_path):
    model = adapted(base)
    first = logits(model)
    model.add_adapter("other", HybridPeftConfig(mixer="sliding_window", layers=[1]))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert linear_heads(model.get_base_model()) == {NAME: (0, 1)} and not torch.equal(first, second)
    expected = convert_to_hybrid(load(base), "sliding_window", [1])
    assert torch.equal(second, logits(expected))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(HybridConfigError, match="runs through one mixer at a time"):
        model.base_model.set_adapter(["default", "other"])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


def test_an_adapter_over_fewer_layers_is_trained_searched_and_saved_alone(base, tmp_path):
    from hf_hybrid import GreedyLayerSwapCallback

    model = get_peft_model(load(base), HybridPeftConfig(mixer=SMALL_MIXER))
    model.add_adapter("b", HybridPeftConfig(mixer=SMALL_MIXER, layers=[1]))
    model.set_adapter("b")
    callback = GreedyLayerSwapCallback("eval_loss", "90%")
    trainer = toy_trainer(tmp_path / "run", model=model, mixer=None, callbacks=[callback])
    assert list(trainer.distill_sites) == [NAME]
    trainer.train()
    assert trainer.swapped_layers() == [NAME]
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(load(base), tmp_path / "saved" / "b")
    assert torch.equal(logits(again), expected)


def test_generation_with_a_cache_and_saving_the_hybrid_inside(base, tmp_path):
    model = adapted(base, **CASES["heads"])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache = model.generate(input_ids=IDS, **settings)
    assert torch.equal(with_cache, model.generate(input_ids=IDS, use_cache=False, **settings))


def test_a_trainer_trains_the_adapter_alone(base, tmp_path):
    model = adapted(base, projections="low_rank", projection_rank=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_steps=2, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=token_dataset(16)).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".hybrid_" in name}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (tmp_path / "checkpoint-2").iterdir()
    }


def test_the_hybrid_trainer_takes_a_peft_model_and_leaves_the_same_format(base, tmp_path):
    model = get_peft_model(load(base), HybridPeftConfig(mixer=SMALL_MIXER))
    trainer = toy_trainer(tmp_path / "run", model=model, mixer=None)
    trainer.train()
    trainer.save_mixer_bank(tmp_path / "bank")
    trainer.swap_layers([1])
    expected = trainer.evaluate()["eval_loss"]
    trainer.save_model(tmp_path / "hybrid")
    model.save_pretrained(tmp_path / "adapter")  # which remembers the switch
    again = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    assert list(linear_heads(again.get_base_model())) == [NAME]
    assert torch.equal(logits(again), logits(model))
    hybrid = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    ids = torch.tensor(trainer.eval_dataset["input_ids"])
    with torch.no_grad():
        assert hybrid(ids, labels=ids).loss.item() == pytest.approx(expected, rel=1e-5)
    for folder in (tmp_path / "bank", tmp_path / "run" / "checkpoint-4"):
        bank = load_mixer_bank(load(base), folder)
        for name, layer in hybrid_layers(bank).items():
            own = trainer.distill_sites[name].hybrid.state_dict()
            assert all(torch.equal(value, own[key]) for key, value in layer.hybrid.state_dict().items())
    resumed = toy_trainer(
        tmp_path / "run", model=get_peft_model(load(base), HybridPeftConfig(mixer=SMALL_MIXER)), mixer=None
    )
    resumed.train(resume_from_checkpoint=True)
    for name, layer in resumed.distill_sites.items():
        own = trainer.distill_sites[name].hybrid.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in layer.hybrid.state_dict().items())


def test_a_bank_of_the_trainer_is_an_adapter(base, tmp_path):
    model = perturb(prepare_distillation_(load(base), SMALL_MIXER, [0, 1]))
    save_mixer_bank(model, tmp_path)
    loaded = PeftModel.from_pretrained(load(base), tmp_path)
    model.eval()
    set_linear_heads_(model, dict.fromkeys(hybrid_layers(model)))
    assert torch.equal(logits(loaded), logits(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base and len(config["base_fingerprint"]) == 2
    assert config["peft_type"] == "HYBRID"


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    adapted(base).save_pretrained(tmp_path)
    other = tiny_model(seed=5)
    with pytest.raises(
        CheckpointError, match="the weights of LlamaForCausalLM .* at 'model.layers.0.self_attn' are others"
    ):
        PeftModel.from_pretrained(other, tmp_path)
    assert not hybrid_layers(other) and type(other).__name__ == "LlamaForCausalLM"
    with pytest.raises(CheckpointError, match="has no layer 'model.layers.2.self_attn'"):
        PeftModel.from_pretrained(tiny_model(num_hidden_layers=2), tmp_path)
    with pytest.raises(CheckpointError, match="has no layer 'model.layers.0.self_attn'"):
        PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path)


@pytest.mark.parametrize("way", ["PeftModel", "load_adapter", "bank"])
def test_an_adapter_with_missing_or_foreign_tensors_is_refused(way, base, tmp_path):
    adapted(base).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)

    model = load(base)

    def start():
        if way == "PeftModel":
            PeftModel.from_pretrained(model, tmp_path)
        elif way == "load_adapter":
            model.load_adapter(str(tmp_path))
        else:
            load_mixer_bank(model, tmp_path)

    save_file({name: value for name, value in tensors.items() if "layers.2" not in name}, path)
    with pytest.raises(CheckpointError, match="lacks tensors|does not fit the students"):
        start()
    assert torch.equal(logits(model), logits(load(base)))  # and the model computes what it did
    model = load(base)
    save_file({**tensors, f"base_model.model.{NAME}.hybrid_mixer.foreign": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="has foreign tensors|does not fit the students"):
        start()
    if way == "bank":
        path.write_bytes(b"half")
        with pytest.raises(CheckpointError, match="is no readable adapter of mixers"):
            start()


def test_settings_that_cannot_be(base):
    with pytest.raises(HybridConfigError, match="heads go with projections='shared'"):
        get_peft_model(load(base), HybridPeftConfig(heads={NAME: [0]}, projections="full"))
    with pytest.raises(HybridConfigError, match="is not an attention site"):
        get_peft_model(load(base), HybridPeftConfig(layers=["nowhere"]))
    with pytest.raises(UnsupportedModelError, match="model must be a transformers PreTrainedModel"):
        get_peft_model(torch.nn.Linear(2, 2), HybridPeftConfig())


def test_a_config_with_impossible_heads_is_refused(base, tmp_path):
    adapted(base).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "linear_heads": {NAME: [0, 0]}}))
    with pytest.raises(CheckpointError, match="linear_heads.* must be heads of a layer of `sites`, each once"):
        PeftModel.from_pretrained(load(base), tmp_path)


def test_lora_beside_a_hybrid_uses_the_familys_own_defaults(base):
    from peft.utils import constants

    tables = dict(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    expected = {n for n, _ in get_peft_model(load(base), LoraConfig()).named_parameters() if "lora_" in n}
    hybrid = get_peft_model(convert_to_hybrid(load(base), SMALL_MIXER), LoraConfig())
    assert {n for n, _ in hybrid.named_parameters() if "lora_" in n} == expected
    assert tables == constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING and "hybrid_attention" not in tables
    assert torch.isfinite(logits(hybrid)).all()


def test_a_teacher_that_carries_an_adapter_is_refused(base):
    lora = get_peft_model(load(base), LoraConfig())
    for start in (lambda m: convert_to_hybrid(m, SMALL_MIXER), lambda m: prepare_distillation_(m, SMALL_MIXER)):
        with pytest.raises(UnsupportedModelError, match="carries an adapter"):
            start(lora.get_base_model())


def test_a_bank_of_two_kinds_of_layers_loads(tmp_path):
    """Vision towers and encoders are bidirectional: they take part of the mixer's settings only."""
    bank = perturb(prepare_distillation_(tiny_llava(), SMALL_MIXER))
    save_mixer_bank(bank, tmp_path)
    loaded = load_mixer_bank(tiny_llava(), tmp_path)
    for name, layer in hybrid_layers(loaded).items():
        assert layer.hybrid_config == hybrid_layers(bank)[name].hybrid_config


def test_two_adapters_by_load_adapter(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "a")
    adapted(base, layers=[1]).save_pretrained(tmp_path / "b")
    model = load(base)
    model.load_adapter(str(tmp_path / "a"), adapter_name="a")
    first = logits(model.eval())
    model.load_adapter(str(tmp_path / "b"), adapter_name="b")
    model.set_adapter("a")
    assert torch.equal(logits(model), first)


def test_only_a_bare_base_takes_an_adapter_of_mixers(base):
    with pytest.raises(AlreadyHybridError, match="is converted already. Call restore_full_attention"):
        get_peft_model(convert_to_hybrid(load(base), SMALL_MIXER, [0]), HybridPeftConfig(layers=[1]))
    lora = get_peft_model(load(base), LoraConfig()).get_base_model()
    with pytest.raises(UnsupportedModelError, match="carries another adapter"):
        get_peft_model(lora, HybridPeftConfig())


def test_a_classifiers_head_is_unwrapped(tmp_path):
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    model = LlamaForSequenceClassification(tiny_model().config)
    adapter = get_peft_model(model, HybridPeftConfig(mixer=SMALL_MIXER, task_type="SEQ_CLS"))
    adapter.get_base_model().save_pretrained(tmp_path / "inside")
    expected = logits(adapter.eval())
    adapter.merge_and_unload().save_pretrained(tmp_path / "merged")
    for folder in ("inside", "merged"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(loaded.eval()), expected)


def test_projections_are_those_of_the_active_adapter(base):
    model = adapted(base, projections="low_rank", projection_rank=2)
    model.add_adapter("other", HybridPeftConfig(mixer="sliding_window"))
    assert model.get_base_model().projections == "low_rank"
    model.set_adapter("other")
    assert model.get_base_model().projections == "shared"
    model.delete_adapter("other")
    model.set_adapter("default")
    hybrid = model.merge_and_unload()
    assert hybrid.projections == "low_rank"
    with pytest.raises(HybridConfigError, match="were trained with its mixer"):
        set_linear_heads_(hybrid, {})


def test_a_half_precision_base_keeps_fp32_mixers_however_it_is_loaded(base, tmp_path):
    model = get_peft_model(load(base).bfloat16(), HybridPeftConfig(mixer=SMALL_MIXER, task_type="CAUSAL_LM"))
    perturb(model).eval().save_pretrained(tmp_path)
    expected = logits(model)
    by_hand = load(base).bfloat16()
    by_hand.load_adapter(str(tmp_path))
    for loaded in (PeftModel.from_pretrained(load(base).bfloat16(), tmp_path), by_hand):
        assert {p.dtype for n, p in loaded.named_parameters() if ".hybrid_" in n} == {torch.float32}
        assert torch.equal(logits(loaded.eval()), expected)


def test_a_switch_set_by_hand_is_remembered(base, tmp_path):
    model = adapted(base)
    set_linear_heads_(model.get_base_model(), {NAME: [0]})
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(base)))
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(base), tmp_path)), expected)


def test_a_refused_model_is_looked_at_again(base, tmp_path):
    adapted(base).save_pretrained(tmp_path)
    model = tiny_model(seed=5)
    with pytest.raises(CheckpointError, match="are others"):
        PeftModel.from_pretrained(model, tmp_path)
    model.load_state_dict(load(base).state_dict())
    PeftModel.from_pretrained(model, tmp_path)


def test_settings_of_an_adapter_are_checked_when_it_is_made(base):
    config = HybridPeftConfig(heads={NAME: range(1)})
    assert config.heads == {NAME: [0]}
    with pytest.raises(HybridConfigError, match="layers must be names or indices"):
        HybridPeftConfig(layers=lambda site: True)
