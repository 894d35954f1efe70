"""Datasets become model inputs: packing on disk and in streams, labels, masks, chats, and what is refused."""

import copy
import glob
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    XLMWithLMHeadModel,
)

from hf_hybrid.distillation import data
from hf_hybrid.distillation.data import check_padding, pack_text, prepare_dataset
from hf_hybrid.errors import DatasetError

from tiny_models import tiny_model


TEXTS = ["w1 w2 w3 good", "bad w5", "w7"] * 100
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}<eos>"


def prepare(dataset, tokenizer=None, model_class=LlamaForCausalLM, config=None, is_training=True, **overrides):
    name = overrides.pop("name", "train_dataset" if is_training else "eval_dataset")
    settings = {
        "processing_class": tokenizer,
        "model_config": config or model_class.config_class(),
        "text_field": "text",
        "max_length": 24,
        "seed": 0,
        "is_training": is_training,
        "model_class": model_class,
        **overrides,
    }
    return prepare_dataset(dataset, name, **settings)


def one_stream(texts, tokenizer, length):
    """The definition of packing: every text, the end-of-text token after each, cut; the last piece dropped."""
    stream = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


def on_disk(folder, rows) -> Dataset:
    path = folder / "rows.parquet"
    Dataset.from_list(rows).to_parquet(path)
    return load_dataset("parquet", data_files=str(path), cache_dir=str(folder / "cache"), split="train")


def streamed(texts, **columns):
    def rows():
        for index, text in enumerate(texts):
            yield {"text": text, **{name: values[index] for name, values in columns.items()}}

    return IterableDataset.from_generator(rows)


# what a training script does, twice in one process: the tokenizer was used the second time
PREPARE = """
import os
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig
from hf_hybrid.distillation import data

def said(*words):  # two processes on one standard output write into each other's lines
    with open("{folder}/said-" + os.environ.get("RANK", "alone"), "a") as file:
        print(*words, file=file)
{state}
files = {{"data_files": "{folder}/rows.parquet", "cache_dir": "{folder}/cache"}}
rows = load_dataset("parquet", split="train", **files)
tokenizer = AutoTokenizer.from_pretrained("{folder}/tokenizer")
for _ in range(2):
    packed = data.prepare_dataset(
        rows, "train_dataset", processing_class=tokenizer, model_config=LlamaConfig(), text_field="text",
        max_length=24, seed=0, is_training=True,
    )
    said([file["filename"] for file in packed.cache_files])
"""
COUNTED = """
import functools
from accelerate import PartialState

PartialState(cpu=True)
tokenise = data._tokenise_to_stream

@functools.wraps(tokenise)  # and so of the same name in the cache
def counted(*args, **kwargs):
    said("tokenises")
    return tokenise(*args, **kwargs)

data._tokenise_to_stream = counted
"""


@pytest.fixture
def masking_tokenizer(tokenizer):
    mask = copy.deepcopy(tokenizer)
    mask.mask_token = "<unk>"
    return mask


@pytest.fixture
def chat_tokenizer(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT_TEMPLATE
    return chat


@pytest.mark.parametrize("length", [2, 7, 24, 100, 1000])
def test_packing_is_one_stream_whatever_the_batches(length, tokenizer, monkeypatch):
    expected = one_stream(TEXTS, tokenizer, length)
    monkeypatch.setattr(data, "TOKENS_PER_BATCH", 60)  # many batches of both maps
    monkeypatch.setattr(data, "TEXTS_PER_BATCH", 7)
    monkeypatch.setattr(data, "CHARACTERS_PER_CALL", 30)
    packed = prepare(Dataset.from_dict({"text": TEXTS}), tokenizer, max_length=length)
    assert packed.column_names == ["input_ids"] and packed["input_ids"][:] == expected
    assert pack_text(iter(TEXTS), tokenizer, length)["input_ids"][:] == expected
    assert pack_text(Dataset.from_dict({"x": TEXTS})["x"], tokenizer, length)["input_ids"][:] == expected
    assert [row["input_ids"] for row in prepare(streamed(TEXTS), tokenizer, max_length=length)] == expected
    assert prepare([{"text": text} for text in TEXTS], tokenizer, max_length=length)["input_ids"][:] == expected


def test_a_long_text_and_empty_ones(tokenizer):
    texts = ["", "w5 " * 1000, "", "w6"]
    assert pack_text(texts, tokenizer, 100)["input_ids"][:] == one_stream(texts, tokenizer, 100)
    without_end = copy.deepcopy(tokenizer)
    without_end.eos_token = None
    assert pack_text(["w1 w2", "w3"], without_end, 3)["input_ids"][:] == [[7, 8, 9]]
    with pytest.raises(DatasetError, match="dataset must hold at least max_length=2 tokens; got 0"):
        pack_text(["", ""], without_end, 2)


@pytest.mark.slow
def test_packing_is_cached_on_disk_for_every_process(tokenizer, tmp_path):
    rows = on_disk(tmp_path, [{"text": text} for text in TEXTS])
    first = prepare(rows, tokenizer)
    assert all(str(tmp_path) in file["filename"] for file in first.cache_files)
    written = sorted(glob.glob(str(tmp_path / "cache" / "**" / "cache-*.arrow"), recursive=True))
    assert len(written) == 2
    tokenizer("w1 " * 10, truncation=True, max_length=4, padding="max_length")  # leaves its mark on the tokenizer
    times = [os.stat(path).st_mtime_ns for path in written]
    assert prepare(rows, tokenizer)["input_ids"][:] == first["input_ids"][:]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = PREPARE.format(folder=str(tmp_path), state="")
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    answers = (tmp_path / "said-alone").read_text().splitlines()
    # one name for two processes, before the tokenizer's first use and after
    assert len(answers) == 4 and len(set(answers)) == 1
    assert [os.stat(path).st_mtime_ns for path in written] == times


@pytest.mark.slow
def test_ranks_share_the_cache_and_the_first_writes_it(tokenizer, tmp_path):
    on_disk(tmp_path, [{"text": text} for text in TEXTS])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = tmp_path / "ranks.py"
    script.write_text(PREPARE.format(folder=str(tmp_path), state=COUNTED))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    first, second = ((tmp_path / f"said-{rank}").read_text().splitlines() for rank in (0, 1))
    assert first[:2] == ["tokenises"] * 2  # two batches, once
    assert first[2:] == second and len(second) == 2 and len(set(second)) == 1  # one file for both, both times


def test_a_stream_keeps_its_order_and_goes_on_where_it_stopped(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "TEXTS_PER_BATCH", 7)
    mixed = [None if index % 2 else index for index in range(len(TEXTS))]  # a column of two types is no obstacle
    for source in (streamed(TEXTS, other=mixed), Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=1)):
        whole = [row["input_ids"] for row in prepare(source, tokenizer)]
        assert whole == one_stream(TEXTS, tokenizer, 24)
        assert [row["input_ids"] for row in prepare(source, tokenizer)] == whole  # an epoch later
        for count in (1, 5, 20):
            stream = prepare(source, tokenizer)
            iterator = iter(stream)
            begun = [next(iterator)["input_ids"] for _ in range(count)]
            resumed = prepare(source, tokenizer)
            resumed.load_state_dict(stream.state_dict())
            assert begun + [row["input_ids"] for row in resumed] == whole


def test_a_stream_is_read_by_workers(tokenizer):
    source = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=2)
    packed = prepare(source, tokenizer, is_training=False)
    rows = [row["input_ids"] for row in DataLoader(packed, batch_size=None, num_workers=2)]
    halves = (*one_stream(TEXTS[:150], tokenizer, 24), *one_stream(TEXTS[150:], tokenizer, 24))
    assert sorted(rows) == sorted(halves)


def test_a_stream_of_unknown_columns_is_looked_at(tokenizer):
    unknown = streamed(TEXTS).map(lambda row: {"text": row["text"]})
    assert unknown.column_names is None
    rows = list(prepare(unknown, tokenizer, is_training=False))
    assert rows == [{"input_ids": ids, "labels": ids} for ids in one_stream(TEXTS, tokenizer, 24)]
    ready = IterableDataset.from_generator(lambda: iter([{"input_ids": [5, 6]}]))
    assert prepare(ready) is ready
    with pytest.raises(DatasetError, match="train_dataset must not be empty; got 0 rows"):
        prepare(IterableDataset.from_generator(lambda: iter([])), tokenizer)
    with pytest.raises(DatasetError, match="train_dataset must hold at least max_length=24 tokens; got fewer"):
        prepare(streamed(["w1"]), tokenizer)


@pytest.mark.parametrize("make", [lambda: Dataset.from_dict({"text": TEXTS}), lambda: streamed(TEXTS)])
def test_text_of_a_causal_model_is_its_own_label(make, tokenizer):
    rows = list(prepare(make(), tokenizer, is_training=False))
    assert rows == [{"input_ids": ids, "labels": ids} for ids in one_stream(TEXTS, tokenizer, 24)]


@pytest.mark.parametrize("make", [lambda texts: Dataset.from_dict({"text": texts}), streamed])
def test_text_of_a_masked_model_is_masked_once(make, masking_tokenizer):
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in random.integers(0, 93, 50)) for _ in range(40)]
    settings = {"model_class": BertForMaskedLM, "is_training": False}
    rows = list(prepare(make(texts), masking_tokenizer, **settings))
    plain = one_stream(texts, masking_tokenizer, 24)
    assert len(rows) == len(plain)
    count = replaced = 0
    for row, ids in zip(rows, plain, strict=True):
        masked = [label != -100 for label in row["labels"]]
        assert any(masked)
        for before, after, label, is_masked in zip(ids, row["input_ids"], row["labels"], masked, strict=True):
            assert label == before if is_masked else after == before
            assert not (is_masked and before == 2)  # special tokens are never guessed
            replaced += is_masked and after == 3
        count += sum(masked)
    assert count / (24 * len(plain)) == pytest.approx(0.15, abs=0.03)
    assert replaced / count == pytest.approx(0.8, abs=0.1)
    assert list(prepare(make(texts), masking_tokenizer, **settings)) == rows
    assert list(prepare(make(texts), masking_tokenizer, seed=1, **settings)) != rows
    # a mask belongs to its row, not to its place
    assert (
        list(prepare(make(texts[24:]), masking_tokenizer, max_length=51, **settings))
        == list(prepare(make(texts), masking_tokenizer, max_length=51, **settings))[24:]
    )
    assert list(prepare(make(texts), masking_tokenizer, model_class=BertForMaskedLM))[0] == {"input_ids": plain[0]}


def test_masked_evaluation_gives_a_loss_of_the_masked_tokens(masking_tokenizer):
    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(config).eval()
    rows = prepare([{"text": "w1 w2 " * 30}], masking_tokenizer, BertForMaskedLM, is_training=False)
    inputs = {key: torch.tensor(rows[key][:]) for key in rows.column_names}
    with torch.no_grad():
        outputs = model(**inputs)
    chosen = inputs["labels"] != -100
    expected = torch.nn.functional.cross_entropy(outputs.logits[chosen], inputs["labels"][chosen])
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_row_of_two_tokens_has_a_masked_one(masking_tokenizer):
    rows = prepare([{"text": "w1 w2 w3 " * 20}], masking_tokenizer, BertForMaskedLM, is_training=False, max_length=2)
    assert all(max(labels) >= 0 for labels in rows["labels"])
    ends = prepare([{"text": ""}] * 4, masking_tokenizer, BertForMaskedLM, is_training=False, max_length=2)
    assert ends["labels"][:] == [[-100, -100]] * 2  # nothing in it that could be masked


@pytest.mark.parametrize(
    "make",
    [
        lambda texts, label: Dataset.from_dict({"text": texts, "label": label}),
        lambda texts, label: streamed(texts, label=label),
        lambda texts, label: [{"text": t, "label": n} for t, n in zip(texts, label, strict=True)],
    ],
)
@pytest.mark.parametrize("model_class", [BertForSequenceClassification, LlamaForSequenceClassification])
def test_labelled_text_of_a_classifier_stays_row_by_row(model_class, make, tokenizer):
    texts, labels = ["w1 w2 w3", "bad", "w7 " * 40], [1, 0, 1]
    for is_training in (False, True):
        rows = list(prepare(make(texts, labels), tokenizer, model_class, is_training=is_training))
        expected = [tokenizer(text, truncation=True, max_length=24)["input_ids"] for text in texts]
        assert [row["input_ids"] for row in rows] == expected and len(expected[2]) == 24
        assert all("text" not in row and "label" not in row and row["attention_mask"] for row in rows)
        # distillation has its teacher
        assert [row.get("labels") for row in rows] == ([None] * 3 if is_training else labels)


def test_rows_are_cut_to_what_the_tokenizer_allows(tokenizer):
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 8
    rows = prepare([{"text": "w7 " * 40, "labels": 0.5}], short, BertForSequenceClassification, is_training=False)
    assert len(rows[0]["input_ids"]) == 8 and rows[0]["labels"] == 0.5


def test_a_classifier_predicts_on_text_without_labels(tokenizer):
    rows = prepare([{"text": "w1 w2"}, {"text": "w3"}], tokenizer, BertForSequenceClassification, is_training=False)
    assert rows["input_ids"][:] == [[7, 8], [9]] and "labels" not in rows.column_names
    packed = prepare([{"text": text} for text in TEXTS], tokenizer, BertForSequenceClassification)
    assert packed["input_ids"][:] == one_stream(TEXTS, tokenizer, 24)


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, BertForMaskedLM])
@pytest.mark.parametrize("label", ["label", "labels"])
def test_labelled_text_of_a_language_model(label, model_class, masking_tokenizer):
    rows = Dataset.from_dict({"text": TEXTS, label: [0] * len(TEXTS)})
    packed = prepare(rows, masking_tokenizer, model_class)  # to distil on, it is text
    assert packed.column_names == ["input_ids"]
    assert packed["input_ids"][:] == one_stream(TEXTS, masking_tokenizer, 24)
    message = rf"eval_dataset must hold tokenised prompts .* got the columns 'text' and '{label}'.*LabelWordTask"
    with pytest.raises(DatasetError, match=message):
        prepare(rows, masking_tokenizer, model_class, is_training=False)


def test_an_encoder_decoder_needs_labels(tokenizer):
    rows = Dataset.from_dict({"text": TEXTS})
    for model_class in (T5ForConditionalGeneration, BartForConditionalGeneration):
        assert prepare(rows, tokenizer, model_class)["input_ids"][:] == one_stream(TEXTS, tokenizer, 24)
        with pytest.raises(DatasetError, match=r"must hold labels for an encoder-decoder model.* Pass rows .*`labels`"):
            prepare(rows, tokenizer, model_class, is_training=False)
    labelled = Dataset.from_dict({"text": TEXTS, "label": [1] * len(TEXTS)})
    assert "labels" in prepare(labelled, tokenizer, BartForSequenceClassification, is_training=False).column_names


def test_what_a_model_is(masking_tokenizer):
    class Mine(LlamaForCausalLM):  # a subclass, as the mirror classes of hybrids are
        pass

    class RemoteForCausalLM(torch.nn.Module):  # code of a repository
        pass

    decoder = BertConfig(is_decoder=True)
    kinds = [
        (LlamaConfig(), Mine, "causal_lm"),
        (LlamaConfig(), RemoteForCausalLM, "causal_lm"),
        (LlavaForConditionalGeneration.config_class(), LlavaForConditionalGeneration, "causal_lm"),
        (XLMWithLMHeadModel.config_class(), XLMWithLMHeadModel, "masked_lm"),
        (BertConfig(), BertModel, "other"),
        (decoder, BertLMHeadModel, "causal_lm"),
        (LlamaConfig(architectures=["HybridLlamaForCausalLM"]), None, "causal_lm"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), None, "other"),
        (BertConfig(architectures=["BertForMaskedLM"]), None, "masked_lm"),
        # configs that were never saved
        (LlamaConfig(), None, "causal_lm"),
        (BertConfig(), None, "masked_lm"),
        (decoder, None, "causal_lm"),
        (BartConfig(), None, "seq2seq"),
        (T5Config(), None, "seq2seq"),
    ]
    for config, model_class, expected in kinds:
        assert data.model_kind(config, model_class) == expected, (config.architectures, model_class)


@pytest.mark.parametrize("is_stream", [False, True])
def test_chats_are_read_through_the_template(is_stream, chat_tokenizer):
    chats = [
        [{"role": "good", "content": "w1 w2"}, {"role": "bad", "content": "w3", "tools": None}],
        [{"role": "good", "content": "w9"}],
    ] * 20
    rows = [{"messages": chat, "source": "x"} for chat in chats]
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if is_stream else Dataset.from_list(rows)
    # one end-of-text token after each, not two: the template's own is taken for it
    expected = one_stream(["good w1 w2 bad w3", "good w9"] * 20, chat_tokenizer, 24)
    assert [row["input_ids"] for row in prepare(dataset, chat_tokenizer)] == expected
    evaluated = list(prepare(dataset, chat_tokenizer, is_training=False))
    assert [row["labels"] for row in evaluated] == expected


def test_chats_need_a_template(tokenizer):
    rows = [{"messages": [{"role": "good", "content": "w1"}]}]
    with pytest.raises(
        DatasetError, match="has a 'messages' column, for which the tokenizer must have a chat template"
    ):
        prepare(rows, tokenizer)
    with pytest.raises(DatasetError, match="train_dataset has a 'messages' column but no tokenizer was given"):
        prepare(rows)


def test_labelled_chats_of_a_classifier(chat_tokenizer):
    rows = [{"messages": [{"role": "good", "content": "w1"}], "label": 1}]
    prepared = prepare(rows, chat_tokenizer, BertForSequenceClassification, is_training=False)
    assert prepared["input_ids"][0] == [4, 7, 2] and prepared["labels"][:] == [1]  # the template's end stays
    with pytest.raises(DatasetError, match=r"'messages' must hold chats of one message or more; got \[\]"):
        prepare([*rows, {"messages": [], "label": 0}], chat_tokenizer)


def test_prepared_rows_pass_as_they_are(tokenizer):
    rows = {"input_ids": [[5, 6]], "text": ["w1"], "label": [0]}
    picture = {"text": ["w1"], "pixel_values": [[0.0]]}
    sound = {"text": ["w1"], "audio": [[0.0]]}
    for columns in (rows, picture, sound, {"score": [1.0]}):
        dataset = Dataset.from_dict(columns)
        assert prepare(dataset, tokenizer, is_training=False) is dataset
    listed = [{"input_ids": [5, 6]}]
    torch_stream = iter(listed)  # readable once
    for other in (listed, torch_stream, [torch.zeros(2)], "a_split", None):
        assert prepare(other, tokenizer) is other


def test_every_split_of_a_dictionary_is_prepared(tokenizer):
    ready = Dataset.from_dict({"input_ids": [[5, 6]]})
    splits = DatasetDict({"a": Dataset.from_dict({"text": TEXTS}), "b": ready})
    prepared = prepare(splits, tokenizer, is_training=False)
    assert set(prepared["a"].column_names) == {"input_ids", "labels"} and prepared["b"] is ready
    with pytest.raises(DatasetError, match=r"eval_dataset\['b'\] must not be empty; got 0 rows"):
        prepare({"a": splits["a"], "b": []}, tokenizer, is_training=False)


def test_another_column_a_format_and_a_processor(tokenizer):
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    rows = Dataset.from_dict({"body": TEXTS, "text": ["w90"] * len(TEXTS)}).with_format("numpy", columns=["text"])
    packed = prepare(rows, Processor(tokenizer), text_field="body")
    assert packed["input_ids"][:] == one_stream(TEXTS, tokenizer, 24)
    assert packed.with_format("torch")[0]["input_ids"].dtype == torch.int64

    class Rows(torch.utils.data.Dataset):  # never raises IndexError
        def __len__(self):
            return 30

        def __getitem__(self, index):
            return {"text": TEXTS[index % 3]}

    assert prepare(Rows(), tokenizer)["input_ids"][:] == one_stream(TEXTS[:30], tokenizer, 24)


def test_what_cannot_be_prepared_is_refused(tokenizer):
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    with pytest.raises(DatasetError, match="train_dataset must not be empty; got 0 rows"):
        prepare(Dataset.from_dict({"text": []}), tokenizer)
    with pytest.raises(DatasetError, match="train_dataset has a 'text' column but no tokenizer was given"):
        prepare(Dataset.from_dict({"text": TEXTS}))
    with pytest.raises(
        DatasetError, match="train_dataset must hold at least max_length=24 tokens; got 2. Add text, or"
    ):
        prepare(Dataset.from_dict({"text": ["w1"]}), tokenizer)
    with pytest.raises(DatasetError, match="corpus must hold at least max_length=24 tokens; got 3"):
        pack_text(["w1 w2"], tokenizer, 24, "corpus")
    with pytest.raises(DatasetError, match="eval_dataset must be masked .*the tokenizer's mask_token is None"):
        prepare(Dataset.from_dict({"text": TEXTS}), tokenizer, BertForMaskedLM, is_training=False)
    for source in (Dataset.from_dict({"text": ["w1", None]}), streamed(["w1", None])):
        with pytest.raises(DatasetError, match="Column 'text' must hold strings; got None. Leave such rows out"):
            list(prepare(source, tokenizer))
    with pytest.raises(DatasetError, match="Column 'text' must hold strings; got 3"):
        pack_text(["w1", 3], tokenizer, 24)
    for wrong in ("pos", None):
        rows = [{"text": "w1", "label": wrong}]
        with pytest.raises(DatasetError, match=f"Column 'label' must hold class indices or numbers; got {wrong!r}"):
            prepare(rows, tokenizer, BertForSequenceClassification, is_training=False)


def test_rows_of_different_lengths_need_a_padding_token(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    ragged, even = ([{"input_ids": [5, 6, 7]}, {"input_ids": ids}] for ids in ([5, 6], [7, 8, 9]))
    for make in (list, Dataset.from_list, lambda rows: {"a": Dataset.from_list(rows)}):
        check_padding(tokenizer, make(ragged))
        check_padding(None, make(even), None)
        with pytest.raises(DatasetError, match=r"different lengths \(2 to 3 tokens\), but no tokenizer was given"):
            check_padding(None, make(even), make(ragged))
        with pytest.raises(DatasetError, match="but the tokenizer has no padding token"):
            check_padding(bare, make(ragged))
    check_padding(None, Dataset.from_dict({"pixel_values": [[0.0]]}), streamed(TEXTS), [torch.zeros(2)])


@pytest.mark.parametrize("make", [lambda: Dataset.from_dict({"text": TEXTS}), lambda: streamed(TEXTS)])
def test_a_trainer_trains_and_evaluates_on_what_is_prepared(make, tokenizer, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    labelled = prepare(make(), tokenizer, is_training=False)
    trainer = Trainer(tiny_model(), arguments, train_dataset=labelled, processing_class=tokenizer)
    trainer.train()
    ids = torch.tensor(one_stream(TEXTS, tokenizer, 24))
    with torch.no_grad():
        expected = trainer.model.eval()(ids, labels=ids).loss.item()
    assert trainer.evaluate(labelled)["eval_loss"] == pytest.approx(expected, rel=1e-3)
    assert trainer.predict(labelled).predictions.shape == (len(ids), 24, 99)
