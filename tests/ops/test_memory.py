"""A window with a memory: the naive form against its definition, and every form against the naive one."""

import itertools

import pytest
import torch

from hf_hybrid.mixers.feature_maps import get_feature_map
from hf_hybrid.ops import LinearPart, cpp, memory_attention, step
from hf_hybrid.ops.chunk import chunk_memory_attention
from hf_hybrid.ops.naive_memory import empty_memory_state, naive_memory_attention

from helpers import assert_close


HEADS, KV_HEADS, K, V = 6, 2, 8, 6
# window, sinks, memory, block, tokens: blocks that divide the window and that do not, no sinks, nothing but short rows
SIZES = [(6, 2, 5, 4, 45), (5, 0, 3, 3, 40), (8, 4, 16, 4, 120), (3, 1, 2, 7, 50), (6, 2, 5, 4, 3), (1, 0, 1, 1, 12)]
CUTS = [(), (3, 8, 20), (1, 2, 3, 4, 5, 30), (16,)]


def inputs(tokens, dtype=torch.float64, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, K), (KV_HEADS, K), (KV_HEADS, V))
    return [torch.randn(batch, tokens, n, d, generator=generator, dtype=torch.float64).to(dtype) for n, d in shapes]


def settings(window, sinks, memory, block, linear=None):
    return {
        "window_size": window, "num_sinks": sinks, "num_memory_tokens": memory, "memory_block_size": block,
        "scale": K**-0.5, "linear": linear,
    }  # fmt: skip


def linear_part():
    torch.manual_seed(1)
    maps = [get_feature_map("hedgehog")(n, K, None).double() for n in (HEADS, KV_HEADS)]
    for feature_map in maps:
        feature_map.init_weights()
        with torch.no_grad():
            for weight in feature_map.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
    return LinearPart(*maps, torch.randn(HEADS, dtype=torch.float64).requires_grad_())


def in_pieces(form, tensors, cuts, valid=None, **kwargs):
    points = [0, *[cut for cut in cuts if cut < tensors[0].shape[1]], tensors[0].shape[1]]
    outputs, state = [], None
    for start, stop in itertools.pairwise(points):
        exists = None if valid is None else valid[:, start:stop]
        output, state = form(*(x[:, start:stop] for x in tensors), valid=exists, state=state, **kwargs)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def padding(tokens, batch=2, seed=3):
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) > 0.3


def by_definition(query, key, value, window, sinks, memory, block):
    """The docstring, written down with sets, of one head and row without padding: nothing is carried from token to token."""
    unit = torch.nn.functional.normalize(key.double(), dim=-1)

    def memory_of(g):
        if g <= 0:
            return set()
        joins = range(max(sinks, (g - 1) * block - window), max(g * block - window, 0))
        together = sorted(memory_of(g - 1) | set(joins))
        mean = unit[: g * block].mean(0)
        return set(sorted(together, key=lambda j: (round((unit[j] @ mean).item(), 12), j))[:memory])

    rows = []
    for t in range(len(query)):
        g = t // block
        seen = sorted({*range(sinks), *range(max(0, g * block - window), t + 1), *memory_of(g)} & {*range(t + 1)})
        weights = (query[t] @ key[seen].T * K**-0.5).softmax(-1)
        rows.append(weights @ value[seen])
    return torch.stack(rows)


@pytest.mark.parametrize("size", SIZES)
def test_the_naive_form_is_its_definition(size):
    *sizes, tokens = size
    query, key, value = inputs(tokens)
    output, _ = naive_memory_attention(query, key, value, **settings(*sizes))
    for row, head in itertools.product(range(2), range(HEADS)):
        kv_head = head // (HEADS // KV_HEADS)
        expected = by_definition(query[row, :, head], key[row, :, kv_head], value[row, :, kv_head], *sizes)
        assert_close(f"row {row}, head {head}", output[row, :, head], expected, 1e-12)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("size", SIZES)
def test_blocks_equal_the_naive_form_with_gradients(size, cuts, padded, linear):
    *sizes, tokens = size
    tensors = [x.requires_grad_() for x in inputs(tokens)]
    kwargs = settings(*sizes, linear_part() if linear else None)
    valid = padding(tokens) if padded else None
    expected, state = naive_memory_attention(*tensors, valid=valid, **kwargs)
    output, final = in_pieces(chunk_memory_attention, tensors, cuts, valid, **kwargs)
    assert_close("output", output, expected, 1e-12)
    for name, own, wanted in zip(final._fields, final, state, strict=True):
        if wanted is not None:
            assert_close(name, own, wanted, 1e-12)
    leaves = [
        *tensors,
        *((kwargs["linear"].log_weight, *kwargs["linear"].feature_map_k.parameters()) if linear else ()),
    ]
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    grads = [torch.autograd.grad((x * weight).sum(), leaves, allow_unused=True) for x in (output, expected)]
    for index, (own, wanted) in enumerate(zip(*grads, strict=True)):
        if wanted is not None:  # no token has left the memory of a short row
            assert_close(f"gradient {index}", own, wanted, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("size", SIZES)
def test_kernels_equal_the_naive_form(size, cuts, padded, dtype, ops_backend):
    ops_backend("cpp")
    *sizes, tokens = size
    tensors, kwargs = inputs(tokens, dtype), settings(*sizes)
    valid = padding(tokens) if padded else None
    expected, state = naive_memory_attention(*(x.double() for x in tensors), valid=valid, **kwargs)
    output, final = in_pieces(memory_attention, tensors, cuts, valid, **kwargs)
    # sums of at most 120 numbers of size 1 in fp32; a bf16 output is rounded once, by at most 2^-9 of itself
    assert_close("output", output, expected, 2e-6 if dtype == torch.float32 else 2**-8)
    for name in ("key", "value", "seen"):
        assert torch.equal(getattr(final, name).double(), getattr(state, name).double()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_kernels_equal_those_of_the_naive_form(size, padded, dtype, ops_backend):
    ops_backend("cpp")
    *sizes, tokens = size
    tensors, kwargs = [x.requires_grad_() for x in inputs(tokens, dtype)], settings(*sizes)
    valid = padding(tokens) if padded else None
    wide = [x.detach().double().requires_grad_() for x in tensors]
    weight = torch.linspace(-1, 1, tensors[0].shape[0] * tokens * HEADS * V).view(-1, tokens, HEADS, V)
    expected = torch.autograd.grad((naive_memory_attention(*wide, valid=valid, **kwargs)[0] * weight).sum(), wide)
    found = torch.autograd.grad((memory_attention(*tensors, valid=valid, **kwargs)[0] * weight).sum(), tensors)
    for name, own, wanted in zip(("query", "key", "value"), found, expected, strict=True):
        # bf16: the gradient comes in rounded, and goes out rounded
        assert_close(name, own, wanted, 5e-6 if dtype == torch.float32 else 2**-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_reach_through_a_cached_memory(size, cuts, padded, ops_backend):
    """Of every form: what the second piece attends to are keys of the first."""
    *sizes, tokens = size
    valid = padding(tokens) if padded else None
    found = []
    for backend in ("naive", "torch", "cpp"):
        if backend != "naive":
            ops_backend(backend)
        tensors = [x.float().requires_grad_() for x in inputs(tokens)]
        form = naive_memory_attention if backend == "naive" else memory_attention
        output, _ = in_pieces(form, tensors, cuts, valid, **settings(*sizes))
        weight = torch.linspace(-1, 1, output.numel()).view_as(output)
        found.append(torch.autograd.grad((output * weight).sum(), tensors))
    for grads in found[1:]:
        for name, own, wanted in zip(("query", "key", "value"), grads, found[0], strict=True):
            assert_close(name, own, wanted, 5e-6)


def test_bf16_beside_a_state_is_the_same_in_pieces():
    linear = linear_part()
    for part in linear[:2]:
        part.to(torch.bfloat16)
    linear = linear._replace(log_weight=linear.log_weight.detach().bfloat16())
    tensors, kwargs = inputs(90, torch.bfloat16), settings(6, 2, 9, 4, linear)
    with torch.no_grad():
        whole, _ = chunk_memory_attention(*tensors, **kwargs)
        pieces, _ = in_pieces(memory_attention, tensors, range(1, 90), **kwargs)
    assert_close("steps", pieces, whole, 2**-8)


def test_steps_one_by_one_equal_one_pass(ops_backend):
    for backend in ("torch", "cpp"):
        ops_backend(backend)
        tensors, kwargs = inputs(90, torch.float32), settings(6, 2, 9, 4)
        expected, _ = naive_memory_attention(*tensors, **kwargs)
        state, outputs = None, []
        for t in range(90):
            one = [x[:, t : t + 1] for x in tensors]
            output, state = memory_attention(*one, state=state, inplace_final_state=True, **kwargs)
            outputs.append(output)
        assert_close(backend, torch.cat(outputs, 1), expected, 2e-6)


def test_a_step_is_taken_by_the_step_form(monkeypatch, ops_backend):
    ops_backend("torch")
    calls = []
    own = step.step_memory_attention
    monkeypatch.setattr(step, "step_memory_attention", lambda *a, **k: calls.append(1) or own(*a, **k))
    tensors, kwargs = inputs(30, torch.float32), settings(6, 2, 9, 4)
    _, state = memory_attention(*(x[:, :20] for x in tensors), **kwargs)
    with torch.no_grad():
        for t in range(20, 30):
            _, state = memory_attention(*(x[:, t : t + 1] for x in tensors), state=state, **kwargs)
    assert len(calls) == 10 - 3  # not for the first token of a block: 20, 24, 28


def test_rows_of_a_batch_may_have_seen_different_numbers_of_tokens(ops_backend):
    for backend in ("torch", "cpp"):
        ops_backend(backend)
        tensors, kwargs = inputs(40, torch.float32), settings(6, 2, 5, 4)
        valid = torch.ones(2, 40, dtype=torch.bool)
        valid[0, :7] = False
        expected, _ = naive_memory_attention(*tensors, valid=valid, **kwargs)
        output, _ = in_pieces(memory_attention, tensors, range(30, 40), valid, **kwargs)
        assert_close(backend, output, expected, 2e-6)


def test_equal_keys_keep_the_earlier(ops_backend):
    """Keys of repeated tokens without positions: a tie, which every form must break alike."""
    query, key, value = inputs(60, torch.float32)
    key = key[:, :3].repeat(1, 20, 1, 1)
    kwargs = settings(4, 0, 5, 4)
    expected, state = naive_memory_attention(query, key, value, **kwargs)
    for form in (chunk_memory_attention, cpp.memory_attention):
        options = {k: v for k, v in kwargs.items() if form is chunk_memory_attention or k != "linear"}
        output, final = form(query, key, value, **options)
        assert_close(form.__module__, output, expected, 2e-6)
        assert torch.equal(final.value, state.value)


def test_every_token_is_in_one_place():
    """With a constant feature map the state is a count of tokens: with sinks, window and memory it makes up all of them."""

    class Ones:
        output_dim = 1

        def weights(self):
            return ()

        def features(self, x):
            return torch.ones_like(x[..., :1])

    for *sizes, tokens in SIZES:
        linear = LinearPart(Ones(), Ones(), torch.zeros(HEADS, dtype=torch.float64))
        kwargs = settings(*sizes, linear)
        for form in (naive_memory_attention, chunk_memory_attention):
            _, state = form(*inputs(tokens), **kwargs)
            window, sinks, memory, block = sizes
            start = (tokens - 1) // block * block
            exact = (
                min(sinks, tokens) + min(memory, max(0, start - window - sinks)) + tokens - max(sinks, start - window)
            )
            exact = min(exact, tokens)
            assert state.recurrent[..., -1].unique().tolist() == [tokens - exact], (form.__name__, sizes)


def test_state_does_not_grow():
    kwargs = settings(6, 2, 5, 4)
    sizes = {k: v for k, v in kwargs.items() if k not in ("scale", "linear")}
    tensors = inputs(200, torch.float32)
    empty = empty_memory_state(tensors[1], tensors[2], **sizes)
    _, state = chunk_memory_attention(*tensors, **kwargs)
    assert [x.shape for x in state[:4]] == [x.shape for x in empty[:4]]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype, padded):
    """Where heads are fewer than threads, a head's blocks are divided; a part goes through the keys before its own."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 700, heads, 16, generator=generator).to(dtype) for heads in (6, 3, 3)]
    valid = torch.rand(2, 700, generator=generator) > 0.2 if padded else None
    kwargs = {"scale": 0.25, "window_size": 16, "num_sinks": 2, "num_memory_tokens": 21, "memory_block_size": 8}
    first = cpp.memory_attention(*(x[:, :100] for x in tensors), valid=None, **kwargs)[1]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 4, 5):
            torch.set_num_threads(count)
            for state in (None, first):  # as a sequence, and as the rest of one that ended in the middle of a block
                output, final = cpp.memory_attention(*tensors, valid=valid, state=state, **kwargs)
                found.append([output, *final[:4]])
    finally:
        torch.set_num_threads(threads)
    for again in (found[2:4], found[4:6]):
        for one, other in zip(found[:2], again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
