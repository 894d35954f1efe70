"""Every mixer against the naive recurrences and the promises of its interface."""

import pytest
import torch
from torch.func import functional_call

from hf_hybrid.errors import HybridConfigError
from hf_hybrid.mixers import build_mixer, linear_attention, list_mixers, sliding_window
from hf_hybrid.ops import chunk, naive

from helpers import assert_close
from mixer_settings import MIXERS


SIZES = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "value_dim": 6, "hidden_size": 32, "causal": True}


def new_mixer(name, dtype=torch.float32):
    mixer = build_mixer(MIXERS[name], **SIZES)
    mixer.init_weights()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixer.to(dtype)


def inputs(length, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(heads, size):
        return torch.randn(batch, length, heads, size, generator=generator, dtype=torch.float64).to(dtype)

    return make(4, 8), make(2, 8), make(2, 6)


@pytest.fixture
def use_naive(monkeypatch):
    """Switches the mixers to the naive recurrences: the ops are what is compared, the mixers' own code is the same."""

    def switch():
        monkeypatch.setattr(linear_attention, "linear_attention", naive.naive_linear_attention)
        for module in (linear_attention, sliding_window):
            monkeypatch.setattr(module, "sliding_window", naive.naive_sliding_window)

    return switch


def test_every_registered_mixer_has_a_row():
    assert {settings.name for settings in MIXERS.values()} == set(list_mixers())


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("name", MIXERS)
def test_chunk_equals_naive_with_gradients(name, length, use_naive):
    mixer = new_mixer(name)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, : length // 3] = False

    def run():
        tensors = [x.requires_grad_() for x in inputs(length)]
        output, state = mixer(*tensors, valid=valid, output_final_state=True)
        output = output * valid[..., None, None]
        weight = torch.linspace(-1, 1, output.numel()).view_as(output)
        leaves = [*tensors, *mixer.parameters()]
        return output, state, torch.autograd.grad((output * weight).sum(), leaves, allow_unused=True)

    output, state, gradients = run()
    use_naive()
    expected_output, expected_state, expected_gradients = run()
    # fp32 sums in another order: a few ulp on outputs, a few more on gradients that sum over all tokens
    assert_close("output", output, expected_output, 2e-6)
    for i, (x, y) in enumerate(zip(state, expected_state, strict=True)):
        assert_close(f"state {i}", x, y, 2e-6)
    for i, (x, y) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert (x is None) == (y is None), i
        if x is not None:
            assert_close(f"gradient {i}", x, y, 2e-5)


@pytest.mark.parametrize("name", ["sliding_window", "linear_attention", "linear_attention-no_window"])
def test_long_sequences_cross_blocks_of_chunks(name, use_naive):
    mixer, tensors = new_mixer(name), inputs(chunk.CHUNK_SIZE * chunk.CHUNKS_PER_BLOCK + 70, batch=1)
    with torch.no_grad():
        output, state = mixer(*tensors, output_final_state=True)
        use_naive()
        expected, expected_state = mixer(*tensors, output_final_state=True)
    assert_close("output", output, expected, 2e-6)
    for i, (x, y) in enumerate(zip(state, expected_state, strict=True)):
        assert_close(f"state {i}", x, y, 2e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_bf16_is_within_twice_the_naive_forms_own_error(name, use_naive):
    tensors, exact_mixer, mixer = (
        inputs(300, dtype=torch.float64),
        new_mixer(name, torch.float64),
        new_mixer(name, torch.bfloat16),
    )
    low = [x.bfloat16() for x in tensors]
    use_chunk = mixer(*low)[0].double()
    use_naive()
    exact = exact_mixer(*tensors)[0]
    naive_error = (mixer(*low)[0].double() - exact).norm() / exact.norm()
    error = (use_chunk - exact).norm() / exact.norm()
    # rounding the products' results to bf16 (2^-9 each) comes on top of rounding the inputs, which both forms suffer
    assert error <= 2 * naive_error + 2**-9, (error, naive_error)


@pytest.mark.parametrize("split", [1, 7, 64, 100])
@pytest.mark.parametrize("name", MIXERS)
def test_prefill_then_steps_equals_one_pass(name, split):
    mixer, (query, key, value) = new_mixer(name), inputs(140)
    with torch.no_grad():
        whole, whole_state = mixer(query, key, value, output_final_state=True)
        pieces, state = [], None
        cuts = [0, split, *range(split + 1, 130), 130, 140]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            output, state = mixer(
                query[:, start:stop], key[:, start:stop], value[:, start:stop], state=state, output_final_state=True
            )
            pieces.append(output)
    assert_close("output", torch.cat(pieces, dim=1), whole, 5e-6)
    for i, (x, y) in enumerate(zip(state, whole_state, strict=True)):
        assert x.dtype == y.dtype
        assert_close(f"state {i}", x, y, 5e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_later_tokens_and_length_change_nothing(name):
    mixer, (query, key, value) = new_mixer(name), inputs(130)
    with torch.no_grad():
        whole = mixer(query, key, value)[0]
        changed = [x.clone() for x in (query, key, value)]
        for x in changed:
            x[:, 70:] = 5.0
        assert torch.equal(mixer(*changed)[0][:, :70], whole[:, :70])  # bit-identical
        for length in (1, 30, 64, 65, 129):
            assert_close(
                f"T={length}", mixer(query[:, :length], key[:, :length], value[:, :length])[0], whole[:, :length], 2e-6
            )


# a window counts positions, padding included: padding inside a sequence is well-defined there, but not the same as none
PADDINGS = [(name, side) for name in MIXERS for side in ("left", "right")] + [("linear_attention-no_window", "middle")]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "side"), PADDINGS)
def test_padding_changes_nothing_forward_and_gradient(name, side, batch):
    mixer, tensors = new_mixer(name), inputs(20, batch)
    before, inside = {"left": (90, 0), "right": (0, 0), "middle": (0, 7)}[side]
    after = 45 if side == "right" else 0

    def pad(x):
        junk = torch.full_like(x[:, :1], 1e3)
        parts = [
            junk.expand(-1, before, -1, -1),
            x[:, :10],
            junk.expand(-1, inside, -1, -1),
            x[:, 10:],
            junk.expand(-1, after, -1, -1),
        ]
        return torch.cat(parts, dim=1)

    flags = torch.cat([torch.ones(batch, 20, dtype=torch.bool)[..., None, None]], dim=1).float()
    valid = pad(flags)[..., 0, 0] == 1.0
    leaves = [x.requires_grad_() for x in tensors]
    plain = mixer(*leaves)[0]
    weight = torch.linspace(-1, 1, plain.numel()).view_as(plain)
    expected = torch.autograd.grad((plain * weight).sum(), [*leaves, *mixer.parameters()], allow_unused=True)

    padded = mixer(*(pad(x) for x in leaves), valid=valid)[0][valid].view_as(plain)
    actual = torch.autograd.grad((padded * weight).sum(), [*leaves, *mixer.parameters()], allow_unused=True)
    assert_close("output", padded, plain, 2e-6)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        if y is not None:
            assert_close(f"gradient {i}", x, y, 2e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_sequences_do_not_see_each_other(name):
    mixer, (query, key, value) = new_mixer(name), inputs(50, batch=1)
    segments = torch.tensor([[0] * 13 + [1] * 1 + [2] * 36])
    packed, state = mixer(query, key, value, segments=segments, output_final_state=True)
    alone = [
        mixer(query[:, a:b], key[:, a:b], value[:, a:b], output_final_state=True)
        for a, b in ((0, 13), (13, 14), (14, 50))
    ]
    assert_close("output", packed, torch.cat([output for output, _ in alone], dim=1), 2e-6)
    step = [x[:, :1] for x in (query, key, value)]
    assert_close("next token", mixer(*step, state=state)[0], mixer(*step, state=alone[-1][1])[0], 2e-6)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("case", ["zero", "huge", "constant", "all padded"])
def test_extreme_inputs_stay_finite(name, case):
    mixer, tensors = new_mixer(name), inputs(80)
    make = {
        "zero": torch.zeros_like,
        "huge": lambda x: 1e4 * x,
        "constant": torch.ones_like,
        "all padded": lambda x: x,
    }[case]
    leaves = [make(x.detach()).requires_grad_() for x in tensors]
    valid = torch.zeros(2, 80, dtype=torch.bool) if case == "all padded" else None
    output = mixer(*leaves, valid=valid)[0]
    assert output.isfinite().all()
    if case == "all padded":
        assert (output == 0).all()
    for gradient in torch.autograd.grad(output.sum(), [*leaves, *mixer.parameters()], allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("name", MIXERS)
def test_state_is_fp32_where_it_sums_and_does_not_grow(name):
    mixer = new_mixer(name, torch.bfloat16)
    sizes = []
    for length in (1, 200):
        _, state = mixer(*inputs(length, dtype=torch.bfloat16), output_final_state=True)
        sizes.append(sum(x.numel() * x.element_size() for x in state))
    assert sizes[0] == sizes[1] == mixer.state_bytes(2, torch.bfloat16)
    if MIXERS[name].name == "linear_attention":
        assert state[-1].dtype == torch.float32  # [B, H_kv, F, V + 1]


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_gets_a_gradient(name):
    mixer = new_mixer(name)
    output = mixer(*inputs(120))[0]
    for parameter_name, parameter in mixer.named_parameters():
        (gradient,) = torch.autograd.grad(output.square().sum(), parameter, retain_graph=True)
        assert gradient.abs().sum() > 0, parameter_name


def test_autocast_does_not_touch_the_state():
    mixer, tensors = new_mixer("linear_attention-no_window"), inputs(65)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = mixer(*tensors, output_final_state=True)
    expected, expected_state = mixer(*tensors, output_final_state=True)
    assert torch.equal(output, expected)
    assert torch.equal(state[0], expected_state[0])


def test_mixers_work_under_functional_call():
    mixer, tensors = new_mixer("linear_attention"), inputs(30)
    weights = {name: parameter * 1.0 for name, parameter in mixer.named_parameters()}
    assert torch.equal(functional_call(mixer, weights, tensors)[0], mixer(*tensors)[0])


def test_sizes_are_checked():
    with pytest.raises(HybridConfigError, match="num_heads must be a multiple of num_key_value_heads; got 4 and 3"):
        build_mixer(MIXERS["linear_attention"], **{**SIZES, "num_key_value_heads": 3})
    with pytest.raises(HybridConfigError, match="sliding_window has no bidirectional form"):
        build_mixer(MIXERS["sliding_window"], **{**SIZES, "causal": False})


def test_packed_sequences_refuse_a_cached_state():
    mixer, tensors = new_mixer("linear_attention"), inputs(4)
    _, state = mixer(*tensors, output_final_state=True)
    with pytest.raises(HybridConfigError, match="packed sequences cannot continue a cached state"):
        mixer(*tensors, segments=torch.zeros(2, 4, dtype=torch.long), state=state)
