"""By how much packing text grows the process, and how fast it is.

    python benchmarks/packing_memory.py                  # 10M tokens, under a minute
    python benchmarks/packing_memory.py --tokens 100     # 100M, no verdict

Synthetic texts of 1 to 2,000 words, 500 on average, in a file of `datasets`; a word-level tokenizer made on the spot;
sequences of 1,024 tokens. Resident memory of this one process is read every 10 ms while it packs, and again when it is
done; the figure is the peak less what was there before. It counts mapped pages of the files, 8 bytes a token and the
text itself, which the system takes back when it wants to: so the limit is one for 10M tokens. Prints `met` or `MISSED`
there; exit status 1 if missed.
"""

import argparse
import gc
import sys
import tempfile
import threading
import time

import datasets
import numpy as np
import psutil
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_hybrid.distillation.data import prepare_dataset


LIMIT, LIMIT_TOKENS = 300, 10**7  # MB (10^6 bytes)
WORDS = 30_000


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


def texts(count: int):
    """Rows of text with `count` tokens in all, end-of-text tokens included."""
    random = np.random.default_rng(0)
    while count > 0:
        length = int(min(count - 1, 2000, 1 + random.exponential(500)))
        yield {"text": " ".join(f"w{i}" for i in random.integers(0, WORDS, length))}
        count -= length + 1


class Peak(threading.Thread):
    """Largest resident memory, in bytes, while the `with` block runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.value = self.after = self.process.memory_info().rss

    def run(self):
        while not self.done.wait(0.01):
            self.value = max(self.value, self.process.memory_info().rss)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()
        self.after = self.process.memory_info().rss
        self.value = max(self.value, self.after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10, help="Millions of tokens.")
    count = parser.parse_args().tokens * 10**6
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.Dataset.from_generator(texts, gen_kwargs={"count": count}, cache_dir=folder)
        tokenizer = make_tokenizer()
        settings = {
            "processing_class": tokenizer,
            "model_config": LlamaConfig(),
            "text_field": "text",
            "max_length": 1024,
            "seed": 0,
            "is_training": True,
        }
        # what is loaded once, whatever the size: threads, compiled parts of libraries
        prepare_dataset([{"text": "w1 " * 2000}], "warm-up", **settings)
        gc.collect()
        start = time.perf_counter()
        with Peak() as memory:
            packed = prepare_dataset(rows, "train_dataset", **settings)
        seconds = time.perf_counter() - start
        if len(packed) != count // 1024:
            raise RuntimeError(f"{count // 1024} rows were expected; got {len(packed)}.")
        peak, after = ((value - memory.before) / 1e6 for value in (memory.value, memory.after))
        del packed, rows
    print(f"{count:,} tokens in {seconds:.1f} s; resident memory grew by {after:.0f} MB, at its peak by {peak:.0f} MB")
    if count != LIMIT_TOKENS:
        return 0
    met = peak <= LIMIT
    print(f"at most {LIMIT} MB: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
