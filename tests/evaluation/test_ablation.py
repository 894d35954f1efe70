"""What the state of a window mixer contributes, and training it to do without the window."""

import pytest
import torch

from hf_hybrid import LinearAttentionConfig, SlidingWindowConfig, ablate, convert_to_hybrid, state_share
from hf_hybrid.errors import HybridConfigError
from hf_hybrid.mixers import GatedDeltaNetConfig
from hf_hybrid.objectives.local import start_distillation_
from hf_hybrid.surgery import hybrid_layers, prepare_distillation_

from helpers import assert_close
from tiny_models import perturb_mixers, tiny_llava, tiny_model


def tokens(rows=2, length=40, seed=0):
    return {"input_ids": torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(seed))}


CONFIGS = [
    LinearAttentionConfig(window_size=4, num_sink_tokens=1),
    GatedDeltaNetConfig(window_size=4, num_sink_tokens=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_without_its_state_a_mixer_is_the_sliding_window(config):
    hybrid = perturb_mixers(convert_to_hybrid(tiny_model(), config))
    window = convert_to_hybrid(tiny_model(), SlidingWindowConfig(window_size=4, num_sink_tokens=1))
    with torch.no_grad():
        whole = hybrid(**tokens()).logits
        with ablate(hybrid, "state") as ablated:
            assert ablated is hybrid
            assert_close("logits", hybrid(**tokens()).logits, window(**tokens()).logits, 1e-5)
        assert torch.equal(hybrid(**tokens()).logits, whole)  # and back


def test_without_its_window_the_state_takes_in_every_token():
    config = LinearAttentionConfig(window_size=4, num_sink_tokens=1)
    hybrid = perturb_mixers(convert_to_hybrid(tiny_model(), config))
    plain = convert_to_hybrid(tiny_model(), LinearAttentionConfig(window_size=0))
    weights = {name: p for name, p in hybrid.state_dict().items() if not name.endswith("log_weight")}
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("output_scale") for name in missing)  # 1, as there
    with torch.no_grad(), ablate(hybrid, "window"):
        assert_close("logits", hybrid(**tokens()).logits, plain(**tokens()).logits, 1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_generation_works_while_a_part_is_out(config):
    hybrid = perturb_mixers(convert_to_hybrid(tiny_model(), config))
    for part in ("state", "window"):
        with ablate(hybrid, part):
            cached = hybrid.generate(**tokens(1, 20), max_new_tokens=6, do_sample=False)
            plain = hybrid.generate(**tokens(1, 20), max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(cached, plain)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_share_of_the_state_is_measured(config):
    hybrid = convert_to_hybrid(tiny_model(), config)
    mixers = [layer.hybrid for layer in hybrid_layers(hybrid).values()]
    weight = "log_weight" if config.name == "linear_attention" else "output_stage.state_logit"
    shares = []
    for value in (-60.0, -4.0, 2.0):
        for mixer in mixers:
            with torch.no_grad():
                mixer.get_parameter(weight).fill_(value)
        shares.append(list(state_share(hybrid, [tokens(), tokens(seed=1)]).values()))
    assert len(shares[0]) == len(mixers) == 3
    assert max(shares[0]) < 1e-5  # a window in disguise
    for quiet, some, much in zip(*shares, strict=True):
        assert quiet < some < much
    assert all(mixer.ablated is None for mixer in mixers)


def test_padding_is_left_out_of_the_share():
    hybrid = convert_to_hybrid(tiny_model(), LinearAttentionConfig(window_size=4))
    row = tokens(1, 30)["input_ids"]
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), row], dim=1)
    mask = (torch.arange(39) >= 9).long()[None]
    plain = state_share(hybrid, [{"input_ids": row}])
    other = state_share(hybrid, [{"input_ids": padded, "attention_mask": mask}])
    for name, share in plain.items():
        assert abs(other[name] - share) < 1e-4


def test_a_training_layer_loses_its_window_now_and_then():
    """With a dropout of one half a layer's loss takes two values; its recomputation in backward sees the same draw."""
    model = prepare_distillation_(tiny_model(), LinearAttentionConfig(window_size=4))
    objective = start_distillation_(model, window_dropout=0.5)
    model.train()
    losses = torch.stack([model(**tokens())["block_losses"] for _ in range(12)])
    for column in losses.T:
        assert len({round(value, 6) for value in column.tolist()}) == 2
    gradients = {}
    for recompute in (True, False):
        objective.recompute = recompute
        model.zero_grad()
        torch.manual_seed(1)
        model(**tokens())["loss"].backward()
        gradients[recompute] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert gradients[True]
    for x, y in zip(gradients[True], gradients[False], strict=True):
        assert torch.equal(x, y)


def test_bad_calls_say_what_is_wrong():
    hybrid = convert_to_hybrid(tiny_model(), LinearAttentionConfig(window_size=4))
    with (
        pytest.raises(HybridConfigError, match="part must be 'state' or 'window'; got 'sinks'"),
        ablate(hybrid, "sinks"),
    ):
        pass
    plain = convert_to_hybrid(tiny_model(), LinearAttentionConfig(window_size=0))
    with pytest.raises(HybridConfigError, match="no mixer with both a window and a state"):
        state_share(plain, [tokens()])


def test_shares_need_something_to_measure():
    hybrid = convert_to_hybrid(tiny_model(), CONFIGS[0])
    with pytest.raises(HybridConfigError, match="state_share: batches is empty"):
        state_share(hybrid, [])
    with (
        ablate(hybrid, "state"),
        pytest.raises(HybridConfigError, match="ablated already, so that nothing can be compared"),
    ):
        state_share(hybrid, [tokens()])
    assert state_share(hybrid, [{**tokens(), "use_cache": True}]) == state_share(hybrid, iter([tokens()]))


def test_only_mixers_that_run_have_a_share():
    """A mixer that is switched off, or whose tower saw nothing, is no sliding window in disguise."""
    model = convert_to_hybrid(tiny_llava(), LinearAttentionConfig(window_size=4, num_sink_tokens=1))
    shares = state_share(model, [tokens()])
    assert len(shares) == 2 and all("language_model" in name for name in shares)
    switched_off = prepare_distillation_(tiny_model(), CONFIGS[0]).eval()
    with pytest.raises(
        HybridConfigError, match="batches must reach a mixer; got none that does. Switch linear layers on"
    ):
        state_share(switched_off, [tokens()])


def test_some_heads_of_a_layer_have_a_share_too():
    name = "model.layers.1.self_attn"
    hybrid = convert_to_hybrid(tiny_model(), CONFIGS[0], heads={name: [1]})
    window = convert_to_hybrid(tiny_model(), SlidingWindowConfig(window_size=4, num_sink_tokens=1), heads={name: [1]})
    perturb_mixers(hybrid)
    assert list(state_share(hybrid, [tokens()])) == [f"{name}.hybrid"]
    with torch.no_grad(), ablate(hybrid, "state"):
        assert_close("logits", hybrid(**tokens()).logits, window(**tokens()).logits, 1e-5)
