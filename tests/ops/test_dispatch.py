"""Which implementation runs, and the switch for fp32 matrix products."""

import pytest
import torch

from hf_hybrid.errors import HybridConfigError, MissingDependencyError
from hf_hybrid.ops import chunk, dispatch, fast_fp32_matmul, naive, step

from helpers import assert_close


def features(length):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.rand(2, length, heads, 8, generator=generator) for heads in (4, 2))
    return query, key, torch.randn(2, length, 2, 5, generator=generator)


@pytest.mark.parametrize("length", [1, 70])
def test_the_default_on_cpu_is_torch(length):
    tensors = features(length)
    expected = naive.naive_linear_attention(*tensors, output_final_state=True)
    for actual in (
        dispatch.linear_attention(*tensors, output_final_state=True),
        chunk.chunk_linear_attention(*tensors, output_final_state=True),
    ):
        assert_close("output", actual[0], expected[0], 2e-6)
        assert_close("state", actual[1], expected[1], 2e-6)
    if length == 1:
        assert_close("step", step.step_linear_attention(*tensors)[0], expected[0], 2e-6)


def test_unnormalised_output_carries_the_normaliser():
    tensors = features(33)
    output, _ = chunk.chunk_linear_attention(*tensors, normalize=False)
    assert output.shape[-1] == 6
    assert_close("ratio", output[..., :-1] / output[..., -1:], chunk.chunk_linear_attention(*tensors)[0], 2e-6)


@pytest.fixture
def environment(monkeypatch):
    def set_backend(name):
        monkeypatch.setenv("HF_HYBRID_OPS", name)
        dispatch.requested_backend.cache_clear()

    yield set_backend
    monkeypatch.undo()
    dispatch.requested_backend.cache_clear()


def test_the_environment_variable_is_checked(environment):
    environment("torh")
    with pytest.raises(
        HybridConfigError, match=r"HF_HYBRID_OPS must be one of torch, fla; got 'torh'. Did you mean 'torch'\?"
    ):
        dispatch.linear_attention(*features(3))
    environment("torch")
    dispatch.linear_attention(*features(3))


@pytest.mark.skipif(dispatch.fla_is_available(), reason="flash-linear-attention is installed")
def test_asking_for_fla_without_it_says_what_to_install(environment):
    environment("fla")
    with pytest.raises(MissingDependencyError, match=r"pip install hf_hybrid\[cuda\]"):
        dispatch.linear_attention(*features(3))


def test_the_fp32_switch_is_put_back_and_changes_no_precision():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), fast_fp32_matmul():
        # 1 + 2^-20 survives only if products are computed in fp32
        x = torch.eye(64) * (1 + 2**-20)
        assert torch.equal(x @ torch.eye(64), x)
        raise RuntimeError("inside")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
