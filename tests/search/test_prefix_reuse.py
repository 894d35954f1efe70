"""Reuse of activations: exact, or off; and the same decision on every process."""

import pytest
import torch
import transformers

from hf_hybrid.errors import HybridError
from hf_hybrid.search.prefix_reuse import PrefixReuse

from tiny_models import SIZES, tiny_model


PLENTY = 1 << 30


def batches(count=3, length=8, seed=5):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(5, 99, (count, 2, length), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def attention_layers(model, kind="Attention"):
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith(kind)}


@torch.no_grad()
def evaluation(model, data):
    return [model(**batch).logits for batch in data]


def tiny_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def tiny_gemma3n():
    """Its last layers read the keys and values of earlier ones."""
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 4},
        head_dim=8,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["full_attention"] * 4,
    )
    return transformers.Gemma3nForCausalLM(config).eval()


def tiny_mixtral(**settings):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, **settings)
    return transformers.MixtralForCausalLM(config).eval()


def recorded(model, data, max_bytes=PLENTY, **kwargs):
    reuse = PrefixReuse(model, attention_layers(model), max_bytes)
    with reuse.recording(**kwargs):
        evaluation(model, data)
    return reuse


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_run_from_any_block_on_is_the_whole_run(family):
    model, data = tiny_model(family), batches()
    reuse, layers = recorded(model, data), attention_layers(model)
    assert reuse.verify(len(data)) and len(reuse.blocks) == 3
    ran = []
    for block in reuse.blocks:
        inner = next(
            module
            for module in block.modules()
            if isinstance(module, torch.nn.LayerNorm) or "Norm" in type(module).__name__
        )
        inner.register_forward_hook(lambda module, args, output, block=block: ran.append(block))
    for position, layer in enumerate(layers.values()):
        handle = layer.register_forward_hook(lambda module, args, output: (output[0] * 0.5, *output[1:]))
        expected = evaluation(model, data)
        ran.clear()
        with reuse.starting_at(position):
            actual = evaluation(model, data)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert set(ran) == set(reuse.blocks[position:])  # and the blocks before did not run
        handle.remove()
    assert all("forward" not in block.__dict__ for block in reuse.blocks)


def test_a_commit_changes_what_later_blocks_see():
    model, data = tiny_model(), batches()
    reuse, layers = recorded(model, data), attention_layers(model)
    assert reuse.verify(len(data))
    first, second, third = layers.values()
    first.register_forward_hook(lambda module, args, output: (output[0] * 0.5, *output[1:]))
    with reuse.recording_above(0):
        evaluation(model, data)
    second.register_forward_hook(lambda module, args, output: (output[0] * 2, *output[1:]))
    expected = evaluation(model, data)
    with reuse.starting_at(1):
        assert all(torch.equal(a, b) for a, b in zip(evaluation(model, data), expected, strict=True))


@pytest.mark.parametrize("make", [tiny_t5, tiny_gemma3n])
def test_hosts_whose_blocks_share_more_than_hidden_states_run_whole(make):
    model, data = make(), batches()
    reuse = recorded(model, data)
    assert not reuse.verify(len(data)) and not reuse.enabled and not reuse.blocks


def test_a_loss_that_depends_on_skipped_blocks_is_noticed():
    data = batches()
    assert recorded(tiny_mixtral(), data).verify(len(data))
    # logits are the same, the loss also counts what the routers of skipped blocks did
    assert not recorded(tiny_mixtral(output_router_logits=True), data).verify(len(data))


def test_activations_beyond_the_limit_are_not_kept():
    model, data = tiny_model(), batches()
    hidden_states = 3 * 3 * 2 * 8 * 32 * 4  # batches, blocks, rows, tokens, hidden size, bytes
    inputs = 3 * 2 * (2 * 8) * 8  # batches, input_ids and labels, tokens, bytes
    assert recorded(model, data, hidden_states + inputs).verify(len(data))
    for kept in ({}, {"only_first_batch": True}):
        small = recorded(model, data, hidden_states + inputs - 1, **kept)
        assert not any(small._seen.inputs) or kept  # let go of as soon as it is known
        assert not small.verify(len(data)) and not small.enabled


def test_the_first_batch_is_enough_to_decide():
    model, data = tiny_model(), batches()
    reuse = recorded(model, data, only_first_batch=True)
    assert [len(inputs) for inputs in reuse._seen.inputs] == [1, 1, 1]
    assert reuse.verify(len(data))


def test_a_model_that_runs_on_its_own_account_is_noticed():
    model, data = tiny_model(), batches()
    assert not recorded(model, [*data, data[0]]).verify(len(data))  # one run more than there are batches
    assert not recorded(model, data).verify(0)
    reuse = PrefixReuse(model, attention_layers(model), PLENTY)
    with reuse.recording():
        evaluation(model, data)
        with torch.no_grad():
            reuse.block_of["model.layers.1.self_attn"](
                torch.zeros(1, 4, 32), position_embeddings=(torch.ones(1, 4, 8),) * 2
            )
    assert not reuse.verify(len(data))


def test_other_batches_are_refused_after_having_been_run_whole():
    model, data = tiny_model(), batches()
    reuse = recorded(model, data)
    assert reuse.verify(len(data))
    for other in (data[::-1], data[:2], [*data, data[0]], batches(length=5)):
        expected = evaluation(model, other)
        with (
            pytest.raises(HybridError, match="The validation batches changed between two trials"),
            reuse.starting_at(2),
        ):
            actual = evaluation(model, other)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_missing_values_among_the_inputs_are_no_change():
    model = tiny_model()
    data = [{"input_ids": batch["input_ids"], "logits_to_keep": torch.tensor([0, 1])} for batch in batches()]
    assert recorded(model, data).verify(3)
    from hf_hybrid.search.prefix_reuse import _same

    gap = {"x": torch.tensor([1.0, float("nan")])}
    assert _same(gap, {"x": gap["x"].clone()}) and not _same(gap, {"x": torch.tensor([float("nan"), 1.0])})


def test_a_forward_of_the_block_itself_is_put_back():
    model, data = tiny_model(), batches()
    block = model.model.layers[0]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    wrapped = block.__dict__["forward"]
    reuse = recorded(model, data)
    assert reuse.verify(len(data)) and block.__dict__["forward"] is wrapped


def test_layers_outside_of_blocks_run_whole():
    attention = torch.nn.Linear(4, 4)
    reuse = PrefixReuse(torch.nn.Sequential(attention), {"0": attention}, PLENTY)
    assert not reuse.enabled
    with reuse.recording():
        pass
    assert not reuse.verify(0)
    assert not PrefixReuse(tiny_model(), {}, PLENTY).enabled


def test_layers_inside_an_adapter_model_are_found():
    from peft import LoraConfig, get_peft_model

    base, data = tiny_model(), batches()
    layers = attention_layers(base)  # named as the base model names them
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    reuse = PrefixReuse(model, layers, PLENTY)
    with reuse.recording():
        evaluation(model, data)
    assert reuse.verify(len(data)) and reuse.position("model.layers.2.self_attn") == 2
    with reuse.recording(), torch.no_grad():
        evaluation(model, data)
        model.generate(data[0]["input_ids"], max_new_tokens=2, do_sample=False)  # does not go through the outer forward
    assert not reuse.verify(len(data))
