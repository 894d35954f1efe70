"""Contracts of conversion, over the table of toy hosts x mixers. Nothing here knows a family."""

import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hf_hybrid import SlidingWindowConfig, convert_to_hybrid, find_attention_sites, restore_full_attention
from hf_hybrid.conversion.cache import HybridLinearLayer, cache_bytes
from hf_hybrid.errors import (
    AlreadyHybridError,
    CheckpointError,
    HybridConfigError,
    NoMatchingAttentionError,
    UnknownMixerError,
    UnsupportedModelError,
)

from helpers import SMALL_MIXER, assert_close, set_swapped
from mixer_settings import MAIN_MIXERS, MIXERS
from tiny_models import HOSTS, perturb_mixers, tiny_model


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
hosts = pytest.mark.parametrize("family", HOSTS)
mixers = pytest.mark.parametrize("mixer", MAIN_MIXERS)


def hybrid(family, mixer="linear_attention", layers=None):
    model = convert_to_hybrid(tiny_model(family), MIXERS[mixer], layers)
    return perturb_mixers(model)


def tokens(batch=2, length=21, seed=0):
    return torch.randint(5, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


@hosts
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_softmax_inside_the_interception_is_bit_equal(family, implementation):
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    ids, mask = tokens(), torch.ones(2, 21, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        plain, padded = model(ids).logits, model(ids, attention_mask=mask).logits
        convert_to_hybrid(model, SMALL_MIXER)
        assert not torch.equal(model(ids).logits, plain)
        set_swapped(model, False)
        assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids, attention_mask=mask).logits, padded)
        assert torch.equal(model.generate(ids, **GREEDY), restore_full_attention(model).generate(ids, **GREEDY))


@hosts
@mixers
def test_convert_then_restore_is_bit_equal(family, mixer):
    model = tiny_model(family)
    with torch.no_grad():
        plain = model(tokens()).logits
        keys, cls, config_class = list(model.state_dict()), type(model), type(model.config)
        convert_to_hybrid(model, MIXERS[mixer])
        assert isinstance(model, cls) and type(model) is not cls
        restore_full_attention(model)
        assert torch.equal(model(tokens()).logits, plain)
    assert list(model.state_dict()) == keys
    assert type(model) is cls and type(model.config) is config_class
    assert "hybrid" not in model.config.to_dict()


@hosts
@mixers
@pytest.mark.parametrize("layers", [[0], [1, 2], None])
def test_cache_in_pieces_equals_one_pass(family, mixer, layers):
    model, ids = hybrid(family, mixer, layers), tokens()
    with torch.no_grad():
        whole = model(ids).logits
        cache, pieces = DynamicCache(), []
        for start, stop in ((0, 7), (7, 11), (11, 12), (12, 13), (13, 21)):
            output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache, pieces = output.past_key_values, [*pieces, output.logits]
    # random fp32 hosts with weights scaled by 4 amplify rounding: 1e-4 of the largest logit
    assert_close("logits", torch.cat(pieces, dim=1), whole, 1e-4)


@hosts
@mixers
def test_later_tokens_change_nothing(family, mixer):
    model, ids = hybrid(family, mixer), tokens()
    changed = ids.clone()
    changed[:, 15:] = 7
    with torch.no_grad():
        assert torch.equal(model(changed).logits[:, :15], model(ids).logits[:, :15])
        assert_close("shorter", model(ids[:, :15]).logits, model(ids).logits[:, :15], 1e-4)


@hosts
@mixers
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_forward_and_gradient(family, mixer, batch, side):
    model, ids = hybrid(family, mixer), tokens(batch)
    junk = torch.full((batch, 6), 9)
    padded = torch.cat([junk, ids] if side == "left" else [ids, junk], dim=1)
    mask = torch.cat([junk * 0, ids * 0 + 1] if side == "left" else [ids * 0 + 1, junk * 0], dim=1)
    kwargs = {"attention_mask": mask}
    if family != "opt":  # takes its positions from the mask
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)

    def run(**inputs):
        model.zero_grad()
        logits = model(**inputs).logits
        logits = logits[mask.bool()].view(batch, 21, -1) if "attention_mask" in inputs else logits
        logits.log_softmax(-1)[..., 5].sum().backward()
        return logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain, expected = run(input_ids=ids)
    logits, gradients = run(input_ids=padded, **kwargs)
    assert_close("logits", logits, plain, 1e-4)
    for name, gradient in expected.items():
        assert_close(name, gradients[name], gradient, 2e-3)


@hosts
@mixers
@pytest.mark.parametrize("layers", [[0], None])
def test_cached_generation_equals_uncached(family, mixer, layers):
    model, ids = hybrid(family, mixer, layers), tokens(2, 9)
    for beams in (1, 3):
        uncached = model.generate(ids, num_beams=beams, use_cache=False, **GREEDY)
        assert torch.equal(model.generate(ids, num_beams=beams, **GREEDY), uncached)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(static, model.generate(ids, use_cache=False, **GREEDY))


@hosts
def test_left_padded_generation_equals_one_by_one(family):
    model, ids = hybrid(family), tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    batch = torch.cat([padded, tokens(1, 13, seed=5)])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    together = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(together[0, 13:], model.generate(ids, **GREEDY)[0, 9:])
    static = model.generate(batch, attention_mask=mask, cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(static, together)


@hosts
@mixers
def test_padding_fed_one_token_at_a_time_is_still_padding(family, mixer):
    model, ids = hybrid(family, mixer), tokens(1, 9)
    padded = torch.cat([torch.full((1, 3), 9), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, pieces = DynamicCache(), []
    with torch.no_grad():
        for t in range(12):
            kwargs = {} if family == "opt" else {"position_ids": positions[:, t : t + 1]}
            step = model(
                padded[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache, use_cache=True, **kwargs
            )
            pieces.append(step.logits)
        assert_close("logits", torch.cat(pieces, dim=1)[:, 3:], model(ids).logits, 1e-4)
    whole = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(padded, attention_mask=mask, prefill_chunk_size=1, **GREEDY), whole)


def test_two_models_from_one_config_stay_two():
    first, second = tiny_model(), None
    second = type(first)(first.config)
    convert_to_hybrid(first, SMALL_MIXER)
    assert type(second.config).__name__ == "LlamaConfig" and "hybrid" not in second.config.to_dict()


def test_saving_again_leaves_no_weights_of_before(tmp_path):
    model = hybrid("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "notes.txt").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.abs().sum() == 0
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*")) and not (tmp_path / "model.safetensors.index.json").exists()
    card = tmp_path / "README.md"
    assert "3 of its 3 attention layers" in card.read_text()
    card.write_text("my own words")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "my own words"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("layers", [[0], None])
def test_assisted_decoding_and_continuation_are_exact(family, layers):
    model, ids = hybrid(family, layers=layers), tokens(1, 6).repeat(1, 3)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)
    assert torch.equal(model.generate(ids, assistant_model=tiny_model(family, seed=3), **GREEDY), expected)
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **GREEDY), expected)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, tokens(1, 3, seed=8)], dim=1)
    assert torch.equal(
        model.generate(longer, past_key_values=first.past_key_values, **GREEDY), model.generate(longer, **GREEDY)
    )


@mixers
def test_cache_bytes_of_a_linear_layer_do_not_grow(mixer):
    model = hybrid("llama", mixer, [0, 2])
    sizes = []
    with torch.no_grad():
        for length in (8, 80):
            cache = model(tokens(1, length), use_cache=True).past_key_values
            linear = [layer for layer in cache.layers if isinstance(layer, HybridLinearLayer)]
            assert len(linear) == 2 and len(cache.layers) == 3
            sizes.append([layer.state_bytes() for layer in linear])
            softmax_bytes = 2 * 1 * 2 * length * 8 * 4  # keys and values, 2 kv heads of 8, fp32
            assert cache_bytes(cache) == sum(sizes[-1]) + softmax_bytes
    assert sizes[0] == sizes[1]


def test_a_cache_can_be_reset_and_used_again():
    model, ids, cache = hybrid("llama"), tokens(), DynamicCache()
    with torch.no_grad():
        first = model(ids, past_key_values=cache, use_cache=True).logits
        cache.reset()
        assert cache.get_seq_length() == 0
    for layer in cache.layers:
        assert layer.read_state() is None
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache, use_cache=True).logits, first)


def test_packed_rows_equal_separate_rows():
    for family in ("llama", "qwen3", "gpt_neox"):
        model, ids = hybrid(family), tokens(2, 10)
        with torch.no_grad():
            positions = torch.cat([torch.arange(10)] * 2)[None]
            packed = model(ids.reshape(1, 20), position_ids=positions, use_cache=False).logits
            assert_close(family, packed.view(2, 10, -1), model(ids).logits, 1e-4)


@hosts
@mixers
def test_saved_checkpoint_loads_in_a_fresh_process(family, mixer, tmp_path):
    model, ids = hybrid(family, mixer, [0, 2]), tokens()
    model.save_pretrained(tmp_path / "hybrid")
    with torch.no_grad():
        torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    if (family, mixer) not in FRESH_PROCESS:
        return
    code = f"""
        import torch, hf_hybrid
        torch.set_num_threads(1)  # as the process that wrote the expected logits: another split of sums is another rounding
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        folder = {str(tmp_path / "hybrid")!r}
        config = AutoConfig.from_pretrained(folder)
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
        with torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, expected)
            base = AutoModel.from_pretrained(folder).eval()
            hidden = base(ids).last_hidden_state
            inner = getattr(model, model.base_model_prefix)
            assert torch.equal(hidden, inner(ids).last_hidden_state)
        assert type(base.config) is type(config) and len(config.hybrid["sites"]) == 2
        print(type(model).__name__, config.model_type)
    """
    assert run_python(code).split() == [type(model).__name__, model.config.model_type]


# a process costs eight seconds: every family once, every mixer at least once
FRESH_PROCESS = {(family, MAIN_MIXERS[i % 3]) for i, family in enumerate(HOSTS)}


def test_the_shim_loads_where_nobody_imported_us(tmp_path):
    model, ids = hybrid("llama"), tokens()
    model.save_pretrained(tmp_path / "hybrid")
    with torch.no_grad():
        torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    code = f"""
        import sys, torch
        torch.set_num_threads(1)
        from transformers import AutoModelForCausalLM
        assert "hf_hybrid" not in sys.modules
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "hybrid")!r}, trust_remote_code=True).eval()
        ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
        model.save_pretrained({str(tmp_path / "again")!r})
        print(type(model).__module__)
    """
    assert run_python(code, HF_MODULES_CACHE=str(tmp_path / "modules")).strip() == "hf_hybrid.modeling_hybrid"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def run_python(code: str, **environment) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_more_layers_can_be_converted_later():
    model = convert_to_hybrid(tiny_model(), SlidingWindowConfig(window_size=3), [0])
    convert_to_hybrid(model, SMALL_MIXER, ["model.layers.2.self_attn"])
    sites = model.config.hybrid_sites()
    assert [settings["name"] for _, settings in sites.values()] == ["sliding_window", "linear_attention"]
    with pytest.raises(AlreadyHybridError, match="model.layers.0.self_attn .* is converted already"):
        convert_to_hybrid(model, SMALL_MIXER)
    assert len(model.config.hybrid_sites()) == 2


def test_sites_are_measured():
    sites = find_attention_sites(tiny_model("qwen3"))
    assert [site.name for site in sites] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert sites[0].sizes() == {
        "num_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "value_dim": 16, "hidden_size": 32, "causal": True,
    }  # fmt: skip
    model = tiny_model()
    model.train()
    find_attention_sites(model)
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([3], HybridConfigError, r"index must be in 0..2 for the 3 attention sites of LlamaForCausalLM .*; got 3"),
        (["model.layers.1.self_atn"], HybridConfigError, r"Did you mean 'model.layers.1.self_attn'"),
        ([], NoMatchingAttentionError, r"layers=\[\] matched none of the 3 attention sites"),
        (lambda site: False, NoMatchingAttentionError, "matched none of the 3 attention sites"),
    ],
)
def test_a_wrong_selection_changes_nothing(layers, error, message):
    model = tiny_model()
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        convert_to_hybrid(model, SMALL_MIXER, layers)
    assert list(model.state_dict()) == keys and type(model).__name__ == "LlamaForCausalLM"


def test_unknown_mixers_and_foreign_models_are_refused():
    with pytest.raises(UnknownMixerError, match="got 'sliding'. Did you mean 'sliding_window'"):
        convert_to_hybrid(tiny_model(), "sliding")
    with pytest.raises(UnsupportedModelError, match="must be a transformers PreTrainedModel; got Linear"):
        convert_to_hybrid(torch.nn.Linear(2, 2))
    with pytest.raises(AlreadyHybridError, match="is not hybrid: there is nothing to restore"):
        restore_full_attention(tiny_model())


def test_a_family_without_the_attention_interface_is_refused():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], vocab_size=99)
    message = r"GPTNeoForCausalLM \(model_type='gpt_neo'\) has no attention layer .* GPTNeoSelfAttention computes attention inline"
    with pytest.raises(UnsupportedModelError, match=message):
        find_attention_sites(GPTNeoForCausalLM(config))


def test_a_bidirectional_family_is_refused_before_anything_changes():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    model = BertForMaskedLM(config)
    with pytest.raises(HybridConfigError, match="gated_delta_net has no bidirectional form"):
        convert_to_hybrid(model, "gated_delta_net")
    assert type(model) is BertForMaskedLM


def test_an_encoder_becomes_linear_and_comes_back(tmp_path):
    from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    model = convert_to_hybrid(BertForMaskedLM(config).eval())
    tokens = torch.randint(5, 99, (2, 12))
    mask = torch.ones_like(tokens)
    mask[0, 8:] = 0
    with torch.no_grad():
        output = model(tokens, attention_mask=mask).logits
        alone = model(tokens[:1, :8]).logits
    assert_close("padding", output[:1, :8], alone, 1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens, attention_mask=mask).logits, output)


def test_what_a_linear_layer_loses_is_said_once():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(Gemma2Config(**{**HOSTS["llama"][2], "head_dim": 8}))
    with pytest.warns(UserWarning, match="3 of the 3 converted layers lose the soft-cap on attention scores"):
        convert_to_hybrid(model, SMALL_MIXER)


def test_continuous_batching_is_refused():
    with pytest.raises(UnsupportedModelError, match="continuous batching cannot run this model"):
        hybrid("llama").generate_batch(inputs=[[5, 6, 7]])


def test_a_cache_with_softmax_keys_is_refused():
    model, ids = tiny_model(), tokens()
    cache = model(ids, use_cache=True).past_key_values
    convert_to_hybrid(model, SMALL_MIXER)
    with pytest.raises(UnsupportedModelError, match="The cache holds softmax keys and values for layer 0"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


def edit(folder, change):
    import json

    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c["hybrid"].update(schema_version=3), CheckpointError, "schema_version` must be 2 or less; got 3"),
        (lambda c: c.pop("hybrid"), CheckpointError, "has no `base_model_type` and `hybrid` entries"),
        (lambda c: c.update(hybrid={}), CheckpointError, "`hybrid` must be an object with a schema_version"),
        (lambda c: c.update(base_model_type="llamma"), CheckpointError, "base_model_type 'llamma' is unknown"),
        (
            lambda c: c["hybrid"]["sites"].update({"model.layers.9.self_attn": c["hybrid"]["sites"]["model.layers.0.self_attn"]}),
            CheckpointError,
            "names the attention site 'model.layers.9.self_attn'",
        ),
        (
            lambda c: c["hybrid"]["sites"]["model.layers.0.self_attn"]["mixer"].update(name="linear_attn"),
            UnknownMixerError,
            "attention site 'model.layers.0.self_attn': .* got 'linear_attn'",
        ),
        (
            lambda c: c["hybrid"]["sites"]["model.layers.0.self_attn"]["mixer"].update(window=3),
            HybridConfigError,
            "attention site 'model.layers.0.self_attn': .* has no setting 'window'",
        ),
        (lambda c: c["hybrid"]["sites"]["model.layers.0.self_attn"].pop("head_dim"), CheckpointError, r"missing or unknown entries: \['head_dim'\]"),
        (lambda c: c["hybrid"]["sites"].pop("model.layers.2.self_attn"), CheckpointError, "weights are unexpected"),
        (lambda c: c["hybrid"].update(projections="some"), CheckpointError, "must have `sites` and `projections` .*; got 'some'"),
        (
            lambda c: c["hybrid"]["sites"]["model.layers.0.self_attn"].update(num_heads="4"),
            CheckpointError,
            "num_heads` has a value that cannot be; got '4'",
        ),
    ],
)  # fmt: skip
def test_an_edited_config_is_refused(tmp_path, change, error, message):
    hybrid("llama").save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_edited_sizes_are_found_out_by_the_layer(tmp_path):
    hybrid("llama", "sliding_window").save_pretrained(tmp_path)
    edit(tmp_path, lambda c: c["hybrid"]["sites"]["model.layers.0.self_attn"].update(head_dim=64))
    with pytest.raises(
        CheckpointError,
        match="the config says 4 query heads, 2 key-value heads of size 64; the layer has 4, 2 of size 8",
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)(tokens())


def test_missing_and_truncated_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    hybrid("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for gone in ("model.layers.1.self_attn.hybrid.log_weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        save_file({k: v for k, v in tensors.items() if k != gone}, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"1 weights are missing, the first '{gone}'"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(tensors, path, metadata={"format": "pt"})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="The file is truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_base_checkpoint_loads_into_a_hybrid_config(tmp_path):
    model = hybrid("llama", layers=[1])
    tiny_model().save_pretrained(tmp_path / "base")
    loaded, info = type(model).from_pretrained(tmp_path / "base", config=model.config, output_loading_info=True)
    assert info["missing_keys"] and all(".hybrid." in key for key in info["missing_keys"])
    fresh = convert_to_hybrid(tiny_model(), SMALL_MIXER, [1])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens()).logits, fresh(tokens()).logits)


def test_other_heads_deepcopy_pickle_and_bf16(tmp_path):
    import copy
    import pickle

    from transformers import AutoModelForSequenceClassification

    model, ids = hybrid("llama"), tokens()
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(classifier).__name__ == "HybridLlamaForSequenceClassification"
    classifier.save_pretrained(tmp_path / "classifier")
    wider = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "classifier", num_labels=5, ignore_mismatched_sizes=True
    )
    assert wider.score.out_features == 5
    assert torch.equal(
        classifier.model.layers[0].self_attn.hybrid.log_weight, model.model.layers[0].self_attn.hybrid.log_weight
    )
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, expected)
        low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        assert low(ids).logits.dtype == torch.bfloat16 and low(ids).logits.isfinite().all()


def test_compiled_decoding_has_one_graph():
    model, ids = hybrid("llama"), tokens(1, 6)
    expected = model.generate(ids, **GREEDY)
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        output = model(ids, past_key_values=cache, use_cache=True)
        generated = [output.logits[:, -1].argmax(-1)]
        for i in range(7):
            position = torch.tensor([[6 + i]])
            output = step(
                input_ids=generated[-1][:, None], past_key_values=cache, position_ids=position, use_cache=True
            )
            generated.append(output.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(generated, dim=1), expected[:, 6:])
    assert counter.frame_count == 1
