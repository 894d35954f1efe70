"""Every mixer with a recurrence against its card, written out token by token and head by head, in fp64.

The contracts compare forms of one mixer with each other; here the mixer itself is compared with what its page promises.
"""

import math

import pytest
import torch

from hf_hybrid import (
    GatedDeltaNetConfig,
    GLAConfig,
    JetBlockConfig,
    KimiDeltaConfig,
    LightningConfig,
    LinearAttentionConfig,
    SlidingWindowConfig,
)
from hf_hybrid.mixers import INITIALIZATIONS, build_mixer, list_mixers

from helpers import assert_close


HEADS, KV_HEADS, K, V, D, T = 4, 2, 6, 5, 12, 15
WINDOW, SINKS = 4, 2
RECURRENT = {
    "lightning": LightningConfig, "gla": GLAConfig, "gated_delta_net": GatedDeltaNetConfig, "kimi_delta": KimiDeltaConfig, "jet_block": JetBlockConfig,
}  # fmt: skip


def softplus(x):
    return torch.log1p(torch.exp(x))


def low_rank(part, x):
    y = part.up @ (part.down @ x)
    return y if part.bias is None else y + part.bias


def decays(mixer, x):
    """Decay of one token, `[H_s]` or `[H_s, K]`."""
    name, states = mixer.config_class.name, mixer.num_states
    if name == "lightning":
        return torch.tensor([math.exp(-(2.0 ** (-8.0 * h / states))) for h in range(1, states + 1)], dtype=torch.double)
    if name == "gla":
        logits = low_rank(mixer.decay, x).view(states, K)
        return torch.exp(torch.clamp(-softplus(-logits) / 16, min=-2.0))
    gates = mixer.gates
    if name == "kimi_delta":
        rate = softplus(low_rank(gates.decay, x).view(states, K)) * gates.log_rate.exp()[:, None]
        return torch.exp(torch.clamp(-rate, min=-5.0))
    return torch.exp(-gates.log_rate.exp() * softplus(gates.decay_weight @ x + gates.decay_bias))


def values_of(mixer, value, hidden):
    """`[T, H_kv, V]`: mixed with their predecessors, in `jet_block`."""
    if mixer.config_class.name != "jet_block":
        return value
    mixed = torch.zeros_like(value)
    part = mixer.convolution
    for t in range(T):
        y = part.down @ hidden[t]
        kernel = part.bias + (part.up @ (y * torch.sigmoid(y))).view(part.kernel_size, KV_HEADS, V)
        for i in range(min(part.kernel_size, t + 1)):
            mixed[t] += kernel[i] * value[t - i]
    return mixed


def recurrence(mixer, query, key, value, hidden):
    """`[T, H, V]`."""
    delta = mixer.config_class.name in ("gated_delta_net", "kimi_delta", "jet_block")
    value, output = values_of(mixer, value, hidden), query.new_zeros(T, HEADS, V)
    for head in range(HEADS):
        state_head, kv_head = head * mixer.num_states // HEADS, head * KV_HEADS // HEADS
        state = query.new_zeros(K, V)
        for t in range(T):
            q, k, v = query[t, head], key[t, kv_head], value[t, kv_head]
            state = decays(mixer, hidden[t])[state_head].reshape(-1, 1) * state
            if delta:
                q, k = (x / torch.sqrt(x @ x + 1e-6) for x in (q, k))
                beta = torch.sigmoid(mixer.gates.beta_weight[state_head] @ hidden[t])
                state = state + beta * torch.outer(k, v - state.T @ k)
            else:
                state = state + torch.outer(k, v)
            output[t, head] = K**-0.5 * state.T @ q
    return output


def exact_window(query, key, value):
    output = query.new_zeros(T, HEADS, V)
    for head in range(HEADS):
        kv_head = head * KV_HEADS // HEADS
        for t in range(T):
            seen = [j for j in range(t + 1) if j < SINKS or j > t - WINDOW]
            weights = torch.softmax(key[seen, kv_head] @ query[t, head] * K**-0.5, dim=0)
            output[t, head] = weights @ value[seen, kv_head]
    return output


def definition(mixer, query, key, value, hidden):
    stage = mixer.output_stage
    state = recurrence(mixer, query, key, value, hidden)
    state = stage.weight * state / torch.sqrt((state * state).mean(-1, keepdim=True) + 1e-6)
    if stage.gate is not None:
        gate = torch.stack([2 * torch.sigmoid(low_rank(stage.gate, x)).view(HEADS, V) for x in hidden])
        state = gate * state
    if not mixer.window_size:
        return state
    share = torch.sigmoid(stage.state_logit)[:, None]
    return share * state + (1 - share) * exact_window(query, key, value)


def new_mixer(config):
    mixer = build_mixer(
        config, num_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=K, value_dim=V, hidden_size=D, causal=True
    )
    mixer.init_weights()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return mixer.double()


def inputs():
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(1, T, *size, generator=generator, dtype=torch.double)
        for size in ((HEADS, K), (KV_HEADS, K), (KV_HEADS, V), (D,))
    ]


def test_every_mixer_has_a_definition_here():
    assert {*RECURRENT, "linear_attention", "sliding_window", "identity", "affine"} == set(list_mixers())


@pytest.mark.parametrize(
    "settings",
    [
        {"window_size": 0},
        {"window_size": 0, "state_per_query_head": True, "output_gate": False},
        {"window_size": WINDOW, "num_sink_tokens": SINKS, "gate_rank": 3},
    ],
    ids=["state", "state_per_query_head", "window"],
)
@pytest.mark.parametrize("name", RECURRENT)
def test_a_mixer_is_what_its_card_says(name, settings):
    mixer, tensors = new_mixer(RECURRENT[name](**settings)), inputs()
    with torch.no_grad():
        expected = definition(mixer, *(x[0] for x in tensors))
        assert_close(name, mixer(*tensors)[0][0], expected, 1e-12)


@pytest.mark.parametrize("name", ["gla", "kimi_delta"])
def test_decays_are_cut_where_the_card_says(name):
    mixer, tensors = new_mixer(RECURRENT[name](window_size=0)), inputs()
    decay = mixer.decay if name == "gla" else mixer.gates.decay
    with torch.no_grad():
        decay.bias.fill_(-100.0 if name == "gla" else 100.0)
        assert decays(mixer, tensors[3][0, 0]).max() <= math.exp(-2.0)
        assert_close(name, mixer(*tensors)[0][0], definition(mixer, *(x[0] for x in tensors)), 1e-12)


@pytest.mark.parametrize("window_size", [0, WINDOW])
def test_linear_attention_is_what_its_card_says(window_size):
    """Window, sinks and everything older under one normaliser; without a window, times a factor per head."""
    sinks = SINKS if window_size else 0
    mixer, tensors = (
        new_mixer(LinearAttentionConfig(window_size=window_size, num_sink_tokens=SINKS, feature_map="hedgehog")),
        inputs(),
    )
    query, key, value, _ = (x[0] for x in tensors)

    def features(weight, x):
        y = weight.T @ x * K**-0.25
        return torch.cat([torch.softmax(y, 0), torch.softmax(-y, 0)])

    expected = torch.zeros(T, HEADS, V, dtype=torch.double)
    with torch.no_grad():
        for head in range(HEADS):
            kv_head = head * KV_HEADS // HEADS
            for t in range(T):
                scores = {
                    j: (key[j, kv_head] @ query[t, head] * K**-0.5).item()
                    for j in range(t + 1)
                    if j < sinks or j > t - window_size
                }
                top = max(scores.values(), default=0.0)
                q = features(mixer.feature_map_q.weight[head], query[t, head])
                weights = torch.zeros(t + 1, dtype=torch.double)
                for j in range(t + 1):
                    if j in scores:
                        weights[j] = math.exp(scores[j] - top)
                    else:
                        factor = mixer.log_weight[head].exp() if window_size else 1.0
                        weights[j] = factor * (q @ features(mixer.feature_map_k.weight[kv_head], key[j, kv_head]))
                expected[t, head] = weights @ value[: t + 1, kv_head] / weights.sum()
            if not window_size:
                expected[:, head] *= mixer.output_scale[head]
        assert_close("linear_attention", mixer(*tensors)[0][0], expected, 1e-12)


def test_a_sliding_window_is_what_its_card_says():
    mixer, tensors = new_mixer(SlidingWindowConfig(window_size=WINDOW, num_sink_tokens=SINKS)), inputs()
    assert_close("window", mixer(*tensors)[0][0], exact_window(*(x[0] for x in tensors[:3])), 1e-12)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_fresh_mixer_begins_as_the_window(name):
    """`quiet_state`: the state has 1.8 % of the weight; `neutral_gates`: its gate is 1."""
    mixer = new_mixer(RECURRENT[name](window_size=WINDOW, num_sink_tokens=SINKS))
    mixer.float().init_weights(INITIALIZATIONS)
    mixer.double()
    query, key, value, hidden = inputs()
    share = mixer.output_stage.state_share()
    assert_close("share", share, torch.full_like(share, 1 / (1 + math.exp(4.0))), 1e-7)
    gate = 2 * torch.sigmoid(mixer.output_stage.gate(hidden))
    assert_close("gate", gate, torch.ones_like(gate), 0.1)
    output = mixer(query, key, value, hidden)[0][0]
    assert (output - exact_window(query[0], key[0], value[0])).abs().max() < 0.1
