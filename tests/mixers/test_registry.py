"""Names, settings and their errors."""

import pytest

from hf_hybrid import (
    GLAConfig,
    JetBlockConfig,
    KimiDeltaConfig,
    LightningConfig,
    LinearAttentionConfig,
    MixerConfig,
    SlidingWindowConfig,
    list_feature_maps,
    list_mixers,
)
from hf_hybrid.errors import HybridConfigError, UnknownMixerError
from hf_hybrid.mixers import LinearMixer, get_mixer, register_feature_map, register_mixer, resolve_mixer_config
from hf_hybrid.mixers.feature_maps import FeatureMap, get_feature_map


def test_names_are_listed():
    assert list_mixers() == [
        "affine", "gated_delta_net", "gla", "identity", "jet_block", "kimi_delta", "lightning", "linear_attention", "sliding_window",
    ]  # fmt: skip
    assert list_feature_maps() == ["dpfp", "elu", "hedgehog", "relu", "softmax", "taylor"]


def test_an_unknown_mixer_lists_the_closest():
    with pytest.raises(UnknownMixerError, match=r"got 'linear_atention'. Did you mean 'linear_attention'"):
        get_mixer("linear_atention")
    with pytest.raises(HybridConfigError, match=r"got 'hedgehogg'. Did you mean 'hedgehog'\?"):
        get_feature_map("hedgehogg")
    with pytest.raises(HybridConfigError, match="mixer must be a name, a dict or a MixerConfig; got 3"):
        resolve_mixer_config(3)


def test_a_config_survives_its_dict():
    for config in (LinearAttentionConfig(window_size=7, feature_dim=3), SlidingWindowConfig(num_sink_tokens=0)):
        assert MixerConfig.from_dict(config.to_dict()) == config == resolve_mixer_config(config.to_dict())
    with pytest.raises(HybridConfigError, match=r"has no setting 'window'; it has .* Did you mean 'window_size'\?"):
        MixerConfig.from_dict({"name": "sliding_window", "window": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_size": -1}, "linear_attention: window_size must be an integer >= 0; got -1"),
        ({"num_sink_tokens": 1.5}, "num_sink_tokens must be an integer >= 0; got 1.5"),
        ({"feature_dim": 0}, "feature_dim must be an integer >= 1; got 0"),
        ({"feature_map": "gelu"}, "feature_map must be one of dpfp, elu, hedgehog, relu, softmax, taylor; got 'gelu'"),
    ],
)
def test_settings_are_checked_when_set(settings, message):
    with pytest.raises(HybridConfigError, match=message):
        LinearAttentionConfig(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GLAConfig(gate_rank=0), "gla: gate_rank must be an integer >= 1; got 0"),
        (lambda: LightningConfig(output_gate="no"), "lightning: output_gate must be True or False; got 'no'"),
        (
            lambda: KimiDeltaConfig(state_per_query_head=1),
            "kimi_delta: state_per_query_head must be True or False; got 1",
        ),
        (lambda: JetBlockConfig(kernel_size=1), "jet_block: kernel_size must be an integer >= 2; got 1"),
    ],
)
def test_settings_of_gated_mixers_are_checked_when_set(make, message):
    with pytest.raises(HybridConfigError, match=message):
        make()


def test_sinks_need_a_window():
    assert LinearAttentionConfig(window_size=0).num_sink_tokens == 0


def test_a_window_needs_at_least_one_token():
    with pytest.raises(HybridConfigError, match="sliding_window: window_size must be an integer >= 1; got 0"):
        SlidingWindowConfig(window_size=0)


def test_a_name_is_taken_once():
    with pytest.raises(HybridConfigError, match="'sliding_window' is taken by SlidingWindow"):

        @register_mixer
        class Twice(LinearMixer):
            config_class = SlidingWindowConfig

    with pytest.raises(HybridConfigError, match="'elu' is taken by EluFeatureMap"):

        @register_feature_map("elu")
        class TwiceMap(FeatureMap):
            pass
