"""Searches by rows on a model: the scorer against the Trainer's own evaluation, heads, budgets, proposals, many ways in."""

import json

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

from hf_hybrid import GreedyLayerSwapCallback
from hf_hybrid.errors import DatasetError, HybridConfigError, MetricError
from hf_hybrid.search.by_rows import unit_costs
from hf_hybrid.search.proposals import fisher_proposals
from hf_hybrid.search.row_scorer import RowScorer, heads_of, unit_names
from hf_hybrid.search.trace import steps_of

from conftest import token_dataset
from helpers import toy_trainer


def margin(prediction):
    """The share of tokens that score below the one that came: smooth enough for a toy model."""
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((logits < np.take_along_axis(logits, labels[..., None], -1)).mean())}


def rows_of(trainer, units, rows, metric):
    """What the scorer must give: every row evaluated alone by the Trainer."""
    trainer.swap_layers(None, heads_of(units, trainer.distill_sites))
    found = [trainer.evaluate_silently(trainer.eval_dataset.select([int(row)])) for row in rows]
    trainer.swap_layers([])
    return np.array([[metrics[metric], metrics["eval_loss"]] for metrics in found])


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_rows_equal_the_trainers_evaluation_of_each(family, granularity, tmp_path):
    trainer = toy_trainer(tmp_path, family, compute_metrics=margin, arguments={"per_device_eval_batch_size": 3})
    scorer = RowScorer(trainer, "eval_accuracy")
    units = unit_names(scorer.sites, granularity)
    sets = [frozenset(), frozenset(units[:1]), frozenset(units[-2:]), frozenset(units)]
    rows = np.array([5, 0, 3, 7])
    found = scorer(sets, rows)
    for units_of_set, values in zip(sets, found, strict=True):
        np.testing.assert_allclose(values, rows_of(trainer, units_of_set, rows, "eval_accuracy"), atol=2e-6)
    assert trainer.swapped_layers() == []


def classifier():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99, num_labels=3
    )
    torch.manual_seed(0)
    rows = [row[: 5 + i] for i, row in enumerate(token_dataset(6, seed=4)["input_ids"])]
    data = Dataset.from_dict({"input_ids": rows, "labels": [0, 1, 2, 2, 1, 0]})
    return transformers.BertForSequenceClassification(config).eval(), data


def encoder_decoder():
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    rows = token_dataset(6, seed=4)["input_ids"]
    data = Dataset.from_dict({"input_ids": rows, "labels": [row[:5] for row in rows]})
    return transformers.T5ForConditionalGeneration(config).eval(), data


def padded(examples):
    length = max(len(example["input_ids"]) for example in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    for row, example in enumerate(examples):
        ids[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.tensor([e["labels"] for e in examples]),
    }


def mean_logit(prediction):
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float(logits.reshape(len(logits), -1).mean())}


@pytest.mark.parametrize("make", [classifier, encoder_decoder])
def test_rows_of_classifiers_and_encoder_decoders(make, tmp_path):
    model, data = make()
    trainer = toy_trainer(
        tmp_path,
        model=model,
        mixer="linear_attention",
        train_dataset=data,
        eval_dataset=data,
        data_collator=padded,
        compute_metrics=mean_logit,
        arguments={"per_device_eval_batch_size": 4},
    )
    scorer = RowScorer(trainer, "eval_accuracy")
    units = unit_names(scorer.sites, "head")
    sets, rows = [frozenset(), frozenset(units[:3]), frozenset(units)], np.array([5, 0, 3, 1, 2])
    for units_of_set, values in zip(sets, scorer(sets, rows), strict=True):
        np.testing.assert_allclose(values, rows_of(trainer, units_of_set, rows, "eval_accuracy"), atol=5e-6)
    report = trainer.search("accuracy", None, granularity="head", max_layers=2)
    assert len(report.most_linear) == 2


def test_a_set_starts_at_its_first_changed_block(tmp_path):
    trainer = toy_trainer(tmp_path, compute_metrics=margin)
    scorer = RowScorer(trainer, "eval_accuracy")
    layers, rows = unit_names(scorer.sites, "layer"), np.arange(4)
    scorer([frozenset(layers[:1]), frozenset(layers[:1]) | {layers[-1]}], rows)  # also verifies
    before = scorer.layer_forwards
    # what they share runs once (3 blocks), then the last block alone for one, two blocks for the other
    scorer([frozenset(layers[:1]), frozenset({layers[0], layers[2]}), frozenset({layers[0], layers[1]})], rows)
    assert scorer.layer_forwards - before == 4 * (3 + 1 + 2)


def test_no_batch_is_held(tmp_path):
    """Peak of activations with 8 rows is that of 32."""
    held = []
    for count in (8, 32):
        trainer = toy_trainer(
            tmp_path / str(count),
            compute_metrics=margin,
            eval_dataset=token_dataset(count, seed=2),
            arguments={"per_device_eval_batch_size": 4},
        )
        scorer, most = RowScorer(trainer, "eval_accuracy"), [0]
        own = scorer._run

        def watched(*args, own=own, scorer=scorer, most=most):
            most[0] = max(most[0], scorer.reuse._seen.size)
            return own(*args)

        scorer._run = watched
        layers = unit_names(scorer.sites, "layer")
        scorer([frozenset(), frozenset(layers[:1]), frozenset(layers[1:2])], np.arange(count))
        held.append(most[0])
        assert scorer.reuse._seen.inputs == []
    assert held[0] == held[1] > 0


def test_losses_that_cannot_be_taken_apart_are_taken_one_by_one(tmp_path):
    def loss_of_batch(outputs, labels, num_items_in_batch=None):
        # needs more of the outputs than a row's logits
        return (
            torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())
            + 0 * outputs.to_tuple()[0].sum()
        )

    trainer = toy_trainer(tmp_path, compute_loss_func=loss_of_batch)
    scorer = RowScorer(trainer, "eval_loss")
    found = scorer([frozenset()], np.arange(3))[0]
    assert scorer._one_at_a_time
    np.testing.assert_allclose(found[:, 1], rows_of(trainer, [], range(3), "eval_loss")[:, 1], atol=1e-5)


def test_slopes_are_derivatives_of_the_loss(tmp_path):
    """`a` of a unit is how fast the loss changes when its output moves from the softmax's towards the mixer's."""
    trainer = toy_trainer(tmp_path)
    scorer = RowScorer(trainer, "eval_loss")
    units = unit_names(scorer.sites, "head")
    proposals = fisher_proposals(scorer, units, [0])
    slopes = np.sqrt(np.diag(proposals.matrix))  # of one row: their sizes
    inputs = scorer._inputs(np.array([0]))
    name, step = list(scorer.sites)[1], 1e-3
    layer = scorer.sites[name]

    def loss_at(shift, head):
        class Moved:
            def run_layer(self, layer, args, kwargs):
                return layer.observed_forward(self, args, kwargs)

            def observe(self, layer, given, target):
                mixed, _ = layer.hybrid(given.query, given.key, given.value, given.hidden_states, valid=given.valid)
                groups = target.shape[2] // layer.hybrid_site.num_key_value_heads
                own = slice(head * groups, (head + 1) * groups)
                target[:, :, own] += shift * (mixed - target)[:, :, own]

        layer.local_objective = Moved()
        try:
            with torch.no_grad():
                return float(trainer.compute_loss(trainer.model.eval(), dict(inputs)))
        finally:
            layer.local_objective = None

    for head in layer.hybrid.heads:
        slope = (loss_at(step, head) - loss_at(-step, head)) / (2 * step)
        assert slopes[units.index(f"{name}:{head}")] == pytest.approx(abs(slope), rel=2e-2, abs=2e-5)
    assert all(not layer.linear_heads for layer in scorer.sites.values())
    by_layer = fisher_proposals(scorer, list(scorer.sites), [0, 1, 2])
    assert set(by_layer([name])) == set(scorer.sites) - {name}


@pytest.mark.parametrize("proposals", ["fisher", "none", "induction"])
def test_a_race_by_head(proposals, tmp_path):
    trainer = toy_trainer(tmp_path, compute_metrics=margin)
    report = trainer.search("accuracy", None, granularity="head", max_layers=3, proposals=proposals)
    assert len(report.most_linear) == 3 and all(":" in unit for unit in report.most_linear)
    heads = heads_of(report.most_linear, trainer.distill_sites)
    now = {name: list(layer.linear_heads) for name, layer in trainer.distill_sites.items() if layer.linear_heads}
    assert now == heads and report.layer_forwards > 0
    trainer.save_model()  # what was found is a checkpoint
    lines = [json.loads(line) for line in (tmp_path / "swap_trace.jsonl").read_text().splitlines()]
    assert {"header", "rows", "commit", "result"} <= {line["type"] for line in lines}


def test_greedy_by_rows_is_the_search_by_layers(tmp_path):
    settings = {"compute_metrics": margin, "eval_dataset": token_dataset(8, seed=2)}
    first = toy_trainer(tmp_path / "a", **settings)
    second = toy_trainer(tmp_path / "b", **settings)
    second.unwrapped.load_state_dict(first.unwrapped.state_dict())
    by_layers = GreedyLayerSwapCallback("accuracy", None, max_layers=3).search(first)
    by_rows = second.search("accuracy", None, strategy="greedy", max_layers=3, cache_share=0.001, length=10**6)
    assert by_rows.most_linear == by_layers.most_linear
    for one, other in zip(by_rows.commits, by_layers.commits, strict=True):
        assert one.metrics["eval_accuracy"] == pytest.approx(other.metrics["eval_accuracy"], abs=1e-9)


def test_a_budget_of_cache(tmp_path):
    trainer = toy_trainer(tmp_path)
    costs, total = unit_costs(trainer.distill_sites, "head", 4096)
    report = trainer.search("eval_loss", None, granularity="head", cache_share=0.5, proposals="none")
    saved = sum(costs[unit] for unit in report.most_linear)
    assert saved >= 0.5 * total > saved - costs[report.most_linear[-1]]
    with pytest.raises(HybridConfigError, match="units together save"):
        trainer.search("eval_loss", None, granularity="head", cache_share=1e-6, length=16)


def test_an_interrupted_race_goes_on(tmp_path):
    trainer = toy_trainer(tmp_path, compute_metrics=margin)
    first = trainer.search("accuracy", None, max_layers=3).to_dict()
    path = tmp_path / "swap_trace.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[: len(lines) // 2]) + "\n" + lines[-1][:9])
    trainer.swap_layers([])
    again = trainer.search("accuracy", None, max_layers=3).to_dict()
    first.pop("layer_forwards"), again.pop("layer_forwards")
    assert again == first


def test_rows_of_another_metric_are_not_read_as_this_one(tmp_path):
    def both(prediction):
        return {**margin(prediction), "f1": 1.0 - margin(prediction)["accuracy"]}

    trainer = toy_trainer(tmp_path, compute_metrics=both)
    first = trainer.search("accuracy", None, max_layers=2)
    trainer.swap_layers([])
    other = trainer.search("f1", None, max_layers=2)
    assert other.base == pytest.approx(1 - first.base) and other.layer_forwards > 0
    trainer.swap_layers([])
    assert trainer.search("accuracy", None, max_layers=2).commits == first.commits


def test_a_race_and_a_promise(tmp_path):
    trainer = toy_trainer(tmp_path, compute_metrics=margin)
    other = token_dataset(60, seed=9)
    report = trainer.search("accuracy", 0.5, granularity="head", confirmation_dataset=other, confidence=0.9)
    assert report.promise.exact and report.promise.rows == 60
    assert len(report.confirmed) == len(report.most_linear) == 6  # half of the metric's range: all heads
    assert "with 6 linear" in report.promise.sentence()


def test_what_means_nothing_is_refused(tmp_path):
    with pytest.raises(HybridConfigError, match="strategy must be one of"):
        GreedyLayerSwapCallback("accuracy", strategy="best")
    with pytest.raises(HybridConfigError, match="granularity must be"):
        GreedyLayerSwapCallback("accuracy", granularity="token")
    with pytest.raises(HybridConfigError, match="proposals must be one of"):
        GreedyLayerSwapCallback("accuracy", proposals="guess")
    with pytest.raises(HybridConfigError, match="cache_share must be"):
        GreedyLayerSwapCallback("accuracy", cache_share=15)
    with pytest.raises(HybridConfigError, match="needs something else that ends the search"):
        GreedyLayerSwapCallback("accuracy", None)
    with pytest.raises(HybridConfigError, match="got neither"):
        GreedyLayerSwapCallback("accuracy", None, max_layers=1, confirmation_dataset=token_dataset(2))
    trainer = toy_trainer(tmp_path, compute_metrics=margin)
    with pytest.raises(HybridConfigError, match="'model.layers.0.self_attn' is missing"):
        trainer.search("accuracy", proposals={"a": 1.0})
    with pytest.raises(HybridConfigError, match="needs a distillation in this trainer"):
        trainer.search("accuracy", proposals="local_loss")
    trainer.eval_dataset = {"a": Dataset.from_dict({"input_ids": [[1, 2]]})}
    with pytest.raises(DatasetError, match="looks at single rows"):
        trainer.search("eval_a_loss")


# ------------------------------------------------------------------------------------------- what a review found


def test_a_metric_that_is_not_there_is_not_the_loss(tmp_path):
    with pytest.raises(MetricError, match="'eval_accuracy' is not among"):
        toy_trainer(tmp_path).search("accuracy", None, max_layers=1)


def test_rows_without_labels_have_no_loss(tmp_path):
    model, data = classifier()

    def unlabelled(examples):
        return {name: value for name, value in padded(examples).items() if name != "labels"}

    arguments = {"eval_dataset": data, "data_collator": unlabelled, "mixer": "linear_attention", "train_dataset": data}
    trainer = toy_trainer(tmp_path, model=model, **arguments)
    with pytest.raises(MetricError, match="eval_loss"):
        trainer.search("eval_loss", None, max_layers=1)


def test_a_row_whose_labels_say_nothing_has_no_say_in_ties(tmp_path):
    rows = token_dataset(5, seed=2)["input_ids"]
    data = Dataset.from_dict({"input_ids": rows, "labels": [[-100] * len(rows[0]), *rows[1:]]})
    trainer = toy_trainer(tmp_path, compute_metrics=first_logits, eval_dataset=data)
    assert len(trainer.search("accuracy", None, max_layers=2).most_linear) == 2
    with pytest.raises(MetricError, match="a row has none"):
        trainer.search("eval_loss", None, max_layers=2)


def first_logits(prediction):
    return {"accuracy": float(1 / (1 + np.exp(-prediction.predictions[:, 0, :5].mean())))}


def test_a_score_of_the_corpus_is_not_decided_by_rows(tmp_path):
    def harmonic(prediction):
        return {"f1": 2 / (1 / (margin(prediction)["accuracy"] + 0.1) + 2.0)}

    with pytest.raises(MetricError, match="must be a mean over rows"):
        toy_trainer(tmp_path, compute_metrics=harmonic).search("f1", None, max_layers=1)


def test_a_promise_is_about_other_rows(tmp_path):
    trainer = toy_trainer(tmp_path, compute_metrics=margin)
    both = trainer.eval_dataset.select([3, 4])
    with pytest.raises(HybridConfigError, match="2 rows of confirmation_dataset are in eval_dataset"):
        trainer.search("accuracy", 0.5, confirmation_dataset=both, confidence=0.9)


def test_small_losses_are_no_bound(tmp_path):
    """A loss below 1 on every row of the teacher may be anything on the hybrid's."""

    def thousandth(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()) / 1000

    trainer = toy_trainer(tmp_path, compute_loss_func=thousandth)
    report = trainer.search("eval_loss", 0.01, confirmation_dataset=token_dataset(9, seed=9), confidence=0.8)
    assert not report.promise.exact and "eval_loss rises by at most 0.01" in report.promise.sentence()


def test_the_latest_search_of_a_trace_is_its_path(tmp_path):
    trainer, trace = toy_trainer(tmp_path, compute_metrics=margin), tmp_path / "swap_trace.jsonl"
    paths = {}
    for granularity, count in (("layer", 3), ("head", 2), ("layer", 3)):
        report = trainer.search("accuracy", None, granularity=granularity, max_layers=count)
        paths[granularity] = steps_of(trace)
        assert paths[granularity][max(paths[granularity])] == report.most_linear and len(report.most_linear) == count
    assert set(paths["head"]) == {1, 2} and set(paths["layer"]) == {1, 2, 3}
    # another order under otherwise equal settings, and the paper's search after races
    for order in (["model.layers.2.self_attn", "model.layers.0.self_attn"], ["model.layers.1.self_attn"]):
        trainer.search("accuracy", None, strategy="fixed", order=order)
        assert steps_of(trace)[max(steps_of(trace))] == order
    report = GreedyLayerSwapCallback("accuracy", None, max_layers=2).search(trainer)
    assert steps_of(trace) == {1: report.most_linear[:1], 2: report.most_linear}


def test_induction_after_a_training(tmp_path):
    callback = GreedyLayerSwapCallback(
        "accuracy", None, strategy="race", granularity="head", proposals="induction", max_layers=2
    )
    trainer = toy_trainer(tmp_path, compute_metrics=margin, callbacks=[callback])
    trainer.train()
    assert len(trainer.swap_report.most_linear) == 2


def test_what_stops_a_race_is_found_before_the_training(tmp_path):
    callback = GreedyLayerSwapCallback("accuracy", None, strategy="fixed", order=["model.layers.9.self_attn"])
    trainer = toy_trainer(tmp_path, compute_metrics=margin, callbacks=[callback])
    with pytest.raises(HybridConfigError, match="each unit at most once; got 'model.layers.9.self_attn'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_search_that_fails_leaves_the_switch_as_it_was(tmp_path):
    trainer = toy_trainer(tmp_path, compute_metrics=margin)
    trainer.swap_layers([1])

    def failing(prediction):
        raise RuntimeError("no metric today")

    trainer.compute_metrics = failing
    with pytest.raises(RuntimeError, match="no metric today"):
        trainer.search("accuracy", None, max_layers=1)
    assert trainer.swapped_layers() == ["model.layers.1.self_attn"]
