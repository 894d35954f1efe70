"""Guards and small promises of the trainer that no test noticed when they were taken out, and texts given to evaluation."""

import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_hybrid import GreedyLayerSwapCallback, HybridTrainer, HybridTrainingArguments, convert_to_hybrid
from hf_hybrid.errors import DatasetError, HybridConfigError, OutputFolderError
from hf_hybrid.surgery import discard_students_, linear_heads, prepare_distillation_

from conftest import token_dataset
from helpers import SMALL_MIXER, toy_arguments, toy_trainer
from tiny_models import tiny_model


def test_one_process_with_several_gpus_is_refused(tmp_path):
    class Many(HybridTrainingArguments):
        @property
        def n_gpu(self):
            return 2

    arguments = Many(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(HybridConfigError, match="one process cannot train on 2 GPUs"):
        HybridTrainer(tiny_model(), SMALL_MIXER, arguments, train_dataset=token_dataset(4))


def test_mixers_are_units_of_their_own_while_they_are_distilled():
    model = tiny_model()
    before = set(model._no_split_modules)
    prepare_distillation_(model, "gla", projections="low_rank")
    assert set(model._no_split_modules) == before | {"GLA", "LowRankDelta"}
    discard_students_(model)
    assert set(model._no_split_modules) == before


def test_logged_losses_are_means_since_the_last_log(tmp_path):
    trainer = toy_trainer(tmp_path, arguments={"max_steps": 4, "logging_steps": 2, "save_strategy": "no"})
    seen, compute = [], trainer.compute_loss

    def noted(*args, **kwargs):
        loss = compute(*args, **kwargs)
        seen.append(float(loss) / 3)
        return loss

    trainer.compute_loss = noted
    trainer.train()
    logged = [row["block_loss_mean"] for row in trainer.state.log_history if "block_loss_mean" in row]
    assert logged == pytest.approx([sum(seen[:2]) / 2, sum(seen[2:]) / 2], abs=2e-6)
    of_heads = [sum(losses) / len(losses) for losses in trainer.last_head_losses.values()]
    assert all(0 < loss < 2 for loss in of_heads) and trainer.last_head_losses.keys() == trainer.distill_sites.keys()


def test_window_dropout_reaches_the_mixers(tmp_path):
    trainer = toy_trainer(tmp_path, arguments={"window_dropout": 0.99, "save_strategy": "no", "max_steps": 8})
    assert trainer.objective.window_dropout == 0.99
    parts = []
    for layer in trainer.distill_sites.values():
        layer.hybrid.register_forward_pre_hook(lambda mixer, args: parts.append(mixer.ablated))
    trainer._starting_students = False
    trainer.train()
    assert parts.count("window") > 0.8 * len(parts)
    assert all(layer.hybrid.ablated is None for layer in trainer.distill_sites.values())


@pytest.mark.parametrize("stream", [False, True])
def test_text_is_evaluated_and_predicted_as_it_is(stream, tokenizer, tmp_path):
    rows = {"text": ["w1 w2 w3 good", "bad w5"] * 40}
    text = Dataset.from_dict(rows)
    if stream:
        text = text.to_iterable_dataset()
        assert isinstance(text, IterableDataset)
    trainer = toy_trainer(
        tmp_path, train_dataset=text, eval_dataset=text, processing_class=tokenizer, arguments={"save_strategy": "no"}
    )
    trainer.train()
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(Dataset.from_dict(rows))["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(Dataset.from_dict(rows)).predictions.shape[-1] == 99


def test_chats_are_distilled_through_the_template(tokenizer, tmp_path):
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "good w3"}]}] * 60
    trainer = toy_trainer(tmp_path, train_dataset=Dataset.from_list(rows), processing_class=chatty)
    assert {len(ids) for ids in trainer.train_dataset["input_ids"]} == {24}
    with pytest.raises(DatasetError, match="template"):
        toy_trainer(tmp_path, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def test_a_causal_model_refuses_labelled_text_for_evaluation(tokenizer, tmp_path):
    rows = Dataset.from_dict({"text": ["w1 good"] * 30, "label": [0, 1] * 15})
    with pytest.raises(DatasetError, match="LabelWordTask"):
        toy_trainer(tmp_path, eval_dataset=rows, processing_class=tokenizer)


def test_a_classifier_keeps_its_labels(tokenizer, tmp_path):
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**small, vocab_size=99, num_labels=2))
    rows = Dataset.from_dict({"text": ["w1 good", "bad w2 w3"] * 8, "label": [1, 0] * 8})
    trainer = HybridTrainer(
        model,
        "linear_attention",
        toy_arguments(tmp_path),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0 and trainer.eval_dataset["labels"] == [1, 0] * 8


def test_heads_are_swapped_by_the_trainer(tmp_path):
    trainer = toy_trainer(tmp_path)
    names = list(trainer.distill_sites)
    trainer.swap_layers([0, 1], heads={0: [1]})
    assert trainer.model.config.hybrid["sites"][names[0]]["heads"] == [1]
    assert trainer.swapped_layers() == names[:2]
    trainer.swap_layers(None, heads={names[2]: [0]})
    assert trainer.swapped_layers() == [names[2]]
    with pytest.raises(HybridConfigError, match="which is not among the layers"):
        trainer.swap_layers([0], heads={1: [0]})
    with pytest.raises(HybridConfigError, match="key-value heads must be among 0..1; got 7"):
        trainer.swap_layers([0], heads={0: [7]})
    low_rank = toy_trainer(tmp_path / "b", arguments={"projections": "low_rank"})
    with pytest.raises(HybridConfigError, match="has trained projections, which belong to the whole layer"):
        low_rank.swap_layers([0], heads={0: [1]})


def test_a_finished_distillation_takes_no_step_more(tmp_path):
    settings = {"max_steps": 3, "save_steps": 3, "lr_scheduler_type": "constant"}
    first = toy_trainer(tmp_path, arguments=settings)
    first.train()
    again = toy_trainer(tmp_path, arguments=settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    for name, layer in again.distill_sites.items():
        for own, other in zip(layer.hybrid.parameters(), first.distill_sites[name].hybrid.parameters(), strict=True):
            assert torch.equal(own, other)


def test_a_run_without_checkpoints_is_not_trained_on(tmp_path):
    settings = {"save_strategy": "no"}
    toy_trainer(tmp_path, arguments=settings, callbacks=[GreedyLayerSwapCallback("eval_loss", "50%")]).train()
    with pytest.raises(OutputFolderError, match="was finished at step 4 and kept no checkpoints; got max_steps=8"):
        toy_trainer(tmp_path, arguments={**settings, "max_steps": 8}).train(resume_from_checkpoint=True)


def test_going_on_with_a_conversion_trains_its_mixers_in_fp32_and_nothing_else(tmp_path):
    model = convert_to_hybrid(tiny_model().bfloat16(), SMALL_MIXER, layers=[0])
    trainer = toy_trainer(tmp_path, mixer=None, model=model)
    trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all(".hybrid." in name for name in trained) and set(trained.values()) == {torch.float32}


def test_a_constructor_that_fails_leaves_a_hybrid_as_it_was(tmp_path):
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER, layers=[0])
    before = linear_heads(model)
    with pytest.raises(TypeError):
        toy_trainer(tmp_path, mixer=None, model=model, nonsense=1)
    assert linear_heads(model) == before and model.training_objective is None


def test_a_bank_is_not_put_beside_a_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(OutputFolderError, match="holds a model, on top of which from_pretrained would load the mixers"):
        toy_trainer(tmp_path / "run").save_mixer_bank(tmp_path / "model")


def test_columns_that_would_be_dropped_are_named(tokenizer, tmp_path):
    import transformers

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**small, vocab_size=99))
    for columns in ({"sentiment": [0, 1]}, {"label": [0, 1], "text_pair": ["w1", "w2"]}):
        rows = Dataset.from_dict({"text": ["w1", "w2"], **columns})
        with pytest.raises(DatasetError, match="has columns beside 'text' that would be dropped"):
            HybridTrainer(
                model, "linear_attention", toy_arguments(tmp_path), eval_dataset=rows, processing_class=tokenizer
            )
    with pytest.raises(DatasetError, match="train_dataset must be one dataset; got a dict of a"):
        toy_trainer(tmp_path, train_dataset={"a": token_dataset(4)})


def test_a_layer_named_twice_and_single_layers(tmp_path):
    trainer = toy_trainer(tmp_path, arguments={"layers": 1})
    name = "model.layers.1.self_attn"
    trainer.swap_layers(name)
    assert trainer.swapped_layers() == [name]
    with pytest.raises(HybridConfigError, match="heads name a layer twice"):
        trainer.swap_layers([0], heads={0: [0], name: [1]})
