"""Every mixer against the naive recurrences and the promises of its interface."""

import importlib
import pkgutil

import pytest
import torch
from torch.func import functional_call

from hf_hybrid import mixers
from hf_hybrid.errors import HybridConfigError
from hf_hybrid.mixers import build_mixer, list_mixers
from hf_hybrid.ops import WindowState, naive, naive_memory

from helpers import assert_close
from mixer_settings import MIXERS_OF_TWO_HEADS as MIXERS


SIZES = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "value_dim": 6, "hidden_size": 32, "causal": True}
WITHOUT_PARAMETERS = [name for name in MIXERS if name.startswith(("sliding_window", "identity"))]
# fp32 sums in another order: a few ulp where weights are positive and normalised. Without a normaliser a token's terms may cancel, and the
# norm after them makes the rest large again.
NORMALIZED = ("sliding_window", "linear_attention", "identity", "affine")
TOLERANCE = {name: 2e-6 if name.startswith(NORMALIZED) else 1e-5 for name in MIXERS}


@pytest.fixture(autouse=True, params=["torch", "cpp"])
def backend(request, ops_backend):
    """Every promise holds for both implementations on a CPU."""
    ops_backend(request.param)


def new_mixer(name, dtype=torch.float32, **sizes):
    torch.manual_seed(5)
    mixer = build_mixer(MIXERS[name], **{**SIZES, **sizes})
    mixer.init_weights()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixer.to(dtype)


def inputs(length, batch=2, dtype=torch.float32, seed=0):
    """Query, key, value and the layer's input."""
    generator = torch.Generator().manual_seed(seed)

    def make(*size):
        return torch.randn(batch, length, *size, generator=generator, dtype=torch.float64).to(dtype)

    return make(4, 8), make(2, 8), make(2, 6), make(32)


@pytest.fixture
def use_naive(monkeypatch):
    """Switches the mixers to the naive recurrences: the ops are what is compared, the mixers' own code is the same."""

    def switch():
        for info in pkgutil.iter_modules(mixers.__path__):
            module = importlib.import_module(f"hf_hybrid.mixers.{info.name}")
            for op in (
                "linear_attention",
                "bidirectional_linear_attention",
                "gated_linear_attention",
                "gated_delta_rule",
                "window_attention",
                "memory_attention",
            ):
                if hasattr(module, op):
                    form = getattr(naive_memory if op == "memory_attention" else naive, f"naive_{op}")

                    def call(*args, form=form, inplace_final_state=False, **kwargs):
                        return form(*args, **kwargs)

                    monkeypatch.setattr(module, op, call)

    return switch


def in_order(mixer, state):
    """State tensors in an order that does not depend on where the windows' rings began."""
    exact = getattr(mixer, "exact", None) or getattr(getattr(mixer, "output_stage", None), "exact", None)
    if exact is None:
        return state
    ordered = []
    for number, size in enumerate(exact.heads_by_size):
        part = state[4 * number : 4 * number + 4]
        if not size:
            window = naive.in_order(WindowState(*part, None), exact.num_sink_tokens)
            # what is not visible may hold anything
            keys, values = (x * window.visible[:, None, :, None] for x in window[:2])
            part = keys, values, window.visible, window.counts
        ordered += part
    return (*ordered, *state[exact.num_tensors :])


def gradients(output, leaves):
    if not output.requires_grad:
        return [None] * len(leaves)
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    return torch.autograd.grad((output * weight).sum(), leaves, allow_unused=True)


def test_every_registered_mixer_has_a_row():
    assert {settings.name for settings in MIXERS.values()} == set(list_mixers())


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("name", MIXERS)
def test_chunk_equals_naive_with_gradients(name, length, use_naive):
    """The fast form in fp32 against the definition in fp64: the naive form in fp32 can be further off than the fast one."""
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, : length // 3] = False

    def run(dtype):
        mixer = new_mixer(name, dtype)
        tensors = [x.requires_grad_() for x in inputs(length, dtype=dtype)]
        output, state = mixer(*tensors, valid=valid, output_final_state=True)
        output = output * valid[..., None, None]
        return output, in_order(mixer, state), gradients(output, [*tensors, *mixer.parameters()])

    output, state, grads = run(torch.float32)
    use_naive()
    expected_output, expected_state, expected_grads = run(torch.float64)
    assert_close("output", output, expected_output, TOLERANCE[name])
    for i, (x, y) in enumerate(zip(state, expected_state, strict=True)):
        assert_close(f"state {i}", x, y, TOLERANCE[name])
    for i, (x, y) in enumerate(zip(grads, expected_grads, strict=True)):
        if x is None or y is None:  # the first token has nothing to forget
            assert x is None or not x.any()
            assert y is None or not y.any()
            continue
        assert_close(f"gradient {i}", x, y, 5e-5)  # sums over all tokens


@pytest.mark.parametrize(
    "name", [name for name in MIXERS if name not in ("sliding_window-no_sinks", "identity", "affine")]
)
def test_without_gradients_over_several_blocks_equals_naive(name, use_naive):
    mixer, tensors = new_mixer(name), inputs(900, batch=1)
    with torch.no_grad():
        output, state = mixer(*tensors, output_final_state=True)
        use_naive()
        expected, expected_state = mixer(*tensors, output_final_state=True)
    assert_close("output", output, expected, TOLERANCE[name])
    for i, (x, y) in enumerate(zip(in_order(mixer, state), in_order(mixer, expected_state), strict=True)):
        assert_close(f"state {i}", x, y, TOLERANCE[name])


@pytest.mark.parametrize("name", MIXERS)
def test_bf16_is_within_twice_the_naive_forms_own_error(name, use_naive):
    tensors, exact_mixer, mixer = (
        inputs(300, dtype=torch.float64),
        new_mixer(name, torch.float64),
        new_mixer(name, torch.bfloat16),
    )
    low = [x.bfloat16() for x in tensors]
    with torch.no_grad():
        fast = mixer(*low)[0].double()
        use_naive()
        exact = exact_mixer(*tensors)[0]
        naive_error = (mixer(*low)[0].double() - exact).norm() / exact.norm().clamp_min(1e-9)
    error = (fast - exact).norm() / exact.norm().clamp_min(1e-9)
    # rounding the products' results to bf16 (2^-9 each) comes on top of rounding the inputs, which both forms suffer
    assert error <= 2 * naive_error + 2**-9, (error, naive_error)


@pytest.mark.parametrize("name", MIXERS)
def test_bf16_gradients_and_steps_are_within_twice_the_naive_forms_own_error(name, use_naive):
    length, tensors = 90, inputs(90, dtype=torch.float64)
    exact_mixer, mixer = new_mixer(name, torch.float64), new_mixer(name, torch.bfloat16)

    def run(mixer, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        grads = gradients(mixer(*leaves)[0], [*leaves, *mixer.parameters()])
        with torch.no_grad():
            first, state = mixer(*(x[:, : length - 8] for x in leaves), output_final_state=True)
            pieces = [first]
            for t in range(length - 8, length):
                piece, state = mixer(*(x[:, t : t + 1] for x in leaves), state=state, output_final_state=True)
                pieces.append(piece)
        return [torch.cat(pieces, dim=1), *grads]

    fast = run(mixer, torch.bfloat16)
    use_naive()
    exact, naive_form = run(exact_mixer, torch.float64), run(mixer, torch.bfloat16)
    for i, (x, y, z) in enumerate(zip(fast, naive_form, exact, strict=True)):
        if z is None:
            continue
        size = z.norm().clamp_min(1e-6)
        error, naive_error = ((w.double() - z).norm() / size for w in (x, y))
        # results of products rounded to bf16 (2^-9 each), in the forward pass and again in the backward
        assert error <= 2 * naive_error + 2**-8, (i, error, naive_error)


LONG = ["sliding_window", "linear_attention", "linear_attention-no_window", "linear_attention-relu", "lightning-plain", "gla-no_window",
        "gated_delta_net-no_window", "kimi_delta-no_window", "jet_block"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_16384_tokens_stay_exact_in_every_form(name, use_naive):
    """Chunks and single steps in fp32 against the recurrence in fp64: nothing drifts."""
    tensors = inputs(16384, batch=1, dtype=torch.float64)
    exact_mixer, mixer = new_mixer(name, torch.float64), new_mixer(name)
    low = [x.float() for x in tensors]
    with torch.no_grad():
        chunked, state = mixer(*low, output_final_state=True)
        pieces, step_state = [], None
        for t in range(16384):
            piece, step_state = mixer(
                *(x[:, t : t + 1] for x in low), state=step_state, output_final_state=True, inplace_final_state=True
            )
            pieces.append(piece)
        use_naive()
        exact, exact_state = exact_mixer(*tensors, output_final_state=True)
    for form, output in (("chunk", chunked), ("step", torch.cat(pieces, dim=1))):
        error = ((output.double() - exact).norm() / exact.norm()).item()
        # the inputs' own rounding to fp32 (6e-8) comes on top
        assert error <= (2e-6 if name.startswith(NORMALIZED) else 1e-5), (form, error)
    for i, (x, y) in enumerate(zip(in_order(mixer, state), in_order(exact_mixer, exact_state), strict=True)):
        assert_close(f"state {i}", x, y, 1e-5)


@pytest.mark.parametrize("split", [1, 7, 64, 100])
@pytest.mark.parametrize("name", MIXERS)
def test_prefill_then_steps_equals_one_pass(name, split):
    mixer, tensors = new_mixer(name), inputs(140)
    with torch.no_grad():
        whole, whole_state = mixer(*tensors, output_final_state=True)
        pieces, state = [], None
        cuts = [0, split, *range(split + 1, 130), 130, 140]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            output, state = mixer(
                *(x[:, start:stop] for x in tensors), state=state, output_final_state=True, inplace_final_state=True
            )
            pieces.append(output)
    assert_close("output", torch.cat(pieces, dim=1), whole, 2 * TOLERANCE[name])
    for i, (x, y) in enumerate(zip(in_order(mixer, state), in_order(mixer, whole_state), strict=True)):
        assert x.dtype == y.dtype
        assert_close(f"state {i}", x, y, 2 * TOLERANCE[name])


@pytest.mark.parametrize("name", MIXERS)
def test_a_step_leaves_the_given_state_alone_unless_told_otherwise(name):
    mixer, tensors = new_mixer(name), inputs(81)
    prompt, token = [x[:, :80] for x in tensors], [x[:, 80:] for x in tensors]
    with torch.no_grad():
        _, state = mixer(*prompt, output_final_state=True)
        before = [x.clone() for x in state]
        output, after = mixer(*token, state=state, output_final_state=True)
        for x, y in zip(state, before, strict=True):
            assert torch.equal(x, y)
        again, same = mixer(*token, state=state, output_final_state=True, inplace_final_state=True)
    assert torch.equal(output, again)
    for x, y in zip(after, same, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_reach_through_a_cached_state(name):
    """Truncated backpropagation is the caller's choice: two pieces, one of them a single token, give the gradients of the whole."""
    mixer, tensors = new_mixer(name), [x.requires_grad_() for x in inputs(41)]
    whole = mixer(*tensors)[0]
    first, state = mixer(*(x[:, :40] for x in tensors), output_final_state=True)
    last, _ = mixer(*(x[:, 40:] for x in tensors), state=state, output_final_state=True)
    pieces = torch.cat([first, last], dim=1)
    leaves = [*tensors, *mixer.parameters()]
    for i, (x, y) in enumerate(zip(gradients(pieces, leaves), gradients(whole, leaves), strict=True)):
        assert (x is None) == (y is None), i
        if x is not None:
            assert_close(f"gradient {i}", x, y, 5e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_later_tokens_and_length_change_nothing(name):
    mixer, tensors = new_mixer(name), inputs(130)
    with torch.no_grad():
        whole = mixer(*tensors)[0]
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:, 70:] = 2.0
        assert_close("later tokens", mixer(*changed)[0][:, :70], whole[:, :70], TOLERANCE[name])
        for length in (1, 30, 64, 65, 129):
            assert_close(f"T={length}", mixer(*(x[:, :length] for x in tensors))[0], whole[:, :length], TOLERANCE[name])


# a window counts positions, padding included: padding inside a sequence is well-defined there, but not the same as none
MIDDLE = [
    "linear_attention-no_window",
    "lightning-plain",
    "gla-no_window",
    "gated_delta_net-no_window",
    "kimi_delta-no_window",
    "identity",
]
PADDINGS = [(name, side) for name in MIXERS for side in ("left", "right")] + [(name, "middle") for name in MIDDLE]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "side"), PADDINGS)
def test_padding_changes_nothing_forward_and_gradient(name, side, batch):
    mixer, tensors = new_mixer(name), inputs(20, batch)
    before, inside = {"left": (90, 0), "right": (0, 0), "middle": (0, 7)}[side]
    after = 45 if side == "right" else 0

    def pad(x, junk=1e3):
        junk = torch.full_like(x[:, :1], junk)
        parts = [
            junk.expand(-1, before, *x.shape[2:]), x[:, :10], junk.expand(-1, inside, *x.shape[2:]), x[:, 10:],
            junk.expand(-1, after, *x.shape[2:]),
        ]  # fmt: skip
        return torch.cat(parts, dim=1)

    valid = pad(torch.ones(batch, 20), junk=0.0).bool()
    leaves = [x.requires_grad_() for x in tensors]
    plain = mixer(*leaves)[0]
    expected = gradients(plain, [*leaves, *mixer.parameters()])
    padded = mixer(*(pad(x) for x in leaves), valid=valid)[0][valid].view_as(plain)
    actual = gradients(padded, [*leaves, *mixer.parameters()])
    assert_close("output", padded, plain, TOLERANCE[name])
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        if y is not None:
            assert_close(f"gradient {i}", x, y, 5e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_sequences_do_not_see_each_other(name):
    mixer, tensors = new_mixer(name), inputs(50, batch=1)
    segments = torch.tensor([[0] * 13 + [1] * 1 + [2] * 36])
    packed, state = mixer(*tensors, segments=segments, output_final_state=True)
    alone = [mixer(*(x[:, a:b] for x in tensors), output_final_state=True) for a, b in ((0, 13), (13, 14), (14, 50))]
    assert_close("output", packed, torch.cat([output for output, _ in alone], dim=1), TOLERANCE[name])
    step = [x[:, :1] for x in tensors]
    assert_close("next token", mixer(*step, state=state)[0], mixer(*step, state=alone[-1][1])[0], TOLERANCE[name])


@pytest.mark.parametrize("name", MIXERS)
def test_packed_rows_go_on_from_their_last_sequence(name):
    """Whatever shares a batch of rows with it while it is mixed."""
    mixer, tensors = new_mixer(name), inputs(100)
    segments = torch.tensor([[0] * 60 + [1] * 40, [0] * 30 + [1] * 19 + [2] * 51])
    with torch.no_grad():
        _, state = mixer(*(x[:, :100] for x in tensors), segments=segments, output_final_state=True)
        for row, start in ((0, 60), (1, 49)):
            _, alone = mixer(*(x[row : row + 1, start:] for x in tensors), output_final_state=True)
            step = [x[row : row + 1, :1] for x in tensors]
            expected = mixer(*step, state=alone)[0]
            output = mixer(*step, state=tuple(x[row : row + 1].clone() for x in state))[0]
            assert_close(f"row {row}", output, expected, TOLERANCE[name])


@pytest.mark.parametrize("name", MIXERS)
def test_inputs_are_left_as_they_are(name):
    mixer, tensors = new_mixer(name), inputs(300)
    before = [x.clone() for x in tensors]
    with torch.no_grad():
        output, state = mixer(*tensors, output_final_state=True)
        kept = output.clone()
        mixer(*(x[:, :1] for x in tensors), state=state)
        assert torch.equal(output, kept)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_without_gradients_the_output_stage_gives_the_same():
    for name in ("gla", "gla-no_window", "lightning-plain"):
        mixer, tensors = new_mixer(name), inputs(600)
        expected = mixer(*tensors)[0]
        with torch.no_grad():
            assert_close(name, mixer(*tensors)[0], expected, 1e-6)


def test_a_mask_must_be_bool():
    mixer, tensors = new_mixer("linear_attention"), inputs(5)
    for wrong in (torch.ones(2, 5, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(
            HybridConfigError, match=r"valid must be bool of shape \[B, T\] = \[2, 5\].*pass mask.bool\(\)"
        ):
            mixer(*tensors, valid=wrong)


def test_calls_without_tokens_are_refused():
    with pytest.raises(HybridConfigError, match=r"The query has no tokens; got the shape \[2, 0, 4, 8\]"):
        new_mixer("linear_attention")(*inputs(0))


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in WITHOUT_PARAMETERS])
def test_a_cached_step_trains_the_mixer_alone(name):
    """Queries, keys and values from frozen layers: only the mixer's own weights want gradients. And a first token leaves none of them out."""
    mixer, tensors = new_mixer(name), inputs(101)
    with torch.no_grad():
        _, state = mixer(*(x[:, :100] for x in tensors), output_final_state=True)
    token = [x[:, 100:] for x in tensors]
    mixer(*token, state=state)[0].square().sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in mixer.parameters())
    mixer.zero_grad()
    mixer(*token)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in mixer.parameters())


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
    for gradient in gradients(output, [*leaves, *mixer.parameters()]):
        assert gradient is None or gradient.isfinite().all()
    with torch.no_grad():
        step_output, state = mixer(*leaves, valid=valid, output_final_state=True)
        assert step_output.isfinite().all()
        last = mixer(*(x[:, -1:] for x in leaves), valid=None if valid is None else valid[:, -1:], state=state)[0]
        assert last.isfinite().all()


@pytest.mark.parametrize("name", MIXERS)
def test_state_is_fp32_where_it_sums_and_does_not_grow(name):
    mixer = new_mixer(name, torch.bfloat16)
    sizes = []
    for length in (1, 200):
        _, state = mixer(*inputs(length, dtype=torch.bfloat16), output_final_state=True)
        sizes.append(sum(x.numel() * x.element_size() for x in state))
    assert sizes[0] == sizes[1] == mixer.state_bytes(2, torch.bfloat16)
    if name not in WITHOUT_PARAMETERS and name != "affine":
        assert state[-1].dtype == torch.float32  # [B, H_s, K, V] or [B, H_kv, F, V + 1]


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in WITHOUT_PARAMETERS])
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


@pytest.mark.parametrize("name", ["linear_attention", "linear_attention-no_window", "gla", "jet_block"])
def test_queries_and_keys_may_be_wider_than_values(name):
    """Under autocast the rotary embedding leaves them in fp32."""
    mixer, (query, key, value, hidden) = new_mixer(name), inputs(20)
    low = value.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = mixer(query, key, low, hidden, output_final_state=True)
        assert output.dtype == torch.bfloat16
        step = mixer(query[:, :1], key[:, :1], low[:, :1], hidden[:, :1].bfloat16(), state=state)[0]
        assert step.dtype == torch.bfloat16
    assert torch.equal(output, mixer(query.bfloat16(), key.bfloat16(), low, hidden)[0])
    assert mixer(query, key, low, hidden)[0].dtype == torch.float32


@pytest.mark.parametrize("name", MIXERS)
def test_a_graph_of_the_whole_mixer_can_be_captured(name):
    """`torch.compile` without a graph break, forward and backward; the graph runs op by op here, which shows the same as compiled code."""
    # a graph holds every block of a memory by itself, which takes long to trace
    length = 22 if "memor" in name else 70
    mixer, tensors = new_mixer(name), [x.requires_grad_() for x in inputs(length)]
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: mixer(*x, output_final_state=True), backend="aot_eager", fullgraph=True)
    output, state = compiled(*tensors)
    expected, expected_state = mixer(*tensors, output_final_state=True)
    assert_close("output", output, expected, 1e-5)
    for x, y in zip(in_order(mixer, state), in_order(mixer, expected_state), strict=True):
        assert_close("state", x, y, 1e-5)
    leaves = [*tensors, *mixer.parameters()]
    for x, y in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        if y is not None:
            assert_close("gradient", x, y, 5e-5)
    with torch.no_grad():
        assert_close("without gradients", compiled(*(x.detach() for x in tensors))[0], expected, 1e-5)


def test_mixers_need_the_layers_input_where_they_gate():
    query, key, value, _ = inputs(4)
    with pytest.raises(HybridConfigError, match="gla makes its gates from the layer's input. Pass hidden_states"):
        new_mixer("gla")(query, key, value)


def test_mixers_work_under_functional_call():
    for name in ("linear_attention", "jet_block"):
        mixer, tensors = new_mixer(name), inputs(30)
        weights = {name: parameter * 1.0 for name, parameter in mixer.named_parameters()}
        assert torch.equal(functional_call(mixer, weights, tensors)[0], mixer(*tensors)[0])
        doubled = {name: parameter.detach() * 2.0 for name, parameter in mixer.named_parameters()}
        with torch.no_grad():
            assert not torch.equal(functional_call(mixer, doubled, tensors)[0], mixer(*tensors)[0])


def test_sizes_are_checked():
    with pytest.raises(HybridConfigError, match="num_heads must be a multiple of num_key_value_heads; got 4 and 3"):
        build_mixer(MIXERS["linear_attention"], **{**SIZES, "num_key_value_heads": 3})
    with pytest.raises(HybridConfigError, match="sliding_window has no bidirectional form"):
        build_mixer(MIXERS["sliding_window"], **{**SIZES, "causal": False})
    with pytest.raises(HybridConfigError, match="gated_delta_net has no bidirectional form"):
        build_mixer(MIXERS["gated_delta_net"], **{**SIZES, "causal": False})


def test_packed_sequences_refuse_a_cached_state():
    mixer, tensors = new_mixer("linear_attention"), inputs(4)
    _, state = mixer(*tensors, output_final_state=True)
    with pytest.raises(HybridConfigError, match="packed sequences cannot continue a cached state"):
        mixer(*tensors, segments=torch.zeros(2, 4, dtype=torch.long), state=state)


@pytest.mark.parametrize("side", ["none", "left", "right", "middle"])
@pytest.mark.parametrize(
    "name",
    ["linear_attention", "linear_attention-elu", "linear_attention-relu", "linear_attention-taylor", "identity"],
)
def test_bidirectional_layers_see_all_tokens_and_no_padding(name, side, use_naive):
    mixer, tensors = new_mixer(name, causal=False), inputs(700 if side == "none" else 60)
    valid = torch.ones(tensors[0].shape[:2], dtype=torch.bool)
    hidden = {"none": slice(0, 0), "left": slice(0, 20), "right": slice(45, 60), "middle": slice(10, 30)}[side]
    valid[0, hidden] = False

    def run():
        leaves = [x.clone().requires_grad_() for x in tensors]
        output = mixer(*leaves, valid=valid)[0] * valid[..., None, None]
        return output, gradients(output, [*leaves, *mixer.parameters()])

    output, grads = run()
    alone = mixer(*(x[:1, valid[0]] for x in tensors))[0]
    assert_close("without the padding", output[:1, valid[0]], alone, 2e-6)
    assert mixer(*tensors, output_final_state=True)[1] == ()
    use_naive()
    expected, expected_grads = run()
    assert_close("output", output, expected, 2e-6)
    for i, (x, y) in enumerate(zip(grads, expected_grads, strict=True)):
        assert (x is None) == (y is None), i
        if x is not None:
            assert_close(f"gradient {i}", x, y, 5e-5)


HALVES = [
    name
    for name, settings in MIXERS.items()
    if getattr(settings, "window_size", 0) and settings.name != "sliding_window"
]


@pytest.mark.parametrize("name", HALVES)
def test_parts_can_be_taken_out(name):
    mixer, tensors = new_mixer(name), inputs(90)
    assert mixer.has_window_and_state()
    whole = mixer(*tensors)[0]
    for part in ("state", "window"):
        mixer.ablated = part
        output = mixer(*tensors)[0]
        assert output.isfinite().all()
        assert not torch.allclose(output, whole)
        if part == "window":  # every parameter is still in the graph: DDP asks for it
            for parameter_name, parameter in mixer.named_parameters():
                assert torch.autograd.grad(output.sum(), parameter, retain_graph=True)[0] is not None, parameter_name
