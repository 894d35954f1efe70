"""
Training rows that ask for recall, made from the user's own text: passages that come again, and lines of a key and a
value whose key is asked for later. Text as people write it seldom repeats itself word by word, so that a hybrid trained
on it alone is never told that it forgot.
"""

import zlib
from functools import partial

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from ..errors import HybridConfigError


SHORTEST_PASSAGE = 32
# Of rows with something to recall, those that get key-value lines instead of a passage.
KEY_VALUE_SHARE = 0.4
MOST_PAIRS = 6
# How a line may look. None of them is what `hf_hybrid.metrics` measures with.
LINES = (
    "{key}: {value}",
    "{key} = {value}",
    "The {key} number is {value}.",
    "[{key}] {value}",
    "Remember {key} {value}.",
)


def check_recall_share(value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise HybridConfigError(f"recall_share must be a number in [0, 1]; got {value!r}.")


def is_plain_text(dataset) -> bool:
    """Whether rows are text and nothing else: those that something to recall can be written into."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return False
    columns = dataset.column_names or list(next(iter(dataset)))
    return "input_ids" in columns and {*columns} <= {"input_ids", "attention_mask"}


def with_recall(
    dataset: Dataset | IterableDataset, share: float, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0
) -> Dataset | IterableDataset:
    """
    Replace some tokens in `share` of the rows, so that something earlier in the row helps to predict them. Rows keep
    their lengths.

    Args:
        dataset (`Dataset` or `IterableDataset`): Rows of `input_ids`, packed, without labels.
        share (`float`): Share of rows in [0, 1].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Writes the key-value lines; without it, passages alone.
        seed (`int`, *optional*, defaults to 0): What a row becomes depends on the seed and its tokens alone.

    Raises:
        HybridConfigError: If `share` is no share.
    """
    check_recall_share(share)
    if not share:
        return dataset
    function = partial(_rewrite, share=share, tokenizer=tokenizer, seed=seed)
    settings = {} if isinstance(dataset, IterableDataset) else {"desc": "Rows that ask for recall"}
    features = Features({"input_ids": List(Value("int32"))})
    columns = dataset.column_names or list(next(iter(dataset)))
    if "attention_mask" in columns:
        features["attention_mask"] = List(Value("int8"))
    return dataset.map(function, features=features, **settings)


def recall_rows(dataset, share: float, processing_class, seed: int):
    """
    A trainer's rows with something to recall, where they are plain text.

    Returns:
        `(dataset, share)`: As [`with_recall`] gives it, and the share that was used: 0 for rows of any other kind.
    """
    if not share or not is_plain_text(dataset):
        return dataset, 0.0
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return with_recall(dataset, share, tokenizer, seed), share


def _rewrite(row: dict, share: float, tokenizer, seed: int) -> dict:
    ids = np.array(row["input_ids"], dtype=np.int32)
    if not all(row.get("attention_mask", ())):  # padding stays where it is
        return row
    rng = np.random.default_rng([zlib.crc32(ids.tobytes()), seed % 2**32])
    if rng.random() < share and len(ids) >= 2 * SHORTEST_PASSAGE:
        if tokenizer is not None and rng.random() < KEY_VALUE_SHARE:
            ids = _with_pairs(ids, tokenizer, rng)
        else:
            ids = _with_passage(ids, rng)
    return {**row, "input_ids": ids.tolist()}


def _with_passage(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A passage of `SHORTEST_PASSAGE` to half of the row's tokens is copied to a later place."""
    size = int(rng.integers(SHORTEST_PASSAGE, len(ids) // 2 + 1))
    source = int(rng.integers(0, len(ids) - 2 * size + 1))
    target = int(rng.integers(source + size, len(ids) - size + 1))
    ids = ids.copy()
    ids[target : target + size] = ids[source : source + size]
    return ids


def _with_pairs(ids: np.ndarray, tokenizer, rng: np.random.Generator) -> np.ndarray:
    """
    Lines of a key (a word of the row) and a value (digits, or another word) are put between its tokens, and some of
    their keys are asked for at its end.
    """
    words = sorted({word for word in tokenizer.decode(ids.tolist()).split() if word.isalpha() and len(word) > 3})
    if len(words) < 2 * MOST_PAIRS:
        return _with_passage(ids, rng)
    number = int(rng.integers(1, MOST_PAIRS + 1))
    chosen = [words[i] for i in rng.permutation(len(words))[: 2 * number]]
    line = LINES[int(rng.integers(len(LINES)))]
    pairs = []
    for key, word in zip(chosen[:number], chosen[number:], strict=True):
        value = "".join(map(str, rng.integers(0, 10, int(rng.integers(3, 9))))) if rng.random() < 0.7 else word
        pairs.append((key, value))

    def encoded(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    lines = [encoded("\n" + line.format(key=key, value=value) + "\n") for key, value in pairs]
    asked = [lines[i] for i in rng.permutation(number)[: int(rng.integers(1, number + 1))]]
    room = len(ids) - sum(map(len, lines)) - sum(map(len, asked))
    if room < number + 1:
        return _with_passage(ids, rng)
    cuts = np.sort(rng.integers(0, room - room // 8 + 1, number))
    pieces, start = [], 0
    for cut, planted in zip(cuts, lines, strict=True):
        pieces += [ids[start:cut], planted]
        start = int(cut)
    return np.concatenate([*pieces, ids[start:room], *asked])


__all__ = ["check_recall_share", "recall_rows", "with_recall"]
