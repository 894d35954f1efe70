"""Rows that ask for recall: what changes in them, and that it is the same everywhere."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from hf_hybrid.demo.assets import prose, teacher_folder
from hf_hybrid.distillation.data import pack_text
from hf_hybrid.distillation.recall_text import SHORTEST_PASSAGE, _with_pairs, with_recall
from hf_hybrid.errors import HybridConfigError


def rows(count=200, length=200, seed=0):
    rng = np.random.default_rng(seed)
    return Dataset.from_dict({"input_ids": rng.integers(0, 10_000, (count, length)).tolist()})


def longest_repeat(ids):
    """Length of the longest stretch that stands twice in a row."""
    ids, best = list(ids), 0
    for shift in range(1, len(ids)):
        run = 0
        for here, there in zip(ids, ids[shift:], strict=False):
            run = run + 1 if here == there else 0
            best = max(best, run)
    return best


def test_the_wanted_share_of_rows_repeats_a_passage():
    before = rows()
    after = with_recall(before, 0.4)
    changed = [i for i in range(len(before)) if before[i]["input_ids"] != after[i]["input_ids"]]
    assert 0.3 < len(changed) / len(before) < 0.5
    for i in changed[:10]:
        assert len(after[i]["input_ids"]) == 200
        assert longest_repeat(after[i]["input_ids"]) >= SHORTEST_PASSAGE
        assert longest_repeat(before[i]["input_ids"]) < 3


def test_a_row_becomes_the_same_whatever_stands_beside_it():
    whole, some = with_recall(rows(), 0.5, seed=3), with_recall(rows().select(range(50, 100)), 0.5, seed=3)
    assert whole.select(range(50, 100))["input_ids"][:] == some["input_ids"][:]
    assert whole["input_ids"][:] != with_recall(rows(), 0.5, seed=4)["input_ids"][:]


def test_streams_become_what_tables_become():
    table = with_recall(rows(20), 0.5)
    stream = with_recall(rows(20).to_iterable_dataset(), 0.5)
    assert [row["input_ids"] for row in stream] == table["input_ids"][:]


def test_no_share_changes_nothing():
    data = rows(5)
    assert with_recall(data, 0.0) is data


@pytest.mark.parametrize("share", [-0.1, 1.1, True, "half"])
def test_a_share_must_be_one(share):
    with pytest.raises(HybridConfigError, match=r"recall_share must be a number in \[0, 1\]"):
        with_recall(rows(5), share)


@pytest.mark.slow
def test_key_value_lines_ask_for_what_was_said():
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    packed = pack_text(prose("train")[:4], tokenizer, 512)
    rng = np.random.default_rng(0)
    for row in packed.select(range(8)):
        ids = np.array(row["input_ids"], dtype=np.int32)
        changed = _with_pairs(ids, tokenizer, rng)
        assert len(changed) == len(ids) and changed.dtype == np.int32
        last = tokenizer.decode(changed.tolist()).strip().splitlines()[-1]
        assert tokenizer.decode(changed.tolist()).count(last) >= 2, last
