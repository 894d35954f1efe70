"""Masks [B, H, Q, KV] that users pass, or `generate` for a static cache: followed, or refused; never ignored."""

import pytest
import torch
import transformers
from backbones.pictures import picture_inputs
from backbones.toy_models import toy_model
from torch.nn.attention.flex_attention import create_block_mask

from hf_hybrid import convert_to_hybrid
from hf_hybrid.errors import UnsupportedModelError
from hf_hybrid.surgery import prepare_distillation_

from helpers import SMALL_MIXER, assert_close
from tiny_models import perturb_mixers, tiny_llava, tiny_model


GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "disable_compile": True}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}


def hybrid(family="llama", layers=None, **overrides):
    return perturb_mixers(convert_to_hybrid(tiny_model(family, **overrides), SMALL_MIXER, layers))


def tokens(batch=2, length=9, seed=0):
    return torch.randint(5, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def causal_mask(length, dtype=torch.bool, batch=2):
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1).clone()
    return (
        mask if dtype == torch.bool else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("layers", [[0], None])
def test_a_4d_mask_that_hides_padding_and_the_future_is_followed(dtype, layers):
    model, ids = hybrid(layers=layers), tokens()
    padded = torch.cat([torch.full((2, 3), 9), ids], dim=1)
    two = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (two.cumsum(-1) - 1).clamp_min(0)
    mask = causal_mask(12, dtype)
    mask[..., :3] = False if dtype == torch.bool else torch.finfo(dtype).min
    with torch.no_grad():
        expected = model(padded, attention_mask=two, position_ids=positions).logits
        actual = model(padded, attention_mask=mask, position_ids=positions).logits
        assert_close("4D", actual[:, 3:], expected[:, 3:], 1e-5)
        assert_close("plain", model(ids, attention_mask=causal_mask(9, dtype)).logits, model(ids).logits, 1e-5)


def two_documents(mask):
    mask[..., 4:, :4] = False
    return mask


def first_token_hidden_from_one(mask):
    mask[..., 3, 0] = False


def one_head_sees_less(mask):
    mask[:, 1, 4:, :4] = False


@pytest.mark.parametrize("layers", [[0], None])
@pytest.mark.parametrize(
    "change",
    [first_token_hidden_from_one, one_head_sees_less, lambda mask: first_token_hidden_from_one(two_documents(mask))],
)
def test_a_4d_mask_that_hides_more_is_refused(change, layers):
    model, mask = hybrid(layers=layers), causal_mask(9).expand(-1, 4, -1, -1).clone()
    change(mask)
    for call in (lambda: model(tokens(), attention_mask=mask), lambda: model(tokens(), mask)):
        with pytest.raises(
            UnsupportedModelError,
            match=r"padding, the future and other packed sequences; the 4D attention mask of shape \[2, 4, 9, 9\] hides more",
        ):
            call()


def test_a_4d_mask_with_numbers_is_refused_and_one_of_softmax_layers_is_not():
    mask = causal_mask(9, torch.float32)
    mask[..., 3, 1] = -0.5
    with pytest.raises(UnsupportedModelError, match="adds numbers to scores"):
        hybrid()(tokens(), attention_mask=mask)
    model = hybrid()
    for layer in model.model.layers:
        layer.self_attn.linear_heads = ()
    assert model(tokens(), attention_mask=mask).logits.isfinite().all()


def test_a_4d_mask_over_a_cache_is_followed():
    model, ids = hybrid(), tokens()
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        piece = model(
            ids[:, 4:], attention_mask=causal_mask(9)[..., 4:, :], past_key_values=cache, use_cache=True
        ).logits
        assert_close("piece", piece, model(ids).logits[:, 4:], 1e-4)
        cache, mask = model(ids[:, :4], use_cache=True).past_key_values, causal_mask(9)[..., 4:, :].clone()
        mask[..., 2:, :4] = False
        with pytest.raises(UnsupportedModelError, match="hides more"):
            model(ids[:, 4:], attention_mask=mask, past_key_values=cache, use_cache=True)


def test_masks_of_encoders_hide_the_same_from_all_tokens():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99
    )
    model, ids = convert_to_hybrid(transformers.BertModel(config).eval(), "linear_attention"), tokens()
    two = torch.ones_like(ids)
    two[:, 6:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=two).last_hidden_state[:, :6]
        wide = two.bool()[:, None, None].expand(-1, 1, 9, -1)
        assert_close("4D", model(ids, attention_mask=wide).last_hidden_state[:, :6], expected, 1e-5)
        with pytest.raises(
            UnsupportedModelError, match=r"masks that hide padding and other packed sequences; the 4D attention mask"
        ):
            model(ids, attention_mask=causal_mask(9))


def test_students_do_not_learn_from_masks_they_cannot_follow():
    model, mask = prepare_distillation_(tiny_model(), SMALL_MIXER), causal_mask(9)
    first_token_hidden_from_one(mask)
    model.eval()
    assert model(tokens(), attention_mask=mask).logits.isfinite().all()  # the teacher
    model.train()
    with pytest.raises(UnsupportedModelError, match="hides more"):
        model(input_ids=tokens(), attention_mask=mask)


def test_a_mask_is_checked_by_the_layers_it_reaches():
    ids = torch.cat([torch.full((2, 16), 98), tokens(2, 5)], dim=1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    everywhere = torch.ones(2, 1, 21, 21, dtype=torch.bool)
    with torch.no_grad():
        for layers in (None, "text"):
            model = convert_to_hybrid(tiny_llava(), "linear_attention", layers)
            with pytest.raises(UnsupportedModelError, match="lets tokens see later ones"):
                model(**inputs, attention_mask=everywhere)
            assert_close("causal", model(**inputs, attention_mask=causal_mask(21)).logits, model(**inputs).logits, 1e-5)
        model = convert_to_hybrid(tiny_llava(), "linear_attention", "vision")  # the text's softmax sees what it is told
        plain = model(**inputs).logits
        assert_close("causal", model(**inputs, attention_mask=causal_mask(21)).logits, plain, 1e-5)
        assert float((model(**inputs, attention_mask=everywhere).logits - plain).abs().max()) > 0.1


def test_one_row_for_all_tokens():
    one_row = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError, match="lets tokens see later ones"):
        hybrid()(tokens(), attention_mask=one_row)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99
    )
    model = convert_to_hybrid(transformers.BertModel(config).eval(), "linear_attention")
    assert model(tokens(), attention_mask=one_row).last_hidden_state.isfinite().all()
    numbers, per_head = torch.zeros(2, 1, 1, 9), one_row.expand(-1, 4, -1, -1).clone()
    numbers[..., 3:6] = -5.0
    per_head[:, 1, :, 6:] = False
    for mask, why in ((numbers, "adds numbers"), (per_head, "hides more from some heads")):
        with pytest.raises(UnsupportedModelError, match=why):
            model(tokens(), attention_mask=mask)


def test_masks_in_a_dict_and_block_masks():
    model, mask = hybrid("gemma3"), causal_mask(9)
    ids = tokens()
    same = {"full_attention": mask, "sliding_attention": mask}
    assert_close("dict", model(ids, attention_mask=same).logits, model(ids).logits, 1e-5)
    first_token_hidden_from_one(mask)
    with pytest.raises(UnsupportedModelError, match="hides more"):
        model(ids, attention_mask=same)

    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    convert_to_hybrid(model, SMALL_MIXER)
    blocks = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 9, 9, device="cpu")
    with torch.no_grad():
        assert_close("blocks", model(ids, attention_mask=blocks).logits, model(ids).logits, 1e-5)
    packed = create_block_mask(lambda b, h, q, k: (q >= k) & ((q < 4) == (k < 4)), 2, None, 9, 9, device="cpu")
    two = causal_mask(9)
    two_documents(two)
    with torch.no_grad():
        same = convert_to_hybrid(tiny_model(), SMALL_MIXER)(ids, attention_mask=two)
        assert_close("packed", model(ids, attention_mask=packed).logits, same.logits, 1e-5)
    less = create_block_mask(lambda b, h, q, k: (q >= k) & ((q != 3) | (k != 0)), 2, None, 9, 9, device="cpu")
    with pytest.raises(UnsupportedModelError, match="hides more"):
        model(ids, attention_mask=less)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize("layers", [[0], None])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_4d_mask_of_packed_rows_is_followed(family, layers, dtype):
    model, ids, mask = hybrid(family, layers), tokens(), causal_mask(9, dtype)
    mask[..., 4:, :4] = False if dtype == torch.bool else torch.finfo(dtype).min
    with torch.no_grad():
        both = model(ids, attention_mask=mask).logits
        first = model(ids[:, :4]).logits
        second = model(
            ids[:, 4:], position_ids=torch.arange(4, 9)[None]
        ).logits  # the mask alone does not start positions again
        assert_close("packed", both, torch.cat([first, second], dim=1), 1e-5)


def test_packed_rows_of_an_encoder_are_followed():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99
    )
    torch.manual_seed(0)
    model, ids = convert_to_hybrid(transformers.BertModel(config).eval(), "linear_attention"), tokens()
    mask = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    mask[..., :4, :4] = mask[..., 4:, 4:] = True
    with torch.no_grad():
        both = model(ids, attention_mask=mask).last_hidden_state
        first = model(ids[:, :4]).last_hidden_state
        second = model(ids[:, 4:], position_ids=torch.arange(4, 9)[None]).last_hidden_state
        assert_close("packed", both, torch.cat([first, second], dim=1), 1e-5)
        mask[..., 0, 2] = False
        with pytest.raises(UnsupportedModelError, match="hides more"):
            model(ids, attention_mask=mask)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_see_the_same_masks_in_the_backward_pass(use_reentrant):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = convert_to_hybrid(transformers.BertModel(config), "linear_attention").train(), tokens()
    mask = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    mask[..., :4, :4] = mask[..., 4:, 4:] = True

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask).last_hidden_state.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again = gradients()
    for name, gradient in plain.items():
        assert_close(name, again[name], gradient, 1e-6)
    students = prepare_distillation_(transformers.BertModel(config).eval(), "linear_attention").train()
    students(input_ids=ids, attention_mask=mask)["loss"].backward()


def test_past_keys_hidden_from_all_new_tokens_were_padding_or_are_an_error():
    model, ids = hybrid(), tokens()

    def piece(mask, first_mask=None):
        with torch.no_grad():
            cache = model(ids[:, :4], attention_mask=first_mask, use_cache=True).past_key_values
            return model(ids[:, 4:], attention_mask=mask, past_key_values=cache, use_cache=True).logits

    for hidden in ([0, 1, 2, 3], [1]):
        mask = causal_mask(9)[..., 4:, :].clone()
        mask[..., hidden] = False
        with pytest.raises(UnsupportedModelError, match="hides more"):
            piece(mask)
        padding = torch.ones(2, 4, dtype=torch.long)
        padding[:, hidden] = 0
        whole = torch.cat([padding, torch.ones(2, 5, dtype=torch.long)], dim=1)
        assert_close("padding", piece(mask, padding), piece(whole, padding), 1e-5)


@pytest.mark.parametrize("layers", [[0], None])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_between_packed_rows(layers, dtype):
    model, ids = hybrid(layers=layers), tokens(2, 12)
    mask = torch.zeros(2, 1, 12, 12, dtype=torch.bool)  # 4 tokens, 2 of padding, 5 tokens, 1 of padding
    for start, stop in ((0, 4), (6, 11)):
        mask[..., start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
    positions = torch.tensor([[*range(4), 0, 0, *range(5), 0]]).expand(2, -1)
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    with torch.no_grad():
        first, second = model(ids[:, :4]).logits, model(ids[:, 6:11]).logits
        for inner in (False, True):  # nobody looks at masks there, and they are followed all the same
            if inner:
                output = model.lm_head(model.model(ids, attention_mask=mask, position_ids=positions).last_hidden_state)
            else:
                output = model(ids, attention_mask=mask, position_ids=positions).logits
            assert_close("first", output[:, :4], first, 1e-5)
            assert_close("second", output[:, 6:11], second, 1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("sizes", [(7, 11), (5, 13), (9, 9), (8, 10)])
def test_packed_rows_of_chunked_attention(implementation, sizes):
    # its layers are not told positions
    model = toy_model("causal-lm", "llama4_text")
    model.set_attn_implementation(implementation)
    # chunked; full. A text of a whole chunk (8) cannot be told from one in the mask of the former
    perturb_mixers(convert_to_hybrid(model, "linear_attention", [1] if 8 in sizes else None))
    ids, positions = tokens(1, sum(sizes)), torch.cat([torch.arange(size) for size in sizes])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = [model(piece, use_cache=False).logits for piece in ids.split(sizes, dim=1)]
        assert_close("packed", packed, torch.cat(alone, dim=1), 1e-5)


@pytest.mark.parametrize("layers", [[0], None])
def test_chunks_are_counted_from_the_first_token_that_exists(layers):
    model = perturb_mixers(convert_to_hybrid(toy_model("causal-lm", "llama4_text"), "linear_attention", layers))
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    for more in ({}, {"prefill_chunk_size": 5}):
        static = model.generate(ids, attention_mask=mask, cache_implementation="static", **more, **GREEDY)
        assert torch.equal(static, expected)


def test_chains_in_one_row_of_esmc():
    # packed rows, told by an argument of their own, of a bidirectional model: in the mask that the host makes of it
    model = toy_model("masked-lm", "esmc")
    perturb_mixers(convert_to_hybrid(model, "linear_attention"))
    ids = tokens(1, 9)
    with torch.no_grad():
        both = model(ids, sequence_id=torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])).logits
        assert_close("first", both[:, :4], model(ids[:, :4]).logits, 1e-4)


def test_a_layer_that_looks_back_through_no_window_is_given_none():
    model, ids = hybrid("gemma3", [1], **MIXED), tokens()
    mask = causal_mask(9).triu(-3)
    with pytest.raises(UnsupportedModelError, match="hides more"):
        model(ids, attention_mask=mask)
    model = hybrid("gemma3", [0], **MIXED)  # this one does
    assert model(ids, attention_mask=mask).logits.isfinite().all()


def test_packed_rows_may_be_marked_twice():
    model, ids, mask = hybrid(), tokens(), causal_mask(9)
    two_documents(mask)
    positions = torch.cat([torch.arange(4), torch.arange(5)]).expand(2, -1)
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
        assert_close("both", model(ids, position_ids=positions, attention_mask=mask).logits, expected, 1e-5)


def test_a_mask_of_integers_is_an_error_that_says_so():
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=32, num_heads=4, d_kv=8, d_ff=64, num_layers=2, vocab_size=99)
    model = transformers.T5EncoderModel(config).eval()
    with pytest.warns(UserWarning, match="layers lose"):
        convert_to_hybrid(model, "linear_attention")
    with pytest.raises(UnsupportedModelError, match=r"dtype torch.int64\. Pass booleans"):
        model(tokens(), attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.long))


@pytest.mark.parametrize(
    ("family", "overrides", "layers"),
    [("gemma3", MIXED, [1]), ("gemma3", MIXED, None), ("gemma3", MIXED, [0]), ("mistral", {"sliding_window": 4}, [1]),
     ("mistral", {"sliding_window": 4}, None), ("phi3", {"sliding_window": 4}, [0])],
)  # fmt: skip
def test_several_tokens_onto_a_static_cache_beyond_the_window(family, overrides, layers):
    model, ids = hybrid(family, layers, **overrides), tokens(2, 12)
    expected = model.generate(ids, **GREEDY)
    chunks = model.generate(ids, cache_implementation="static", prefill_chunk_size=5, **GREEDY)
    assert torch.equal(chunks, expected)
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    begun = model.generate(ids[:, :9], past_key_values=cache, **{**GREEDY, "max_new_tokens": 2})
    more = torch.cat([begun, tokens(2, 3, seed=5)], dim=1)
    assert torch.equal(model.generate(more, past_key_values=cache, **GREEDY), model.generate(more, **GREEDY))


@pytest.mark.parametrize("layers", ["text", None])
@pytest.mark.parametrize("model_type", ["paligemma", "gemma3"])
def test_tokens_of_pictures_may_see_each_other_where_the_family_does_so(model_type, layers):
    model = toy_model("image-text-to-text", model_type)
    inputs = picture_inputs(model, model_type)
    if model_type == "gemma3":  # 13 tokens, its window is 4
        more = tokens(2, 6)
        inputs = {**inputs, "input_ids": torch.cat([more, inputs["input_ids"]], dim=1)}
        for name, fill in (("attention_mask", 1), ("token_type_ids", 0)):
            inputs[name] = torch.cat([torch.full_like(more, fill), inputs[name]], dim=1)
    with pytest.warns(UserWarning, match="bidirectional attention among the tokens of a picture"):
        convert_to_hybrid(model, "linear_attention", layers)
    static = model.generate(**inputs, cache_implementation="static", **GREEDY)
    assert torch.equal(static, model.generate(**inputs, **GREEDY))
