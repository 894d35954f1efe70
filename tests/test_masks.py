"""Masks [B, H, Q, KV] that users pass, or `generate` for a static cache: followed, or refused; never ignored."""

import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import create_block_mask

from hf_hybrid import convert_to_hybrid
from hf_hybrid.errors import UnsupportedModelError

from helpers import SMALL_MIXER, assert_close
from tiny_models import perturb_mixers, tiny_llava, tiny_model


def hybrid(family="llama", layers=None, **overrides):
    return perturb_mixers(convert_to_hybrid(tiny_model(family, **overrides), SMALL_MIXER, layers))


def tokens(batch=2, length=9, seed=0):
    return torch.randint(5, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def causal_mask(length, dtype=torch.bool, batch=2):
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1).clone()
    return (
        mask
        if dtype == torch.bool
        else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
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
        layer.self_attn.hybrid_swapped = False
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
    from hf_hybrid.distillation import prepare_distillation_

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
            assert_close(
                "causal", model(**inputs, attention_mask=causal_mask(21)).logits, model(**inputs).logits, 1e-5
            )
        model = convert_to_hybrid(
            tiny_llava(), "linear_attention", "vision"
        )  # the text's softmax sees what it is told
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
    blocks = create_block_mask(lambda b, h, q, k: (q >= k) & ((q < 4) == (k < 4)), 2, None, 9, 9, device="cpu")
    with pytest.raises(UnsupportedModelError, match="hides more"):
        model(ids, attention_mask=blocks)


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


MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}


@pytest.mark.parametrize(
    ("family", "overrides", "layers"),
    [("gemma3", MIXED, [1]), ("gemma3", MIXED, None), ("gemma3", MIXED, [0]), ("mistral", {"sliding_window": 4}, [1]),
     ("mistral", {"sliding_window": 4}, None), ("phi3", {"sliding_window": 4}, [0])],
)  # fmt: skip
def test_several_tokens_onto_a_static_cache_beyond_the_window(family, overrides, layers):
    model, ids = hybrid(family, layers, **overrides), tokens(2, 12)
    greedy = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    expected = model.generate(ids, **greedy)
    chunks = model.generate(ids, cache_implementation="static", prefill_chunk_size=5, **greedy)
    assert torch.equal(chunks, expected)
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    begun = model.generate(ids[:, :9], past_key_values=cache, **{**greedy, "max_new_tokens": 2})
    more = torch.cat([begun, tokens(2, 3, seed=5)], dim=1)
    assert torch.equal(model.generate(more, past_key_values=cache, **greedy), model.generate(more, **greedy))


def test_prefixes_of_pictures_may_be_seen_whole_where_the_family_does_so():
    from backbones.pictures import picture_inputs
    from backbones.toy_models import toy_model

    model = toy_model("image-text-to-text", "paligemma")
    inputs = picture_inputs(model, "paligemma")
    with pytest.warns(UserWarning, match="bidirectional attention among the tokens of a picture"):
        convert_to_hybrid(model, "linear_attention", "text")
    greedy = {
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    static = model.generate(**inputs, cache_implementation="static", **greedy)
    assert torch.equal(static, model.generate(**inputs, **greedy))
