"""Examples, run as a user runs them, for two steps on a toy model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import token_dataset
from tiny_models import tiny_model


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_distill_and_search(tmp_path, tokenizer):
    tiny_model().save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    rows = [tokenizer.convert_ids_to_tokens(ids) for ids in token_dataset(60)["input_ids"]]
    lines = [json.dumps({"text": " ".join(row), "label": index % 2}) for index, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    files = [
        part for split in ("train", "validation", "test") for part in (f"--{split}_file", str(tmp_path / "rows.jsonl"))
    ]
    command = [
        sys.executable, str(EXAMPLES / "distill_and_search.py"), "--model", str(tmp_path / "teacher"), *files, "--prompt", "{text} w1",
        "--label_words", "bad,good", "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--max_length", "24", "--report_to", "none",
        "--max_drop", "1.0", "--use_cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 linear layers, test accuracy" in done.stdout
    assert (tmp_path / "out" / "config.json").exists()
