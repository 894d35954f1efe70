"""
Datasets become model inputs here, and nowhere else: text is tokenised and packed, labelled text is tokenised row by
row, rows that are prepared already pass as they are.

Packing is two maps of `datasets`. The first writes one row per token (Arrow, 4 bytes), the second reads `max_length` of
them at a time, or a multiple, and drops the last, shorter piece. Nothing is carried by us between batches: all texts
are one stream, however large the batches, on disk (cached by fingerprint, memory-mapped) as well as streamed (in the
order, and with the shards and the resumable state, that `datasets` keeps).
"""

import contextlib
import itertools
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import DataCollatorForLanguageModeling, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ..errors import DatasetError


CHAT_FIELD, LABEL_FIELDS = "messages", ("labels", "label", "label_ids")
# a row with one of these is for a collator that knows it: packing its text would drop the picture or sound
MEDIA_FIELDS = {
    *["image", "images", "pixel_values", "video", "videos", "audio", "audios", "input_features", "input_values"]
}
TEXTS_PER_BATCH = 256
# a fast tokenizer holds some 200 bytes per token (strings, offsets) until its call returns: about 50 MB at this size
CHARACTERS_PER_CALL = 2**20
TOKEN = Features({"token": Value("int32")})
TOKENS_PER_BATCH = 2**18  # of the second map; what it writes is one record batch of 1 MB

MASKED_LM_NAMES = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
# class names by model type; a type that stands in several is what the first one says
LANGUAGE_MODELS = (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
LANGUAGE_MODEL_NAMES = {name for mapping in LANGUAGE_MODELS for name in mapping.values()}


def prepare_dataset(
    dataset,
    name: str,
    *,
    processing_class,
    model_config: PreTrainedConfig,
    text_field: str,
    max_length: int,
    seed: int,
    is_training: bool,
    model_class: type | None = None,
):
    """
    A dataset as model inputs. For training, text and chats are packed without labels, since distillation has its
    teacher (a classifier's labelled text stays row by row). For evaluation and prediction:

    | the model | text, chats | the same with labels |
    |---|---|---|
    | causal LM | packed, `labels` are the tokens | refused |
    | masked LM | packed and masked, once | refused |
    | encoder-decoder | refused | refused |
    | any other | row by row | row by row, with `labels` |

    Rows with `input_ids`, without text, or with pictures or sounds pass as they are.

    Args:
        dataset (`Dataset`, `IterableDataset`, `list[dict]`, `dict[str, ...]` of these, or `None`): Anything else passes
            as it is. A stream of text is begun, to see that it fills a row.
        name (`str`): What messages call it.
        processing_class (`PreTrainedTokenizerBase` or processor, *optional*): Needed for text.
        model_config (`PreTrainedConfig`): Of the model that will read the rows.
        text_field (`str`): Column of text. Without it, `messages` are read through the tokenizer's chat template.
        max_length (`int`): Tokens per packed row; rows that are not packed are truncated to it.
        seed (`int`): Of the masks of a masked LM. The mask of a row depends on the seed and its tokens alone.
        is_training (`bool`): Whether the rows are distilled on.
        model_class (`type`, *optional*): The model's class. Without it, the config's `architectures` say what the model
            is, or its `model_type` where they were never saved.

    Returns:
        The dataset, of the kind that was given (a list of text becomes a `Dataset`).

    Raises:
        DatasetError: If it is empty or too short, holds something else than text, lacks a tokenizer, a chat template or
            a mask token, or has no labels that the model could be evaluated on.
    """
    settings = (processing_class, model_config, text_field, max_length, seed, is_training, model_class)
    return _prepare(dataset, name, *settings)


def _prepare(dataset, name: str, *settings):
    if isinstance(dataset, dict):
        if settings[5]:
            raise DatasetError(f"{name} must be one dataset; got a dict of {', '.join(dataset)}. Pass one of them.")
        return {key: _prepare(part, f"{name}[{key!r}]", *settings) for key, part in dataset.items()}
    processing_class, model_config, text_field, max_length, seed, is_training, model_class = settings
    columns = _column_names(dataset, name)
    field = next((column for column in (text_field, CHAT_FIELD) if column in columns), None)
    if field is None or "input_ids" in columns or MEDIA_FIELDS & columns:
        return dataset
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is None:
        raise DatasetError(
            f"{name} has a {field!r} column but no tokenizer was given. Pass processing_class=tokenizer."
        )
    label = next((column for column in LABEL_FIELDS if column in columns), None)
    kind = model_kind(model_config, model_class)
    others = sorted(columns - {field, *LABEL_FIELDS})
    if kind == "other" and not is_training and others and (label is None or any("text" in name for name in others)):
        raise DatasetError(
            f"{name} has columns beside {field!r} that would be dropped: {', '.join(others)}. Name the label column "
            "'label', or "
            "pass rows that are tokenised already (input_ids)."
        )
    return _prepare_text(dataset, name, field, label, kind, tokenizer, max_length, seed, is_training)


def _prepare_text(dataset, name, field, label, kind, tokenizer, max_length, seed, is_training):
    """The row of the table that the model is in."""
    if not is_training:
        _check_can_be_evaluated(name, kind, field, label, tokenizer)
    if not isinstance(dataset, Dataset | IterableDataset):
        dataset = Dataset.from_list([dataset[index] for index in range(len(dataset))])
    by_row = kind == "other" and (label is not None or not is_training)
    label = label if by_row and not is_training else None
    dataset = dataset.with_format(None).select_columns([field] if label is None else [field, label])
    if is_chat := field == CHAT_FIELD:
        # most templates end with the end-of-text token, which packing puts between texts anyway
        end = "" if by_row else tokenizer.eos_token or ""
        dataset, field = _chats_to_text(dataset, tokenizer, name, end), "text"
    elif isinstance(dataset, IterableDataset):
        # rows without a type: a row that holds no text has to be found before Arrow joins it with the others
        dataset = dataset.map(_check_row, fn_kwargs={"field": field})
    if by_row:
        # a chat template writes special tokens itself
        return _tokenise_by_row(dataset, field, label, tokenizer, max_length, add_special_tokens=not is_chat)
    labelled = not is_training and kind == "causal_lm"
    packed = _pack(dataset, field, tokenizer, max_length, name, labelled)
    return packed if is_training or labelled else _mask_once(packed, tokenizer, seed)


def pack_text(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int, name: str = "dataset"
) -> Dataset:
    """
    Tokenise texts, join them with the end-of-text token between, and cut the stream into sequences of `max_length`
    tokens. The last, shorter piece is dropped.

    Args:
        texts (`Iterable[str]`): Special tokens are not added to them.
        name (`str`, *optional*, defaults to `"dataset"`): What messages call it.

    Returns:
        `Dataset`: One column, `input_ids`.

    Raises:
        DatasetError: If the texts do not fill one sequence, or one of them is no string.
    """
    texts = list(texts)
    _check_strings(texts, "text")
    dataset = Dataset.from_dict({"text": texts}, features=Features({"text": Value("string")}))
    return _pack(dataset, "text", tokenizer, max_length, name, with_labels=False)


def check_padding(processing_class, *datasets) -> None:
    """
    Raise [`DatasetError`] if rows differ in length and the tokenizer has no padding token, which many causal models
    lack. The first 64 rows of each dataset, as [`prepare_dataset`] returns it, are looked at; streams are not.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    for dataset in datasets:
        if isinstance(dataset, dict):
            check_padding(processing_class, *dataset.values())
        lengths = _lengths(dataset)
        if len(lengths) > 1 and getattr(tokenizer, "pad_token_id", None) is None:
            have = "no tokenizer was given" if tokenizer is None else "the tokenizer has no padding token"
            raise DatasetError(
                f"The dataset has sequences of different lengths ({min(lengths)} to {max(lengths)} tokens), but {have}."
                " Pass processing_class=tokenizer with tokenizer.pad_token = tokenizer.eos_token, or a data_collator."
            )


def _lengths(dataset) -> set[int]:
    rows = []
    if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
        rows = dataset[: min(len(dataset), 64)]["input_ids"]
    elif isinstance(dataset, list):
        rows = [row["input_ids"] for row in dataset[:64] if isinstance(row, dict) and "input_ids" in row]
    return {len(ids) for ids in rows}


def _column_names(dataset, name: str) -> set[str]:
    """Columns of a dataset; none for what is no table of ours to prepare."""
    if isinstance(dataset, IterableDataset):
        if dataset.column_names is not None:
            return set(dataset.column_names)
        first = next(iter(dataset), None)
        if first is None:
            raise DatasetError(f"{name} must not be empty; got 0 rows.")
        return set(first)
    if not hasattr(dataset, "__len__"):  # None, or an iterable of torch's, which may be readable only once
        return set()
    if len(dataset) == 0:
        raise DatasetError(f"{name} must not be empty; got 0 rows.")
    if isinstance(dataset, Dataset):
        return set(dataset.column_names)
    first = None if isinstance(dataset, str) else dataset[0]
    return set(first) if isinstance(first, dict) else set()


def model_kind(config: PreTrainedConfig, model_class: type | None) -> str:
    """`"causal_lm"`, `"masked_lm"`, `"seq2seq"`, or `"other"`: what has another head, or none."""
    if model_class is not None:
        names = [parent.__name__ for parent in model_class.__mro__]
    elif config.architectures:
        names = [name.removeprefix("Hybrid") for name in config.architectures]
    else:
        mappings = LANGUAGE_MODELS[1:] if getattr(config, "is_decoder", False) else LANGUAGE_MODELS
        names = [mapping.get(config.model_type, "") for mapping in mappings]
    for name in names:
        if name in LANGUAGE_MODEL_NAMES or name.endswith(("ForCausalLM", "ForMaskedLM")):  # or of someone's own code
            if getattr(config, "is_encoder_decoder", False):
                return "seq2seq"
            return "masked_lm" if name in MASKED_LM_NAMES or name.endswith("ForMaskedLM") else "causal_lm"
    return "other"


def _check_can_be_evaluated(name: str, kind: str, field: str, label: str | None, tokenizer) -> None:
    if kind == "seq2seq":
        raise DatasetError(
            f"{name} must hold labels for an encoder-decoder model, whose answer does not follow from its input; got "
            f"the column {field!r}. Pass rows of tokenised `input_ids` and `labels`."
        )
    if label is not None and kind != "other":
        raise DatasetError(
            f"{name} must hold tokenised prompts for a language model to be judged by labels; got the columns {field!r}"
            f" and {label!r}. Pass rows of `input_ids` and `labels`, or LabelWordTask(tokenizer, prompt, label_words)."
            f"dataset(rows) with that task's trainer_kwargs(). For the loss on the text alone, leave {label!r} out."
        )
    if kind == "masked_lm" and tokenizer.mask_token_id is None:
        raise DatasetError(
            f"{name} must be masked for a masked language model; the tokenizer's mask_token is None. Pass the model's "
            "own tokenizer."
        )


# `datasets` names a cache file after the mapped function's name and arguments, not its code: rename a function below
# when it writes something else. Arguments must pickle to the same bytes in every process, as tokenizers do.


def _map(dataset, function, batch_size: int, settings: dict[str, Any], **fn_kwargs):
    settings = {"batched": True, "batch_size": batch_size, "fn_kwargs": fn_kwargs, **settings}
    if isinstance(dataset, IterableDataset):
        return dataset.map(function, **settings)
    # of a table, what one call returns: the default of 1,000 rows would be 1,000 tokens in the first map of packing
    settings["writer_batch_size"] = TOKENS_PER_BATCH if dataset.format["type"] == "arrow" else 1000
    # the first process writes what the others find in the cache; data that is in no file is cached by each process
    shared = PartialState().main_process_first() if dataset.cache_files else contextlib.nullcontext()
    with shared:
        return dataset.map(function, **settings)


def _chats_to_text(dataset, tokenizer, name: str, end: str):
    """The conversations as a column `text`, without `end` where they end with it."""
    if tokenizer.chat_template is None:
        raise DatasetError(
            f"{name} has a {CHAT_FIELD!r} column, for which the tokenizer must have a chat template; got None. Set "
            "tokenizer.chat_template, or pass a column of text."
        )
    return _map(dataset, _render_chats, TEXTS_PER_BATCH, {"remove_columns": [CHAT_FIELD]}, tokenizer=tokenizer, end=end)


def _render_chats(batch: dict, tokenizer, end: str) -> dict:
    for chat in batch[CHAT_FIELD]:
        if not chat:
            raise DatasetError(
                f"Column {CHAT_FIELD!r} must hold chats of one message or more; got {chat!r}. Leave such rows out."
            )
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in batch[CHAT_FIELD]]
    return {"text": [text.removesuffix(end) for text in texts]}


def _tokenise_by_row(dataset, field: str, label: str | None, tokenizer, max_length: int, add_special_tokens: bool):
    settings = {"remove_columns": [field] if label is None else [field, label]}
    inputs = {"field": field, "label": label, "tokenizer": tokenizer, "add_special_tokens": add_special_tokens}
    length = min(max_length, tokenizer.model_max_length)
    return _map(dataset, _tokenise_rows, TEXTS_PER_BATCH, settings, max_length=length, **inputs)


def _tokenise_rows(batch: dict, field: str, label: str | None, tokenizer, **how) -> dict:
    _check_strings(batch[field], field)
    rows = dict(tokenizer(batch[field], truncation=True, **how))
    if label is None:
        return rows
    wrong = next((value for value in batch[label] if value is None or isinstance(value, str)), None)
    if wrong is not None or None in batch[label]:
        raise DatasetError(
            f"Column {label!r} must hold class indices or numbers; got {wrong!r}. Map names with model.config.label2id."
        )
    return {**rows, "labels": batch[label]}


def _pack(dataset, field: str, tokenizer, max_length: int, name: str, with_labels: bool):
    """One stream of tokens, cut into rows."""
    inputs = {"field": field, "tokenizer": tokenizer}
    tokens = _map(dataset.with_format("arrow"), _tokenise_to_stream, TEXTS_PER_BATCH, {"features": TOKEN}, **inputs)
    is_stream = isinstance(dataset, IterableDataset)
    if not is_stream and len(tokens) < max_length:
        raise DatasetError(_too_short(name, max_length, len(tokens)))
    # a stream hands its rows out one by one, so that a short one is not waited for
    batch_size = max_length if is_stream else max_length * max(TOKENS_PER_BATCH // max_length, 1)
    columns = ("input_ids", "labels") if with_labels else ("input_ids",)
    features = Features({column: List(Value("int32")) for column in columns})
    packed = _map(tokens, _cut_stream, batch_size, {"features": features}, max_length=max_length, columns=columns)
    packed = packed.with_format(None)
    if is_stream and next(iter(packed), None) is None:
        raise DatasetError(_too_short(name, max_length, "fewer"))
    return packed


def _too_short(name: str, max_length: int, count: int | str) -> str:
    return f"{name} must hold at least max_length={max_length} tokens; got {count}. Add text, or lower max_length."


def _tokenise_to_stream(table: pa.Table, field: str, tokenizer) -> pa.Table:
    """`[texts]` -> one row per token, the end-of-text token after each text."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [np.empty(0, dtype=np.int32)]
    for texts in _by_size(table[field]):
        _check_strings(texts, field)
        # not verbose: a text longer than the model's context is nothing to warn of, it will be cut
        rows = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        pieces.append(np.fromiter(itertools.chain.from_iterable(ids + end for ids in rows), dtype=np.int32))
    return pa.table({"token": np.concatenate(pieces)})


def _by_size(column: pa.ChunkedArray) -> Iterator[list]:
    """Groups of at most `CHARACTERS_PER_CALL` characters, or of one text: a batch of books is not held at once."""
    group: list = []
    size = 0
    for value in column:
        text = value.as_py()
        length = len(text) if isinstance(text, str) else 0
        if group and size + length > CHARACTERS_PER_CALL:
            yield group
            group, size = [], 0
        group.append(text)
        size += length
    yield group


def _cut_stream(table: pa.Table, max_length: int, columns: tuple[str, ...]) -> pa.Table:
    """One row per token -> rows of `max_length`. Only the last batch of a dataset is no multiple of it."""
    tokens = table["token"].combine_chunks()
    count = len(tokens) // max_length
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * max_length)
    rows = pa.ListArray.from_arrays(offsets, tokens.slice(0, count * max_length))
    return pa.table(dict.fromkeys(columns, rows))


def _mask_once(dataset, tokenizer, seed: int):
    features = Features({column: List(Value("int32")) for column in ("input_ids", "labels")})
    return _map(dataset, _mask_rows, 32, {"features": features}, tokenizer=tokenizer, seed=seed)


def _mask_rows(batch: dict, tokenizer, seed: int) -> dict:
    """
    BERT's masks. The generator of a row is seeded by the row: its mask is the same in every process, whatever its
    number in the stream. Drawn again until a token is masked, since the loss of a row without one is not a number.
    """
    collator = DataCollatorForLanguageModeling(tokenizer)
    rows: dict[str, list] = {"input_ids": [], "labels": []}
    for ids in batch["input_ids"]:
        row_seed = zlib.crc32(np.asarray(ids, dtype=np.int32).tobytes(), seed % 2**32)
        collator.generator = torch.Generator().manual_seed(row_seed)
        has_words = not set(ids) <= set(tokenizer.all_special_ids)
        while True:
            inputs, labels = collator.torch_mask_tokens(torch.tensor([ids]))
            if (labels >= 0).any() or not has_words:
                break
        rows["input_ids"].append(inputs[0].tolist())
        rows["labels"].append(labels[0].tolist())
    return rows


def _check_row(row: dict, field: str) -> dict:
    _check_strings([row[field]], field)
    return {}  # nothing changes


def _check_strings(texts: list, field: str) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise DatasetError(f"Column {field!r} must hold strings; got {text!r}. Leave such rows out.")
