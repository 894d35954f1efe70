"""Distillation, search, saving and resuming on two processes, under DDP and FSDP2: what one process finds, and in step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForCausalLM

from hf_hybrid import load_mixer_bank
from hf_hybrid.adapters.bank import BANK_FOLDER, student_state
from hf_hybrid.errors import HybridConfigError
from hf_hybrid.objectives.local import start_distillation_
from hf_hybrid.surgery import prepare_distillation_

from conftest import token_dataset
from helpers import toy_trainer
from tiny_models import tiny_model


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate"
# rounding in another order, of numbers of size 1 to 5
TOLERANCE = 1e-5
BOTH = [
    "whole",
    "recomputed",
    "learned",
    "gated",
    "adapter",
    "finalized",
    "accumulated",
    "from_bank",
    "without_checkpoints",
    "memory",
    "pictures",
]
# T5's three tied embeddings stop accelerate's FSDP2, whoever trains; shards must be gathered by all, pictures or not
ONLY_DDP = ["encoder_decoder", "mixed", "repaired"]


def launch(mode: str, folder: Path, runs: list[str], killed: bool = False) -> dict[str, list[dict]]:
    """Two processes; what each of them found in each run."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        str(CONFIGS / f"{mode}.yaml"),
        "--num_processes",
        "2",
    ]
    command += ["--main_process_port", "0", str(Path(worker.__file__)), str(folder), *runs]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode != 0) == killed, done.stderr[-4000:]
    assert ("exitcode  : -9" in done.stderr) == killed, done.stderr[-4000:]
    files = {run: [folder / f"{run}.rank{number}.json" for number in (0, 1)] for run in runs}
    return {run: [json.loads(path.read_text()) for path in pair] for run, pair in files.items() if pair[0].exists()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What a process alone finds."""
    folder = tmp_path_factory.mktemp("one")
    wanted = ["whole", "learned", "gated", "accumulated", "from_bank", "pictures", "encoder_decoder", "repaired"]
    found = {name: getattr(worker, name)(folder) for name in wanted}
    whole = found["whole"]
    return {
        **found,
        "folder": folder,
        "recomputed": whole,
        "adapter": whole,
        "memory": whole,
        "without_checkpoints": whole,
    }


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, tmp_path_factory):
    """What two processes find, killed twice on the way."""
    mode, folder = request.param, tmp_path_factory.mktemp(request.param)
    runs = BOTH + (ONLY_DDP if mode == "ddp" else [])
    found = launch(mode, folder, [*runs, "killed_in_search"], killed=True)
    found |= launch(mode, folder, ["resumed_search", "killed_in_distillation"], killed=True)
    found |= launch(mode, folder, ["resumed_distillation"])
    return {**found, "mode": mode, "folder": folder}


def runs_of(two) -> list[str]:
    return [name for name in two if name not in ("mode", "folder")]


def largest_difference(a, b) -> float:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(largest_difference(a[key], b[key]) for key in a)
    if isinstance(a, list):
        assert len(a) == len(b)
        return max((largest_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    return abs(a - b)


@pytest.mark.slow
def test_processes_stay_in_step(two):
    assert set(runs_of(two)) >= {*BOTH, "resumed_search", "resumed_distillation"}
    for name in runs_of(two):
        first, second = two[name]
        assert first == second, name
        assert first["world"] == 2


@pytest.mark.slow
def test_losses_and_parameters_are_those_of_one_process(one, two):
    for name in set(runs_of(two)) & set(one):
        if two[name][0]["losses"]:
            assert largest_difference(two[name][0]["losses"], one[name]["losses"]) < TOLERANCE, name
        if name != "adapter":  # PEFT names them otherwise
            assert largest_difference(two[name][0]["parameters"], one[name]["parameters"]) < TOLERANCE, name
    assert len(two["whole"][0]["losses"]) == worker.STEPS


def assert_same_search(found, expected):
    assert [swapped for swapped, _ in found["trials"]] == [swapped for swapped, _ in expected["trials"]]
    assert len(found["trials"]) == worker.TRIALS
    assert largest_difference([x for _, x in found["trials"]], [x for _, x in expected["trials"]]) < TOLERANCE
    assert found["swapped"] == expected["swapped"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "recomputed", "adapter", "from_bank", "without_checkpoints", "memory"])
def test_the_search_swaps_the_same_layers_in_the_same_order(one, two, name):
    assert_same_search(two[name][0], one["whole"])


@pytest.mark.slow
def test_a_kill_in_the_search_repeats_no_trial(one, two):
    found = two["resumed_search"][0]
    assert found["losses"] == [] and found["steps"] == worker.STEPS  # no step more than the first time
    assert_same_search(found, one["whole"])
    assert largest_difference(found["parameters"], one["whole"]["parameters"]) < TOLERANCE
    # four of seven trials were there; the rehearsal and the recording of what was swapped are extra
    assert found["evaluations"] < two["resumed_distillation"][0]["evaluations"]


@pytest.mark.slow
def test_a_kill_in_the_distillation_goes_on_from_the_last_checkpoint(one, two):
    found = two["resumed_distillation"][0]
    assert largest_difference(found["losses"], one["whole"]["losses"][2:]) < TOLERANCE  # killed at 3, saved at 2
    assert largest_difference(found["parameters"], one["whole"]["parameters"]) < TOLERANCE
    assert_same_search(found, one["whole"])


@pytest.mark.slow
def test_a_finished_training_takes_no_further_step_in_one_process(one):
    trainer = worker.make_trainer(one["folder"] / "whole")  # six steps of an epoch of eight, at a constant rate
    trainer.train(resume_from_checkpoint=True)
    assert worker.outcome(trainer)["parameters"] == one["whole"]["parameters"]
    assert trainer.state.global_step == worker.STEPS


@pytest.mark.slow
def test_what_two_processes_saved_loads_in_one(one, two):
    folder, expected = two["folder"] / "whole", two["whole"][0]
    hybrid = AutoModelForCausalLM.from_pretrained(folder / "hybrid").eval()
    assert type(hybrid).__name__ == "HybridLlamaForCausalLM" and hybrid.config.architectures == [
        "HybridLlamaForCausalLM"
    ]
    ids = torch.tensor(token_dataset(8, seed=2)["input_ids"])
    with torch.no_grad():
        loss = hybrid(ids, labels=ids).loss.item()
    assert abs(loss - expected["eval_loss"]) < TOLERANCE and abs(loss - one["whole"]["eval_loss"]) < TOLERANCE
    bank = student_state(load_mixer_bank(tiny_model(), folder / BANK_FOLDER))
    assert {name: value.double().flatten().tolist() for name, value in bank.items()} == expected["parameters"]


@pytest.mark.slow
def test_what_is_sharded(two):
    names = set(two["whole"][0]["sharded"])
    if two["mode"] == "ddp":
        assert not names
        return
    # each mixer gathers its own weights: no gradient reaches the layer around it
    assert {"FSDPLinearAttention", "FSDPLlamaDecoderLayer", "FSDPHybridLlamaForCausalLM"} <= names
    saved = os.listdir(two["folder"] / "whole" / f"checkpoint-{worker.STEPS}")
    assert "optimizer_0" in saved and not [name for name in saved if name.startswith("pytorch_model")]


@pytest.mark.slow
def test_a_sharded_model_is_not_finalized(two):
    found = two["finalized"][0]
    if two["mode"] == "ddp":
        before, after = found["eval_losses"]
        assert abs(before - after) < TOLERANCE
    else:
        assert "HybridTrainer.finalize: the weights are sharded. Call save_model(folder)" in found["message"]


@pytest.mark.slow
def test_a_process_that_no_picture_reaches_gives_the_others_their_gradients(two):
    assert [loss > 0 for loss in two["pictures"][0]["losses"][0][1:]] == [False, False, True, True]
    if "mixed" in two:
        first, last = two["mixed"][0]["losses"][0][1:], two["mixed"][0]["losses"][-1][1:]
        assert all(loss > 0 for loss in first)
        fresh = student_state(worker.make_trainer(two["folder"] / "fresh", worker.scaled(worker.tiny_llava())).model)
        trained = two["mixed"][0]["parameters"]
        assert all(value.double().flatten().tolist() != trained[name] for name, value in fresh.items())
        assert last != first


def test_what_is_to_be_gathered_by_itself():
    model = worker.tiny_llava()
    of_family = set(model._no_split_modules)
    assert "CLIPTextEmbeddings" in of_family  # which this model does not have: accelerate would stop at it
    prepare_distillation_(model, "linear_attention")
    assert model._no_split_modules == {"LinearAttention"} | of_family - {"CLIPTextEmbeddings"}
    start_distillation_(model)  # as the trainer does again
    assert model.training_objective.host_units == of_family


@pytest.mark.parametrize(
    ("setting", "arguments", "message"),
    [
        ({}, {"projections": "low_rank"}, "projections='low_rank' cannot be sharded by FSDP"),
        ({}, {"projections": "full"}, "projections='full' cannot be sharded by FSDP"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "FSDP's activation_checkpointing must be False"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "FSDP's cpu_ram_efficient_loading must be False"),
    ],
)
def test_what_cannot_be_sharded_is_refused(setting, arguments, message, tmp_path, monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", **setting}.items():
        monkeypatch.setenv(name, value)
    model = tiny_model()
    with pytest.raises(HybridConfigError, match=message):
        toy_trainer(tmp_path, model=model, arguments=arguments)
    assert type(model) is type(tiny_model())


@pytest.mark.parametrize("name", ["activation_checkpointing", "cpu_ram_efficient_loading"])
def test_the_same_said_in_the_arguments_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the arguments set it for transformers
    with pytest.raises(HybridConfigError, match=f"FSDP's {name} must be False"):
        toy_trainer(tmp_path, arguments={"fsdp": True, "fsdp_config": {name: True}})


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero3", "DEEPSPEED")])
def test_the_configurations_are_read_and_know_their_keys(name, kind):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == kind
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for key in config.fsdp_config:
        assert key in known, key
    assert ("NOT RUN" in path.read_text()) == (name == "deepspeed_zero3")
