"""Publishing and loading back, against a Hub-compatible server on this machine. Clients run in processes of their own: the address of
the Hub is read when huggingface_hub is imported."""

import os
import subprocess
import sys
import textwrap

import pytest

from hub_server import HubServer


TESTS = os.path.dirname(__file__)


@pytest.fixture
def run_client(tmp_path):
    """Runs code in a fresh process that knows only our Hub; returns what it prints."""
    with HubServer(tmp_path / "hub", token="hf_test") as hub:

        def run(code: str, name: str = "client") -> str:
            home = tmp_path / name
            environment = {
                **os.environ,
                **hub.environment(home),
                "PYTHONPATH": TESTS,
                "HF_MODULES_CACHE": str(home / "modules"),
            }
            done = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(code)],
                capture_output=True,
                text=True,
                env=environment,
                cwd=tmp_path,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            return done.stdout

        yield run


LOAD = """
    import torch; torch.set_num_threads(1)
    {first}
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("tester/toy"{trust}).eval()
    with torch.no_grad():
        print(model(torch.arange(5, 25)[None]).logits.double().sum().item(), len(model.config.hybrid["sites"]))
"""


def test_a_model_goes_to_the_hub_and_comes_back(run_client):
    sent = run_client("""
        import torch; torch.set_num_threads(1)
        from helpers import SMALL_MIXER
        from tiny_models import tiny_model, perturb_mixers
        from hf_hybrid import convert_to_hybrid
        model = perturb_mixers(convert_to_hybrid(tiny_model(), SMALL_MIXER, [0, 2]))
        model.push_to_hub("tester/toy")
        with torch.no_grad():
            print(model(torch.arange(5, 25)[None]).logits.double().sum().item(), 2)
        from huggingface_hub import hf_hub_download
        card = open(hf_hub_download("tester/toy", "README.md")).read()
        assert "2 of its 3 attention layers" in card and 'from_pretrained("tester/toy")' in card, card
        model.push_to_hub("tester/toy")  # a second push, onto what is there
    """)
    assert run_client(LOAD.format(first="import hf_hybrid", trust=""), "other") == sent
    assert run_client(LOAD.format(first="", trust=", trust_remote_code=True"), "stranger") == sent


def test_a_trainer_pushes_the_hybrid_with_its_card(run_client):
    sent = run_client("""
        import torch; torch.set_num_threads(1)
        from helpers import toy_trainer
        from hf_hybrid import GreedyLayerSwapCallback
        trainer = toy_trainer("run", callbacks=[GreedyLayerSwapCallback("eval_loss", 10.0, max_layers=2)], arguments={"hub_model_id": "tester/toy"})
        trainer.train()
        trainer.push_to_hub()
        from huggingface_hub import HfApi, hf_hub_download
        files = HfApi().list_repo_files("tester/toy")
        assert {"config.json", "model.safetensors", "modeling_hf_hybrid.py", "README.md", "swap_trace.jsonl"} <= set(files), files
        assert not any("checkpoint-" in name for name in files), files
        card = open(hf_hub_download("tester/toy", "README.md")).read()
        assert "## Search" in card and "| 2 |" in card and "eval_loss" in card, card
        model = trainer.finalize()
        with torch.no_grad():
            print(model(torch.arange(5, 25)[None]).logits.double().sum().item(), 2)
    """)
    assert (
        run_client(LOAD.format(first="import hf_hybrid", trust=""), "other").splitlines()[-1] == sent.splitlines()[-1]
    )


def test_a_bank_is_loaded_from_the_hub(run_client):
    out = run_client("""
        import torch; torch.set_num_threads(1)
        from helpers import toy_trainer
        from tiny_models import tiny_model
        from hf_hybrid import load_mixer_bank
        from hf_hybrid.adapters.bank import student_state
        from huggingface_hub import HfApi
        trainer = toy_trainer("run")
        trainer.train()
        trainer.save_mixer_bank("bank")
        HfApi().create_repo("tester/bank")
        HfApi().upload_folder(repo_id="tester/bank", folder_path="bank")
        loaded = load_mixer_bank(tiny_model(), "tester/bank")
        for name, value in student_state(trainer.model).items():
            assert torch.equal(student_state(loaded)[name], value)
        print("equal")
    """)
    assert out.splitlines()[-1] == "equal"


def test_an_adapter_is_pushed_and_loaded_four_ways(run_client):
    out = run_client("""
        import torch; torch.set_num_threads(1)
        from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM
        from hf_hybrid import HybridPeftConfig
        from tiny_models import tiny_model
        tiny_model().push_to_hub("tester/base")
        def base():
            return AutoModelForCausalLM.from_pretrained("tester/base").eval()
        ids = torch.arange(5, 25)[None]
        config = HybridPeftConfig(mixer="linear_attention", heads={"model.layers.1.self_attn": [1]})
        model = get_peft_model(base(), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".hybrid_" in name:
                    parameter.add_(0.3)
            expected = model(ids).logits
            model.push_to_hub("tester/adapter")
            by_hand = base()
            by_hand.load_adapter("tester/adapter")
            for loaded in (
                PeftModel.from_pretrained(base(), "tester/adapter"),
                AutoPeftModelForCausalLM.from_pretrained("tester/adapter"),
                AutoModelForCausalLM.from_pretrained("tester/adapter"),
                by_hand,
            ):
                assert torch.equal(loaded.eval()(ids).logits, expected)
            with model.disable_adapter():
                assert torch.equal(model(ids).logits, base()(ids).logits)
        print("equal")
    """)
    assert out.splitlines()[-1] == "equal"


def test_a_repository_that_is_not_there(run_client):
    out = run_client("""
        import hf_hybrid
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained("tester/nothing")
        except OSError as error:
            print(type(error).__name__, "tester/nothing" in str(error))
    """)
    assert out.strip().endswith("True")
