"""Ways of running a hybrid: what people do with a transformers model, they do with a hybrid."""

import copy
import pickle
import threading

import accelerate
import pytest
import torch
import transformers
from backbones.toy_models import toy_model
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Trainer, TrainingArguments

from hf_hybrid import convert_to_hybrid, find_attention_sites, restore_full_attention
from hf_hybrid.conversion.cache import HybridLinearLayer
from hf_hybrid.errors import HybridConfigError, UnsupportedModelError
from hf_hybrid.mixers.base import LinearMixer
from hf_hybrid.surgery import prepare_distillation_

from helpers import SMALL_MIXER, assert_close
from mixer_settings import MIXERS
from tiny_models import perturb_mixers, tiny_llava, tiny_model


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SIZES = {
    "d_model": 32,
    "num_heads": 4,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "vocab_size": 99,
    "decoder_start_token_id": 0,
}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "vocab_size": 99, "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip


def hybrid(family="llama", layers=None, **overrides):
    return perturb_mixers(convert_to_hybrid(tiny_model(family, **overrides), SMALL_MIXER, layers))


def tokens(batch=2, length=9, seed=0):
    return torch.randint(5, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def scaled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model.eval()


def t5(**overrides):
    torch.manual_seed(0)
    return scaled(transformers.T5ForConditionalGeneration(transformers.T5Config(**{**SIZES, **overrides})))


def bart():
    torch.manual_seed(0)
    return scaled(transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)))


# --------------------------------------------------------------------------------------------------- selecting layers


def test_encoder_and_decoder_are_selected_by_name():
    sites = find_attention_sites(bart())
    assert [site.part for site in sites] == ["encoder"] * 2 + ["decoder"] * 2
    assert [site.causal for site in sites] == [False] * 2 + [True] * 2
    for part in ("encoder", "decoder"):
        model = convert_to_hybrid(bart(), "linear_attention", part)
        assert (
            all(f".{part}." in name for name in model.config.hybrid_sites()) and len(model.config.hybrid_sites()) == 2
        )
    model = convert_to_hybrid(bart(), "linear_attention", ["encoder", -1])
    assert len(model.config.hybrid_sites()) == 3
    with pytest.raises(HybridConfigError, match=r"nor one of its parts \(decoder, encoder\). Did you mean 'encoder'"):
        convert_to_hybrid(bart(), "linear_attention", "encodr")


def test_towers_are_selected_by_modality_and_by_module():
    model = tiny_llava()
    assert [site.part for site in find_attention_sites(model)] == ["vision"] * 2 + ["text"] * 2
    for layers, count in (("vision", 2), ("text", 2), ("model.vision_tower", 2), (lambda site: not site.causal, 2)):
        one = convert_to_hybrid(tiny_llava(), "linear_attention", layers)
        assert len(one.config.hybrid_sites()) == count
    convert_to_hybrid(model, "linear_attention")
    ids = torch.cat([torch.full((1, 16), 98), tokens(1, 5)], dim=1)
    picture = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        with_picture = model(ids, pixel_values=picture).logits
        other = model(ids, pixel_values=-picture).logits
    assert with_picture.isfinite().all() and not torch.equal(with_picture, other)


# ----------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("layers", ["encoder", "decoder", None, [3], [4, 5]])
@pytest.mark.filterwarnings("ignore:.*layers lose")
def test_encoder_decoders_generate_with_a_cache_as_without(make, layers):
    if make is bart and layers == [4, 5]:
        layers = [2, 3]
    model, ids = (
        perturb_mixers(
            convert_to_hybrid(make(), SMALL_MIXER if layers not in ("encoder", None) else "linear_attention", layers)
        ),
        tokens(),
    )
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    for beams in (1, 3):
        expected = model.generate(ids, attention_mask=mask, num_beams=beams, use_cache=False, **GREEDY)
        assert torch.equal(model.generate(ids, attention_mask=mask, num_beams=beams, **GREEDY), expected)
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(static, model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))


@pytest.mark.filterwarnings("ignore:.*layers lose")
def test_the_first_layer_of_t5_may_be_linear_where_others_read_its_position_bias(tmp_path):
    # layer 0 of the decoder owns the bias of all its layers, and sizes it with its own keys
    model, ids = perturb_mixers(convert_to_hybrid(t5(), SMALL_MIXER, [3])), tokens()
    answer = tokens(2, 7, seed=4)
    with torch.no_grad():
        whole = model(input_ids=ids, decoder_input_ids=answer, use_cache=False).logits
        encoded, cache, pieces = model.get_encoder()(ids), None, []
        for t in range(7):
            output = model(
                encoder_outputs=encoded, decoder_input_ids=answer[:, t : t + 1], past_key_values=cache, use_cache=True
            )
            cache, pieces = output.past_key_values, [*pieces, output.logits]
    assert_close("logits", torch.cat(pieces, dim=1), whole, 1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, decoder_input_ids=answer, use_cache=False).logits, whole)


def test_sampling_draws_the_same_tokens_with_and_without_a_cache():
    model, ids = hybrid(), tokens()
    kwargs = {**GREEDY, "do_sample": True, "top_k": 20, "temperature": 0.7}
    torch.manual_seed(3)
    expected = model.generate(ids, use_cache=False, **kwargs)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, **kwargs), expected)


def test_a_cache_shared_with_the_hosts_own_recurrence():
    config = transformers.FalconH1Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=99, mamba_d_ssm=64,
        mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = (
        perturb_mixers(convert_to_hybrid(transformers.FalconH1ForCausalLM(config).eval(), SMALL_MIXER)),
        tokens(),
    )
    with torch.no_grad():
        whole, output = model(ids, use_cache=False).logits, model(ids[:, :5], use_cache=True)
        cache, pieces = output.past_key_values, [output.logits]
        assert all(isinstance(layer, HybridLinearLayer) and layer.host_states == 1 for layer in cache.layers)
        for t in range(5, 9):
            pieces.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert_close("logits", torch.cat(pieces, dim=1), whole, 1e-4)
    for beams in (1, 3):
        expected = model.generate(ids, num_beams=beams, use_cache=False, **GREEDY)
        assert torch.equal(model.generate(ids, num_beams=beams, **GREEDY), expected)


# ---------------------------------------------------------------------------------------------- training and transport


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = hybrid(), tokens()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    for name, gradient in plain.items():
        assert_close(name, again[name], gradient, 1e-6)


def test_resized_embeddings_tied_weights_and_half_precision(tmp_path):
    model, ids = hybrid(tie_word_embeddings=True), tokens()
    model.resize_token_embeddings(120, mean_resizing=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.shape[0] == 120
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
        for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
            low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
            assert {parameter.dtype for parameter in low.parameters()} == {dtype}
            assert_close(str(dtype), low(ids).logits, expected, tolerance)


def test_layers_offloaded_to_disk(tmp_path):
    model, ids = hybrid(), tokens()
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    devices = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.layers.0": "cpu",
    }
    devices |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=str(tmp_path / "off")
    ).eval()
    assert next(loaded.model.layers[2].self_attn.hybrid.parameters()).device.type == "meta"
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)


def test_torch_export_captures_a_hybrid():
    model, ids = hybrid(), tokens()

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        program = torch.export.export(Wrapped(), (ids,), strict=False)
        assert_close("logits", program.module()(ids), model(ids).logits, 1e-5)


def test_lora_on_a_hybrid():
    import peft

    model, ids = hybrid(), tokens()
    with torch.no_grad():
        expected = model(ids).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["hybrid"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, expected)
    adapted(ids, labels=ids).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("lora_B" in name for name in trained) and any(".hybrid." in name for name in trained)
    assert not any(name.endswith("mlp.up_proj.weight") for name in trained)
    generated = adapted.generate(input_ids=ids, **GREEDY)
    assert generated.shape == (2, 17)


def test_a_hybrid_is_fine_tuned_with_label_smoothing(tmp_path):
    model = hybrid()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12).tolist()]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows))
    trainer.train()
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unchanged
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model.eval()(tokens()).logits)


# -------------------------------------------------------------------------------------------------------------- guards


def test_tensor_parallelism_is_refused_before_anything_is_loaded(tmp_path):
    hybrid().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="tensor-parallel plan has no entries"):
        AutoModelForCausalLM.from_pretrained(tmp_path, tp_plan="auto")


def test_context_parallelism_is_not_offered():
    assert tiny_model().supports_context_parallel is not False and hybrid().supports_context_parallel is False


@pytest.mark.parametrize("mixer", MIXERS)
def test_quantisers_find_no_linear_layer_in_a_mixer(mixer):
    model = convert_to_hybrid(tiny_model(), MIXERS[mixer])
    for name, module in model.named_modules():
        if isinstance(module, LinearMixer):
            inside = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
            assert not inside, f"{name}: a quantiser would replace {inside[0]}"


def test_attention_called_twice_in_a_forward_is_refused():
    model = hybrid()
    attention = model.model.layers[0].self_attn
    original = attention.o_proj.forward

    def again(x):  # what a host does that attends twice, as differential attention
        from hf_hybrid.conversion.interception import hybrid_attention_forward

        query = torch.randn(2, 4, 9, 8)
        hybrid_attention_forward(attention, query, query[:, :2], query[:, :2], None)
        return original(x)

    attention.o_proj.forward = again
    with pytest.raises(UnsupportedModelError, match="attention is called 2 times in one forward"):
        model(tokens(), use_cache=False)


def test_keys_of_another_sequence_are_refused():
    from hf_hybrid.conversion.interception import hybrid_attention_forward
    from hf_hybrid.conversion.layer import LayerCall

    model = hybrid()
    attention = model.model.layers[0].self_attn
    attention._hybrid_call = LayerCall(torch.randn(1, 3, 32), None, (0, 1))
    key = torch.randn(1, 2, 5, 8)
    with pytest.raises(UnsupportedModelError, match="got 3 queries and 5 keys"):
        hybrid_attention_forward(attention, torch.randn(1, 4, 3, 8), key, key, None)


def test_shared_keys_are_not_made_linear():
    config = transformers.Gemma3nTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=99,
        vocab_size_per_layer_input=99, hidden_size_per_layer_input=8, laurel_rank=4, num_kv_shared_layers=2, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = transformers.Gemma3nForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="shares its keys and values with model.layers"):
        find_attention_sites(model)


def test_copies_run_side_by_side_in_threads():
    """One model is one forward at a time; a copy per thread is the way."""
    import copy

    model, ids = hybrid(), tokens()
    with torch.no_grad():
        expected = model(ids).logits
    copies, results = [copy.deepcopy(model) for _ in range(3)], {}

    def work(index):
        with torch.no_grad():
            results[index] = [copies[index](ids).logits for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(logits, expected) for per_copy in results.values() for logits in per_copy)


def test_the_loss_of_picture_blocks_is_said():
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **small,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        text_config={"model_type": "gemma", **small, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99},
        image_token_index=98,
        projection_dim=32,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    with pytest.warns(
        UserWarning, match="2 of the 4 converted layers lose the bidirectional attention among the tokens of a picture"
    ):
        convert_to_hybrid(model, "linear_attention")


@pytest.mark.filterwarnings("ignore:.*layers lose")
def test_the_cache_of_t5_does_not_hold_on_to_keys():
    model = convert_to_hybrid(t5(), SMALL_MIXER, "decoder")
    with torch.no_grad():
        sizes = []
        for length in (8, 64):
            output = model(input_ids=tokens(), decoder_input_ids=tokens(2, length), use_cache=True)
            layer = output.past_key_values.self_attention_cache.layers[0]
            assert layer.full_length_keys and layer.new_key_values is None
            sizes.append(layer.state_bytes())
    assert sizes[0] == sizes[1]


@pytest.mark.filterwarnings("ignore:.*layers lose")
def test_a_position_bias_that_nobody_reads_is_not_computed(tmp_path):
    model, ids = convert_to_hybrid(t5(), "linear_attention", ["encoder"]), tokens(2, 64)
    first = model.encoder.block[0].layer[0].SelfAttention
    hidden_states = torch.randn(2, 64, 32)

    def bytes_of_bias():
        return first(hidden_states)[1].untyped_storage().nbytes()

    with torch.no_grad():
        expected = model.get_encoder()(ids).last_hidden_state
        assert bytes_of_bias() < 100
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.get_encoder()(ids).last_hidden_state, expected)
            readers = other.encoder.block[0].layer[0].SelfAttention._hybrid_bias_readers
            assert readers[0] is other.encoder.block[1].layer[0].SelfAttention
        model.save_pretrained(tmp_path)
        again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
        first = again.encoder.block[0].layer[0].SelfAttention
        assert bytes_of_bias() < 100
        assert torch.equal(again.get_encoder()(ids).last_hidden_state, expected)
        # as soon as somebody reads it again, it is there
        again.encoder.block[2].layer[0].SelfAttention.linear_heads = ()
        assert bytes_of_bias() == 4 * 64 * 64 * 4
        assert not torch.equal(again.get_encoder()(ids).last_hidden_state, expected)
        owner = model.encoder.block[0].layer[0].SelfAttention
        owner._hybrid_bias_readers = None  # computed after all: linear layers do not read it
        assert torch.equal(model.get_encoder()(ids).last_hidden_state, expected)
        restored = restore_full_attention(model).get_encoder()(ids).last_hidden_state
        assert torch.equal(restored, t5().get_encoder()(ids).last_hidden_state)
        decoder = convert_to_hybrid(t5(), "linear_attention", ["decoder"]).decoder.block[0].layer[0].SelfAttention
        assert decoder(hidden_states)[1].untyped_storage().nbytes() < 100


RECURRENT_HOSTS = ("zamba", "zamba2", "zaya", "inkling_text", "falcon_h1", "mllama")


@pytest.mark.parametrize("model_type", RECURRENT_HOSTS)
@pytest.mark.parametrize("layers", [None, [0]])
@pytest.mark.filterwarnings("ignore:.*layers lose")
def test_a_static_cache_with_more_than_keys_in_it(model_type, layers):
    model = convert_to_hybrid(toy_model("causal-lm", model_type), "linear_attention", layers)
    static = model.generate(tokens(), cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(static, model.generate(tokens(), **GREEDY))


@pytest.mark.parametrize(
    ("preloaded", "path"),
    [("LlamaAttention", "model.layers.0.self_attn"), ("LlamaDecoderLayer", "model.layers.0"), ("LlamaModel", "model")],
)
def test_layers_offloaded_as_a_whole_are_refused(preloaded, path):
    model = tiny_model()
    accelerate.cpu_offload(model, torch.device("cpu"), preload_module_classes=[preloaded])
    for change in (convert_to_hybrid, prepare_distillation_):
        with pytest.raises(UnsupportedModelError, match=f"^{path} is offloaded as a whole"):
            change(model, SMALL_MIXER)
    assert type(model) is transformers.LlamaForCausalLM and model(tokens()).logits.isfinite().all()


# ---------------------------------------------------------------------------------------- what the dry forward leaves


@pytest.mark.parametrize("task, model_type", [("base", "splinter"), ("base", "clap"), ("zero-shot-image", "align")])
def test_text_encoders_that_are_given_no_mask_are_bidirectional(task, model_type):
    assert {site.causal for site in find_attention_sites(toy_model(task, model_type))} == {False}


def test_the_dry_forward_leaves_a_host_that_changes_with_its_input_as_it_was():
    model = toy_model("seq2seq-lm", "bigbird_pegasus").train()
    encoder, modules = model.get_encoder(), dict(model.named_modules())
    assert encoder.attention_type == "block_sparse"  # short texts turn it, for good, to full attention
    find_attention_sites(model)
    assert encoder.attention_type == "block_sparse"
    assert dict(model.named_modules()) == modules and all(module.training for module in modules.values())


def test_the_dry_forward_draws_no_random_numbers_and_fills_no_tables():
    torch.manual_seed(3)
    expected = torch.rand(3)
    model = toy_model("base", "vit_mae")  # masks patches at random, in evaluation too
    torch.manual_seed(3)
    find_attention_sites(model)
    assert torch.equal(torch.rand(3), expected)
    model = toy_model("image-classification", "levit").train()  # keeps biases by position until it is trained again
    with pytest.raises(UnsupportedModelError):
        find_attention_sites(model)
    tables = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
    assert tables and not any(tables)


def test_the_dry_forward_leaves_what_is_not_the_modules_alone():
    class Remembers(torch.nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared, self.seen, self.own = shared, [], {}

        def forward(self, x):
            self.seen = self.shared
            self.own["length"] = x.shape[1]
            return x

    model, shared = tiny_model(), [1, 2]
    model.model.norm = torch.nn.Sequential(model.model.norm, Remembers(shared))
    remembers = model.model.norm[1]
    seen, own = remembers.seen, remembers.own
    find_attention_sites(model)
    assert shared == [1, 2] and remembers.seen is seen and seen == [] and remembers.own is own and own == {}
