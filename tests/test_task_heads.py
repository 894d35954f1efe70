"""Every task head: distil, search, save, load through the Auto class, run through the pipeline where transformers has one."""

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

from hf_hybrid import GreedyLayerSwapCallback, HybridTrainer

from helpers import toy_arguments


WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *(f"w{i}" for i in range(94))]
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
VIT = {k: v for k, v in BERT.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
WAV2VEC2 = {
    **BERT, "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "pad_token_id": 0,
}  # fmt: skip
WHISPER = {
    **BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
CLIP = {
    "text_config": {**BERT, "max_position_embeddings": 32, "eos_token_id": 98},
    "vision_config": VIT,
    "projection_dim": 16,
}


def numbers(*shape, high=99, seed=0):
    return torch.randint(5, high, shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TEXT = {"input_ids": numbers(12, 9).tolist(), "attention_mask": [[1] * 7 + [0] * 2] * 12}
# task: (Auto class, config, columns of the dataset, pipeline and what it reads)
HEADS = {
    "causal-lm": ("CausalLM", ("LlamaConfig", LLAMA), {**TEXT, "labels": TEXT["input_ids"]}, ("text-generation", "w1 w2")),
    "masked-lm": ("MaskedLM", ("BertConfig", BERT), {**TEXT, "labels": TEXT["input_ids"]}, ("fill-mask", "w1 [MASK] w2")),
    "seq2seq-lm": ("Seq2SeqLM", ("BartConfig", BART), {**TEXT, "labels": numbers(12, 6).tolist()}, None),
    "sequence-classification": (
        "SequenceClassification", ("BertConfig", BERT), {**TEXT, "labels": [0, 1] * 6}, ("text-classification", "w1 w2 w3"),
    ),
    "sequence-classification of a decoder": (
        "SequenceClassification", ("LlamaConfig", LLAMA), {**TEXT, "labels": [0, 1] * 6}, ("text-classification", "w1 w2 w3"),
    ),
    "token-classification": (
        "TokenClassification", ("BertConfig", BERT), {**TEXT, "labels": (numbers(12, 9) % 2).tolist()}, ("token-classification", "w1 w2 w3"),
    ),
    "question-answering": (
        "QuestionAnswering", ("BertConfig", BERT), {**TEXT, "start_positions": [1] * 12, "end_positions": [3] * 12}, None,
    ),
    "multiple-choice": (
        "MultipleChoice", ("BertConfig", BERT), {"input_ids": numbers(12, 3, 9).tolist(), "labels": [0, 1, 2] * 4}, None,
    ),
    "image-classification": (
        "ImageClassification", ("ViTConfig", VIT), {"pixel_values": noise(12, 3, 32, 32).tolist(), "labels": [0, 1] * 6},
        ("image-classification", "picture"),
    ),
    "ctc": ("CTC", ("Wav2Vec2Config", WAV2VEC2), {"input_values": noise(12, 600).tolist(), "labels": numbers(12, 3).tolist()}, None),
    "audio-classification": (
        "AudioClassification", ("Wav2Vec2Config", WAV2VEC2), {"input_values": noise(12, 600).tolist(), "labels": [0, 1] * 6},
        ("audio-classification", "sound"),
    ),
    "speech-seq2seq": (
        "SpeechSeq2Seq", ("WhisperConfig", WHISPER), {"input_features": noise(12, 8, 40).tolist(), "labels": numbers(12, 6).tolist()}, None,
    ),
    "zero-shot-image": (
        "ZeroShotImageClassification", ("CLIPConfig", CLIP),
        {**TEXT, "pixel_values": noise(12, 3, 32, 32).tolist(), "return_loss": [True] * 12}, None,
    ),
}  # fmt: skip


def tokenizer():
    return transformers.BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


def collate(rows):
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    if "return_loss" in batch:
        batch["return_loss"] = True
    return batch


@pytest.mark.parametrize("task", HEADS)
def test_distil_search_save_load_and_run(task, tmp_path):
    head, (config_class, sizes), columns, pipeline = HEADS[task]
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(getattr(transformers, config_class)(**sizes))
    rows = Dataset.from_dict(columns)
    trainer = HybridTrainer(
        model, "linear_attention",
        toy_arguments(tmp_path / "out", max_steps=2, save_strategy="no", remove_unused_columns=False),
        train_dataset=rows, eval_dataset=rows, data_collator=collate,
        callbacks=[GreedyLayerSwapCallback("loss", "100%", max_layers=2, keep="most_linear")],
    )  # fmt: skip
    trainer.train()
    swapped = trainer.swapped_layers()
    assert swapped and len(trainer.swap_report.trials) >= len(trainer.distill_sites)
    hybrid = trainer.finalize()
    batch = {name: value for name, value in collate([rows[0], rows[1]]).items() if name != "return_loss"}

    def logits(model):
        with torch.no_grad():
            output = model.eval()(**batch)
        return (
            output.start_logits
            if task == "question-answering"
            else output["logits_per_image" if task == "zero-shot-image" else "logits"]
        )

    hybrid.save_pretrained(tmp_path / "hybrid")
    loaded = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path / "hybrid")
    for parameter in loaded.parameters():  # in memory of its own: alignment in a mapped file changes the order of sums
        parameter.data = parameter.data.clone()
    assert type(loaded) is type(hybrid) and sorted(loaded.config.hybrid_sites()) == sorted(swapped)
    assert torch.equal(logits(loaded), logits(hybrid))
    if pipeline is None:
        return
    kind, given = pipeline
    if given == "picture":
        from PIL import Image

        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
        answer = transformers.pipeline(kind, model=loaded, image_processor=processor)(Image.new("RGB", (40, 40), "red"))
    elif given == "sound":
        extractor = transformers.Wav2Vec2FeatureExtractor()
        answer = transformers.pipeline(kind, model=loaded, feature_extractor=extractor)(np.zeros(800, dtype=np.float32))
    else:
        kwargs = {"max_new_tokens": 3, "do_sample": False} if kind == "text-generation" else {}
        answer = transformers.pipeline(kind, model=loaded, tokenizer=tokenizer(), **kwargs)(given)
    assert isinstance(answer, list) and answer and set(answer[0]) & {"label", "generated_text", "token_str", "entity"}


def test_feature_extraction(tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.BertConfig(**BERT))
    trainer = HybridTrainer(
        model, "linear_attention", toy_arguments(tmp_path / "out", max_steps=2, save_strategy="no"),
        train_dataset=Dataset.from_dict({"input_ids": TEXT["input_ids"]}), data_collator=collate,
    )  # fmt: skip
    trainer.train()
    trainer.swap_layers([0, 1])
    trainer.finalize().save_pretrained(tmp_path / "hybrid")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "hybrid")
    features = transformers.pipeline("feature-extraction", model=loaded, tokenizer=tokenizer())("w1 w2")
    assert np.array(features).shape == (1, 4, 32)


@pytest.mark.parametrize("family", ["Bart", "T5"])
@pytest.mark.filterwarnings("ignore:.*layers lose")
def test_a_classifier_on_an_encoder_decoder(family, tmp_path):
    sizes = (
        BART
        if family == "Bart"
        else {"d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "num_layers": 2, "vocab_size": 99}
    )
    config = getattr(transformers, f"{family}Config")(**{**sizes, "eos_token_id": 2, "decoder_start_token_id": 1})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    ids = numbers(12, 9)
    ids[:, -1] = 2
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": [0, 1] * 6})
    trainer = HybridTrainer(
        model, "linear_attention", toy_arguments(tmp_path / "out", max_steps=2, save_strategy="no", remove_unused_columns=False),
        train_dataset=rows, eval_dataset=rows, data_collator=collate,
    )  # fmt: skip
    assert len(trainer.distill_sites) == 4
    trainer.train()
    trainer.swap_layers(range(4))
    hybrid = trainer.finalize()
    hybrid.save_pretrained(tmp_path / "hybrid")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hybrid").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, hybrid.eval()(ids).logits)
