"""Layers with some heads linear: every way of running equals the naive composition (softmax for kept heads, the mixer for the others)."""

import copy

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, StaticCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from hf_hybrid import SlidingWindowConfig, convert_to_hybrid, find_attention_sites
from hf_hybrid.conversion.cache import HybridHeadsLayer, cache_bytes
from hf_hybrid.conversion.layer import hybrid_layers
from hf_hybrid.errors import AlreadyHybridError, CheckpointError, HybridConfigError, UnsupportedModelError
from hf_hybrid.surgery import linear_heads, set_linear_heads_

from helpers import SMALL_MIXER, assert_close
from mixer_settings import MAIN_MIXERS, MIXERS
from tiny_models import HOSTS, perturb_mixers, tiny_model


IDS = torch.randint(5, 99, (2, 19), generator=torch.Generator().manual_seed(3))


def head_sets(model) -> dict[str, list[int]]:
    count = find_attention_sites(model)[0].num_key_value_heads
    return {"one": [count - 1], "all_but_one": list(range(count))[1:], "all": list(range(count))}


def converted(family, which, mixer=SMALL_MIXER):
    model = tiny_model(family)
    heads = head_sets(model)[which]
    names = [site.name for site in find_attention_sites(model)]
    convert_to_hybrid(model, mixer, heads=dict.fromkeys(names, heads))
    return perturb_mixers(model), dict.fromkeys(names, heads)


class Naive:
    """The host with its softmax and a mixer over all heads, composed per head in the plainest way, without any cache."""

    def __init__(self, family, hybrid, heads):
        self.model, self.heads = tiny_model(family), heads
        self.mixers = {name: layer.hybrid for name, layer in hybrid_layers(hybrid).items()}
        self.names = {module: name for name, module in self.model.named_modules()}

    def __call__(self, ids, **kwargs):
        self.model.set_attn_implementation("naive_composition")
        Naive.active, self.inputs = self, {}
        handles = [
            module.register_forward_pre_hook(self.note, with_kwargs=True)
            for module, name in self.names.items()
            if name in self.heads
        ]
        try:
            with torch.no_grad():
                return self.model(ids, use_cache=False, **kwargs).logits
        finally:
            for handle in handles:
                handle.remove()

    def note(self, module, args, kwargs):
        self.inputs[module] = kwargs.get("hidden_states", args[0] if args else None)

    @staticmethod
    def attention(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
        naive = Naive.active
        mixer, heads = naive.mixers[naive.names[module]], naive.heads[naive.names[module]]
        groups = query.shape[1] // key.shape[1]
        wide_key, wide_value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ wide_key.transpose(-1, -2) * scaling + mask
        output = (scores.softmax(-1) @ wide_value).transpose(1, 2).contiguous()  # [B, T, H, V]
        valid = torch.stack([row.diagonal() for row in mask[:, 0]]) > torch.finfo(mask.dtype).min / 2
        queries = [head * groups + i for head in heads for i in range(groups)]
        scaled = query * (scaling * query.shape[-1] ** 0.5)
        starts = (mask[:, 0].diagonal(-1, 1, 2) <= torch.finfo(mask.dtype).min / 2) & valid[:, 1:] & valid[:, :-1]
        segments = torch.cat([starts.new_zeros(starts.shape[0], 1), starts], 1).cumsum(-1)
        sliding = getattr(module, "sliding_window", None) == 1
        mixed, _ = mixer(
            scaled[:, queries].transpose(1, 2),
            key[:, heads].transpose(1, 2),
            value[:, heads].transpose(1, 2),
            naive.inputs[module],
            valid=valid,
            segments=segments if bool(starts.any()) and not sliding else None,
        )
        output[:, :, queries] = mixed
        return output, None


AttentionInterface.register("naive_composition", Naive.attention)
AttentionMaskInterface.register("naive_composition", eager_mask)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp_min(0)


@pytest.mark.parametrize("which", ["one", "all_but_one", "all"])
@pytest.mark.parametrize("family", HOSTS)
@torch.no_grad()
def test_every_way_of_running_equals_the_naive_composition(family, which):
    model, heads = converted(family, which)
    naive = Naive(family, model, heads)
    expected = naive(IDS)
    assert_close("one pass", model(IDS, use_cache=False).logits, expected, 1e-5)

    output = model(IDS[:, :7], use_cache=True)
    cache, steps = output.past_key_values, [output.logits]
    kinds = {type(layer) for layer in cache.layers}
    assert (HybridHeadsLayer in kinds) == (which != "all" or len(heads[next(iter(heads))]) < 2) or which == "all"
    steps.append(model(IDS[:, 7:12], past_key_values=cache).logits)  # a chunk
    steps += [model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(12, 19)]
    assert_close("prefill, chunk, steps", torch.cat(steps, 1), expected, 1e-5)

    static = StaticCache(config=model.config, max_cache_len=32)
    steps = [model(IDS[:, :9], past_key_values=static).logits]
    steps += [model(IDS[:, t : t + 1], past_key_values=static).logits for t in range(9, 19)]
    assert_close("static cache", torch.cat(steps, 1), expected, 1e-5)

    # padding in front
    padded = torch.cat([torch.full((2, 4), 7), IDS], 1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(IDS)], 1)
    mask[1, 2:4] = 1
    actual = model(padded, attention_mask=mask, position_ids=positions(mask)).logits
    assert_close(
        "padding",
        actual[mask.bool()],
        naive(padded, attention_mask=mask, position_ids=positions(mask))[mask.bool()],
        1e-5,
    )
    if family != "opt":  # its own softmax does not know packed rows
        packed = torch.cat([torch.arange(8), torch.arange(11)])[None].expand(2, -1)
        assert_close(
            "packing", model(IDS, position_ids=packed, use_cache=False).logits, naive(IDS, position_ids=packed), 1e-5
        )


@pytest.mark.parametrize("which", ["one", "all_but_one"])
@pytest.mark.parametrize("family", HOSTS)
def test_generation_with_a_cache_equals_generation_without(family, which):
    model, _ = converted(family, which)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 3):
        with_cache = model.generate(IDS, num_beams=beams, **settings)
        without = model.generate(IDS, num_beams=beams, use_cache=False, **settings)
        assert torch.equal(with_cache, without), f"{beams} beams"
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, model.generate(IDS, **settings))
    assisted = model.generate(IDS[:1], prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(assisted, model.generate(IDS[:1], **settings))


@pytest.mark.parametrize("name", MAIN_MIXERS)
@torch.no_grad()
def test_every_mixer_serves_some_heads(name):
    model, heads = converted("llama", "one", MIXERS[name])
    expected = Naive("llama", model, heads)(IDS)
    output = model(IDS[:, :7], use_cache=True)
    steps = [output.logits]
    steps += [model(IDS[:, t : t + 1], past_key_values=output.past_key_values).logits for t in range(7, 19)]
    assert_close(name, torch.cat(steps, 1), expected, 1e-5)


def test_no_head_is_the_host_and_all_heads_are_the_hybrid_bit_by_bit():
    for family in HOSTS:
        host, model = tiny_model(family), tiny_model(family)
        whole = perturb_mixers(convert_to_hybrid(tiny_model(family), SMALL_MIXER))
        convert_to_hybrid(
            model, SMALL_MIXER, heads={s.name: list(s.key_value_heads) for s in find_attention_sites(model)}
        )
        perturb_mixers(model)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, whole(IDS).logits), family
            set_linear_heads_(model, {})
            assert torch.equal(model(IDS).logits, host(IDS).logits), family


def test_a_switched_layer_equals_one_that_was_converted_so():
    """A whole mixer that runs on some heads, as a bank does, and a mixer over these heads alone, as a checkpoint holds."""
    bank = perturb_mixers(convert_to_hybrid(tiny_model(), SMALL_MIXER))
    names = list(hybrid_layers(bank))
    set_linear_heads_(bank, {names[0]: [1], names[2]: [0]})
    assert linear_heads(bank) == {names[0]: (1,), names[2]: (0,)}
    small = convert_to_hybrid(tiny_model(), SMALL_MIXER, heads={names[0]: [1], names[2]: [0]})
    for name in (names[0], names[2]):
        layer = hybrid_layers(small)[name]
        layer.hybrid.load_state_dict(hybrid_layers(bank)[name].hybrid.restricted(layer.linear_heads).state_dict())
    with torch.no_grad():
        assert torch.equal(bank(IDS).logits, small(IDS).logits)
        cached = bank(IDS[:, :9], use_cache=True)
        step = bank(IDS[:, 9:], past_key_values=cached.past_key_values).logits
        assert_close("cache", step, small(IDS).logits[:, 9:], 1e-5)


def test_a_checkpoint_holds_linear_heads_only(tmp_path):
    bank = perturb_mixers(convert_to_hybrid(tiny_model(), SMALL_MIXER))
    names = list(hybrid_layers(bank))
    set_linear_heads_(bank, {names[0]: [1], names[1]: None})
    bank.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert linear_heads(loaded) == {names[0]: (1,), names[1]: (0, 1)}
    sites = loaded.config.hybrid["sites"]
    assert sites[names[0]]["heads"] == [1] and "heads" not in sites[names[1]] and list(sites) == names[:2]
    assert hybrid_layers(loaded)[names[0]].hybrid.log_weight.shape == (2,)  # two query heads read head 1
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, bank(IDS).logits)


@pytest.mark.parametrize("kept", [1])
def test_cache_bytes_of_a_layer_with_one_of_three_heads_kept(kept):
    model = tiny_model(
        "llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=48, max_position_embeddings=8192
    )
    mixer = SlidingWindowConfig(window_size=64, num_sink_tokens=4)
    convert_to_hybrid(model, mixer, heads={"model.layers.1.self_attn": [0, 2]})
    with torch.no_grad():
        cache = model(torch.randint(5, 99, (1, 4096)), use_cache=True, logits_to_keep=1).past_key_values
    layer = cache.layers[1]
    held = cache_bytes(type(cache)()) + layer.state_bytes() + sum(x.numel() * 4 for x in (layer.keys, layer.values))
    head_dim = 8
    keys_and_values = 2 * 4096 * head_dim * 4
    state = 2 * (64 + 4) * 2 * head_dim * 4
    assert layer.keys.shape[1] == 1
    assert held == pytest.approx(keys_and_values + state, rel=0.01)


def test_bad_heads_are_refused_and_nothing_changes():
    name = "model.layers.1.self_attn"
    for heads, message in {
        (name, (5,)): r"heads of model.layers.1.self_attn: key-value heads must be among 0..1; got 5",
        (name, (0, 0)): "key-value heads must be named once each; got 0 twice",
        (name, ()): "has no heads",
        ("model.layers.9.self_attn", (0,)): "is not an attention site",
    }.items():
        model = tiny_model()
        with pytest.raises(HybridConfigError, match=message):
            convert_to_hybrid(model, SMALL_MIXER, heads={heads[0]: list(heads[1])})
        assert type(model) is type(tiny_model()) and not hybrid_layers(model)
    with pytest.raises(HybridConfigError, match="is not among the selected layers"):
        convert_to_hybrid(tiny_model(), SMALL_MIXER, layers=[0], heads={name: [0]})
    with pytest.raises(HybridConfigError, match="heads must be a dict of key-value heads by layer"):
        convert_to_hybrid(tiny_model(), SMALL_MIXER, heads=[0])
    with pytest.raises(HybridConfigError, match="must be a list of key-value heads; got 'all'"):
        convert_to_hybrid(tiny_model(), SMALL_MIXER, heads={name: "all"})
    with pytest.raises(HybridConfigError, match="is named twice"):
        convert_to_hybrid(tiny_model(), SMALL_MIXER, heads={name: [0], 1: [1]})
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER, heads={name: [1]})
    with pytest.raises(AlreadyHybridError, match="is converted already"):
        convert_to_hybrid(model, SMALL_MIXER, heads={name: [0]})
    with pytest.raises(HybridConfigError, match=r"must be among \[1\]; got 0"):
        set_linear_heads_(model, {name: [0]})
    with pytest.raises(HybridConfigError, match="'model.layers.0.self_attn' has no mixer"):
        set_linear_heads_(model, {"model.layers.0.self_attn": None})
    assert linear_heads(model) == {name: (1,)}


def test_a_config_that_names_heads_wrongly_is_refused(tmp_path):
    import json

    model = convert_to_hybrid(tiny_model(), SMALL_MIXER, heads={"model.layers.1.self_attn": [1]})
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    for heads in ([1, 1], [2], [], "1", [True]):
        config = json.loads(text)
        config["hybrid"]["sites"]["model.layers.1.self_attn"]["heads"] = heads
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="heads` must be a list of key-value heads 0..1, each once"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_a_cache_of_another_switch_is_refused():
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER)
    names = list(hybrid_layers(model))
    cache = model(IDS, use_cache=True).past_key_values
    set_linear_heads_(model, {names[0]: [0]})
    with pytest.raises(UnsupportedModelError, match="filled while other heads of layer 0 were linear"):
        model(IDS[:, :1], past_key_values=copy.deepcopy(cache))
    set_linear_heads_(model, {})
    with pytest.raises(UnsupportedModelError, match="filled while layer 0 was linear, which it is not any more"):
        model(IDS[:, :1], past_key_values=cache)


def test_compiled_decoding_is_one_graph():
    model, heads = converted("llama", "one")
    expected = Naive("llama", model, heads)(IDS)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(IDS[:, :9], past_key_values=cache)
        step = torch.compile(model, backend=backend, fullgraph=True)
        logits = [step(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(9, 19)]
    assert_close("compiled", torch.cat(logits, 1), expected[:, 9:], 1e-5)
    assert len(graphs) == 1


def test_gradients_reach_kept_and_linear_heads():
    model, _ = converted("llama", "one")
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_layers_with_different_heads_compile_also_with_a_graph_break():
    model = perturb_mixers(convert_to_hybrid(tiny_model(), SMALL_MIXER))
    names = list(hybrid_layers(model))
    set_linear_heads_(model, {names[1]: [0], names[2]: [1]})
    positions = torch.cat([torch.arange(8), torch.arange(11)])[None].expand(2, -1)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        for kwargs in ({}, {"position_ids": positions}):
            assert_close(
                "compiled",
                compiled(IDS, use_cache=False, **kwargs).logits,
                model(IDS, use_cache=False, **kwargs).logits,
                1e-5,
            )


@torch.no_grad()
def test_a_static_cache_that_was_allocated_early():
    model, heads = converted("llama", "one")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(IDS, **settings)
    chunked = model.generate(IDS, prefill_chunk_size=4, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(chunked, expected)


def test_heads_of_the_switch_that_are_no_lists():
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER)
    with pytest.raises(HybridConfigError, match="must be a list of key-value heads, or None for all; got 0"):
        set_linear_heads_(model, {"model.layers.1.self_attn": 0})
    with pytest.raises(HybridConfigError, match="heads must be a dict of heads by layer"):
        set_linear_heads_(model, ["model.layers.1.self_attn"])
