"""What lives on the instance, or is keyed by class, survives that a model becomes a hybrid, and Trainer arguments mean what they say."""

import types

import pytest
import torch
import transformers
from accelerate import dispatch_model
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_hybrid import HybridTrainer, convert_to_hybrid
from hf_hybrid.conversion.layer import hybrid_layers
from hf_hybrid.errors import DatasetError, HybridConfigError, UnsupportedModelError

from conftest import token_dataset
from helpers import SMALL_MIXER, toy_arguments, toy_trainer
from tiny_models import tiny_llava, tiny_model


IDS = torch.randint(5, 99, (2, 9), generator=torch.Generator().manual_seed(0))


def fine_tuned(tmp_path):
    model = tiny_model()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, bf16=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=token_dataset(8)).train()
    return model.eval()


def test_a_bf16_distillation_is_finalized(tmp_path):
    trainer = toy_trainer(tmp_path, arguments={"bf16": True})
    trainer.train()
    trainer.swap_layers([1])
    model = trainer.finalize()
    assert model(IDS).logits.isfinite().all() and model.generate(IDS, max_new_tokens=2).shape == (2, 11)


@pytest.mark.parametrize("wrapped", ["bf16", "hooks"])
def test_a_teacher_that_others_wrapped_is_distilled_and_converted(wrapped, tmp_path):
    def teacher():
        if wrapped == "bf16":
            return fine_tuned(tmp_path / "tuned")
        model = tiny_model()
        return dispatch_model(model, {"": "cpu"}, force_hooks=True)

    trainer = toy_trainer(tmp_path / "run", model=teacher())
    trainer.train()
    assert all(loss > 0 for loss in trainer.last_block_losses.values())
    model = convert_to_hybrid(teacher(), SMALL_MIXER)
    mask = torch.ones(2, 1, 9, 9).tril()[:, :, :, :].bool()
    mask[:, :, 5, 2] = False
    with pytest.raises(UnsupportedModelError, match="hides more"):  # 4D masks are looked at all the same
        model(IDS, attention_mask=mask)


def test_an_attention_with_a_forward_of_its_own_is_refused():
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.forward = types.MethodType(type(attention).forward, attention)
    with pytest.raises(UnsupportedModelError, match="has a forward of its own on the instance"):
        convert_to_hybrid(model, SMALL_MIXER)
    assert not hybrid_layers(model)
    other = tiny_model()
    other.forward = types.MethodType(type(other).forward, other)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has a forward of its own"):
        convert_to_hybrid(other, SMALL_MIXER)


def base(name):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**small, vocab_size=99)).eval(), {"input_ids": IDS}
    if name == "llama":
        config = transformers.LlamaConfig(**small, vocab_size=99)
        return transformers.LlamaModel(config).eval(), {"input_ids": IDS}
    if name == "mixtral":
        config = transformers.MixtralConfig(**small, vocab_size=99, num_key_value_heads=2, num_local_experts=2)
        return transformers.MixtralModel(config).eval(), {"input_ids": IDS, "output_router_logits": True}
    config = transformers.ViTConfig(**small, image_size=8, patch_size=4)
    return transformers.ViTModel(config).eval(), {"pixel_values": torch.randn(1, 3, 8, 8)}


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral", "vit"])
def test_base_models_give_hidden_states_as_their_host(name):
    model, inputs = base(name)
    expected = model(**inputs, output_hidden_states=True)
    convert_to_hybrid(model, "linear_attention", layers=[1])
    actual = model(**inputs, output_hidden_states=True)
    assert len(actual.hidden_states) == len(expected.hidden_states)
    assert torch.equal(actual.hidden_states[1], expected.hidden_states[1])
    if name == "mixtral":
        assert len(actual.router_logits) == len(expected.router_logits)


def test_a_tower_of_its_own_gives_hidden_states():
    model = tiny_llava()
    tower = model.model.vision_tower
    convert_to_hybrid(tower, "linear_attention")
    assert tower(torch.randn(1, 3, 32, 32), output_hidden_states=True).hidden_states is not None


def test_hidden_states_after_a_distillation(tmp_path):
    model, _ = base("llama")
    trainer = HybridTrainer(
        model, SMALL_MIXER, toy_arguments(tmp_path), train_dataset=token_dataset(8).remove_columns("labels")
    )
    trainer.train()
    trainer.swap_layers([0])
    assert len(trainer.finalize()(IDS, output_hidden_states=True).hidden_states) == 3


def test_label_smoothing_scores_the_next_token(tmp_path):
    ours = toy_trainer(tmp_path / "a", arguments={"label_smoothing_factor": 0.1})
    arguments = TrainingArguments(str(tmp_path / "b"), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    theirs = Trainer(tiny_model(), arguments, eval_dataset=ours.eval_dataset)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-6)


def test_an_optimizer_without_mixers_is_refused_and_the_model_comes_back(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(HybridConfigError, match="must hold parameters of the mixers; it holds none that train"):
        toy_trainer(tmp_path, model=model, optimizers=(optimizer, None))
    assert type(model).__name__ == "LlamaForCausalLM" and all(p.requires_grad for p in model.parameters())


def test_after_training_the_model_is_the_tasks_again(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.train()
    assert trainer.model.generate(IDS, max_new_tokens=2).shape == (2, 11)


@pytest.mark.parametrize(
    ("name", "value"),
    [("gradient_checkpointing", True), ("gradient_checkpointing", False), ("activation_checkpointing", True)],
)
def test_checkpointing_is_obeyed(name, value, tmp_path):
    calls = []

    def counted(*args):
        calls.append(1)

    trainer = toy_trainer(tmp_path, arguments={name: value, "max_steps": 1, "save_strategy": "no"})
    layer = next(iter(trainer.distill_sites.values()))
    trainer._starting_students = False  # no calibration, which runs mixers too
    layer.hybrid.register_forward_pre_hook(counted)
    trainer.train()
    assert len(calls) == (2 if value else 1)


def test_mixers_and_layers_are_understood_or_refused(tmp_path):
    arguments = toy_arguments(tmp_path)
    with pytest.raises(HybridConfigError, match="the second argument is the mixer; got HybridTrainingArguments"):
        HybridTrainer(tiny_model(), arguments)
    assert len(toy_trainer(tmp_path, arguments={"layers": [0, 2]}).distill_sites) == 2
    assert len(toy_trainer(tmp_path, arguments={"layers": "all"}).distill_sites) == 3


def test_a_constructor_that_fails_leaves_the_model_as_it_was(tmp_path):
    model = tiny_model()
    text = Dataset.from_dict({"text": ["w1 w2"] * 40})
    for kwargs in ({"train_dataset": text}, {"compute_loss_func": 3, "optimizers": 5}):
        with pytest.raises((DatasetError, TypeError)):
            toy_trainer(tmp_path, model=model, **kwargs)
        assert type(model).__name__ == "LlamaForCausalLM" and not hybrid_layers(model)
        assert all(p.requires_grad for p in model.parameters())
    toy_trainer(tmp_path, model=model)  # and the second try works
