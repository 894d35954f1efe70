"""Every error of the command line is one line and a status."""

import json
import subprocess
import sys

import pytest

from hf_hybrid.cli.main import VERBS, main

from conftest import token_dataset
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("cli")
    tiny_model().save_pretrained(path / "teacher")
    tokenizer.save_pretrained(path / "teacher")
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in token_dataset(4)["input_ids"]]
    (path / "rows.jsonl").write_text("".join(json.dumps({"text": " ".join(w), "label": 0}) + "\n" for w in words))
    (path / "broken.jsonl").write_text('{"text": \n')
    return path


CONVERT = ["convert", "teacher", "--output_dir", "x"]
EVALUATE = ["evaluate", "teacher", "--eval_dataset", "rows.jsonl"]
CASES = {
    "mixer": ([*CONVERT, "--mixer", "slding_window"], "Did you mean 'sliding_window'"),
    "layer": ([*CONVERT, "--layers", "7"], "index must be in 0..2"),
    "no JSON": ([*CONVERT, "--mixer_config", "{"], "--mixer_config is not JSON"),
    "no object": ([*CONVERT, "--mixer_config", "[1]"], "--mixer_config must be a JSON object"),
    "no setting": ([*CONVERT, "--mixer", "gla", "--mixer_config", '{"gate": 1}'], "has no setting 'gate'"),
    "heads, no JSON": ([*CONVERT, "--heads", "[0"], "--heads is not JSON"),
    "heads, no object": ([*CONVERT, "--heads", "[0]"], "--heads must be a JSON object; got '[0]'"),
    "heads, no list": ([*CONVERT, "--heads", '{"model.layers.1.self_attn": "0"}'], "must be a list of key-value heads"),
    "heads, too many": ([*CONVERT, "--heads", '{"model.layers.1.self_attn": [5]}'], "must be among 0..1; got 5"),
    "heads, none": ([*CONVERT, "--heads", "{}"], "matched none"),
    "heads, elsewhere": (
        [*CONVERT, "--layers", "0", "--heads", '{"model.layers.1.self_attn": [0]}'],
        "is not among the selected layers",
    ),
    "no file": (["evaluate", "teacher", "--eval_dataset", "nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
    "broken file": (["evaluate", "teacher", "--eval_dataset", "broken.jsonl"], "DatasetGenerationError: "),
    "half a task": ([*EVALUATE, "--prompt", "x {text}"], "belong together"),
    "prompt": ([*EVALUATE, "--prompt", "x", "--label_words", "good,bad"], "must contain {text}"),
    "words": ([*EVALUATE, "--prompt", "{text}", "--label_words", "good,good"], "different tokens"),
    "column": ([*EVALUATE, "--text_column", "txt"], "has no column 'txt'; it has text, label"),
    "device": ([*EVALUATE, "--eval_length", "8", "--device", "cuda:99"], "--device must be a device of this machine ("),
    "no hybrid": (["benchmark", "teacher"], "is not a hybrid checkpoint"),
    "lengths": (["benchmark", "teacher", "--lengths", "16,x"], "must be comma-separated numbers of tokens; got '16,x'"),
    "no model": (["inspect", "./nothing"], "nothing"),
    "argument": (
        ["distill", "teacher", "--dataset", "rows.jsonl", "--max_length", "1"],
        "max_length must be at least 2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_are_one_line_and_a_status(folder, capsys, monkeypatch, case):
    monkeypatch.chdir(folder)
    arguments, message = CASES[case]
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.splitlines()[-1].startswith("hf-hybrid ") or message in error.splitlines()[-1]
    assert not (folder / "x").exists()


def test_the_traceback_is_there_for_those_who_ask(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HYBRID_TRACEBACK", "1")
    with pytest.raises(ValueError, match="slding_window"):
        main([*CONVERT, "--mixer", "slding_window"])


def test_a_hybrid_without_a_base_needs_a_teacher(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["convert", "teacher", "--output_dir", "nameless"]) == 0
    config = json.loads((folder / "nameless" / "config.json").read_text())
    config["hybrid"]["base_model"]["name_or_path"] = None
    (folder / "nameless" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["benchmark", "nameless"]) == 1
    assert "does not name its base model. Pass --teacher" in capsys.readouterr().err
    short = ["--lengths", "16", "--rounds", "1", "--decode_tokens", "1"]
    assert main(["benchmark", "nameless", "--teacher", "teacher", *short]) == 0


def test_help(capsys):
    assert main(["nope"]) == 2
    assert main([]) == 2
    assert not capsys.readouterr().out
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(capsys, verb):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"usage: hf-hybrid {verb}" in text and VERBS[verb].split(",")[0] in text


@pytest.mark.slow
def test_the_list_of_verbs_needs_no_verb():
    code = (
        "import sys\nfrom hf_hybrid.cli.main import main\nmain(['--help'])\n"
        "print([n for n in sys.modules if n.startswith('hf_hybrid.cli.') and n != 'hf_hybrid.cli.main'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
