"""The command line, on toy models: every subcommand does its job, and every error is one line and a non-zero status."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_hybrid import cli

from conftest import token_dataset
from tiny_models import tiny_model


@pytest.fixture
def teacher(tmp_path, tokenizer):
    tiny_model().save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in token_dataset(60)["input_ids"]]
    rows = [{"text": " ".join(row), "label": index % 2} for index, row in enumerate(words)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


QUICK = [
    "--max_steps",
    2,
    "--per_device_train_batch_size",
    2,
    "--max_length",
    24,
    "--report_to",
    "none",
    "--use_cpu",
    "--disable_tqdm",
    "true",
]


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
    bank, out, rows = teacher / "bank", teacher / "hybrid", teacher / "rows.jsonl"
    model = teacher / "teacher"
    assert run("distill", model, "--dataset", rows, "--output_dir", bank, "--window_size", 4, *QUICK) == 0
    assert "Distilled 3 layers" in capsys.readouterr().out
    search = [
        "search",
        model,
        "--mixer_bank",
        bank,
        "--eval_dataset",
        rows,
        "--eval_length",
        24,
        "--output_dir",
        out,
        "--max_drop",
        "50%",
    ]
    assert run(*search, "--report_to", "none", "--use_cpu", "--disable_tqdm", "true") == 0
    assert "Swapped 3 of 3 layers, eval_loss" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert len(loaded.config.hybrid["sites"]) == 3
    assert (out / "README.md").read_text().count("`eval_loss`") >= 1
    assert run("evaluate", out, "--eval_dataset", rows, "--eval_length", 24) == 0
    assert "perplexity" in capsys.readouterr().out
    task = ["--prompt", "{text} w1", "--label_words", "good,bad"]
    assert run("evaluate", out, "--eval_dataset", rows, "--max_examples", 40, *task) == 0
    assert "on 40 examples" in capsys.readouterr().out
    assert run("benchmark", out, "--lengths", "16,32", "--rounds", 1, "--decode_tokens", 2) == 0
    assert "prefill" in capsys.readouterr().out
    for layers, message in (
        ("model.layers.9.self_attn", "is not an attention site"),
        ("7", "index must be in 0..2"),
        (",", "matched none"),
    ):
        assert run("convert", model, "--mixer_bank", bank, "--layers", layers, "--output_dir", teacher / "y") == 1
        assert message in capsys.readouterr().err and not (teacher / "y").exists()
    assert run("convert", model, "--mixer_bank", bank, "--layers", "1", "--output_dir", teacher / "z") == 0
    assert "1 linear layers" in capsys.readouterr().out
    # again into the same folder: refused; continued: nothing is scored twice, the result is the same
    assert run(*search, "--report_to", "none", "--use_cpu") == 1
    assert "holds another run" in capsys.readouterr().err
    before = (out / "swap_trace.jsonl").read_text().count('"type": "trial"')
    assert run(*search, "--resume", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true") == 0
    assert (out / "swap_trace.jsonl").read_text().count('"type": "trial"') == before


def test_search_on_label_words(teacher, capsys):
    bank, rows = teacher / "bank", teacher / "rows.jsonl"
    assert (
        run(
            "distill",
            teacher / "teacher",
            "--dataset",
            rows,
            "--output_dir",
            bank,
            "--mixer",
            "sliding_window",
            *QUICK,
        )
        == 1
    )
    assert "sliding_window has nothing to train" in capsys.readouterr().err
    assert run("distill", teacher / "teacher", "--dataset", rows, "--output_dir", bank, *QUICK) == 0
    arguments = [
        "--prompt",
        "{text} w1",
        "--label_words",
        "good,bad",
        "--metric",
        "accuracy",
        "--max_drop",
        "0.5",
        "--max_layers",
        1,
    ]
    more = ["--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--output_dir", teacher / "out"]
    assert run("search", teacher / "teacher", "--mixer_bank", bank, "--eval_dataset", rows, *arguments, *more) == 0
    assert "Swapped 1 of 3 layers, eval_accuracy" in capsys.readouterr().out


def test_convert_and_inspect(teacher, capsys):
    out = teacher / "windowed"
    assert (
        run(
            "convert",
            teacher / "teacher",
            "--mixer",
            "sliding_window",
            "--window_size",
            8,
            "--layers",
            "0,-1",
            "--output_dir",
            out,
        )
        == 0
    )
    loaded = AutoModelForCausalLM.from_pretrained(out)
    sites = loaded.config.hybrid_sites()
    assert list(sites) == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    assert sites["model.layers.0.self_attn"][1] == {"name": "sliding_window", "window_size": 8, "num_sink_tokens": 4}
    with torch.no_grad():
        assert loaded(torch.arange(20)[None]).logits.isfinite().all()
    capsys.readouterr()
    assert run("inspect", out) == 0
    text = capsys.readouterr().out
    assert "2 of 3 convertible layers" in text
    assert run("convert", teacher / "teacher", "--output_dir", out) == 1
    assert "holds a model already" in capsys.readouterr().err


def test_any_setting_of_a_mixer_can_be_given(teacher):
    out = teacher / "plain-gla"
    settings = '{"output_gate": false, "gate_rank": 3}'
    assert (
        run(
            "convert", teacher / "teacher", "--mixer", "gla", "--window_size", 0, "--mixer_config", settings, "--output_dir", out
        )
        == 0
    )  # fmt: skip
    site = AutoModelForCausalLM.from_pretrained(out).config.hybrid_sites()["model.layers.0.self_attn"]
    assert site[1]["output_gate"] is False
    assert site[1]["gate_rank"] == 3
    assert site[1]["window_size"] == 0


def test_errors_are_one_line_and_a_status(teacher, capsys):
    model = teacher / "teacher"
    for arguments, message in [
        (
            ["convert", model, "--mixer", "slding_window", "--output_dir", teacher / "x"],
            "Did you mean 'sliding_window'",
        ),
        (["convert", model, "--layers", "7", "--output_dir", teacher / "x"], "index must be in 0..2"),
        (["convert", model, "--mixer_config", "{", "--output_dir", teacher / "x"], "--mixer_config is not JSON"),
        (["convert", model, "--mixer_config", "[1]", "--output_dir", teacher / "x"], "must be a JSON object"),
        (
            ["convert", model, "--mixer", "gla", "--mixer_config", '{"gate": 1}', "--output_dir", teacher / "x"],
            "has no setting 'gate'",
        ),
        (["evaluate", model, "--eval_dataset", "nowhere.jsonl"], "The file 'nowhere.jsonl' does not exist"),
        (["evaluate", model, "--eval_dataset", teacher / "rows.jsonl", "--prompt", "x {text}"], "belong together"),
        (
            [
                "evaluate",
                model,
                "--eval_dataset",
                teacher / "rows.jsonl",
                "--prompt",
                "x",
                "--label_words",
                "good,bad",
            ],
            "must contain {text}",
        ),
        (
            [
                "evaluate",
                model,
                "--eval_dataset",
                teacher / "rows.jsonl",
                "--prompt",
                "{text}",
                "--label_words",
                "good,good",
            ],
            "different tokens",
        ),
        (["benchmark", model], "is not a hybrid checkpoint"),
        (["inspect", teacher / "nothing"], "nothing"),
        (
            ["evaluate", model, "--eval_dataset", teacher / "rows.jsonl", "--text_column", "txt"],
            "has no column 'txt'; it has text, label",
        ),
        (
            ["distill", model, "--dataset", teacher / "rows.jsonl", "--max_length", "1"],
            "max_length must be at least 2 tokens",
        ),
    ]:
        assert run(*arguments) == 1, arguments
        error = capsys.readouterr().err.strip()
        assert message in error, (arguments, error)
        assert error.splitlines()[-1].startswith("hf-hybrid ") or message in error.splitlines()[-1]
    assert not (teacher / "x").exists()
    assert run("nope") == 2
    assert run("--help") == 0
    assert "distill" in capsys.readouterr().out


def test_inspect_reads_the_config_alone(tmp_path, capsys):
    from transformers import BertConfig, BloomConfig, LlamaConfig, MambaConfig, T5Config

    small = {"hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16, "vocab_size": 1000}
    configs = {
        "llama": LlamaConfig(**small, num_key_value_heads=4, architectures=["LlamaForCausalLM"]),
        "bert": BertConfig(**small),
        "bloom": BloomConfig(hidden_size=64, n_layer=2, n_head=4, architectures=["BloomForCausalLM"]),
        "t5": T5Config(d_model=64, num_layers=2, num_heads=4, d_kv=16, architectures=["T5ForConditionalGeneration"]),
        "mamba": MambaConfig(hidden_size=64, num_hidden_layers=1, architectures=["MambaForCausalLM"]),
    }
    for name, config in configs.items():
        config.save_pretrained(tmp_path / name)
    assert run("inspect", tmp_path / "llama", "--dtype", "bfloat16") == 0
    text = capsys.readouterr().out
    # 4 layers x 4 heads x 128 x (keys and values) x 2 bytes = 8 KiB per token
    assert "0 of 4 convertible layers" in text and "32.0 MiB" in text and "1,024.0 MiB" in text and "131,072" in text
    assert run("inspect", tmp_path / "bert") == 0
    text = capsys.readouterr().out
    assert "0 of 4 convertible layers" in text and "KV cache" not in text
    assert run("inspect", tmp_path / "bert", "--mixer", "gated_delta_net") == 0
    assert "refused" in capsys.readouterr().out
    assert run("inspect", tmp_path / "bloom") == 0
    assert "2 of these layers would lose the ALiBi position bias" in capsys.readouterr().out
    assert run("inspect", tmp_path / "t5") == 0
    text = capsys.readouterr().out
    assert "relative" in text and "stays softmax" in text and "cross-attention" in text
    assert run("inspect", tmp_path / "mamba") == 1
    assert "none of its modules computes attention" in capsys.readouterr().err


def test_inspect_loads_the_weights_where_the_config_is_not_enough(tmp_path, capsys):
    from transformers import FalconConfig, FalconForCausalLM

    # merges its position bias with masks, which cannot be done without numbers
    config = FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, alibi=True)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    assert run("inspect", tmp_path) == 0
    assert "2 of these layers would lose" in capsys.readouterr().out


def test_inspect_counts_latents(tmp_path, capsys):
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, vocab_size=99, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1,
        moe_intermediate_size=16, first_k_dense_replace=4, architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert run("inspect", tmp_path) == 0
    # 4 layers x (latent of 8 + rotary key of 4) x 4 bytes: not the 4 heads x (8 + 8) that are made from them
    assert f"{4 * 12 * 4 * 32768 / 2**20:.1f} MiB" in capsys.readouterr().out


def test_inspect_counts_what_windows_keep(tmp_path, capsys):
    from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

    from hf_hybrid.cache import cache_bytes

    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4, head_dim=32, vocab_size=99,
        max_position_embeddings=8192, sliding_window=16, architectures=["Gemma3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert run("inspect", tmp_path, "--dtype", "float32") == 0
    text = capsys.readouterr().out
    cache = DynamicCache(config=config)
    with torch.no_grad():
        Gemma3ForCausalLM(config)(
            torch.randint(5, 99, (1, 4096)), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
    row = next(line for line in text.splitlines() if "4,096" in line)
    assert f"{cache_bytes(cache) / 2**20:.1f} MiB" in row, row
