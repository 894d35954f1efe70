"""Which implementation runs, how the kernels are built, and the switch for fp32 matrix products."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from hf_hybrid.errors import HybridConfigError, MissingDependencyError
from hf_hybrid.mixers import build_mixer, get_feature_map
from hf_hybrid.mixers.feature_maps import HedgehogFeatureMap
from hf_hybrid.ops import chunk, cpp, dispatch, fast_fp32_matmul, naive, step
from hf_hybrid.ops.cpp import build

from helpers import assert_close
from mixer_settings import MIXERS


needs_compiler = pytest.mark.skipif(
    build.kernels() is None, reason="the compiled kernels need a C++ compiler, and this machine has none"
)


def features(length, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.rand(2, length, heads, 8, generator=generator).to(dtype) for heads in (4, 2))
    return query, key, torch.randn(2, length, 2, 5, generator=generator).to(dtype)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_compiler)])
@pytest.mark.parametrize("length", [1, 70])
def test_every_backend_gives_the_same(length, backend):
    tensors = features(length)
    expected = naive.naive_linear_attention(*tensors, output_final_state=True)
    actual = dispatch.linear_attention(*tensors, output_final_state=True, backend=backend)
    assert_close("output", actual[0], expected[0], 2e-6)
    assert_close("state", actual[1], expected[1], 2e-6)
    if length == 1:
        assert_close("step", step.step_linear_attention(*tensors)[0], expected[0], 2e-6)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_compiler)])
@pytest.mark.parametrize("length", [1, 33])
def test_unnormalised_output_carries_the_normaliser(length, backend):
    tensors = features(length)
    output, _ = dispatch.linear_attention(*tensors, normalize=False, backend=backend)
    assert output.shape[-1] == 6
    assert_close("ratio", output[..., :-1] / output[..., -1:], chunk.chunk_linear_attention(*tensors)[0], 2e-6)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_compiler)])
@pytest.mark.parametrize("decay", [0.0, -1e-6, -0.7, -20.0, -1e4, -torch.inf])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_decays_at_their_limits(decay, per_channel, delta, backend):
    """Nothing forgotten, everything forgotten, and all between: finite, and equal to the recurrence."""
    query, key, value = features(50)
    decays = torch.full((2, 50, 2, 8) if per_channel else (2, 50, 2), decay)
    decays[:, 20:30] = -0.1  # and back: a later token must not suffer from an earlier one
    op, exact = dispatch.gated_linear_attention, naive.naive_gated_linear_attention
    kwargs = {"decay": decays, "scale": 0.5}
    if delta:
        op, exact = dispatch.gated_delta_rule, naive.naive_gated_delta_rule
        kwargs.update(beta=torch.full((2, 50, 2), 0.9), qk_l2norm=True)
    wide = {name: x.double() if torch.is_tensor(x) else x for name, x in kwargs.items()}
    expected, expected_state = exact(query.double(), key.double(), value.double(), output_final_state=True, **wide)
    output, state = op(query, key, value, output_final_state=True, backend=backend, **kwargs)
    # Torch takes differences of cumulative sums, as large as 640 after a chunk of decays of -20: half of their last digit is 3e-5. The kernels do so
    # per channel only, with sums below 128.
    tolerance = 3e-5 if backend == "torch" else 4e-6 if per_channel else 2e-6
    assert_close("output", output, expected, tolerance)
    assert_close("state", state, expected_state, tolerance)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_compiler)])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_weak_and_strong_decays_side_by_side(per_channel, delta, backend):
    """Tokens that keep everything beside tokens that keep e^-16: both sides of a rescaled chunk are far from 1, their product is not."""
    query, key, value = features(300)
    shape = (2, 300, 2, 8) if per_channel else (2, 300, 2)
    generator = torch.Generator().manual_seed(1)
    decay = -16.0 * (torch.rand(shape, generator=generator) < 0.7)
    gates = {"decay": decay.requires_grad_()}
    if delta:
        gates["beta"] = torch.rand(2, 300, 2, generator=generator).requires_grad_()
    forms = [dispatch.gated_linear_attention, naive.naive_gated_linear_attention]
    if delta:
        forms = [dispatch.gated_delta_rule, naive.naive_gated_delta_rule]
    settings = {"scale": 0.3, "output_final_state": True, **({"qk_l2norm": True} if delta else {})}
    results = []
    for form, dtype in zip(forms, (torch.float32, torch.float64), strict=True):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        own = {name: x.detach().to(dtype).requires_grad_() for name, x in gates.items()}
        output, state = form(*leaves, **own, **settings, **({"backend": backend} if dtype == torch.float32 else {}))
        weight = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
        grads = torch.autograd.grad((output * weight).sum() + state.sum(), [*leaves, *own.values()])
        with torch.no_grad():
            again = form(*leaves, **own, **settings, **({"backend": backend} if dtype == torch.float32 else {}))[0]
        results.append([output, again, state, *grads])
    for i, (x, y) in enumerate(zip(*results, strict=True)):
        assert_close(f"result {i}", x, y, 2e-6)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_compiler)])
def test_parallel_keys_do_not_break_the_delta_rule(backend):
    """Identical keys written at full strength: an inverse by series would overflow."""
    _, _, value = features(200)
    key = torch.ones(2, 200, 2, 8)
    kwargs = {"decay": torch.zeros(2, 200, 2), "beta": torch.ones(2, 200, 2), "scale": 1.0, "qk_l2norm": True}
    output, _ = dispatch.gated_delta_rule(key, key, value, backend=backend, **kwargs)
    assert_close("output", output, value, 1e-5)  # what was written last is what is read


@needs_compiler
def test_mixers_run_in_the_kernels_where_they_can(ops_backend, monkeypatch):
    ops_backend("cpp")

    def no_torch(*args, **kwargs):
        raise AssertionError("a torch form ran")

    for module in (chunk, step):
        for name in vars(module):
            if name.startswith(("chunk_", "step_", "bidirectional_")) and callable(getattr(module, name)):
                monkeypatch.setattr(module, name, no_torch)
    for settings in MIXERS.values():
        if settings.name == "linear_attention" and settings.num_memory_tokens:
            continue  # a state beside a memory is torch's
        mixer = build_mixer(
            settings, num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=6, hidden_size=32, causal=True
        )
        mixer.init_weights()
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [torch.randn(1, 40, *size).to(dtype) for size in ((4, 8), (2, 8), (2, 6), (32,))]
            with torch.no_grad():
                _, state = mixer(*tensors, output_final_state=True)
                mixer(*(x[:, :1] for x in tensors), state=state)


@needs_compiler
def test_what_the_kernels_cannot_do_runs_in_torch(ops_backend):
    ops_backend("cpp")

    class Own(HedgehogFeatureMap):  # inherits the name of a compiled map, not its meaning
        def features(self, x, weight):
            return super().features(x, weight) + 1.0

    maps = [Own(heads, 8) for heads in (4, 2)]
    for feature_map in maps:
        feature_map.init_weights()
    query, key, value = features(40)
    expected = naive.naive_linear_attention(query, key, value, feature_map_q=maps[0], feature_map_k=maps[1])[0]
    actual = dispatch.linear_attention(query, key, value, feature_map_q=maps[0], feature_map_k=maps[1])[0]
    assert_close("own map", actual, expected, 2e-6)
    for tensors in (features(40, torch.float64), features(40, torch.float16)):
        assert not cpp.can_run(*tensors)
        assert dispatch.linear_attention(*tensors)[0].dtype == tensors[0].dtype
    seen = []
    torch.func.vmap(lambda q, k, v: (seen.append(cpp.can_run(q, k, v)), q)[1])(*(x.unsqueeze(0) for x in features(5)))
    assert seen == [False]  # no address behind such a tensor


@needs_compiler
@pytest.mark.parametrize("name", ["elu", "hedgehog", "taylor"])
def test_strided_and_grouped_inputs_are_read_where_they_lie(name):
    """As transformers hands them over: heads before tokens, and key-value heads fewer than query heads."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 45, 24, generator=generator).transpose(1, 2) for heads in (6, 2, 2))
    maps = {f"feature_map_{x}": get_feature_map(name)(heads, 24) for x, heads in (("q", 6), ("k", 2))}
    for feature_map in maps.values():
        feature_map.init_weights()
    expected = naive.naive_linear_attention(query, key, value, **maps)[0]
    assert_close("output", dispatch.linear_attention(query, key, value, backend="cpp", **maps)[0], expected, 2e-6)


@needs_compiler
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_compiler)])
def test_one_token_of_strided_tensors(backend):
    """Views of something larger, a transposed state; asked to change it in place, too."""
    query, key, value = features(1)
    beta, decay = torch.rand(2, 1, 4)[..., 2:], -torch.rand(2, 1, 4)[..., :2]
    state = torch.randn(2, 8, 2, 5).transpose(1, 2)
    settings = {"decay": decay, "beta": beta, "scale": 1.0, "output_final_state": True}
    expected = naive.naive_gated_delta_rule(query, key, value, initial_state=state, **settings)
    for inplace in (False, True):
        actual = dispatch.gated_delta_rule(
            query, key, value, initial_state=state.detach(), inplace_final_state=inplace, backend=backend, **settings
        )
        for x, y in zip(actual, expected, strict=True):
            assert_close("step", x, y, 2e-6)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_compiler)])
def test_a_mask_of_numbers_means_what_it_says(backend):
    tensors = features(20)
    valid = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = dispatch.linear_attention(*tensors, valid=valid, backend=backend)[0]
    assert_close("output", dispatch.linear_attention(*tensors, valid=valid.long(), backend=backend)[0], expected, 2e-6)


def test_threads_share_the_work_and_change_nothing():
    tensors = features(300)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(dispatch.linear_attention(*tensors, backend="cpp")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)


def test_the_environment_variable_is_checked(ops_backend):
    ops_backend("torh")
    with pytest.raises(
        HybridConfigError, match=r"HF_HYBRID_OPS must be one of torch, cpp, fla; got 'torh'. Did you mean 'torch'\?"
    ):
        dispatch.linear_attention(*features(3))
    ops_backend("torch")
    assert dispatch.choose_backend(None, torch.zeros(1)) == "torch"
    with pytest.raises(HybridConfigError, match="backend must be one of torch, cpp, fla; got 'c'"):
        dispatch.linear_attention(*features(3), backend="c")


@pytest.mark.skipif(dispatch.fla_is_available(), reason="flash-linear-attention is installed")
def test_fla_is_for_gpus(ops_backend, monkeypatch):
    """Named in a call, it refuses tensors on a CPU; named for the process, they take what fits."""
    monkeypatch.setattr(dispatch, "fla_is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(HybridConfigError, match="backend=fla runs on a GPU; the tensors are on cpu. Move them"):
        dispatch.linear_attention(*features(3), backend="fla")
    ops_backend("fla")
    assert dispatch.choose_backend(None, torch.zeros(1)) == dispatch.default_backend("cpu")
    assert dispatch.choose_backend(None, torch.zeros(1, device="meta")) == "fla"


def test_asking_for_fla_without_it_says_what_to_install(ops_backend):
    ops_backend("fla")
    with pytest.raises(MissingDependencyError, match=r"pip install hf_hybrid\[cuda\]"):
        dispatch.linear_attention(*features(3))
    with pytest.raises(MissingDependencyError, match="backend=fla needs flash-linear-attention"):
        dispatch.linear_attention(*features(3), backend="fla")


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """The build as in a new process, with a cache folder of its own."""
    monkeypatch.setenv("HF_HYBRID_CACHE", str(tmp_path))
    caches = (build.kernels, dispatch.default_backend, dispatch.requested_backend)
    for function in caches:
        function.cache_clear()
    yield tmp_path / "kernels"
    monkeypatch.undo()
    for function in caches:
        function.cache_clear()


def test_without_a_compiler_the_ops_run_in_torch(fresh_build, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose_backend(None, torch.zeros(1)) == "torch"
        dispatch.linear_attention(*features(3))
    with pytest.raises(MissingDependencyError, match="backend=cpp needs a C\\+\\+ compiler that works"):
        dispatch.linear_attention(*features(3), backend="cpp")


def test_a_compiler_that_is_named_and_missing_is_reported(fresh_build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="CXX names 'no-such-compiler', which is not on the path"):
        assert dispatch.choose_backend(None, torch.zeros(1)) == "torch"


def test_a_compiler_that_fails_is_reported_once(fresh_build, monkeypatch):
    broken = fresh_build.parent / "broken"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no disk left' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match="could not be compiled with .*broken.*no disk left"):
        assert dispatch.choose_backend(None, torch.zeros(1)) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.linear_attention(*features(3))
    assert list(fresh_build.iterdir()) == []  # nothing half-made


@needs_compiler
def test_the_kernels_are_compiled_once(fresh_build):
    assert build.kernels() is not None
    made = {path: path.stat().st_mtime_ns for path in fresh_build.iterdir()}
    assert all(path.suffix == ".so" for path in made)
    build.kernels.cache_clear()
    assert build.kernels() is not None
    assert {path: path.stat().st_mtime_ns for path in fresh_build.iterdir()} == made


@needs_compiler
@pytest.mark.slow
def test_the_kernels_are_right_on_a_processor_with_shorter_vectors(tmp_path):
    """The same promises, compiled for the oldest 64-bit processors: 8 lanes, no fused multiply-add."""
    folder = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "CXXFLAGS": "-march=x86-64", "HF_HYBRID_CACHE": str(tmp_path)}
    if os.uname().machine not in ("x86_64", "AMD64"):
        pytest.skip("another kind of processor: its own vectors are what the other tests run")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-m",
        "not slow",
        "-k",
        "cpp",
        "mixers/test_contract.py",
    ]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=540)
    assert result.returncode == 0, result.stdout[-3000:]


def test_the_fp32_switch_is_put_back_and_changes_no_precision():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), fast_fp32_matmul():
        # 1 + 2^-20 survives only if products are computed in fp32
        x = torch.eye(64) * (1 + 2**-20)
        assert torch.equal(x @ torch.eye(64), x)
        raise RuntimeError("inside")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
