"""Budgets shared out among heads, and the heads that look things up."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hybrid import (
    LinearAttentionConfig,
    SlidingWindowConfig,
    convert_to_hybrid,
    find_attention_sites,
    induction_scores,
    plan_heads,
)
from hf_hybrid.conversion.cache.placing import cache_bytes
from hf_hybrid.conversion.layer import hybrid_layers
from hf_hybrid.demo.assets import prose, teacher_folder
from hf_hybrid.errors import DatasetError, HybridConfigError, UnsupportedModelError
from hf_hybrid.surgery import linear_heads

from tiny_models import tiny_model


MIXER = SlidingWindowConfig(window_size=8, num_sink_tokens=2, memory_block_size=4)
SITES = [f"model.layers.{i}.self_attn" for i in range(3)]


def scores(*values):
    return {name: list(pair) for name, pair in zip(SITES, values, strict=True)}


RANKED = scores((0.9, 0.1), (0.2, 0.8), (0.3, 0.0))


def test_the_first_heads_are_kept_the_next_remember_much_all_others_little():
    plan = plan_heads(
        tiny_model(), scores=RANKED, share=0.32, length=200, mixer=MIXER, num_kept_heads=1, num_memory_tokens=3,
        large_memory_tokens=30,
    )  # fmt: skip
    assert plan.heads == {SITES[0]: [1]}
    sizes = {name: mixer.num_memory_tokens for name, mixer in plan.mixers.items()}
    assert sizes == {SITES[0]: (0, 3), SITES[1]: 30, SITES[2]: (30, 3)}
    assert plan.share <= 0.32
    hybrid = plan.convert(tiny_model())
    assert linear_heads(hybrid) == {SITES[0]: (1,), SITES[1]: (0, 1), SITES[2]: (0, 1)}


@pytest.mark.parametrize("share", [0.2, 0.35, 0.6])
@pytest.mark.parametrize("kept", [0, 1])
def test_the_share_is_what_the_cache_holds(share, kept):
    model = tiny_model().to(torch.bfloat16)
    ids = torch.randint(3, 99, (1, 200))
    full = cache_bytes(model(input_ids=ids).past_key_values)
    settings = {
        "length": 200,
        "mixer": MIXER,
        "num_kept_heads": kept,
        "num_memory_tokens": 1,
        "large_memory_tokens": 40,
    }
    if kept and share < 0.3:
        with pytest.raises(HybridConfigError, match="Keep fewer heads"):
            plan_heads(model, scores=RANKED, share=share, **settings)
        return
    plan = plan_heads(model, scores=RANKED, share=share, **settings)
    hybrid = plan.convert(model)
    held = cache_bytes(hybrid(input_ids=ids).past_key_values)
    # beside keys and values, a window's state knows which of its places are filled: plans know memories only
    assert held / full == pytest.approx(plan.share, rel=0.01)
    assert plan.share <= share


def test_layers_that_look_back_a_few_tokens_cost_what_they_cost():
    model = tiny_model("gemma3").to(torch.bfloat16)
    ids = torch.randint(3, 99, (1, 200))
    full = cache_bytes(model(input_ids=ids).past_key_values)
    sites = {site.name: [0.1, 0.2] for site in find_attention_sites(model)}
    mixer = SlidingWindowConfig(window_size=4, num_sink_tokens=1, memory_block_size=4)
    plan = plan_heads(
        model, scores=sites, share=0.6, length=200, mixer=mixer, num_memory_tokens=2, large_memory_tokens=60
    )
    assert list(plan.mixers) == ["model.layers.1.self_attn"]  # the others' windows of 8 are smaller than a state
    held = cache_bytes(plan.convert(model)(input_ids=ids).past_key_values)
    assert held / full == pytest.approx(plan.share, rel=0.02) and plan.share <= 0.6


def test_kept_heads_may_be_a_share():
    settings = {"scores": RANKED, "share": 0.9, "length": 200, "mixer": MIXER, "num_memory_tokens": 3}
    few, none = (plan_heads(tiny_model(), num_kept_heads=k, **settings).heads for k in (0.2, 0.1))
    assert few == {SITES[0]: [1]} and none == {}  # a fifth of six heads is one


def test_a_plan_is_saved_and_loaded(tmp_path):
    plan = plan_heads(tiny_model(), scores=RANKED, share=0.5, length=200, mixer=MIXER, num_memory_tokens=3)
    hybrid = plan.convert(tiny_model())
    ids = torch.randint(3, 99, (2, 90))
    hybrid.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids).logits, hybrid(input_ids=ids).logits)
    assert {n: x.hybrid_config for n, x in hybrid_layers(again).items()} == plan.mixers


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"share": 0.0}, r"share must be in \(0, 1\]"),
        ({"share": 0.5, "mixer": "identity"}, "must have a window"),
        ({"share": 0.5, "mixer": LinearAttentionConfig(window_size=0)}, "must have a window"),
        ({"share": 0.5, "scores": None}, "either input_ids or scores"),
        ({"share": 0.5, "scores": {"model.layers.9.self_attn": [0.0, 0.0]}}, "model.layers.9.self_attn"),
        ({"share": 0.5, "scores": {SITES[0]: [0.0]}}, "must be 2, one for each key-value head; got 1"),
        ({"share": 0.5, "num_kept_heads": -1}, "num_kept_heads"),
        ({"share": 0.01}, "take .* of the cache at 200 tokens; got share=1.0%"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    given = {"scores": RANKED, "mixer": MIXER, "length": 200, "num_memory_tokens": 3, **arguments}
    with pytest.raises(HybridConfigError, match=message):
        plan_heads(tiny_model(), **given)


def test_one_mixer_for_each_layer():
    mixers = {SITES[0]: "gla", SITES[2]: {"name": "sliding_window", "window_size": 5}}
    hybrid = convert_to_hybrid(tiny_model(), mixers)
    assert {n: x.hybrid_config.name for n, x in hybrid_layers(hybrid).items()} == {
        SITES[0]: "gla",
        SITES[2]: "sliding_window",
    }
    with pytest.raises(HybridConfigError, match="'model.layers.1.self_attn' is missing"):
        convert_to_hybrid(tiny_model(), mixers, layers=[0, 1])
    with pytest.raises(HybridConfigError, match="'model.layers.2.self_attn' is not selected"):
        convert_to_hybrid(tiny_model(), mixers, layers=[0])
    with pytest.raises(HybridConfigError, match="at least one layer"):
        convert_to_hybrid(tiny_model(), {})


def test_sizes_are_one_or_one_for_each_head():
    with pytest.raises(HybridConfigError, match="one for each of the layer's 2 key-value heads; got 3 numbers"):
        convert_to_hybrid(tiny_model(), SlidingWindowConfig(num_memory_tokens=(1, 2, 3)))
    with pytest.raises(HybridConfigError, match="each of num_memory_tokens must be an integer >= 0; got -1"):
        SlidingWindowConfig(num_memory_tokens=(1, -1))
    with pytest.raises(HybridConfigError, match="memory_block_size must be an integer >= 1"):
        SlidingWindowConfig(memory_block_size=0)
    assert SlidingWindowConfig(num_memory_tokens=[1, 2]) == SlidingWindowConfig(num_memory_tokens=(1, 2))
    with pytest.raises(HybridConfigError, match="num_memory_tokens must be 0 where window_size is 0"):
        LinearAttentionConfig(window_size=0, num_memory_tokens=5)
    assert LinearAttentionConfig(num_memory_tokens=5).fitted(causal=False).num_memory_tokens == 0
    assert dataclasses.asdict(SlidingWindowConfig())["num_memory_tokens"] == 0


def test_scores_leave_the_model_as_it_was():
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kind = type(model)
    found = induction_scores(model, torch.randint(3, 99, (2, 40)))
    assert list(found) == SITES and all(len(pair) == 2 and 0 <= min(pair) <= max(pair) <= 1 for pair in found.values())
    assert type(model) is kind and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(DatasetError, match="T of 32 or more"):
        induction_scores(model, torch.ones(1, 5, dtype=torch.long))


def test_scores_are_the_attention_paid_to_what_came_next():
    model = tiny_model(num_hidden_layers=1)
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 99, (1, 40))
    weights = model(input_ids=torch.cat([ids, ids], 1), output_attentions=True).attentions[0][0]
    rows = torch.arange(48, 80)
    expected = weights[:, rows, rows - 39].mean(-1).view(2, 2).amax(-1)
    assert induction_scores(model, ids)["model.layers.0.self_attn"] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.slow
def test_on_a_pretrained_model_the_heads_found_are_those_that_copy():
    """Keeping the best ninth of the heads recalls more than keeping the worst ninth, and a plan more than a window."""
    from hf_hybrid.metrics import repeated_passages, row_losses

    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    ids = torch.tensor([tokenizer(text)["input_ids"][:256] for text in prose("train")[:2]])
    found = induction_scores(AutoModelForCausalLM.from_pretrained(teacher_folder()), ids)
    rows = repeated_passages(torch.tensor([tokenizer(t)["input_ids"][:256] for t in prose("test")[:2]]), 256)

    def recall(values):
        model = AutoModelForCausalLM.from_pretrained(teacher_folder())
        mixer = SlidingWindowConfig(window_size=32)
        plan = plan_heads(
            model, scores=values, share=0.4, length=1024, mixer=mixer, num_memory_tokens=16, large_memory_tokens=512
        )
        losses = row_losses(plan.convert(model), rows)
        return sum(losses) / len(losses)

    worst = {name: [-value for value in heads] for name, heads in found.items()}
    best, turned = recall(found), recall(worst)
    assert best < 0.6 * turned, (best, turned)


def test_models_without_causal_attention():
    import transformers

    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(UnsupportedModelError, match="no causal attention"):
        induction_scores(transformers.BertModel(config), torch.ones(1, 40, dtype=torch.long))
    assert find_attention_sites(transformers.BertModel(config))
