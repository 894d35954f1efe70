"""The score of a search through the Trainer: exact with and without reuse, on one process."""

import random

import numpy as np
import pytest
import torch
import transformers

from hf_hybrid import GreedyLayerSwapCallback, HybridTrainer
from hf_hybrid.errors import HybridError
from hf_hybrid.search.scoring import Scorer, evaluate

from conftest import token_dataset
from helpers import SMALL_MIXER, toy_arguments, toy_trainer
from tiny_models import SIZES, tiny_model


def tiny_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def tiny_gemma3n():
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 4},
        head_dim=8,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["full_attention"] * 4,
    )
    return transformers.Gemma3nForCausalLM(config).eval()


def tiny_mixtral():
    """Its loss counts what the routers of all blocks did: nothing fails when some are skipped."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=1.0
    )
    return transformers.MixtralForCausalLM(config).eval()


def accuracy(prediction):
    guess = prediction.predictions
    guess = guess[0] if isinstance(guess, tuple) else guess
    return {"accuracy": float(np.mean(guess[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]))}


def first_layer_runs(trainer):
    """A list that grows by one whenever the first layer that has a mixer runs."""
    runs = []
    next(iter(trainer.distill_sites.values())).register_forward_hook(lambda *_: runs.append(1))
    return runs


def search(trainer, metric="eval_loss", max_drop="50%", **kwargs):
    report = GreedyLayerSwapCallback(metric, max_drop, **kwargs).search(trainer)
    deciding = {"eval_loss", report.metric}
    return [(trial.swapped, {name: trial.metrics[name] for name in deciding}) for trial in report.trials]


def both_ways(tmp_path, make, **kwargs):
    """Trials and first-layer runs of a search with reuse of activations, and without."""
    results = []
    for reuse in (True, False):
        trainer = make(tmp_path / str(reuse))
        runs = first_layer_runs(trainer)
        results.append((search(trainer, reuse_activations=reuse, **kwargs), len(runs)))
    return results


@pytest.mark.parametrize("make", [tiny_t5, tiny_gemma3n, tiny_mixtral])
def test_a_host_whose_blocks_share_more_gives_the_same_search(make, tmp_path):
    (reused, few), (whole, many) = both_ways(tmp_path, lambda folder: toy_trainer(folder, model=make()))
    assert reused == whole and few >= many


@pytest.mark.parametrize(
    "changes",
    [
        {"arguments": {"bf16": True}},
        {"eval_dataset": token_dataset(8, seed=2).with_format("torch")},
        {"eval_dataset": token_dataset(8, seed=2).to_iterable_dataset()},
        {"compute_metrics": accuracy},
        {"arguments": {"per_device_eval_batch_size": 3}},
    ],
    ids=["bf16", "torch format", "stream", "metric", "uneven batches"],
)
def test_ways_of_evaluating_reuse_exactly(changes, tmp_path):
    (reused, few), (whole, many) = both_ways(tmp_path, lambda folder: toy_trainer(folder, **changes))
    assert reused == whole and few < many


def test_the_limit_of_memory_is_kept(tmp_path):
    def make(folder):
        return toy_trainer(folder)

    (_, few), (whole, many) = both_ways(tmp_path / "a", make)
    # of 8 rows of 24 tokens: three blocks' inputs, and what recognises the batch
    needed = 8 * 24 * (3 * 32 * 4 + 2 * 8)
    (reused, enough), _ = both_ways(tmp_path / "b", make, max_reuse_bytes=needed)
    (without, runs), _ = both_ways(tmp_path / "c", make, max_reuse_bytes=needed - 1)
    assert enough == few < many == runs and reused == without == whole


def generating(trainer_of):
    """A metric that generates, as the Trainer's own documentation suggests for summaries."""

    def compute_metrics(prediction):
        model = trainer_of[0].model
        ids = torch.tensor(prediction.label_ids[:2, :8])
        with torch.no_grad():
            produced = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return {"accuracy": float((produced[:, -4:] < 50).float().mean())}

    return compute_metrics


def test_a_metric_that_generates_is_searched_by_whole_forwards(tmp_path, caplog):
    def make(folder):
        trainer_of = []
        trainer_of.append(toy_trainer(folder, compute_metrics=generating(trainer_of)))
        return trainer_of[0]

    (reused, few), (whole, many) = both_ways(tmp_path, make, metric="accuracy", max_drop=1.0)
    assert reused == whole and few == many and len(whole) == 7


def test_a_metric_that_generates_is_known_before_the_distillation(tmp_path, monkeypatch):
    said, trainer_of = [], []
    monkeypatch.setattr(transformers.utils.logging.get_logger("hf_hybrid.search.scoring"), "info", said.append)
    callback = GreedyLayerSwapCallback("accuracy", 1.0)
    trainer = toy_trainer(tmp_path, compute_metrics=generating(trainer_of), callbacks=[callback])
    trainer_of.append(trainer)
    steps = []
    training_step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: steps.append(len(said)) or training_step(*args, **kwargs)
    trainer.train()
    assert len(trainer.swap_report.trials) == 7
    assert steps[0] == 1 and said[0].startswith("Activations cannot be reused between trials of this model")


class Generating(HybridTrainer):
    """Generates while it predicts, as `Seq2SeqTrainer(predict_with_generate=True)` does."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, _, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        produced = self.model.generate(
            input_ids=inputs["input_ids"][:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        return loss, produced, labels


def test_a_trainer_that_generates_is_searched_by_whole_forwards(tmp_path):
    def compute_metrics(prediction):
        return {"accuracy": float((prediction.predictions < 50).mean())}

    def make(folder):
        data = {"eval_dataset": token_dataset(8, seed=2), "compute_metrics": compute_metrics}
        return Generating(tiny_model(), SMALL_MIXER, toy_arguments(folder), train_dataset=token_dataset(8), **data)

    (reused, few), (whole, many) = both_ways(tmp_path, make, metric="accuracy", max_drop=1.0)
    assert reused == whole and few == many


def shuffled(examples):
    random.shuffle(examples)
    ids = torch.tensor([example["input_ids"] for example in examples])
    return {"attention_mask": torch.ones_like(ids), "input_ids": ids, "labels": ids}


def test_batches_that_change_are_refused_before_the_distillation(tmp_path):
    trainer = toy_trainer(tmp_path / "a", data_collator=shuffled, callbacks=[GreedyLayerSwapCallback()])
    with pytest.raises(HybridError, match="The validation batches changed between two trials"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(HybridError, match="The validation batches changed between two trials"):
        search(toy_trainer(tmp_path / "b", data_collator=shuffled))
    assert len(search(toy_trainer(tmp_path / "c", data_collator=shuffled), reuse_activations=False)) == 7


def test_batches_may_change_where_nothing_is_reused(tmp_path):
    callback = GreedyLayerSwapCallback("eval_loss", "50%")
    trainer = toy_trainer(tmp_path, model=tiny_t5(), data_collator=shuffled, callbacks=[callback])
    trainer.train()
    assert trainer.swap_report.trials


def test_loaders_are_not_kept(tmp_path):
    trainer = toy_trainer(tmp_path)
    for dataset in (None, token_dataset(4)):
        evaluate(trainer, "eval_loss", dataset)
        assert trainer.accelerator._dataloaders == []
    before = torch.get_rng_state()
    Scorer(trainer, "eval_loss", True, 1 << 30).rehearse()
    assert torch.equal(torch.get_rng_state(), before)  # loaders draw; a training that follows does not notice
    search(trainer)
    assert trainer.accelerator._dataloaders == []
    trained = toy_trainer(tmp_path / "trained", callbacks=[GreedyLayerSwapCallback("eval_loss", "50%")])
    trained.train()
    assert len(trained.accelerator._dataloaders) == 1  # the training's


def test_trials_are_not_logged(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.state.log_history.append({"loss": 1.0, "step": 1})
    assert len(search(trainer)) == 7
    assert trainer.state.log_history == [{"loss": 1.0, "step": 1}]


def test_a_search_leaves_no_trace_in_training(tmp_path):
    alone, searched = toy_trainer(tmp_path / "a"), toy_trainer(tmp_path / "b", callbacks=[GreedyLayerSwapCallback()])
    for trainer in (alone, searched):
        trainer.train()
    for (name, a), (_, b) in zip(alone.model.named_parameters(), searched.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    # the log holds the training, not hundreds of evaluations
    assert [sorted(entry) for entry in searched.state.log_history] == [
        sorted(entry) for entry in alone.state.log_history
    ]
    assert not any("eval_loss" in entry for entry in searched.state.log_history)
    assert "prediction_step" not in searched.__dict__


def test_a_prediction_step_of_the_trainer_itself_is_put_back(tmp_path):
    trainer = toy_trainer(tmp_path)
    own, calls = trainer.prediction_step, []
    trainer.prediction_step = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    patched = trainer.__dict__["prediction_step"]
    search(trainer)
    assert calls and trainer.__dict__["prediction_step"] is patched


def test_named_splits_are_searched(tmp_path):
    splits = {"val": token_dataset(8, seed=2), "dev": token_dataset(8, seed=3)}
    trainer = toy_trainer(tmp_path / "a", eval_dataset=splits)
    report = GreedyLayerSwapCallback("eval_val_loss", "50%").search(trainer)
    single = GreedyLayerSwapCallback("eval_loss", "50%").search(toy_trainer(tmp_path / "b", eval_dataset=splits["val"]))
    assert report.most_linear == single.most_linear and report.base == single.base
    assert all("eval_dev_loss" in trial.metrics for trial in report.trials)


def test_compiled_models_run_whole(tmp_path):
    trainer = toy_trainer(tmp_path)
    assert Scorer(trainer, "eval_loss", True, 1 << 30).reuse.enabled
    trainer.args.torch_compile = True
    assert not Scorer(trainer, "eval_loss", True, 1 << 30).reuse.enabled


def test_an_adapter_model_is_searched(tmp_path):
    from peft import LoraConfig, get_peft_model

    from hf_hybrid.surgery import hybrid_layers, prepare_distillation_

    def make(folder):
        base = tiny_model()
        prepare_distillation_(base, SMALL_MIXER)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
        for layer in hybrid_layers(base).values():  # an adapter freezes everything else
            layer.hybrid.requires_grad_(True)
        return toy_trainer(folder, mixer=None, model=model)

    (reused, few), (whole, many) = both_ways(tmp_path, make)
    assert reused == whole and few < many and whole[1][0] == ["model.layers.0.self_attn"]
