"""Families that compute attention inline. The contracts run over them in tests/backbones; here, their variants."""

import pytest
import torch
import transformers

from hf_hybrid import convert_to_hybrid, find_attention_sites, restore_full_attention
from hf_hybrid.conversion.layer import hybrid_layers
from hf_hybrid.conversion.ports import PORTS, find_port
from hf_hybrid.errors import AlreadyHybridError, UnsupportedModelError
from hf_hybrid.surgery import discard_students_, prepare_distillation_, set_linear_heads_

from helpers import assert_close


VARIANTS = {
    "falcon, one kv head": ("FalconForCausalLM", "FalconConfig", {"multi_query": True, "new_decoder_architecture": False}),
    "falcon, kv groups": ("FalconForCausalLM", "FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, every head": ("FalconForCausalLM", "FalconConfig", {"multi_query": False}),
    "falcon, alibi": ("FalconForCausalLM", "FalconConfig", {"alibi": True}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {"rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {}),
    "mpt": ("MptForCausalLM", "MptConfig", {"attn_config": {"clip_qkv": 1.0}}),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", {}),
    "deberta": ("DebertaForMaskedLM", "DebertaConfig", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": (
        "DebertaV2ForMaskedLM", "DebertaV2Config",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8},
    ),
}  # fmt: skip


def toy(name):
    model_class, config_class, overrides = VARIANTS[name]
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 99,
    }
    config = getattr(transformers, config_class)(**sizes, **overrides)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


class Softmax(torch.nn.Module):
    """What the family computes without its position bias, as a mixer: says whether a port hands over the right queries, keys and values."""

    needs_hidden_states = False

    def __init__(self, mixer):
        super().__init__()
        self.causal, self.config_class = mixer.causal, type(mixer).config_class
        self.head_dim, self.num_heads = mixer.head_dim, mixer.num_heads
        self.num_key_value_heads = mixer.num_key_value_heads
        self.groups, self.config = mixer.groups, mixer.config

    def forward(self, query, key, value, hidden_states, *, valid=None, **kwargs):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        assert valid is None or valid.all()
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=self.causal, enable_gqa=True
        )
        return output.transpose(1, 2), None


@pytest.mark.parametrize("name", ["falcon, one kv head", "falcon, kv groups", "falcon, every head", "gptj"])
def test_a_port_with_a_softmax_inside_is_the_family(name):
    model, ids = toy(name), torch.arange(22).view(2, 11) % 90 + 5
    with torch.no_grad():
        expected = model(ids).logits
        convert_to_hybrid(model, "linear_attention")
        for layer in hybrid_layers(model).values():
            layer.hybrid = Softmax(layer.hybrid)
        assert_close(name, model(ids, use_cache=False).logits, expected, 1e-5)


@pytest.mark.parametrize("name", ["bloom", "mpt", "mpnet", "deberta", "deberta-v2", "falcon, alibi"])
def test_without_its_position_bias_a_family_is_its_port_with_a_softmax_inside(name, monkeypatch):
    model, ids = toy(name), torch.arange(22).view(2, 11) % 90 + 5
    if name == "mpnet":
        torch.nn.init.zeros_(model.mpnet.encoder.relative_attention_bias.weight)
    elif name.startswith("deberta"):
        for layer in model.modules():  # the scale counts the kinds of scores, so leave them there and make them zero
            if hasattr(layer, "pos_att_type"):
                kind = "disentangled_attention_bias" if name == "deberta-v2" else "disentangled_att_bias"
                setattr(layer, kind, lambda *args, **kwargs: 0)
    else:
        module = __import__(type(model).__module__, fromlist=["*"])
        build = {"mpt": "build_mpt_alibi_tensor", "bloom": "_get_alibi_slopes"}.get(name, "build_alibi_tensor")
        original = getattr(module, build)
        monkeypatch.setattr(module, build, lambda *args, **kwargs: original(*args, **kwargs) * 0)
        if name == "mpt":
            monkeypatch.setattr(
                type(model.transformer),
                "build_mpt_alibi_tensor",
                lambda self, *args, **kwargs: original(*args, **kwargs) * 0,
            )
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.warns(UserWarning, match="layers lose the"):
            convert_to_hybrid(model, "linear_attention")
        for layer in hybrid_layers(model).values():
            layer.hybrid = Softmax(layer.hybrid)
        kwargs = {} if name.startswith(("deberta", "mpnet")) else {"use_cache": False}
        assert_close(name, model(ids, **kwargs).logits, expected, 1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*layers lose")
def test_layers_that_keep_their_softmax_are_bit_equal(name):
    model, ids = toy(name), torch.arange(22).view(2, 11) % 90 + 5
    sites = find_attention_sites(model)
    assert len(sites) == 2 and {site.causal for site in sites} == {"ForCausalLM" in type(model).__name__}
    if name == "falcon, kv groups":
        assert sites[0].num_key_value_heads == 2
    with torch.no_grad():
        expected = model(ids).logits
        convert_to_hybrid(model, "linear_attention")
        assert not torch.equal(model(ids).logits, expected)
        set_linear_heads_(model, {})
        assert torch.equal(model(ids).logits, expected)
        restore_full_attention(model)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*layers lose")
def test_a_converted_port_is_seen_by_the_next_probe(name):
    model = toy(name)
    names = [site.name for site in find_attention_sites(model)]
    convert_to_hybrid(model, "linear_attention", [0])
    assert [site.name for site in find_attention_sites(model)] == names
    with pytest.raises(AlreadyHybridError, match=f"{names[0]} of .* is converted already"):
        convert_to_hybrid(model, "linear_attention", [0])
    convert_to_hybrid(model, "linear_attention", [1])
    assert list(model.config.hybrid_sites()) == names == [site.name for site in find_attention_sites(model)]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("projections", ["shared", "low_rank", "full"])
@pytest.mark.filterwarnings("ignore:.*layers lose")
def test_ports_are_distilled_with_any_projections(name, projections):
    model = prepare_distillation_(toy(name), "linear_attention", projections=projections)
    model.train()
    output = model(input_ids=torch.arange(22).view(2, 11) % 90 + 5)
    assert (output["block_losses"] > 0).all()
    output["loss"].backward()
    for layer in hybrid_layers(model).values():
        assert all(parameter.grad is not None for parameter in layer.hybrid.parameters())
    discard_students_(model)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*layers lose")
def test_asking_for_attention_weights_is_no_error(name):
    model, ids = toy(name), torch.arange(22).view(2, 11) % 90 + 5
    with torch.no_grad():
        host = model(ids, output_attentions=True)
        same = torch.equal(host.logits, model(ids).logits)  # Falcon computes something else when asked
        convert_to_hybrid(model, "linear_attention", [0])
        output = model(ids, output_attentions=True)
        assert torch.equal(output.logits, model(ids).logits) or not same
    # a linear layer has no weights to show
    shown = [weights for weights in output.attentions or () if weights is not None]
    assert len(shown) <= 1 and all(weights.shape == (2, 4, 11, 11) for weights in shown)


@pytest.mark.parametrize("name", ["bloom", "mpt", "gptj"])
@pytest.mark.filterwarnings("ignore:.*layers lose")
def test_the_probe_leaves_hooks_where_they_were(name):
    from accelerate import cpu_offload

    model, ids = toy(name), torch.arange(22).view(2, 11) % 90 + 5
    with torch.no_grad():
        expected = model(ids).logits
        linear = convert_to_hybrid(toy(name), "linear_attention")(ids).logits
    cpu_offload(model, torch.device("cpu"))
    before = {module: dict(module.__dict__).keys() for module in model.modules()}
    forwards = {module: module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__}
    find_attention_sites(model)
    assert {module: dict(module.__dict__).keys() for module in model.modules()} == before
    assert {module: module.__dict__["forward"] for module in forwards} == forwards
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
        convert_to_hybrid(model, "linear_attention")
        assert_close(name, model(ids).logits, linear, 1e-6)


def test_talking_heads_are_refused_by_name():
    config = transformers.DebertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99
    )
    config.talking_head = True
    with pytest.raises(UnsupportedModelError, match="talking_head=True mixes the scores of its heads"):
        find_attention_sites(transformers.DebertaForMaskedLM(config))


def test_every_port_belongs_to_a_class_that_exists():
    for path in PORTS:
        module, _, name = path.rpartition(".")
        cls = getattr(__import__(module, fromlist=[name]), name)
        assert find_port(cls) is PORTS[path]
