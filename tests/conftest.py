"""Shared fixtures: fixed seeds, two threads, quiet libraries, a tokenizer made on the spot, toy data. No network."""

import os


os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before anything from the ecosystem is imported: a test never looks a name up
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402


torch.set_num_threads(1)  # toy tensors: threads of two test processes would only fight
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
disable_progress_bars()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def ops_backend(monkeypatch):
    """`ops_backend(name)` makes the ops run in `name` for the rest of the test, as `HF_HYBRID_OPS` does."""
    from hf_hybrid.ops import dispatch
    from hf_hybrid.ops.cpp.build import kernels

    def choose(name):
        if name == "cpp" and kernels() is None:
            pytest.skip("the compiled kernels need a C++ compiler, and this machine has none")
        monkeypatch.setenv("HF_HYBRID_OPS", name)
        dispatch.requested_backend.cache_clear()

    yield choose
    monkeypatch.undo()
    dispatch.requested_backend.cache_clear()


def token_dataset(rows: int, length: int = 24, seed: int = 1) -> Dataset:
    """Random token ids with a little structure (each token repeats half of the time), as `input_ids` and `labels`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 99, (rows, length), generator=generator)
    repeat = torch.rand(rows, length, generator=generator) < 0.5
    for t in range(1, length):
        ids[:, t] = torch.where(repeat[:, t], ids[:, t - 1], ids[:, t])
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of 99 words, with an end-of-text and a padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "good", "bad"] + [f"w{i}" for i in range(93)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
