"""What tells two searches apart: everything that trials depend on, and nothing else."""

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset, Features, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_hybrid.search.identity import data_digest, search_identity, weights_digest

from conftest import token_dataset
from helpers import toy_trainer
from tiny_models import tiny_model


def rows(change=0):
    ids = [[1, 2, 3], [4, 5, 6 + change]]
    return Dataset.from_dict({"input_ids": ids, "score": [0.5, float("nan")], "name": ["a", None]})


class Rows(torch.utils.data.Dataset):
    """A dataset of torch, or of anything that can be indexed."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas", None])
def test_a_format_does_not_hide_the_rows(kind):
    assert data_digest(rows().with_format(kind)) == data_digest(rows()) != data_digest(rows(1).with_format(kind))


def test_rows_of_a_dataset():
    whole = data_digest(rows())
    assert data_digest(rows().select([1, 0])) != whole != data_digest(rows().select([0]))
    assert (
        data_digest(rows().select([0, 1]))
        == whole
        == data_digest(rows().select_columns(["score", "name", "input_ids"]))
    )
    assert data_digest(rows().with_format("torch", columns=["input_ids"])) == data_digest(
        rows().select_columns("input_ids")
    )
    assert data_digest({"a": rows(), "b": rows(1)}) == {"a": whole, "b": data_digest(rows(1))}
    long = Dataset.from_dict({"x": range(2500)})
    assert data_digest(long) != data_digest(Dataset.from_dict({"x": [*range(2499), 0]}))


def test_what_transforms_rows_counts():
    assert data_digest(rows().with_transform(lambda row: row)) == data_digest(rows().with_transform(lambda row: row))
    assert data_digest(rows().with_transform(lambda row: {**row, "x": 1})) != data_digest(
        rows().with_transform(lambda row: row)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda change: torch.tensor([1.0, change]),
        lambda change: np.array([1.0, change]),
        lambda change: [1.0, change],
        lambda change: Image.new("RGB", (4, 4), int(change)),
        lambda change: {"array": np.array([0.1, change]), "sampling_rate": 16000},
        lambda change: "text" * int(change),
        lambda change: b"bytes" * int(change),
    ],
    ids=["tensor", "array", "list", "picture", "sound", "text", "bytes"],
)
def test_rows_of_other_datasets(make):
    def dataset(change):
        return Rows([{"x": make(1.0)}, {"x": make(change)}])

    assert data_digest(dataset(2.0)) == data_digest(dataset(2.0)) != data_digest(dataset(3.0))
    assert data_digest(list(dataset(2.0).values)) == data_digest(dataset(2.0))


def test_pictures_count_by_their_bytes(tmp_path):
    def dataset(colour, folder):
        path = tmp_path / folder / "picture.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), colour).save(path)
        features = Features({"image": ImageFeature()})
        files = Dataset.from_dict({"image": [str(path)]}, features=features)
        return files, Dataset.from_dict({"image": [Image.new("RGB", (4, 4), colour)]}, features=features)

    (red, red_picture), (same, _), (blue, blue_picture) = dataset("red", "a"), dataset("red", "b"), dataset("blue", "c")
    assert data_digest(red) == data_digest(same) != data_digest(blue)
    assert data_digest(red_picture) != data_digest(blue_picture)


def test_sounds_count_by_their_bytes():
    def dataset(last):
        stored = {"audio": [{"bytes": bytes([1, last]), "path": None}], "values": [[0.5, last]]}
        return Dataset.from_dict(stored).cast_column("audio", Audio(16000))  # as it is read from disk, not decoded yet

    assert data_digest(dataset(1)) == data_digest(dataset(1)) != data_digest(dataset(2))


def test_streams_count_by_their_rows():
    def stream(change):
        return IterableDataset.from_generator(lambda: iter(rows(change)))

    assert data_digest(stream(0)) == data_digest(stream(0)) != data_digest(stream(1))
    assert data_digest(rows().to_iterable_dataset()) != data_digest(rows(1).to_iterable_dataset())


def test_all_weights_count_and_tied_ones_once():
    assert weights_digest(tiny_model()) == weights_digest(tiny_model()) != weights_digest(tiny_model(seed=1))
    for name in (
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "model.rotary_emb.inv_freq",
        "lm_head.weight",
    ):
        model = tiny_model()
        with torch.no_grad():
            model.get_parameter(name).add_(1) if "inv_freq" not in name else model.get_buffer(name).add_(1)
        assert weights_digest(model) != weights_digest(tiny_model()), name
    tied = tiny_model(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and weights_digest(tied) == weights_digest(
        tiny_model(tie_word_embeddings=True)
    )
    assert weights_digest(tiny_model().half()) != weights_digest(tiny_model().half().float())


def test_offloaded_weights_count():
    from accelerate import cpu_offload

    model, other = tiny_model(), tiny_model(seed=1)
    plain = weights_digest(model)
    assert weights_digest(cpu_offload(model, "cpu")) == plain != weights_digest(cpu_offload(other, "cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())  # and are where they were


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]))}


def shifted(prediction):
    return {"accuracy": float(np.mean(prediction.predictions[:, :-2].argmax(-1) == prediction.label_ids[:, 2:]))}


def changed(tmp_path, before=None, after=None):
    first, second = (search_identity(toy_trainer(tmp_path, **(kwargs or {}))) for kwargs in (before, after))
    return sorted(key for key in first if first[key] != second[key])


def other_mlp():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("difference", "after"),
    [
        ([], {}),
        ([], {"arguments": {"per_device_eval_batch_size": 3, "max_steps": 7, "learning_rate": 0.5}}),
        (["weights"], {"model": other_mlp}),
        (["compute_metrics"], {"compute_metrics": accuracy}),
        (
            ["compute_loss_func"],
            {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()},
        ),
        (
            ["preprocess_logits_for_metrics"],
            {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
        ),
        (
            ["data_collator"],
            {"data_collator": lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])}},
        ),
        (["data"], {"eval_dataset": token_dataset(8, seed=3)}),
        (["data"], {"eval_dataset": token_dataset(8, seed=3).with_format("torch")}),
        ([], {"eval_dataset": token_dataset(8, seed=2).with_format("numpy")}),
        (["arguments"], {"arguments": {"label_smoothing_factor": 0.1}}),
        (["arguments"], {"arguments": {"dataloader_drop_last": True}}),
        (["config"], {"model": lambda: tiny_model(rms_norm_eps=0.1)}),
    ],
)
def test_what_tells_searches_apart(difference, after, tmp_path):
    if "model" in after:
        after = {**after, "model": after["model"]()}
    assert changed(tmp_path, after=after) == difference


def test_the_metric_function_tells_searches_apart(tmp_path):
    assert changed(tmp_path, {"compute_metrics": accuracy}, {"compute_metrics": shifted}) == ["compute_metrics"]
    assert changed(tmp_path, {"compute_metrics": accuracy}, {"compute_metrics": accuracy}) == []
    drop = {"dataloader_drop_last": True}
    small = {**drop, "per_device_eval_batch_size": 3}
    assert changed(tmp_path, {"arguments": drop}, {"arguments": small}) == ["arguments"]
