"""Digests by content: equal for equal content in another process, different for any other content."""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import textwrap

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from hf_hybrid.errors import DatasetError
from hf_hybrid.search.fingerprint import Fingerprint


def digest(value, **kwargs):
    return Fingerprint(**kwargs).add(value).hexdigest()


def picture(value=0, mode="RGB"):
    return Image.new(mode, (3, 2), value)


VALUES = [
    None,
    True,
    1,
    1.0,
    1j,
    "1",
    b"1",
    [],
    [1],
    [1, 1],
    [[1], 1],
    {},
    {"1": 1},
    {"1": 2},
    {1},
    {1, 2},
    "ab",
    ["a", "b"],
    "a, b",
    torch.tensor([1.0, 2.0]),
    torch.tensor([2.0, 1.0]),
    torch.tensor([[1.0, 2.0]]),
    torch.tensor([1.0, 2.0], dtype=torch.float64),
    torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    torch.zeros(0),
    torch.zeros(0, 1),
    torch.tensor(1.0),
    np.array([1.0, 2.0]),
    np.array([1, 2]),
    np.array(["a", None], dtype=object),
    np.array(["a", 1], dtype=object),
    picture(),
    picture(1),
    picture(0, "L"),
    functools.partial(print, 1),
    functools.partial(print, 2),
    torch.eye(2).to_sparse(),
    sys,
    os,
]


def test_other_content_is_another_digest():
    for a, b in itertools.combinations(range(len(VALUES)), 2):
        assert digest(VALUES[a]) != digest(VALUES[b]), (VALUES[a], VALUES[b])


def test_equal_content_is_the_same_digest():
    shared = [1, 2]
    for a, b in [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([shared, shared], [[1, 2], [1, 2]]),
        (torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous()),
        (np.arange(4)[::2], np.array([0, 2])),
        (picture(7), picture(7)),
        (bytearray(b"x"), b"x"),
    ]:
        assert digest(a) == digest(b)
    circle = []
    circle.append(circle)
    assert digest(circle)


PROGRAM = """
    import functools, torch
    LIMIT, TABLE = {limit}, {{"x": {{"b", "a", "c"}}}}

    def helper(x):
        return x {operator} LIMIT

    class Metric:
        scale = {scale}

        def __init__(self, words):
            self.words, self.rng = words, torch.Generator()

        @property
        def first(self):
            return self.words[0]

        def __call__(self, prediction):
            return [helper(x) for x in prediction], TABLE, lambda y: y * {factor}

    def wrapped(function):
        @functools.wraps(function)
        def inner(prediction):
            return function(prediction)
        return inner

    @wrapped
    def compute_metrics(prediction, top={top}):
        return {{"accuracy": helper(prediction)}}

    from hf_hybrid.search.fingerprint import Fingerprint
    metric = Metric({words})
    values = compute_metrics, metric, metric.__call__, functools.partial(compute_metrics, top=3), Metric
    digests = [Fingerprint().add(value).hexdigest() for value in values]
"""
SETTINGS = {"limit": 0.5, "operator": ">", "scale": 1.0, "factor": 2, "top": 1, "words": ["a"]}


def program(**changes) -> str:
    return textwrap.dedent(PROGRAM).format(**{**SETTINGS, **changes})


def digests(**changes) -> list[str]:
    namespace = {"__name__": "program"}
    exec(program(**changes), namespace)
    return namespace["digests"]


def test_functions_are_the_same_in_another_process():
    code = f"__name__ = 'program'\n{program()}\nprint(*digests)"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == digests() and len(set(digests())) == 5


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({}, "nnnnn"),
        ({"limit": 0.6}, "yyyyy"),  # a constant of the module, used by a function that is used
        ({"operator": "<"}, "yyyyy"),  # the code of that function
        ({"scale": 2.0}, "nyyny"),  # of the class
        ({"factor": 3}, "nyyny"),  # a function inside of a function
        ({"top": 2}, "ynnyn"),  # a default
        ({"words": '["b"]'}, "nyynn"),  # of the object
    ],
)
def test_every_part_of_a_function_counts(change, changed):
    pairs = zip(digests(), digests(**change), strict=True)
    assert "".join("n" if before == after else "y" for before, after in pairs) == changed


def test_addresses_do_not_count():
    def make():
        def metric(prediction, rows=(1, 2), *, names=("a",)):
            return metric, rows, torch.Generator

        return metric

    assert digest(make()) == digest(make())
    assert digest(functools.lru_cache(make())) == digest(functools.lru_cache(make()))
    kept = make()
    assert digest(kept) != digest(functools.partial(kept, rows=()))


def test_a_variable_that_is_not_set_yet():
    def make(flag):
        def metric():
            return later

        if flag:
            later = 1
        return metric

    assert digest(make(False)) != digest(make(True))


def test_collators_count_by_their_settings(tokenizer):
    def collator(**kwargs):
        return DataCollatorForLanguageModeling(tokenizer, **{"mlm": False, **kwargs})

    assert digest(collator()) == digest(collator()) != digest(collator(pad_to_multiple_of=8))
    tokenizer.mask_token = "<unk>"
    used = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.2, seed=3)
    fresh = digest(used)
    used([{"input_ids": [1, 2, 3, 4]}])  # makes its generator
    assert (
        digest(used)
        == fresh
        != digest(DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.3, seed=3))
    )
    right = digest(DataCollatorWithPadding(tokenizer))
    tokenizer.padding_side = "left"
    try:
        assert digest(DataCollatorWithPadding(tokenizer)) != right
    finally:
        tokenizer.padding_side, tokenizer.mask_token = "right", None


class Accuracy(evaluate.Metric):
    """An evaluation module, as `evaluate.load` returns one: what it holds changes with use."""

    def _info(self):
        import datasets

        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.array(predictions) == np.array(references)))}


def test_an_evaluation_module_counts_by_its_name(tmp_path):
    module = Accuracy(cache_dir=str(tmp_path))

    def compute_metrics(prediction):
        return module.compute(predictions=prediction, references=prediction)

    before = digest(compute_metrics)
    assert compute_metrics([1, 2]) == {"accuracy": 1.0}
    assert digest(compute_metrics) == before


@dataclasses.dataclass
class Row:
    ids: list
    label: int = 0


class Opaque:
    __slots__ = ("handle",)


def test_rows_must_show_their_content():
    assert digest(Row([1]), strict=True) == digest(Row([1]), strict=True) != digest(Row([1], 1), strict=True)
    assert digest({"x": {Row}}, strict=True)
    with pytest.raises(
        DatasetError, match="rows of a dataset must hold numbers, text, .*; got test_fingerprint.Opaque"
    ):
        digest({"x": Opaque()}, strict=True)


def test_quantised_weights_count_by_their_parts():
    from torch.testing._internal.two_tensor import TwoTensor

    def pair(a, b):
        return TwoTensor(torch.full((2,), a), torch.full((2,), b))

    assert digest(pair(1.0, 2.0)) == digest(pair(1.0, 2.0)) != digest(pair(1.0, 3.0))
