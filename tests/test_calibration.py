"""Starting values read off the pretrained layers."""

import contextlib
import gc
import logging

import pytest
import torch

from hf_hybrid import HybridTrainer, LinearAttentionConfig, calibrate_mixers, convert_to_hybrid
from hf_hybrid.conversion.layer import hybrid_layers, is_hybrid_attention
from hf_hybrid.distillation.calibration import NUM_SINKS, Call, look_back_histogram, median_distance
from hf_hybrid.errors import HybridConfigError
from hf_hybrid.mixers import INITIALIZATIONS, GatedDeltaNetConfig, GLAConfig, LightningConfig, build_mixer
from hf_hybrid.surgery import prepare_distillation_

from conftest import token_dataset
from helpers import assert_close, toy_arguments
from tiny_models import tiny_model


SIZES = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "value_dim": 8, "hidden_size": 32, "causal": True}


def batches(count=2, rows=2, length=24):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(5, 99, (rows, length), generator=generator)} for _ in range(count)]


@contextlib.contextmanager
def warns_in_log(name):
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def mixers_of(model):
    return [module.hybrid for module in model.modules() if is_hybrid_attention(module)]


def call_of(query, key, value=None, valid=None, segments=None):
    return Call(query, key, key if value is None else value, None, valid, segments)


def looks_back(by, length=24):
    """Queries and keys of one head, `[1, T, 1, T]`, whose attention sits on the token `by` positions back."""
    key = 30 * torch.eye(length)
    return key.roll(-by, dims=-1).view(1, length, 1, -1), key.view(1, length, 1, -1)


def test_the_look_back_of_known_attention_is_found():
    """A head that attends to the token three positions back, and one that attends to itself."""
    mixer = build_mixer(LightningConfig(window_size=0), **{**SIZES, "num_heads": 2})
    (far, key), (near, _) = looks_back(3), looks_back(0)
    histogram = look_back_histogram(mixer, call_of(torch.cat([far, near], dim=2), key))
    assert histogram.shape == (2, 24)
    assert_close("three back", histogram[0, 3], torch.tensor(20.0 - 3), 1e-4)  # those who see a token that is no sink
    assert_close("self", histogram[1, 0], torch.tensor(20.0), 1e-4)
    distances = median_distance(histogram)
    assert 3 <= distances[0] <= 4
    assert distances[1] == 1.0  # the least there is


def test_the_look_back_of_padded_and_packed_rows_is_theirs_alone():
    """What sinks are is counted from a sequence's own first token; nothing looks across sequences; many queries go block by block."""
    torch.manual_seed(0)
    mixer = build_mixer(LightningConfig(window_size=0), **SIZES)
    query, key = torch.randn(2, 30, 4, 8), torch.randn(2, 30, 2, 8)
    alone = [
        look_back_histogram(mixer, call_of(query[:1, :20], key[:1, :20])),
        look_back_histogram(mixer, call_of(query[:1, 20:], key[:1, 20:])),
    ]
    together = look_back_histogram(mixer, call_of(query[:1], key[:1], segments=torch.tensor([20 * [0] + 10 * [1]])))
    assert_close("packed", together[:, :20], alone[0] + torch.nn.functional.pad(alone[1], (0, 10)), 1e-6)
    assert not together[:, 20:].any()
    valid = torch.ones(1, 37, dtype=torch.bool)
    valid[:, :7] = False
    padded = [torch.nn.functional.pad(x[:1], (0, 0, 0, 0, 7, 0), value=3.0) for x in (query, key)]
    plain = look_back_histogram(mixer, call_of(query[:1], key[:1]))
    assert_close("padded", look_back_histogram(mixer, call_of(*padded, valid=valid))[:, :30], plain, 1e-6)
    assert NUM_SINKS == 4
    assert_close("mass", plain.sum(-1) < 26.0, torch.ones(4) > 0, 0)
    long = [torch.randn(1, 600, heads, 8) for heads in (4, 2)]
    weights = (long[0].transpose(1, 2) @ long[1].transpose(1, 2).repeat_interleave(2, 1).mT * 8**-0.5).double()
    weights = weights.masked_fill(~torch.ones(600, 600).tril().bool(), -torch.inf).softmax(-1)
    histogram = look_back_histogram(mixer, call_of(*long))
    for distance in (0, 1, 255, 256, 595):
        mass = weights.diagonal(-distance, 2, 3)[..., NUM_SINKS:].sum(-1)[0]
        assert_close(f"distance {distance}", histogram[:, distance], mass, 1e-5)


def test_median_distance_interpolates():
    flat = torch.ones(1, 10)
    assert_close("flat", median_distance(flat), torch.tensor([5.0]), 1e-6)
    assert_close("steep", median_distance(torch.tensor([[0.0, 0.0, 4.0, 4.0]])), torch.tensor([3.0]), 1e-6)


@pytest.mark.parametrize(
    "config", [GLAConfig(window_size=0), GatedDeltaNetConfig(window_size=0, state_per_query_head=True)]
)
def test_decays_start_at_the_measured_half_life(config):
    mixer = build_mixer(config, **SIZES)
    mixer.init_weights()
    half_lives = torch.tensor([3.0, 40.0] if mixer.num_states == 2 else [3.0, 10.0, 40.0, 200.0])
    mixer.set_half_lives(half_lives)
    hidden = torch.zeros(1, 1, 32)  # nothing data-dependent
    if config.name == "gla":
        decay = torch.nn.functional.logsigmoid(mixer.decay(hidden)).unflatten(-1, (2, 8)).mean(-1) / mixer.temperature
    else:
        decay = mixer.gates(hidden, None)[0]
    assert_close("half", decay[0, 0].exp() ** half_lives, torch.full_like(half_lives, 0.5), 1e-5)


def test_calibration_brings_the_students_closer_on_a_real_layer():
    """On a toy model and before any training: every step helps, and the two together most."""
    losses = {}
    for names in ((), ("half_lives",), ("output_scale",), ("half_lives", "output_scale")):
        model = prepare_distillation_(tiny_model(), GatedDeltaNetConfig(window_size=0))
        calibrate_mixers(model, batches(), **{name: name in names for name in ("half_lives", "output_scale")})
        model.train()
        losses[names] = model(**batches(1, rows=8)[0])["loss"].item()
    assert losses[("output_scale",)] < losses[()]
    assert losses[("half_lives", "output_scale")] < losses[("half_lives",)]
    assert losses[("half_lives", "output_scale")] < losses[()]


def test_a_converted_model_can_be_calibrated_and_stays_in_its_mode():
    model = convert_to_hybrid(tiny_model(), GLAConfig())
    before = [mixer.output_stage.weight.clone() for mixer in mixers_of(model)]
    calibrate_mixers(model, batches())
    assert not model.training
    assert all(mixer.ablated is None for mixer in mixers_of(model))
    for old, mixer in zip(before, mixers_of(model), strict=True):
        assert not torch.equal(old, mixer.output_stage.weight)
        assert (mixer.output_stage.weight > 0.0).all()


@pytest.mark.parametrize("window_size", [0, 6])
def test_padding_does_not_count(window_size):
    """Left padding and other lengths leave the measured values as they are."""
    row = torch.randint(5, 99, (1, 20), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), row], dim=1)
    mask = torch.cat([torch.zeros(1, 7, dtype=torch.long), torch.ones_like(row)], dim=1)
    values = []
    for batch in ({"input_ids": row}, {"input_ids": padded, "attention_mask": mask}):
        model = convert_to_hybrid(tiny_model(), GatedDeltaNetConfig(window_size=window_size))
        calibrate_mixers(model, [batch])
        values.append([(m.gates.decay_bias.clone(), m.output_stage.weight.clone()) for m in mixers_of(model)])
    for plain, other in zip(*values, strict=True):
        for x, y in zip(plain, other, strict=True):
            assert_close("value", y, x, 1e-4)


@pytest.mark.parametrize("window_size", [0, 6])
def test_the_output_scale_is_the_least_squares_one(window_size):
    """No other factor brings the layer closer to its softmax."""
    torch.manual_seed(0)
    loud = GLAConfig(window_size=window_size), [0]  # the state at the weight of the window
    model = convert_to_hybrid(tiny_model().double(), *loud, initialization="neutral_gates")
    calibrate_mixers(model, batches(1), half_lives=False)
    (mixer,) = mixers_of(model)
    assert (mixer.output_stage.weight > 2e-3).all()  # no head asks for the other sign
    calls = []
    mixer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(args), with_kwargs=True)
    model(**batches(1)[0])
    query, key, value, hidden = calls[0]
    target = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)

    def error(factor):
        mixer.scale_output(torch.full((4,), factor))
        distance = (mixer(query, key, value, hidden)[0] - target).square().sum((0, 1, 3))
        mixer.scale_output(torch.full((4,), 1 / factor))
        return distance

    with torch.no_grad():
        best = error(1.0)
        for factor in (0.9, 1.1):
            assert (error(factor) > best).all()


def test_a_purely_linear_layer_is_brought_to_the_scale_of_its_softmax():
    model = convert_to_hybrid(tiny_model(), LinearAttentionConfig(window_size=0))
    calibrate_mixers(model, batches())
    for mixer in mixers_of(model):
        assert not (mixer.output_scale == 1.0).any()
    bidirectional = build_mixer(LinearAttentionConfig(), **{**SIZES, "causal": False})
    bidirectional.init_weights()
    tensors = [torch.randn(1, 9, *size) for size in ((4, 8), (2, 8), (2, 8))]
    before = bidirectional(*tensors)[0]
    bidirectional.scale_output(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    factors = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    assert_close("scaled", bidirectional(*tensors)[0], before * factors, 1e-6)


def test_texts_of_sinks_alone_say_nothing_of_half_lives():
    model = convert_to_hybrid(tiny_model(), GLAConfig())
    before = [mixer.decay.bias.clone() for mixer in mixers_of(model)]
    with warns_in_log("hf_hybrid.distillation.calibration") as messages:
        calibrate_mixers(model, batches(length=3), output_scale=False)
    assert any("too short to say how long layers remember" in message for message in messages)
    for old, mixer in zip(before, mixers_of(model), strict=True):
        assert torch.equal(mixer.decay.bias, old)


def test_mixers_that_need_none_are_left_alone():
    model = convert_to_hybrid(tiny_model(), LinearAttentionConfig(window_size=4))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    calibrate_mixers(model, batches())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_bad_calls_say_what_is_wrong():
    with pytest.raises(
        HybridConfigError, match="the model has no mixers. Call prepare_distillation_ or convert_to_hybrid"
    ):
        calibrate_mixers(tiny_model(), batches())
    with pytest.raises(HybridConfigError, match="batches is empty"):
        calibrate_mixers(convert_to_hybrid(tiny_model(), "gla"), [])


def test_each_starting_value_can_be_left_out():
    def start(config, without):
        mixer = build_mixer(config, **SIZES)
        torch.manual_seed(0)
        mixer.init_weights([name for name in INITIALIZATIONS if name != without])
        return mixer

    linear = LinearAttentionConfig(window_size=4)
    assert torch.equal(start(linear, None).feature_map_k.weight[0], torch.eye(8))
    assert not torch.equal(start(linear, "identity_maps").feature_map_k.weight[0], torch.eye(8))
    assert (start(linear, None).log_weight == -4.0).all()
    assert (start(linear, "quiet_state").log_weight == 0.0).all()
    gated = GatedDeltaNetConfig()
    quiet, loud = (start(gated, without).output_stage.gate.up.std() for without in (None, "neutral_gates"))
    assert loud > 10 * quiet
    assert (start(gated, "quiet_state").output_stage.state_logit == 0.0).all()


def test_the_trainer_calibrates_fresh_students_and_only_those(tmp_path):
    def decays(trainer):
        return torch.stack([site.hybrid.gates.decay_bias.detach().clone() for site in trainer.distill_sites.values()])

    def new_trainer(folder, **arguments):
        return HybridTrainer(
            tiny_model(), "gated_delta_net", toy_arguments(folder, max_steps=1, learning_rate=0.0, **arguments),
            train_dataset=token_dataset(16),
        )  # fmt: skip

    trainer = new_trainer(tmp_path / "with")
    fresh = decays(trainer)
    trainer.train()
    assert not torch.equal(decays(trainer), fresh)
    calibrated = decays(trainer)
    trainer.args.output_dir = str(tmp_path / "again")
    trainer.train()  # goes on from what was learnt
    assert torch.equal(decays(trainer), calibrated)

    trainer = new_trainer(tmp_path / "without", initialization="identity_maps,quiet_state")
    fresh = decays(trainer)
    trainer.train()
    assert torch.equal(decays(trainer), fresh)


class Rows(torch.utils.data.IterableDataset):
    """Rows that can only be read one after the other, with a column that no model takes."""

    def __iter__(self):
        for index in range(64):
            ids = [(7 * index + 3 * place) % 90 + 5 for place in range(24)]
            yield {"input_ids": ids, "labels": ids, "text": "abc"}


def test_the_trainer_calibrates_on_datasets_of_any_kind(tmp_path):
    """Columns the model does not take are dropped; a dataset without a length is read from its start; the sample of another follows the seed."""
    trainer = HybridTrainer(
        tiny_model(), "gla", toy_arguments(tmp_path / "a", max_steps=1, learning_rate=0.0), train_dataset=Rows()
    )
    trainer.train()
    weights = [site.hybrid.output_stage.weight for site in trainer.distill_sites.values()]
    assert not any((weight == 1.0).any() for weight in weights)
    scales = []
    for run, seed in enumerate((1, 1, 2)):
        trainer = HybridTrainer(
            tiny_model(), "lightning", toy_arguments(tmp_path / str(run), max_steps=1, learning_rate=0.0, seed=seed),
            train_dataset=token_dataset(64),
        )  # fmt: skip
        trainer.train()
        scales.append(next(iter(trainer.distill_sites.values())).hybrid.output_stage.weight.clone())
    assert torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[0], scales[2])


def test_arguments_are_checked(tmp_path):
    with pytest.raises(
        HybridConfigError,
        match="initialization must be 'all', 'none', or some of .*; got 'half_life'. Did you mean 'half_lives'",
    ):
        toy_arguments(tmp_path, initialization="half_life")
    with pytest.raises(HybridConfigError, match="got 3"):
        toy_arguments(tmp_path, initialization=3)
    assert toy_arguments(tmp_path).initializations == INITIALIZATIONS
    assert toy_arguments(tmp_path, initialization="none").initializations == ()
    chosen = toy_arguments(tmp_path, initialization="half_lives, quiet_state")
    assert chosen.initializations == ("half_lives", "quiet_state")
    with pytest.raises(HybridConfigError, match="calibration_batches must be an integer >= 1; got 0"):
        toy_arguments(tmp_path, calibration_batches=0)
    for wrong in (1.0, "much"):
        with pytest.raises(HybridConfigError, match=r"window_dropout must be a number in \[0, 1\); got"):
            toy_arguments(tmp_path, window_dropout=wrong)
    with pytest.raises(HybridConfigError, match="got 'gate'"):
        prepare_distillation_(tiny_model(), "gla", initialization=["gate"])
    with pytest.raises(HybridConfigError, match="got 'gate'"):
        convert_to_hybrid(tiny_model(), "gla", initialization="gate")


@pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op:FutureWarning")
def test_measuring_local_losses_holds_on_to_nothing():
    """Without gradients no graph is kept: a checkpointed forward whose backward never comes would never be freed."""
    model = prepare_distillation_(tiny_model(), GLAConfig())
    model.train()
    with torch.no_grad():
        for batch in batches(3, rows=3, length=23):
            assert not model(**batch)["loss"].requires_grad
    gc.collect()
    alive = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.shape == (3, 23, 32)]
    assert not alive


def test_an_affine_map_takes_its_best_fit():
    """No other map of the layer's input is closer to the softmax's output on the same tokens, and noise is farther."""
    model = prepare_distillation_(tiny_model(), "affine")
    batches = [
        {"input_ids": torch.randint(3, 99, (8, 40), generator=torch.Generator().manual_seed(i))} for i in range(2)
    ]

    def loss():
        with torch.no_grad():
            return sum(model.train()(**batch)["loss"].item() for batch in batches)

    nothing = loss()
    calibrate_mixers(model, batches)
    fitted = loss()
    assert fitted < 0.6 * nothing
    generator = torch.Generator().manual_seed(0)
    for layer in hybrid_layers(model).values():
        with torch.no_grad():
            layer.hybrid.weight.add_(0.02 * torch.randn(layer.hybrid.weight.shape, generator=generator))
    assert loss() > fitted


def test_padding_is_not_in_an_affine_fit():
    ids = torch.randint(3, 99, (4, 30), generator=torch.Generator().manual_seed(0))
    weights = []
    for padded in (False, True):
        model = prepare_distillation_(tiny_model(), "affine")
        batch = {"input_ids": ids}
        if padded:
            batch = {"input_ids": torch.cat([ids, torch.zeros(4, 7, dtype=torch.long)], 1)}
            batch["attention_mask"] = (batch["input_ids"] != 0).long()
        calibrate_mixers(model, [batch])
        weights.append(torch.cat([layer.hybrid.weight.flatten() for layer in hybrid_layers(model).values()]))
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-3)
