"""Short cuts under a compiler, padding without positions, caches of other modes, offload after conversion."""

import accelerate
import pytest
import torch
from transformers import DynamicCache

from hf_hybrid import GatedDeltaNetConfig, GLAConfig, KimiDeltaConfig, LinearAttentionConfig, convert_to_hybrid
from hf_hybrid.conversion.layer import hybrid_layers
from hf_hybrid.errors import UnsupportedModelError

from helpers import SMALL_MIXER, assert_close
from mixer_settings import MIXERS
from tiny_models import perturb_mixers, tiny_model


IDS = torch.randint(5, 99, (2, 13), generator=torch.Generator().manual_seed(0))


def hybrid(mixer=SMALL_MIXER, layers=None, family="llama", heads=None):
    return perturb_mixers(convert_to_hybrid(tiny_model(family), mixer, layers, heads=heads))


@pytest.mark.parametrize("heads", [None, {"model.layers.1.self_attn": [1]}])
@torch.no_grad()
def test_packed_rows_are_told_apart_under_a_compiler(heads):
    model = hybrid(heads=heads)
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None].expand(2, -1)
    expected = model(IDS, position_ids=positions, use_cache=False).logits
    assert not torch.allclose(expected, model(IDS, use_cache=False).logits, atol=1e-3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert_close("compiled", compiled(IDS, position_ids=positions, use_cache=False).logits, expected, 1e-5)
    # and what gives no positions is one graph as before
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    assert_close("one graph", whole(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits, 1e-5)


@pytest.mark.parametrize("name", [n for n in MIXERS if n != "identity"])
@torch.no_grad()
def test_left_padding_without_positions(name):
    model = hybrid(MIXERS[name])
    expected = model(IDS).logits
    padded = torch.cat([torch.full((2, 5), 7), IDS], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(IDS)], 1)
    output = model(padded, attention_mask=mask, use_cache=True)
    assert_close(name, output.logits[:, 5:], expected, 2e-5)
    mask = torch.cat([mask, mask[:, -1:]], 1)  # a step over the cache, also without positions
    longer = torch.cat([IDS, IDS[:, :1]], 1)
    step = model(IDS[:, :1], attention_mask=mask, past_key_values=output.past_key_values).logits
    assert_close(name, step, model(longer).logits[:, -1:], 2e-5)


@torch.no_grad()
def test_left_padding_of_a_host_that_notices_is_the_hosts():
    """GPT-2 embeds places: padding in front moves its text, hybrid or not."""
    host, model = tiny_model("gpt2"), hybrid(layers=[1], family="gpt2")
    for layer in hybrid_layers(model).values():
        layer.linear_heads = ()
    padded = torch.cat([torch.full((2, 5), 7), IDS], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(IDS)], 1)
    assert torch.equal(model(padded, attention_mask=mask).logits, host(padded, attention_mask=mask).logits)


@pytest.mark.parametrize("heads", [None, {f"model.layers.{i}.self_attn": [0] for i in range(3)}])
@pytest.mark.parametrize("name", [n for n in MIXERS if n != "identity"])
@torch.no_grad()
def test_right_padding_then_decoding(name, heads):
    model = hybrid(MIXERS[name], heads=heads)
    lengths = torch.tensor([13, 8])
    mask = (torch.arange(13) < lengths[:, None]).long()
    cache = model(IDS, attention_mask=mask, use_cache=True).past_key_values
    token = torch.tensor([[11], [12]])
    for step in range(3):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        positions = (lengths + step)[:, None]
        actual = model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    for row, length in enumerate(lengths.tolist()):
        text = torch.cat([IDS[row, :length], token[row].expand(3)])[None]
        assert_close(f"{name}, row {row}", actual[row], model(text).logits[0, -1:], 2e-5)


@pytest.mark.parametrize("mixer", [SMALL_MIXER, GLAConfig(window_size=4, num_sink_tokens=1)])
def test_a_cache_filled_in_inference_mode_goes_on(mixer):
    model = hybrid(mixer)
    with torch.no_grad():
        expected = model(IDS).logits[:, -1:]
    with torch.inference_mode():
        cache = model(IDS[:, :9], use_cache=True).past_key_values
    with torch.no_grad():
        for t in range(9, 13):
            step = model(IDS[:, t : t + 1], past_key_values=cache).logits
    assert_close("step", step, expected, 1e-5)
    with torch.inference_mode():
        cache = model(IDS, use_cache=True).past_key_values
    generated = model.generate(IDS, max_new_tokens=3, do_sample=False, past_key_values=cache, eos_token_id=None)
    assert torch.equal(generated, model.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None))


@pytest.mark.parametrize("feature_map", ["hedgehog", "taylor"])
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch_model"])
@torch.no_grad()
def test_offload_after_conversion(way, feature_map, tmp_path):
    dim = {"feature_dim": 3} if feature_map == "taylor" else {}
    model = hybrid(LinearAttentionConfig(feature_map=feature_map, window_size=4, **dim))
    expected = model(IDS).logits
    if way == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif way == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        places = {name: "disk" for name, _ in model.named_children()}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert torch.equal(model(IDS).logits, expected)


def test_a_quantized_cache_is_named():
    from transformers.cache_utils import BaseQuantizedLayer

    class Quantized(BaseQuantizedLayer):
        def __init__(self):
            self.keys = self.values = None
            self.cumulative_length, self.is_initialized = 0, False

        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, tensor):
            return tensor

    cache = DynamicCache()
    cache.layers = [Quantized() for _ in range(3)]
    with pytest.raises(UnsupportedModelError, match="Quantized caches .* cache_implementation='quantized'"):
        hybrid()(IDS, past_key_values=cache)


def test_serve_sees_that_continuous_batching_is_not_there():
    model = hybrid()
    assert not hasattr(model, "init_continuous_batching")
    with pytest.raises(UnsupportedModelError, match="continuous batching cannot run this model"):
        model.generate_batch([])


@torch.no_grad()
def test_weights_that_a_quantiser_packed_do_not_decide_the_mixers_type():
    model = tiny_model().bfloat16()
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    from hf_hybrid.modeling_hybrid import mixer_dtype

    attention = model.model.layers[0].self_attn
    assert mixer_dtype(model, attention) == torch.bfloat16
    for name in ("k_proj", "v_proj", "o_proj"):
        getattr(attention, name).weight = projection.weight
    assert mixer_dtype(model, attention) == torch.bfloat16


def test_gates_are_exact_in_the_middle_of_a_padded_batch():
    for mixer in (GatedDeltaNetConfig(window_size=0), KimiDeltaConfig(window_size=0)):
        model = hybrid(mixer)
        mask = torch.ones_like(IDS)
        mask[1, :4] = 0
        with torch.no_grad():
            actual = model(IDS, attention_mask=mask).logits[1, 4:]
            assert_close(mixer.name, actual, model(IDS[1:, 4:]).logits[0], 2e-5)


@pytest.mark.parametrize("name", ["linear_attention-elu", "gla", "kimi_delta", "linear_attention-dpfp"])
@torch.no_grad()
def test_left_padding_without_positions_under_a_compiler(name):
    model = hybrid(MIXERS[name])
    padded = torch.cat([torch.full((2, 5), 7), IDS], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(IDS)], 1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    actual = compiled(padded, attention_mask=mask, use_cache=False).logits[:, 5:]
    assert_close(name, actual, model(IDS, use_cache=False).logits, 2e-5)
