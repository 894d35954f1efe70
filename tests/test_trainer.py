"""Distillation, search and saving through the Trainer, on toy hosts."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_hybrid import (
    GreedyLayerSwapCallback,
    HybridTrainer,
    LinearAttentionConfig,
    convert_to_hybrid,
    load_mixer_bank,
    save_mixer_bank,
)
from hf_hybrid.adapters.bank import student_state
from hf_hybrid.conversion.layer import hybrid_layers
from hf_hybrid.errors import (
    AlreadyHybridError,
    CheckpointError,
    DatasetError,
    HybridConfigError,
    MetricError,
    OutputFolderError,
    UnknownMixerError,
)
from hf_hybrid.objectives.local import LocalDistillation
from hf_hybrid.surgery import prepare_distillation_

from conftest import token_dataset
from helpers import SMALL_MIXER, toy_arguments, toy_trainer
from tiny_models import HOSTS, tiny_llava, tiny_model


def accuracy(prediction):
    guess = prediction.predictions[:, :-1].argmax(-1)
    return {"accuracy": float(np.mean(guess == prediction.label_ids[:, 1:]))}


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("projections", ["shared", "low_rank", "full"])
@pytest.mark.parametrize("family", HOSTS)
def test_one_step_changes_every_student_parameter_and_nothing_else(family, projections, tmp_path):
    # a low-rank difference B A starts with B = 0, as in LoRA, so that A moves one step later
    steps = 2 if projections == "low_rank" else 1
    arguments = {"max_steps": steps, "warmup_steps": 0, "projections": projections, "save_strategy": "no"}
    trainer = toy_trainer(tmp_path, family, arguments=arguments)
    teacher = {name: value.clone() for name, value in tiny_model(family).state_dict().items()}
    before = snapshot(trainer.model)
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    # a bias of the keys shifts all scores of a query alike: softmax, and so the exact window, does not see it
    blind = {name for name in trainable - changed if name.endswith("k_proj.bias")}
    assert changed == trainable - blind
    assert all(".hybrid." in name or ".hybrid_delta." in name for name in changed)
    inner = {name: value for name, value in trainer.model.state_dict().items() if name not in trainable}
    for name, value in teacher.items():
        assert torch.equal(inner[name], value), name


class PerLayer(LocalDistillation):
    """Gives the loss of every layer, with its gradient, instead of their sum."""

    def _collected(self, model):
        return {name: torch.stack(losses.layer).mean() for name, losses in self._losses.items()}


@pytest.mark.parametrize("projections", ["shared", "low_rank"])
@pytest.mark.parametrize("recompute", [True, False])
def test_block_losses_give_each_other_no_gradient(recompute, projections, tmp_path):
    trainer = toy_trainer(tmp_path, arguments={"activation_checkpointing": recompute, "projections": projections})
    model = trainer.model.train()
    ids = torch.tensor(token_dataset(2)["input_ids"])
    together = model(input_ids=ids)
    together["loss"].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert together["block_losses"].shape == (3,) and torch.allclose(together["loss"], together["block_losses"].sum())
    model.requires_grad_(True)  # also where the model itself could learn, each loss reaches its own mixer alone
    for site in trainer.distill_sites:  # one block's loss alone
        model.zero_grad()
        model.training_objective = PerLayer(model, recompute)
        model(input_ids=ids)[site].backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.abs().sum() > 0:
                # (with projections of its own the layer runs once more, so that its frozen weights would learn too)
                reach = f"{site}.hybrid." if projections == "shared" else f"{site}."
                assert name.startswith(reach), f"the loss of {site} reached {name}"
                if name in expected:
                    assert torch.allclose(parameter.grad, expected[name], atol=1e-7)


def test_projections_run_once_per_step():
    """Queries, keys, values and outputs of every layer are computed once in a training forward, by the counted products of their weights."""
    from torch.utils.flop_counter import FlopCounterMode

    model = prepare_distillation_(tiny_model(), SMALL_MIXER).train()
    ids = torch.tensor(token_dataset(2)["input_ids"])
    counts = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 0)
    with FlopCounterMode(display=False, depth=None) as flops:
        model(input_ids=ids)["loss"].backward()
    for name, by_op in flops.get_flop_counts().items():
        for projection in counts:
            if name.endswith(f"self_attn.{projection}"):
                counts[projection] += sum(by_op.values())
    tokens, wide, narrow = ids.numel(), 32 * 32, 32 * 16
    expected = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow, "o_proj": wide}
    assert counts == {name: 3 * 2 * tokens * size for name, size in expected.items()}  # three layers, forward alone


def test_the_losses_of_heads_say_which_head_is_hard(tmp_path):
    trainer = toy_trainer(tmp_path)
    model = trainer.model.train()
    ids = torch.tensor(token_dataset(2)["input_ids"])
    with torch.no_grad():
        before = model(input_ids=ids)["head_losses"]
        layer = trainer.distill_sites["model.layers.1.self_attn"]
        layer.hybrid.feature_map_k.weight[1].normal_()  # the second key-value head
        layer.hybrid.log_weight[2:].fill_(4.0)
        after = model(input_ids=ids)["head_losses"]
    changed = (after != before).nonzero().flatten().tolist()
    assert before.shape == (6,) and changed == [3]  # and no other


def test_padding_does_not_change_the_local_loss(tmp_path):
    model = toy_trainer(tmp_path).model.train()
    ids = torch.tensor(token_dataset(2)["input_ids"])
    plain = model(input_ids=ids)["block_losses"]
    padded = torch.cat([torch.full((2, 5), 7), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    actual = model(input_ids=padded, attention_mask=mask, position_ids=positions)["block_losses"]
    assert torch.allclose(actual, plain, rtol=1e-4)


def test_the_teacher_stays_in_eval_mode(tmp_path):
    model = toy_trainer(tmp_path, "gpt2").model  # GPT-2 has dropout
    model.train()
    ids = torch.tensor(token_dataset(2)["input_ids"])
    assert torch.equal(model(input_ids=ids)["block_losses"], model(input_ids=ids)["block_losses"])


def test_accumulation_of_8_equals_a_batch_of_8(tmp_path):
    def run(batch, accumulation):
        arguments = {
            "max_steps": 20, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "save_strategy": "no",
            "learning_rate": 1e-2,
        }  # fmt: skip
        trainer = toy_trainer(tmp_path / f"{batch}", arguments=arguments, train_dataset=token_dataset(160))
        trainer.train()
        losses = [row["block_loss_mean"] for row in trainer.state.log_history if "block_loss_mean" in row]
        return student_state(trainer.model), losses

    (one, losses_one), (eight, losses_eight) = run(1, 8), run(8, 1)
    assert losses_one[-1] < losses_one[0]
    np.testing.assert_allclose(losses_one, losses_eight, rtol=1e-3)
    for (
        name
    ) in one:  # Adam divides by the root of a mean square: rounding of tiny gradients is amplified, hence not 1e-6
        assert torch.allclose(one[name], eight[name], atol=2e-3), (name, (one[name] - eight[name]).abs().max())


def test_the_search_ends_where_a_plain_search_would(tmp_path):
    callback = GreedyLayerSwapCallback("accuracy", "50%")
    trainer = toy_trainer(tmp_path / "a", callbacks=[callback], compute_metrics=accuracy)
    trainer.train()
    report = trainer.swap_report
    assert trainer.swapped_layers() == [name for name in trainer.distill_sites if name in report.most_linear]
    assert report.base == pytest.approx(Trainer(tiny_model(), TrainingArguments(str(tmp_path / "b"), report_to=[], use_cpu=True),
        eval_dataset=trainer.eval_dataset, compute_metrics=accuracy).evaluate()["eval_accuracy"])  # fmt: skip
    # every trial again, without reuse of activations
    for trial in report.trials:
        trainer.swap_layers(trial.swapped)
        metrics = trainer.evaluate()
        assert metrics["eval_accuracy"] == trial.metrics["eval_accuracy"]
        assert metrics["eval_loss"] == pytest.approx(trial.metrics["eval_loss"], rel=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "a" / "swap_trace.jsonl").read_text().splitlines()]
    assert sum(row["type"] == "trial" for row in rows) == len(report.trials)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_reused_activations_give_the_same_search(family, tmp_path):
    results = []
    for reuse in (True, False):
        callback = GreedyLayerSwapCallback("eval_loss", "30%", reuse_activations=reuse)
        trainer = toy_trainer(tmp_path / str(reuse), family, callbacks=[callback])
        calls = []
        first = next(iter(trainer.distill_sites.values()))
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        results.append(([(t.swapped, t.metrics["eval_loss"]) for t in trainer.swap_report.trials], len(calls)))
    (with_reuse, few), (without, many) = results
    assert with_reuse == without  # bit-equal: the same operations on the same numbers
    assert few < many  # and the first layer ran less often


def test_evaluation_that_changes_between_trials_is_refused(tmp_path):
    import random

    def shuffled(examples):
        random.shuffle(examples)
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"attention_mask": torch.ones_like(ids), "input_ids": ids, "labels": ids}

    trainer = toy_trainer(tmp_path, data_collator=shuffled, callbacks=[GreedyLayerSwapCallback()])
    from hf_hybrid.errors import HybridError

    with pytest.raises(HybridError, match="The validation batches changed between two trials"):
        trainer.train()


def test_the_hybrid_is_saved_loaded_and_finalized(tmp_path):
    trainer = toy_trainer(tmp_path, arguments={"projections": "low_rank"})
    trainer.train()
    trainer.swap_layers([0, "model.layers.2.self_attn"])
    expected = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    assert trainer.evaluate()["eval_loss"] == expected  # saving changed nothing
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.use_cache is True and trainer.model.config.use_cache is False  # off while training only
    ids = torch.tensor(trainer.eval_dataset["input_ids"])
    with torch.no_grad():
        assert loaded(ids, labels=ids).loss.item() == pytest.approx(expected, rel=1e-5)
        hybrid = trainer.finalize()
        assert type(hybrid) is type(loaded)
        assert hybrid(ids, labels=ids).loss.item() == pytest.approx(expected, rel=1e-5)
    assert list(hybrid.state_dict()) == list(loaded.state_dict())
    with pytest.raises(HybridConfigError, match="the model was finalized"):
        trainer.train(resume_from_checkpoint=True)
    # and an ordinary Trainer fine-tunes it
    arguments = TrainingArguments(
        str(tmp_path / "tuned"), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    before = snapshot(loaded)
    Trainer(loaded, arguments, train_dataset=token_dataset(16)).train()
    assert all(not torch.equal(p, before[n]) for n, p in loaded.named_parameters() if ".hybrid." in n)


def test_resume_is_bit_exact(tmp_path):
    whole = toy_trainer(tmp_path / "whole", arguments={"max_steps": 6})
    whole.train()
    half = toy_trainer(tmp_path / "half", arguments={"max_steps": 6})

    class Stop(Exception):
        pass

    from transformers import TrainerCallback

    class StopAfter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Stop

    half.add_callback(StopAfter())
    with pytest.raises(Stop):
        half.train()
    resumed = toy_trainer(tmp_path / "half", arguments={"max_steps": 6})
    resumed.train(resume_from_checkpoint=True)
    for name, value in student_state(whole.model).items():
        assert torch.equal(student_state(resumed.model)[name], value), name


def test_a_kill_while_saving_costs_one_checkpoint_only(tmp_path):
    whole = toy_trainer(tmp_path / "a", arguments={"max_steps": 6})
    whole.train()
    toy_trainer(tmp_path / "b", arguments={"max_steps": 4}).train()
    (tmp_path / "b" / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 1.0, "glo')
    (tmp_path / "b" / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"half")
    resumed = toy_trainer(tmp_path / "b", arguments={"max_steps": 6})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    # nothing complete at all: starts over in the same folder
    (tmp_path / "c" / "checkpoint-2").mkdir(parents=True)
    fresh = toy_trainer(tmp_path / "c", arguments={"max_steps": 6})
    fresh.train(resume_from_checkpoint=True)
    for name, value in student_state(whole.model).items():
        assert torch.equal(student_state(fresh.model)[name], value), name


SEARCH = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits SIGINT as ignored
    sys.path.insert(0, {tests!r})
    import conftest
    from helpers import toy_trainer
    from hf_hybrid import GreedyLayerSwapCallback

    class Slow(GreedyLayerSwapCallback):  # time to be killed in
        def search(self, trainer):
            evaluate = trainer.evaluate_silently
            def slowly(*args):
                time.sleep({delay})
                return evaluate(*args)
            trainer.evaluate_silently = slowly
            return super().search(trainer)

    trainer = toy_trainer({folder!r}, callbacks=[Slow("eval_loss", "50%")])
    trainer.train(resume_from_checkpoint={resume})
    print(trainer.swap_report.most_linear, len(trainer.swap_report.trials))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_search_resumes_to_the_same_layers(kill, tmp_path):
    def start(folder, resume, delay):
        code = textwrap.dedent(SEARCH).format(
            tests=os.path.dirname(__file__), folder=str(folder), resume=resume, delay=delay
        )
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    trace = tmp_path / "killed" / "swap_trace.jsonl"
    process = start(tmp_path / "killed", False, 0.7)
    deadline = time.time() + 120
    while time.time() < deadline and not (trace.exists() and trace.read_text().count('"trial"') >= 3):
        time.sleep(0.05)
    process.send_signal(kill)
    process.communicate(timeout=60)
    assert process.returncode != 0
    done = trace.read_text().count('"type": "trial"')
    assert 3 <= done < 7
    resumed, output = start(tmp_path / "killed", True, 0), start(tmp_path / "whole", False, 0)
    (first, errors), (second, _) = resumed.communicate(timeout=120), output.communicate(timeout=120)
    assert resumed.returncode == 0, errors[-2000:]
    first, second = first.splitlines()[-1], second.splitlines()[-1]  # layers and number of trials
    assert first == second and first.endswith(" 7")
    assert (tmp_path / "killed" / "swap_trace.jsonl").read_text().count('"type": "trial"') == 7


def test_a_trace_of_another_search_is_not_continued(tmp_path):
    narrow = LinearAttentionConfig(window_size=3, num_sink_tokens=0)

    def search(**kwargs):
        return GreedyLayerSwapCallback().search(toy_trainer(tmp_path, **kwargs))

    search(mixer="sliding_window")
    search(mixer="sliding_window")  # the same again: fine, nothing is evaluated
    for changed, kwargs in {
        "data": {"mixer": "sliding_window", "eval_dataset": token_dataset(8, seed=5)},
        "mixers, weights": {"mixer": narrow},
        "weights": {"mixer": "sliding_window", "model": tiny_model(seed=3)},
    }.items():
        with pytest.raises(OutputFolderError, match=f"holds another search: {changed} changed since"):
            search(**kwargs)


def test_students_are_not_replaced_silently(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.swap_layers([1])
    with pytest.raises(AlreadyHybridError, match="has students already, so that mixer would be ignored"):
        toy_trainer(tmp_path, model=trainer.model)
    with pytest.raises(HybridConfigError, match="layers='1' and projections='shared' would be ignored"):
        toy_trainer(tmp_path, mixer=None, model=trainer.model, arguments={"layers": "1"})
    again = toy_trainer(tmp_path, mixer=None, model=trainer.model)
    assert again.swapped_layers() == [] and len(again.distill_sites) == 3
    with pytest.raises(AlreadyHybridError, match="is in distillation already"):
        convert_to_hybrid(trainer.model, SMALL_MIXER)
    trainer.swap_layers([1])
    trainer.model.save_pretrained(tmp_path / "x")  # the hybrid as the switch stands
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert list(loaded.config.hybrid["sites"]) == ["model.layers.1.self_attn"]


def test_resume_with_other_students_or_teacher_is_refused(tmp_path):
    toy_trainer(tmp_path).train()
    more = {"max_steps": 6}
    with pytest.raises(CheckpointError, match=r"was written with other students \(sites differ\)"):
        toy_trainer(tmp_path, mixer=LinearAttentionConfig(window_size=9), arguments=more).train(
            resume_from_checkpoint=True
        )
    with pytest.raises(CheckpointError, match="the weights of .* at 'model.layers.0.self_attn' are others"):
        toy_trainer(tmp_path, model=tiny_model(seed=5), arguments=more).train(resume_from_checkpoint=True)
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(OutputFolderError, match=r"holds another run \(config.json\)"):
        toy_trainer(tmp_path / "model").train(resume_from_checkpoint=True)


def test_training_on_after_a_search_voids_its_trace(tmp_path):
    toy_trainer(tmp_path, callbacks=[GreedyLayerSwapCallback("eval_loss", "50%")]).train()
    longer = toy_trainer(tmp_path, callbacks=[GreedyLayerSwapCallback("eval_loss", "50%")], arguments={"max_steps": 6})
    longer.train(resume_from_checkpoint=True)
    assert (tmp_path / "swap_trace.jsonl.superseded").exists() and len(longer.swap_report.trials) == 7


def test_trained_projections_cannot_be_restored(tmp_path):
    from hf_hybrid import restore_full_attention

    trainer = toy_trainer(tmp_path, arguments={"projections": "full"})
    trainer.train()
    trainer.swap_layers([0])
    model = trainer.finalize()
    assert model.config.hybrid["projections"] == "full"
    with pytest.raises(AlreadyHybridError, match="distilled with projections='full'"):
        restore_full_attention(model)


def test_arguments_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(HybridConfigError, match="load_best_model_at_end must be False"):
        toy_trainer(tmp_path, arguments={"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2})


def test_callback_state_survives_a_resume(tmp_path):
    more = token_dataset(4, seed=9)
    arguments = {"restore_callback_states_from_checkpoint": True, "max_steps": 6}
    toy_trainer(
        tmp_path, callbacks=[GreedyLayerSwapCallback("eval_loss", 5.0, confirmation_dataset=more, max_layers=2)]
    ).train()
    callback = GreedyLayerSwapCallback("eval_loss", 5.0, confirmation_dataset=more)
    resumed = toy_trainer(tmp_path, callbacks=[callback], arguments=arguments)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.swap_report.commits) == 2 and resumed.swap_report.confirmed is not None


def test_keep_best(tmp_path):
    trainer = toy_trainer(tmp_path, callbacks=[GreedyLayerSwapCallback("eval_loss", 5.0, keep="best")])
    trainer.train()
    assert sorted(trainer.swapped_layers()) == sorted(trainer.swap_report.best)


def test_an_output_folder_with_another_run_is_refused(tmp_path):
    toy_trainer(tmp_path).train()
    with pytest.raises(OutputFolderError, match="holds another run .*checkpoint-2.*resume_from_checkpoint=True"):
        toy_trainer(tmp_path).train()


def test_swaps_are_confirmed_on_other_data(tmp_path):
    callback = GreedyLayerSwapCallback("eval_loss", 5.0, confirmation_dataset=token_dataset(4, seed=9))
    trainer = toy_trainer(tmp_path, callbacks=[callback])
    trainer.train()
    report = trainer.swap_report
    assert len(report.most_linear) == 3 and report.confirmed == report.most_linear and len(report.confirmations) == 3
    assert len(trainer.swapped_layers()) == 3


def test_bank_survives_the_disk_and_checks_its_base(tmp_path):
    trainer = toy_trainer(tmp_path / "run")
    trainer.train()
    trainer.swap_layers([0, 1, 2])
    expected = trainer.evaluate()["eval_loss"]
    trainer.save_mixer_bank(str(tmp_path / "bank"))
    assert sum(f.stat().st_size for f in (tmp_path / "bank").iterdir()) < 60_000

    again = toy_trainer(tmp_path / "again", mixer=None, model=load_mixer_bank(tiny_model(), tmp_path / "bank"))
    again.swap_layers([0, 1, 2])
    assert again.evaluate()["eval_loss"] == expected
    by_name = HybridTrainer(
        tiny_model(),
        None,
        toy_arguments(tmp_path / "c"),
        mixer_bank=str(tmp_path / "bank"),
        eval_dataset=token_dataset(8, seed=2),
    )
    by_name.swap_layers([0, 1, 2])
    assert by_name.evaluate()["eval_loss"] == expected

    with pytest.raises(CheckpointError, match="distilled from .* the weights of LlamaForCausalLM .* are others"):
        load_mixer_bank(tiny_model().apply(_disturb), tmp_path / "bank")
    load_mixer_bank(tiny_model().bfloat16(), tmp_path / "bank")  # rounding is no other model
    with pytest.raises(CheckpointError, match="has no layer 'model.layers.1.self_attn'"):
        load_mixer_bank(tiny_model(num_hidden_layers=1), tmp_path / "bank")
    with pytest.raises(CheckpointError, match=r"the weights of Qwen2ForCausalLM \(model_type='qwen2'\) .* are others"):
        load_mixer_bank(tiny_model("qwen2"), tmp_path / "bank")
    from safetensors.torch import load_file, save_file

    weights, config = (tmp_path / "bank" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if "layers.1." not in name}, weights)
    untouched = tiny_model()
    with pytest.raises(CheckpointError, match="does not fit the students"):
        load_mixer_bank(untouched, tmp_path / "bank")
    description = json.loads(config.read_text())
    for key, message in {
        "base_fingerprint": "lacks entries",
        "sites": "is not of a HYBRID adapter that was trained",
    }.items():
        config.write_text(json.dumps({k: v for k, v in description.items() if k != key}))
        with pytest.raises(CheckpointError, match=message):
            load_mixer_bank(untouched, tmp_path / "bank")
    config.write_text(json.dumps(description))
    assert type(untouched).__name__ == "LlamaForCausalLM" and list(untouched.state_dict()) == list(
        tiny_model().state_dict()
    )
    assert all(parameter.requires_grad for parameter in untouched.parameters())
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="is no readable adapter of mixers"):
        load_mixer_bank(tiny_model(), tmp_path / "bank")
    with pytest.raises(AlreadyHybridError, match="has no students to save"):
        save_mixer_bank(tiny_model(), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def _disturb(module):
    if isinstance(module, torch.nn.Linear):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(module.weight.shape, generator=generator)
        module.weight.data.add_(0.1 * module.weight.data.std() * noise)


@pytest.mark.parametrize("damage", ["truncate", "edit"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    toy_trainer(tmp_path).train()
    path = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-10])
        message = "is no readable adapter of mixers"
    else:
        tensors = load_file(path)
        tensors.popitem()
        save_file(tensors, path)
        message = "does not fit the students: 1 tensors differ"
    with pytest.raises(CheckpointError, match=message):
        toy_trainer(tmp_path, arguments={"max_steps": 6}).train(resume_from_checkpoint=True)


def test_text_is_tokenised_and_packed(tokenizer, tmp_path):
    text = Dataset.from_dict({"text": ["w1 w2 w3 good", "bad w5"] * 40})
    trainer = toy_trainer(tmp_path, train_dataset=text, eval_dataset=None, processing_class=tokenizer)
    assert trainer.train_dataset.column_names == ["input_ids"]
    assert {len(ids) for ids in trainer.train_dataset["input_ids"]} == {24}
    assert len(trainer.train_dataset) == 40 * (5 + 3) // 24
    trainer.train()
    evaluated = toy_trainer(tmp_path, eval_dataset=text, processing_class=tokenizer)
    assert evaluated.evaluate()["eval_loss"] > 0  # text is given labels where it is evaluated
    with pytest.raises(DatasetError, match="must hold at least max_length=24 tokens; got 8"):
        toy_trainer(tmp_path, train_dataset=text.select(range(2)), processing_class=tokenizer)
    with pytest.raises(DatasetError, match="train_dataset has a 'text' column but no tokenizer was given"):
        toy_trainer(tmp_path, train_dataset=text)


def test_empty_data_and_missing_padding_are_refused(tokenizer, tmp_path):
    with pytest.raises(DatasetError, match="train_dataset must not be empty"):
        toy_trainer(tmp_path, train_dataset=Dataset.from_dict({"input_ids": []}))
    with pytest.raises(DatasetError, match="eval_dataset must not be empty"):
        toy_trainer(tmp_path, eval_dataset=[])
    with pytest.raises(DatasetError, match="train_dataset is missing"):
        toy_trainer(tmp_path, train_dataset=None).train()
    ragged = Dataset.from_dict({"input_ids": [[5, 6, 7], [5, 6]]})
    with pytest.raises(DatasetError, match=r"different lengths \(2 to 3 tokens\), but no tokenizer was given"):
        toy_trainer(tmp_path, train_dataset=ragged)
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(DatasetError, match="but the tokenizer has no padding token"):
        toy_trainer(tmp_path, train_dataset=ragged, processing_class=bare)


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(UnknownMixerError, match="got 'gated_delta'"):
        toy_trainer(tmp_path, mixer="gated_delta")
    with pytest.raises(HybridConfigError, match="args must be HybridTrainingArguments; got TrainingArguments"):
        HybridTrainer(tiny_model(), SMALL_MIXER, TrainingArguments(str(tmp_path), report_to=[]))
    with pytest.raises(
        HybridConfigError, match=r"projections must be one of shared, low_rank, full; got 'ful'. Did you mean 'full'\?"
    ):
        toy_trainer(tmp_path, arguments={"projections": "ful"})
    with pytest.raises(HybridConfigError, match="rank must be an integer >= 1; got 0"):
        toy_trainer(tmp_path, arguments={"projections": "low_rank", "projection_rank": 0})
    with pytest.raises(HybridConfigError, match="max_length must be at least 2 tokens; got 1"):
        toy_arguments(tmp_path, max_length=1)
    with pytest.raises(HybridConfigError, match="give either mixer or mixer_bank"):
        HybridTrainer(tiny_model(), "sliding_window", toy_arguments(tmp_path), mixer_bank="x")
    with pytest.raises(AlreadyHybridError, match="Distillation starts from full attention"):
        prepare_distillation_(convert_to_hybrid(tiny_model(), SMALL_MIXER))
    with pytest.raises(HybridConfigError, match="keep must be 'most_linear' or 'best'; got 'worst'"):
        GreedyLayerSwapCallback(keep="worst")
    with pytest.raises(HybridConfigError, match="max_layers must be at least 1"):
        GreedyLayerSwapCallback(max_layers=0)
    trainer = toy_trainer(tmp_path)
    with pytest.raises(HybridConfigError, match="swap_layers: 'x' has no student"):
        trainer.swap_layers(["x"])
    with pytest.raises(HybridConfigError, match="swap_layers: 3 has no student"):
        trainer.swap_layers([3])


def test_a_metric_that_compute_metrics_does_not_return(tmp_path):
    trainer = toy_trainer(tmp_path, callbacks=[GreedyLayerSwapCallback("f1")], compute_metrics=accuracy)
    with pytest.raises(
        MetricError, match="the metric 'eval_f1' is not among what the evaluation returned: .*eval_accuracy"
    ):
        trainer.train()
    with pytest.raises(MetricError, match="watches 'eval_loss' on eval_dataset, which is missing"):
        GreedyLayerSwapCallback().search(toy_trainer(tmp_path / "b", eval_dataset=None))


def test_a_callback_needs_a_hybrid_trainer(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(tiny_model(), arguments, train_dataset=token_dataset(8), callbacks=[GreedyLayerSwapCallback()])
    with pytest.raises(HybridConfigError, match="needs a HybridTrainer"):
        trainer.train()


def test_not_a_number_stops_training_and_search(tmp_path):
    trainer = toy_trainer(tmp_path / "a")
    with torch.no_grad():
        trainer.model.model.layers[1].self_attn.hybrid.log_weight.fill_(float("nan"))
    with pytest.raises(
        MetricError, match="step 0: the local loss of model.layers.1.self_attn must be finite; 1 of 3 sites are not"
    ):
        trainer.train()
    trainer = toy_trainer(tmp_path / "b", arguments={"per_device_eval_batch_size": 2})
    with torch.no_grad():
        trainer.model.model.layers[1].self_attn.hybrid.log_weight.fill_(float("nan"))
    with pytest.raises(
        MetricError,
        match="round 1, trial of model.layers.1.self_attn: the metric 'eval_loss' must be a finite number; got nan",
    ):
        GreedyLayerSwapCallback().search(trainer)


def test_a_mixer_without_parameters_is_searched_not_trained(tmp_path):
    trainer = toy_trainer(tmp_path, mixer="sliding_window")
    with pytest.raises(HybridConfigError, match="sliding_window has nothing to train with projections='shared'"):
        trainer.train()
    report = GreedyLayerSwapCallback("eval_loss", "50%").search(trainer)
    assert len(report.most_linear) == 3 and len(trainer.swapped_layers()) == 3


def test_a_model_can_be_given_by_path(tmp_path):
    tiny_model().save_pretrained(tmp_path / "teacher")
    trainer = HybridTrainer(
        str(tmp_path / "teacher"), SMALL_MIXER, toy_arguments(tmp_path / "out"), train_dataset=token_dataset(16)
    )
    trainer.train()
    assert trainer.last_block_losses.keys() == trainer.distill_sites.keys()
    trainer.swap_layers([1])
    trainer.save_model()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hybrid"]["base_model"]["name_or_path"] == str(tmp_path / "teacher")


def test_a_bf16_model_trains_fp32_mixers(tmp_path):
    trainer = toy_trainer(tmp_path, model=tiny_model().bfloat16())
    assert {p.dtype for p in student_state(trainer.model).values()} == {torch.float32}
    trainer.train()
    trainer.swap_layers([0, 1, 2])
    assert {p.dtype for p in trainer.finalize().parameters()} == {torch.bfloat16}


def test_only_selected_layers_get_students(tmp_path):
    trainer = toy_trainer(
        tmp_path, mixer=LinearAttentionConfig(window_size=0), arguments={"layers": "0,model.layers.2.self_attn"}
    )
    assert list(trainer.distill_sites) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    trainer.train()


def test_sites_that_no_batch_reaches_are_named(tmp_path, caplog, monkeypatch):
    import logging

    from transformers.utils import logging as hf_logging

    monkeypatch.setattr(hf_logging.get_logger("hf_hybrid"), "propagate", True)
    monkeypatch.setattr(hf_logging.get_logger("transformers"), "propagate", True)
    trainer = toy_trainer(tmp_path, model=tiny_llava(), mixer="linear_attention", arguments={"max_steps": 1})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    losses = trainer.last_block_losses
    assert [loss > 0 for loss in losses.values()] == [False, False, True, True] and "vision_tower" in next(iter(losses))
    assert "No batch reached 2 of 4 attention sites, the first model.vision_tower" in caplog.text


def test_block_losses_belong_to_their_sites_whatever_runs_first():
    import transformers

    from hf_hybrid.surgery import prepare_distillation_

    # the vision tower is defined after the text tower, and runs before it
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 99, "max_position_embeddings": 32},
        vision_config={**small, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    model = prepare_distillation_(transformers.CLIPModel(config), "linear_attention")
    vision, text = torch.randn(1, 3, 32, 32), torch.arange(5, 14)[None]
    model.train()
    first = model(input_ids=text, pixel_values=vision)["block_losses"]
    other = model(input_ids=text, pixel_values=-vision)["block_losses"]
    changed = {name for name, a, b in zip(hybrid_layers(model), first, other, strict=True) if not torch.equal(a, b)}
    assert changed and all("vision" in name for name in changed)


def test_the_loss_of_an_encoder_decoder_ignores_the_padding_of_either_side():
    import transformers

    from hf_hybrid.surgery import prepare_distillation_

    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, vocab_size=99, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = prepare_distillation_(transformers.BartForConditionalGeneration(config), "linear_attention")
    model.train()
    source, answer = torch.randint(5, 99, (2, 9)), torch.randint(5, 99, (2, 6))
    plain = model(input_ids=source, decoder_input_ids=answer)["block_losses"]
    junk = torch.full((2, 4), 7)
    padded = model(
        input_ids=torch.cat([source, junk], 1), attention_mask=torch.cat([source * 0 + 1, junk * 0], 1),
        decoder_input_ids=torch.cat([answer, junk], 1), decoder_attention_mask=torch.cat([answer * 0 + 1, junk * 0], 1),
    )["block_losses"]  # fmt: skip
    assert torch.allclose(padded, plain, rtol=1e-4)
