"""Every verb does its job on toy models."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_hybrid.cli import ablate, benchmark, evaluate
from hf_hybrid.cli.main import main
from hf_hybrid.cli.options import PlacedModelArguments

from conftest import token_dataset
from tiny_models import tiny_model


SITES = [f"model.layers.{index}.self_attn" for index in range(3)]
QUIET = ["--report_to", "none", "--use_cpu", "--disable_tqdm", "true"]
QUICK = ["--max_steps", 2, "--per_device_train_batch_size", 2, "--max_length", 24, *QUIET]


@pytest.fixture
def teacher(tmp_path, tokenizer):
    tiny_model().save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in token_dataset(60)["input_ids"]]
    rows = [{"text": " ".join(row), "label": index % 2} for index, row in enumerate(words)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(*arguments):
    return main([str(argument) for argument in arguments])


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(5, 45)[None]).logits


def test_ablate(teacher, capsys):
    rows, out = teacher / "rows.jsonl", teacher / "hybrid"
    assert run("convert", teacher / "teacher", "--window_size", 4, "--output_dir", out) == 0
    capsys.readouterr()
    assert run("ablate", out, "--eval_dataset", rows, "--eval_length", 24, "--max_examples", 20) == 0
    printed = capsys.readouterr().out
    assert printed.count("%") == 3  # one share per layer
    assert "with only windows and sinks" in printed
    assert "with only states" in printed
    assert run("ablate", out, "--eval_dataset", rows, "--text_column", "txt") == 1
    assert "has no column 'txt'; it has text, label." in capsys.readouterr().err
    assert run("ablate", teacher / "teacher", "--eval_dataset", rows, "--eval_length", 24) == 1
    assert "no mixer with both a window and a state" in capsys.readouterr().err


def test_distill_search_evaluate_benchmark(teacher, capsys):
    bank, out, rows, model = teacher / "bank", teacher / "hybrid", teacher / "rows.jsonl", teacher / "teacher"
    assert run("distill", model, "--dataset", rows, "--output_dir", bank, "--window_size", 4, *QUICK) == 0
    assert "Distilled 3 layers" in capsys.readouterr().out
    data = ["--eval_dataset", rows, "--eval_length", 24]
    search = ["search", model, "--mixer_bank", bank, *data, "--output_dir", out, "--max_drop", "50%", *QUIET]
    assert run(*search) == 0
    assert "Swapped 3 of 3 layers, eval_loss" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert len(loaded.config.hybrid["sites"]) == 3
    assert (out / "README.md").read_text().count("`eval_loss`") >= 1
    assert run("evaluate", out, *data) == 0
    assert "perplexity" in capsys.readouterr().out
    task = ["--prompt", "{text} w1", "--label_words", "good,bad"]
    assert run("evaluate", out, "--eval_dataset", rows, "--max_examples", 40, *task, "--device", "cpu") == 0
    assert "on 40 examples" in capsys.readouterr().out
    assert run("benchmark", out, "--lengths", "16,32", "--rounds", 1, "--decode_tokens", 2) == 0
    assert "prefill" in capsys.readouterr().out
    # again into the same folder: refused; continued: nothing is scored twice, the result is the same
    assert run(*search) == 1
    assert "holds another run" in capsys.readouterr().err
    before = (out / "swap_trace.jsonl").read_text()
    assert '"type": "rows"' in before
    assert run(*search, "--resume") == 0
    after = (out / "swap_trace.jsonl").read_text()
    assert after.startswith(before) and '"type": "search"' in after[len(before) :]
    assert after[len(before) :].count("\n") == 1  # that it began again, and nothing else


def test_models_are_measured_where_the_machine_is_fastest(teacher):
    name = str(teacher / "teacher")
    accelerator = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type
    model = PlacedModelArguments(model=name).load()
    assert next(model.parameters()).device.type == (accelerator or "cpu") and not model.training
    assert PlacedModelArguments(model=name, device="cpu").load().device.type == "cpu"
    for verb in (ablate, benchmark, evaluate):
        assert verb.OPTIONS[0] is PlacedModelArguments


def test_search_on_label_words(teacher, capsys):
    bank, rows, model = teacher / "bank", teacher / "rows.jsonl", teacher / "teacher"
    distill = ["distill", model, "--dataset", rows, "--output_dir", bank]
    assert run(*distill, "--mixer", "sliding_window", *QUICK) == 1
    assert "sliding_window has nothing to train" in capsys.readouterr().err
    assert run(*distill, *QUICK) == 0
    task = ["--prompt", "{text} w1", "--label_words", "good,bad", "--metric", "accuracy"]
    search = ["search", model, "--mixer_bank", bank, "--eval_dataset", rows, *task, *QUIET]
    assert run(*search, "--max_drop", "0.5", "--max_layers", 1, "--output_dir", teacher / "out") == 0
    assert "Swapped 1 of 3 layers, eval_accuracy" in capsys.readouterr().out
    # any point of the path; the one that was saved is the same
    convert = ["convert", model, "--mixer_bank", bank, "--trace", teacher / "out" / "swap_trace.jsonl"]
    assert run(*convert, "--layers", 1, "--output_dir", teacher / "step") == 0
    assert torch.equal(logits(teacher / "step"), logits(teacher / "out"))
    assert run(*convert, "--layers", 2, "--output_dir", teacher / "too far") == 1
    assert "a number of swaps from 1 to 1" in " ".join(capsys.readouterr().err.split())
    assert run("convert", model, "--trace", bank / "swap_trace.jsonl", "--output_dir", teacher / "x") == 1
    assert "pass --mixer_bank" in capsys.readouterr().err
    assert run(*convert[:-1], rows, "--output_dir", teacher / "x") == 1
    assert "no step of a search is there" in capsys.readouterr().err
    # by head, within a share of the cache, with a promise about other rows
    other, lines = teacher / "other.jsonl", rows.read_text().splitlines()
    other.write_text(
        "".join(json.dumps({**json.loads(line), "text": "w3 " + json.loads(line)["text"]}) + "\n" for line in lines)
    )
    by_head = ["--granularity", "head", "--cache_share", 0.6, "--confirmation_dataset", other, "--confidence", 0.9]
    assert run(*search, *by_head, "--max_drop", "0.9", "--output_dir", teacher / "heads") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "of 6 heads, eval_accuracy" in printed and "blocks ran" in printed
    assert "With 90% confidence, on data like these 60 rows, eval_accuracy drops by at most 0.9" in printed
    assert AutoModelForCausalLM.from_pretrained(teacher / "heads").config.hybrid["sites"]
    convert[-1] = teacher / "heads" / "swap_trace.jsonl"
    assert run(*convert, "--output_dir", teacher / "all steps") == 0
    assert torch.equal(logits(teacher / "all steps"), logits(teacher / "heads"))
    assert run(*search, *by_head, "--max_drop", "none", "--output_dir", teacher / "none") == 1
    assert "takes back swaps that break max_drop or floor; got neither" in " ".join(capsys.readouterr().err.split())


def test_search_is_told_the_direction_of_a_metric(teacher, capsys):
    """The worst layer by loss is the one whose swap raises it most: a search that maximises takes it first."""
    bank, rows, model = teacher / "bank", teacher / "rows.jsonl", teacher / "teacher"
    assert run("distill", model, "--dataset", rows, "--output_dir", bank, "--window_size", 4, *QUICK) == 0
    search = ["search", model, "--mixer_bank", bank, "--eval_dataset", rows, "--eval_length", 24, "--max_layers", 1]
    search += ["--strategy", "greedy"]
    first = {}
    for given in ("false", "true"):
        out = teacher / given
        options = ["--greater_is_better", given, "--max_drop", "50%", "--output_dir", out, *QUIET]
        assert run(*search, *options) == 0
        trials = [json.loads(line) for line in (out / "swap_trace.jsonl").read_text().splitlines()]
        scores = {
            t["candidate"]: t["metrics"]["eval_loss"] for t in trials if t.get("type") == "trial" and t["candidate"]
        }
        chosen = [*AutoModelForCausalLM.from_pretrained(out).config.hybrid["sites"]]
        first[given] = chosen, [(min if given == "false" else max)(scores, key=scores.get)]
    assert first["false"][0] == first["false"][1] != first["true"][0] == first["true"][1]


def test_convert_and_inspect(teacher, capsys):
    out = teacher / "windowed"
    convert = ["convert", teacher / "teacher", "--mixer", "sliding_window", "--window_size", 8, "--output_dir", out]
    assert run(*convert, "--layers", "0,-1") == 0
    sites = AutoModelForCausalLM.from_pretrained(out).config.hybrid_sites()
    assert list(sites) == [SITES[0], SITES[2]]
    memory = {"num_memory_tokens": 0, "memory_block_size": 32}
    assert sites[SITES[0]][1] == {"name": "sliding_window", "window_size": 8, "num_sink_tokens": 4, **memory}
    assert logits(out).isfinite().all()
    capsys.readouterr()
    assert run("inspect", out) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "2 of 3 convertible layers" in text and "4 of 6 key-value heads" in text
    assert run(*convert) == 1
    assert "holds a model already" in capsys.readouterr().err


def test_convert_single_heads(teacher, capsys):
    out, model = teacher / "heads", teacher / "teacher"
    assert run("convert", model, "--heads", json.dumps({SITES[1]: [1]}), "--output_dir", out) == 0
    assert "1 linear layers" in capsys.readouterr().out
    sites = AutoModelForCausalLM.from_pretrained(out).config.hybrid["sites"]
    assert list(sites) == [SITES[1]] and sites[SITES[1]]["heads"] == [1]
    assert run("inspect", out) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "1 of 3 convertible layers" in text and "1 of 6 key-value heads" in text
    # with --layers, those that --heads does not name are linear whole
    both = ["--layers", "0,1", "--heads", json.dumps({SITES[1]: [0]}), "--output_dir", teacher / "both"]
    assert run("convert", model, *both) == 0
    sites = AutoModelForCausalLM.from_pretrained(teacher / "both").config.hybrid["sites"]
    assert {name: site.get("heads") for name, site in sites.items()} == {SITES[0]: None, SITES[1]: [0]}


def test_convert_with_the_students_of_a_bank(teacher, capsys):
    bank, model, rows = teacher / "bank", teacher / "teacher", teacher / "rows.jsonl"
    assert run("distill", model, "--dataset", rows, "--output_dir", bank, "--window_size", 4, *QUICK) == 0
    convert = ["convert", model, "--mixer_bank", bank, "--output_dir"]
    for layers, message in (
        ("model.layers.9.self_attn", "is not an attention site"),
        ("7", "index must be in 0..2"),
        (",", "matched none"),
    ):
        assert run(*convert, teacher / "x", "--layers", layers) == 1
        assert message in capsys.readouterr().err and not (teacher / "x").exists()
    assert run(*convert, teacher / "x", "--heads", json.dumps({SITES[1]: [2]})) == 1
    assert "key-value heads must be among 0..1; got 2" in capsys.readouterr().err and not (teacher / "x").exists()
    assert run(*convert, teacher / "one", "--layers", "1") == 0
    assert "1 linear layers" in capsys.readouterr().out
    assert run(*convert, teacher / "all") == 0
    assert len(AutoModelForCausalLM.from_pretrained(teacher / "all").config.hybrid["sites"]) == 3
    assert run(*convert, teacher / "head", "--heads", json.dumps({SITES[1]: [1]})) == 0
    head = AutoModelForCausalLM.from_pretrained(teacher / "head")
    assert {name: site.get("heads") for name, site in head.config.hybrid["sites"].items()} == {SITES[1]: [1]}
    # the weights are the bank's: the same heads of the whole layer
    whole = AutoModelForCausalLM.from_pretrained(teacher / "one").get_submodule(SITES[1]).hybrid
    for name, parameter in head.get_submodule(SITES[1]).hybrid.named_parameters():
        assert torch.equal(parameter, whole.restricted((1,)).get_parameter(name))
    differ = [logits(teacher / name) for name in ("teacher", "one", "head")]
    assert not any(
        torch.equal(a, b) for a, b in [(differ[0], differ[1]), (differ[0], differ[2]), (differ[1], differ[2])]
    )


def test_any_setting_of_a_mixer_can_be_given(teacher):
    out, settings = teacher / "plain-gla", '{"output_gate": false, "gate_rank": 3}'
    convert = ["convert", teacher / "teacher", "--mixer", "gla", "--window_size", 0, "--mixer_config", settings]
    assert run(*convert, "--output_dir", out) == 0
    site = AutoModelForCausalLM.from_pretrained(out).config.hybrid_sites()[SITES[0]]
    assert site[1]["output_gate"] is False
    assert site[1]["gate_rank"] == 3
    assert site[1]["window_size"] == 0


def test_a_budget_is_planned_and_repaired(teacher, capsys):
    rows, out, model = teacher / "rows.jsonl", teacher / "hybrid", teacher / "teacher"
    # a plan ranks heads on passages of 512 tokens, of which the toy rows have enough
    plan = ["--mixer", "sliding_window", "--window_size", 4, "--num_memory_tokens", 2, "--large_memory_tokens", 100]
    mixer = ["--mixer_config", json.dumps({"memory_block_size": 4})]
    share = ["--share", 0.4, "--length", 256, "--num_kept_heads", 1]
    assert run("convert", model, "--output_dir", out, "--dataset", rows, *plan, *mixer, *share) == 0
    sites = AutoModelForCausalLM.from_pretrained(out).config.hybrid["sites"]
    assert sum(len(site.get("heads", [0, 1])) for site in sites.values()) == 5
    sizes = [site["mixer"]["num_memory_tokens"] for site in sites.values()]
    assert {2, 100} & {n for size in sizes for n in (size if isinstance(size, list) else [size])}
    capsys.readouterr()
    texts = teacher / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": json.loads(x)["text"]}) + "\n" for x in rows.read_text().splitlines()))
    data = ["--dataset", texts, "--eval_dataset", texts]
    assert run("repair", out, *data, "--output_dir", teacher / "repaired", *QUICK) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Repaired for 2 steps (96 tokens); loss" in printed
    assert AutoModelForCausalLM.from_pretrained(teacher / "repaired").repaired
    assert run("convert", model, "--output_dir", teacher / "no", *plan, "--share", 0.4) == 1
    assert "--share needs --dataset" in capsys.readouterr().err
    assert run("convert", model, "--output_dir", teacher / "no", *share, "--dataset", rows, "--layers", 1) == 1
    assert "--layers and --heads would be ignored" in capsys.readouterr().err


def test_a_search_may_end_with_a_repair(teacher, capsys):
    bank, out, rows, model = teacher / "bank", teacher / "hybrid", teacher / "rows.jsonl", teacher / "teacher"
    assert run("distill", model, "--dataset", rows, "--output_dir", bank, "--window_size", 4, *QUICK) == 0
    data = ["--eval_dataset", rows, "--eval_length", 24, "--max_layers", 1, "--max_drop", "50%"]
    search = ["search", model, "--mixer_bank", bank, *data, "--output_dir", out, *QUIET]
    assert run(*search, "--repair_steps", 1) == 1
    assert "--repair_steps needs --repair_dataset" in capsys.readouterr().err
    assert run(*search, "--repair_steps", 1, "--repair_dataset", rows) == 0
    assert "Repaired for 1 steps." in " ".join(capsys.readouterr().out.split())
    assert AutoModelForCausalLM.from_pretrained(out).repaired
    card = (out / "README.md").read_text()
    assert "## Repair" in card and "eval_loss" in card


@pytest.mark.parametrize("verb", ["distill", "convert", "repair"])
@pytest.mark.parametrize("name", ["paper", "fast", "balanced", "recall"])
def test_presets_say_what_they_do(verb, name, capsys):
    assert run(verb, "--preset", name, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"preset {name}: ") and "cost: " in printed
    for stage in ("mixer", "plan", "distill", "search", "repair"):
        assert f"\n{stage}: " in printed


def test_presets_are_defaults_and_what_is_typed_counts_more(teacher, capsys):
    rows, model = teacher / "rows.jsonl", teacher / "teacher"
    assert run("repair", "--preset", "recall", "--dry-run", "--recall_share", 0.1) == 0
    printed = capsys.readouterr().out
    assert "'recall_share': 0.1" in printed and "'max_steps': 96" in printed
    assert run("distill", model, "--dataset", rows, "--output_dir", teacher / "x", "--preset", "fast", *QUIET) == 1
    assert "has no stage 'distill'" in capsys.readouterr().err
    assert run("repair", "--preset", "blanced", "--dry-run") == 1
    assert "Did you mean 'balanced'?" in capsys.readouterr().err
    # the paper's method, for two steps: copies of the projections train
    distill = ["distill", model, "--dataset", rows, "--output_dir", teacher / "bank", "--preset", "paper", *QUICK]
    assert run(*distill) == 0
    settings = json.loads((teacher / "bank" / "adapter_config.json").read_text())
    assert settings["projections"] == "full"
