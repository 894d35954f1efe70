"""A mixer over some of a layer's key-value heads computes what the whole mixer computes for them, in every form."""

import pytest
import torch

from hf_hybrid.errors import HybridConfigError
from hf_hybrid.mixers import LinearMixer, SlidingWindowConfig, build_mixer, list_mixers

from helpers import assert_close
from mixer_settings import MIXERS


SIZES = {"num_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "value_dim": 5, "hidden_size": 8}
SUBSETS = [(0,), (1,), (0, 2), (0, 1, 2)]


def make(name, causal=True):
    torch.manual_seed(0)
    mixer = build_mixer(MIXERS[name].fitted(causal), **SIZES, causal=causal)
    mixer.init_weights()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return mixer.double()


def inputs(length=11):
    torch.manual_seed(1)
    return [torch.randn(2, length, h, d, dtype=torch.double) for h, d in ((6, 4), (3, 4), (3, 5))] + [
        torch.randn(2, length, 8, dtype=torch.double)
    ]


def of_heads(tensors, heads):
    query, key, value, hidden = tensors
    queries = [2 * h + i for h in heads for i in range(2)]
    return query[:, :, queries], key[:, :, list(heads)], value[:, :, list(heads)], hidden


@pytest.mark.parametrize("heads", SUBSETS)
@pytest.mark.parametrize("name", MIXERS)
def test_some_heads_equal_those_of_the_whole_mixer(name, heads):
    mixer, x = make(name), inputs()
    queries = [2 * h + i for h in heads for i in range(2)]
    expected = mixer(*x)[0][:, :, queries]
    small = mixer.restricted(heads)
    assert small.heads == heads and small.num_key_value_heads == len(heads)
    for label, run in {"heads=": lambda *a, **k: mixer(*a, heads=heads, **k), "restricted": small}.items():
        assert_close(label, run(*of_heads(x, heads))[0], expected, 1e-12)
        # prefill, then token by token
        part = of_heads(x, heads)
        first, state = run(*(t[:, :6] for t in part), output_final_state=True)
        steps = [first]
        for t in range(6, 11):
            out, state = run(*(s[:, t : t + 1] for s in part), state=state, output_final_state=True)
            steps.append(out)
        assert_close(f"{label}, step by step", torch.cat(steps, 1), expected, 1e-9)


@pytest.mark.parametrize("name", [n for n in MIXERS if list(make(n).parameters())])
def test_gradients_reach_the_rows_of_those_heads_only(name):
    mixer, x = make(name), inputs()
    whole = torch.autograd.grad(mixer(*x)[0][:, :, 2:4].square().sum(), list(mixer.parameters()), allow_unused=True)
    some = torch.autograd.grad(
        mixer(*of_heads(x, (1,)), heads=(1,))[0].square().sum(), list(mixer.parameters()), allow_unused=True
    )
    for (parameter, _), a, b in zip(mixer.named_parameters(), whole, some, strict=True):
        assert (a is None) == (b is None), parameter
        if a is not None:
            assert_close(parameter, b, a, 1e-10)


@pytest.mark.parametrize("name", [n for n in MIXERS if MIXERS[n].name in ("linear_attention", "identity")])
def test_bidirectional_heads(name):
    mixer, x = make(name, causal=False), inputs()
    expected = mixer(*x)[0][:, :, [0, 1, 4, 5]]
    assert_close(name, mixer(*of_heads(x, (0, 2)), heads=(0, 2))[0], expected, 1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_state_of_some_heads_is_that_share_of_the_whole(name):
    mixer = make(name)
    assert mixer.restricted((0, 2)).state_bytes() * 3 == pytest.approx(mixer.state_bytes() * 2, rel=0.2)


def test_every_parameter_of_every_mixer_has_a_layout():
    assert {MIXERS[name].name for name in MIXERS} == set(list_mixers())
    for name in MIXERS:
        mixer = make(name)
        small = mixer.restricted((1,))
        assert [n for n, _ in small.named_parameters()] == [n for n, _ in mixer.named_parameters()]


def test_heads_that_are_not_the_layers():
    for heads in ((3,), (1, 0), (0, 0), ()):
        with pytest.raises(HybridConfigError, match="heads must be some of the layer's key-value heads 0..2"):
            build_mixer(SlidingWindowConfig(), **SIZES, causal=True, heads=heads)
    with pytest.raises(HybridConfigError, match=r"heads must be some of the mixer's key-value heads \[0, 2\]; got 1"):
        make("gla").restricted((0, 2)).restricted((1,))


def test_a_mixer_without_layouts_says_so(monkeypatch):
    mixer = make("linear_attention")
    monkeypatch.setattr(type(mixer), "head_layouts", LinearMixer.head_layouts)
    with pytest.raises(HybridConfigError, match="its `head_layouts` do not say how 'log_weight' is laid out"):
        mixer.restricted((0,))


def test_buffers_are_for_all_heads_alike():
    mixer, x = make("sliding_window"), inputs()
    mixer.register_buffer("scale", torch.tensor(2.0))
    mixer.__dict__.pop("_mixers_over", None)
    mixer._over((0,))[0].register_buffer("scale", torch.tensor(0.0, device="meta"))
    assert mixer.restricted((0,)).scale == 2.0
    mixer(*of_heads(x, (0,)), heads=(0,))
