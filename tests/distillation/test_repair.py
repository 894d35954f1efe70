"""Repairs on toy hosts: what trains, what the teacher is, what is saved, and what is refused."""

import copy
import json

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_hybrid import (
    LinearAttentionConfig,
    RepairArguments,
    RepairTrainer,
    SlidingWindowConfig,
    convert_to_hybrid,
    restore_full_attention,
)
from hf_hybrid.distillation.repair_saving import WEIGHTS_FILE
from hf_hybrid.errors import (
    AlreadyHybridError,
    CheckpointError,
    HybridConfigError,
    MetricError,
    OutputFolderError,
    UnsupportedModelError,
)
from hf_hybrid.objectives.logits import forward_kl
from hf_hybrid.surgery import linear_heads, set_linear_heads_

from conftest import token_dataset
from helpers import SMALL_MIXER, toy_trainer
from tiny_models import tiny_model


def arguments(folder, **overrides):
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "max_length": 24, "learning_rate": 3e-3, "warmup_steps": 0,
    }  # fmt: skip
    return RepairArguments(str(folder), **{**settings, **overrides})


def hybrid(family="llama", mixer=SMALL_MIXER, **kwargs):
    return convert_to_hybrid(tiny_model(family), mixer, **kwargs)


def trainer(folder, model=None, data=None, **overrides):
    kwargs = {k: overrides.pop(k) for k in ("eval_dataset", "teacher", "callbacks", "data_collator") if k in overrides}
    data = token_dataset(32) if data is None else data
    return RepairTrainer(model or hybrid(), arguments(folder, **overrides), train_dataset=data, **kwargs)


def divergence(model, teacher, ids):
    with torch.no_grad():
        return forward_kl(model(input_ids=ids).logits, teacher(input_ids=ids).logits).item()


def few_rows(count=8):
    """Rows few enough to be learnt: what random tokens teach helps with no others."""
    return Dataset.from_list([{"input_ids": row} for row in ids(count).tolist()])


def ids(rows=8, length=24, seed=5):
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi3"])
def test_a_repair_brings_predictions_to_the_teachers(family, tmp_path):
    teacher, model = tiny_model(family), hybrid(family, layers=[0, 2])
    before = divergence(model, teacher, ids())
    repair = trainer(tmp_path, model, max_steps=40, data=few_rows(), recall_share=0.0)
    repair.train()
    assert divergence(repair.finalize(), teacher, ids()) < 0.5 * before
    assert repair.repair_report.steps == 40 and repair.repair_report.tokens == 40 * 4 * 24


def test_some_heads_alone_and_memories_are_repaired(tmp_path):
    mixer = SlidingWindowConfig(window_size=3, num_memory_tokens=(2, 0), memory_block_size=3)
    model = convert_to_hybrid(tiny_model(), mixer, heads={"model.layers.1.self_attn": [0]})
    teacher = tiny_model()
    before = divergence(model, teacher, ids())
    repair = trainer(tmp_path, model, max_steps=40, data=few_rows(), recall_share=0.0)
    repair.train()
    assert divergence(repair.finalize(), teacher, ids()) < 0.5 * before
    assert linear_heads(model) == {"model.layers.1.self_attn": (0,)}


@pytest.mark.parametrize("trained", ["mixers", "lora", "mlp", "norms", "mixers,lora,mlp,norms"])
def test_the_teacher_is_what_it_was_whatever_trains(trained, tmp_path):
    teacher, model = tiny_model(), hybrid()
    seen = []
    repair = trainer(tmp_path, model, trained=trained, weight_learning_rate=1e-3)
    own = repair._as_teacher

    class Watched:
        def __init__(self, hybrid):
            self.context = own(hybrid)

        def __enter__(self):
            inside = self.context.__enter__()
            with torch.no_grad():
                seen.append(torch.equal(inside(input_ids=ids()).logits, teacher(input_ids=ids()).logits))
            return inside

        def __exit__(self, *error):
            return self.context.__exit__(*error)

    repair._as_teacher = Watched
    changed = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    repair.train()
    assert seen == [True] * 6
    parts = repair._parts
    assert {*parts.values()} == {*trained.split(",")}
    moved = {n for n, p in model.named_parameters() if n in changed and not torch.equal(changed[n], p)}
    # a low-rank difference B A starts with B = 0
    assert {parts[n] for n in moved} == {*trained.split(",")}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {*parts}


def test_every_part_has_its_own_rate(tmp_path):
    repair = trainer(tmp_path, trained="mixers,lora,mlp,norms", mixer_learning_rate=2e-3, weight_learning_rate=4e-5)
    optimizer = repair.create_optimizer()
    names = {id(p): n for n, p in repair.unwrapped.named_parameters()}
    rates = {repair._parts[names[id(p)]]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {"lora": 3e-3, "mixers": 2e-3, "mlp": 4e-5, "norms": 4e-5}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(repair._parts)


def test_weights_train_in_fp32_and_go_back_to_their_types(tmp_path):
    model = hybrid().to(torch.bfloat16)
    repair = trainer(tmp_path, model, trained="mixers,lora,norms", bf16=True)
    assert {p.dtype for p in repair.unwrapped.parameters() if p.requires_grad} == {torch.float32}
    repair.train()
    assert {p.dtype for p in repair.finalize().parameters()} == {torch.bfloat16}


def test_finalizing_leaves_an_ordinary_hybrid_that_computes_the_same(tmp_path):
    repair = trainer(tmp_path / "run")
    repair.train()
    with torch.no_grad():
        adapted = repair.unwrapped(input_ids=ids()).logits
    model = repair.finalize()
    names = {name for name, _ in hybrid().named_parameters()}
    assert {name for name, _ in model.named_parameters()} == names
    assert type(model) is type(hybrid()) and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(input_ids=ids()).logits, adapted, atol=2e-5, rtol=1e-4)
    repair.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)
    assert again.config.hybrid["repair"] == {"trained": ["mixers", "lora"], "steps": 6}
    report = json.loads((tmp_path / "saved" / "repair_report.json").read_text())
    assert report["steps"] == 6 and report["trained"] == ["mixers", "lora"]
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "## Repair" in card and "`mixers` and `lora` trained for 6 steps" in card


def test_a_repaired_model_knows_that_its_softmax_is_nobodys(tmp_path):
    repair = trainer(tmp_path / "run")
    repair.train()
    repair.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(AlreadyHybridError, match="was repaired"):
        restore_full_attention(again)
    with pytest.raises(HybridConfigError, match="was repaired with the switch as it stands"):
        set_linear_heads_(again, {})
    with pytest.raises(HybridConfigError, match="Pass teacher="):
        trainer(tmp_path / "more", again)
    more = trainer(tmp_path / "more", again, teacher=tiny_model(), max_steps=2)
    more.train()
    with pytest.raises(HybridConfigError, match="is in a repair"):
        again.save_pretrained(tmp_path / "twice")
    more.finalize()
    again.save_pretrained(tmp_path / "twice")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "twice").repaired


def test_metrics_are_taken_before_and_after(tmp_path):
    repair = trainer(tmp_path, eval_dataset=token_dataset(8, seed=2))
    repair.train()
    report = repair.repair_report
    assert report.before["loss"] > 0 and report.after["loss"] > 0 and {*report.before} == {*report.after} == {"loss"}
    assert "| loss |" in report.markdown()


def test_a_repair_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "lr_scheduler_type": "constant"}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    half = trainer(tmp_path / "half", **settings)
    half.train()
    import shutil

    shutil.rmtree(tmp_path / "half" / "checkpoint-6")
    rest = trainer(tmp_path / "half", **settings)
    rest.train(resume_from_checkpoint=True)
    for (name, own), (_, other) in zip(
        whole.unwrapped.named_parameters(), rest.unwrapped.named_parameters(), strict=True
    ):
        assert torch.equal(own, other), name
    assert rest.repair_report.tokens == whole.repair_report.tokens
    assert (tmp_path / "half" / "checkpoint-3" / WEIGHTS_FILE).stat().st_size < 200_000  # what trains, not the model
    with pytest.raises(OutputFolderError, match="resume_from_checkpoint=True"):
        trainer(tmp_path / "half", **settings).train()
    with pytest.raises(CheckpointError, match="trained other weights"):
        trainer(tmp_path / "half", **settings, trained="mixers").train(resume_from_checkpoint=True)
    (tmp_path / "half" / "checkpoint-6" / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of a repair"):
        trainer(tmp_path / "half", **settings).train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-6"))


def test_only_predictions_of_labelled_tokens_count(tmp_path):
    data = [{"input_ids": row, "labels": [-100] * 20 + row[20:]} for row in ids(32).tolist()]
    model, teacher = hybrid(), tiny_model()
    repair = trainer(tmp_path, model, data=Dataset.from_list(data), max_steps=1)
    batch = {"input_ids": ids(4), "labels": torch.tensor([d["labels"] for d in data[:4]])}
    batch["input_ids"] = torch.tensor([d["input_ids"] for d in data[:4]])
    model.train()
    loss = repair.compute_loss(model, dict(batch))
    with torch.no_grad():
        logits = [m(input_ids=batch["input_ids"]).logits[:, 19:23] for m in (model, teacher)]
    assert loss.item() == pytest.approx(forward_kl(*logits).item(), rel=1e-4)


def test_rows_with_labels_get_no_recall(tmp_path):
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids(16, 100).tolist()])
    repair = trainer(tmp_path / "a", data=data, recall_share=1.0)
    assert repair.recall_share == 0.0 and repair.train_dataset[0]["input_ids"] == data[0]["input_ids"]
    plain = data.remove_columns("labels")
    repair = trainer(tmp_path / "b", data=plain, recall_share=1.0)
    assert repair.recall_share == 1.0 and repair.train_dataset[0]["input_ids"] != data[0]["input_ids"]


def test_classifiers_are_repaired_on_their_own_logits(tmp_path):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=99, num_labels=3
    )
    torch.manual_seed(0)
    teacher = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 and "embed" not in name else 1.0)
    model = convert_to_hybrid(copy.deepcopy(teacher), "linear_attention")
    data = Dataset.from_list([{"input_ids": row, "labels": 1} for row in ids().tolist()])

    def distance():
        with torch.no_grad():
            return forward_kl(model(input_ids=ids()).logits, teacher(input_ids=ids()).logits).item()

    before = distance()
    repair = trainer(tmp_path, model, data=data, max_steps=40)
    repair.train()
    repair.finalize()
    assert distance() < 0.5 * before


def test_encoder_decoders_are_repaired(tmp_path):
    config = transformers.T5Config(
        d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    teacher = transformers.T5ForConditionalGeneration(config).eval()
    model = convert_to_hybrid(copy.deepcopy(teacher), "linear_attention", layers="encoder")
    rows = [{"input_ids": row, "labels": row[:6] + [-100, -100]} for row in ids(32).tolist()]
    repair = trainer(tmp_path, model, data=Dataset.from_list(rows), max_steps=3)
    repair.train()
    assert repair.state.log_history[0]["loss"] > 0
    repair.finalize()


def test_after_a_distillation_the_trainer_repairs_what_it_found(tmp_path):
    distilled = toy_trainer(tmp_path / "run", arguments={"save_strategy": "no"})
    distilled.train()
    distilled.swap_layers([0, 2])
    args = arguments(tmp_path / "run" / "repair", max_steps=3)
    report = distilled.repair(args=args)
    assert report.steps == 3 and distilled.repair_report is report
    distilled.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.repaired and len(linear_heads(again)) == 2


def test_an_optimizer_made_too_early_is_refused(tmp_path):
    model = hybrid()
    early = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(HybridConfigError, match=r"optimizers\[0\] must hold all that trains"):
        RepairTrainer(model, arguments(tmp_path), train_dataset=few_rows(), optimizers=(early, None))
    # and the model is as it was
    assert all(p.requires_grad for p in model.parameters())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in hybrid().named_parameters()}
    model.save_pretrained(tmp_path / "saved")


def test_models_without_classes_are_refused(tmp_path):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 99,
    }
    rows = Dataset.from_list([{"input_ids": row} for row in ids().tolist()])
    encoder = convert_to_hybrid(transformers.BertModel(transformers.BertConfig(**sizes)), "linear_attention")
    with pytest.raises(UnsupportedModelError, match="gives no logits"):
        trainer(tmp_path / "a", encoder, data=rows).train()
    config = transformers.BertConfig(**sizes, num_labels=1)
    regression = convert_to_hybrid(transformers.BertForSequenceClassification(config), "linear_attention")
    with pytest.raises(UnsupportedModelError, match=r"logits of shape \[4, 1\]"):
        trainer(tmp_path / "b", regression, data=rows).train()


def test_half_precision_reports_what_it_saves(tmp_path, caplog):
    model = hybrid().to(torch.bfloat16)
    repair = trainer(tmp_path, model, trained="norms", eval_dataset=token_dataset(8, seed=2), weight_learning_rate=1e-7)
    import logging

    with caplog.at_level(logging.WARNING):
        transformers.utils.logging.enable_propagation()
        repair.train()
    assert "changes to mlp and norms are lost" in caplog.text
    # nothing is left of the changes, and the report says so
    assert repair.repair_report.before == repair.repair_report.after


def test_checkpointing_and_accumulation_change_nothing(tmp_path):
    plain = trainer(tmp_path / "a", hybrid("gpt2"), data=few_rows(), max_steps=2, recall_share=0.0)
    plain.train()
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    for name, settings in {
        "checkpointing": {"gradient_checkpointing": True},
        "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    }.items():
        other = trainer(tmp_path / name, hybrid("gpt2"), data=few_rows(), max_steps=2, recall_share=0.0, **settings)
        other.train()
        found = [entry["loss"] for entry in other.state.log_history if "loss" in entry]
        assert found == pytest.approx(losses, rel=1e-4), name


def test_another_hybrids_checkpoint_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, **settings).train()
    other = convert_to_hybrid(tiny_model(seed=1), SMALL_MIXER)
    with pytest.raises(CheckpointError, match="the repair of another hybrid"):
        trainer(tmp_path, other, **settings).train(resume_from_checkpoint=True)


def test_a_repair_reads_the_text_that_distillation_read(tmp_path, monkeypatch):
    """Not its rows that ask for recall, which would be rewritten twice."""
    rows = Dataset.from_list([{"input_ids": row} for row in ids(16, 100).tolist()])
    distilled = toy_trainer(
        tmp_path / "run", train_dataset=rows, arguments={"recall_share": 1.0, "save_strategy": "no"}
    )
    assert distilled.train_dataset["input_ids"][:] != rows["input_ids"][:]
    distilled.swap_layers([0])
    read = []
    monkeypatch.setattr(RepairTrainer, "train", lambda self: read.append(self.train_dataset["input_ids"][:]))
    distilled.repair(args=arguments(tmp_path / "repair", recall_share=0.0))
    assert read == [rows["input_ids"][:]]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"trained": "mixer"}, "trained must name some of .*Did you mean 'mixers'"),
        ({"trained": ""}, "trained must name some of"),
        ({"lora_rank": 0}, "lora_rank must be an integer >= 1"),
        ({"recall_share": 2.0}, "recall_share"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"max_length": 1}, "max_length"),
    ],
)
def test_arguments_that_cannot_be(overrides, message, tmp_path):
    with pytest.raises(HybridConfigError, match=message):
        arguments(tmp_path, **overrides)


def test_models_that_cannot_be_repaired(tmp_path):
    with pytest.raises(HybridConfigError, match="must be a hybrid with linear heads; got LlamaForCausalLM"):
        trainer(tmp_path, tiny_model())
    switched_off = hybrid()
    set_linear_heads_(switched_off, {})
    with pytest.raises(HybridConfigError, match="must be a hybrid with linear heads"):
        trainer(tmp_path, switched_off)
    with pytest.raises(HybridConfigError, match="in distillation"):
        distilled = toy_trainer(tmp_path / "run")
        distilled.swap_layers([0])
        trainer(tmp_path, distilled.model)
    with pytest.raises(HybridConfigError, match="nothing of trained='mixers'"):
        without = hybrid(mixer="sliding_window")
        trainer(tmp_path, without, trained="mixers")
    assert all(p.requires_grad for p in without.parameters()) and "in_repair" not in without.__dict__
    with pytest.raises(HybridConfigError, match="load_best_model_at_end"):
        trainer(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    with pytest.raises(HybridConfigError, match="bf16_full_eval"):
        trainer(tmp_path, bf16_full_eval=True)
    with pytest.raises(HybridConfigError, match="args must be RepairArguments"):
        RepairTrainer(hybrid(), transformers.TrainingArguments(str(tmp_path)))
    with pytest.raises(HybridConfigError, match="train_dataset is missing"):
        RepairTrainer(hybrid(), arguments(tmp_path)).train()


def test_sharded_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UnsupportedModelError, match="cannot be sharded"):
        trainer(tmp_path)


def test_a_divergence_that_is_no_number_stops(tmp_path):
    model = hybrid(mixer=LinearAttentionConfig(window_size=4))
    with torch.no_grad():
        model.model.layers[0].self_attn.hybrid.log_weight.fill_(float("nan"))
    with pytest.raises(MetricError, match="step 0: the divergence from the teacher must be finite"):
        trainer(tmp_path, model).train()
