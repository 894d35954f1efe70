"""What `hf-hybrid inspect` says of models of several kinds, and what it must not do."""

import json
import sys

import pytest
import torch
from transformers import (
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    T5Config,
)

from hf_hybrid import convert_to_hybrid
from hf_hybrid.cli.main import main
from hf_hybrid.conversion.cache import cache_bytes

from helpers import SMALL_MIXER
from tiny_models import SIZES, tiny_model


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Tables whose cells are not wrapped."""
    monkeypatch.setenv("COLUMNS", "200")


def inspect(*arguments):
    return main(["inspect", *map(str, arguments)])


def row_of(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"│ {start}"))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_config_alone_is_read(tmp_path, capsys):
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
    assert inspect(tmp_path / "llama", "--dtype", "bfloat16") == 0
    text = capsys.readouterr().out
    # 4 layers x 4 heads x 128 x (keys and values) x 2 bytes = 8 KiB per token
    assert "0 of 4 convertible layers" in text and "32.0 MiB" in text and "1,024.0 MiB" in text and "131,072" in text
    assert inspect(tmp_path / "bert") == 0
    text = capsys.readouterr().out
    assert "0 of 4 convertible layers" in text and "KV cache" not in text
    assert inspect(tmp_path / "bert", "--mixer", "gated_delta_net") == 0
    assert "refused" in capsys.readouterr().out
    assert inspect(tmp_path / "bloom") == 0
    assert "2 of these layers would lose the ALiBi position bias" in capsys.readouterr().out
    assert inspect(tmp_path / "t5") == 0
    text = capsys.readouterr().out
    assert "relative" in text and "stays softmax" in text and "cross-attention" in text
    assert inspect(tmp_path / "mamba") == 1
    assert "none of its modules computes attention" in capsys.readouterr().err


def test_single_heads_are_counted(tmp_path, capsys):
    """A head of 128 in bfloat16 caches 512 bytes per token; its linear attention keeps a state of fixed size."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4}
    LlamaConfig(**sizes, vocab_size=99, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert inspect(tmp_path, "--dtype", "bfloat16", "--window_size", 64, "--num_sink_tokens", 4) == 0
    text = capsys.readouterr().out
    assert row_of(text, "0")[3:6] == ["16/4 x 128", "yes", "512 B"]
    layer, head = row_of(text, "0")[6].split(", ")
    # one key-value head: what it is for the whole layer, by the number of heads
    assert float(head.replace(",", "")) == pytest.approx(float(layer.removesuffix(" KiB").replace(",", "")) / 4, abs=1)
    for length in (4096, 32768, 131072):
        cells = row_of(text, f"{length:,}")
        assert cells[1] == f"{length * 512 * 8 / 2**20:,.1f} MiB"
        assert cells[3:] == [f"{length / 2:,.1f} KiB", f"{head} KiB"]
    assert "0 of 8 key-value heads" in text


def test_linear_heads_of_a_hybrid_are_named(tmp_path, capsys):
    model = convert_to_hybrid(tiny_model(), SMALL_MIXER, [0, 1], heads={"model.layers.1.self_attn": [1]})
    model.save_pretrained(tmp_path)
    assert inspect(tmp_path) == 0
    text = capsys.readouterr().out
    assert [row_of(text, str(index))[2] for index in range(3)] == [
        "linear_attention",
        "linear_attention, heads 1",
        "softmax",
    ]
    assert "2 of 3 convertible layers" in text and "3 of 6 key-value heads" in text


def test_heads_of_different_sizes_give_a_range(tmp_path, capsys):
    """Two layers look back 16 tokens, one sees all."""
    sizes = {**SIZES, "head_dim": 8, "sliding_window": 16, "max_position_embeddings": 8192}
    config = Gemma3TextConfig(
        **sizes,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        architectures=["Gemma3ForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    assert inspect(tmp_path, "--dtype", "float32") == 0
    small, large = row_of(capsys.readouterr().out, "4,096")[3].split(" - ")
    assert float(small) == pytest.approx(16 * 16 * 4 / 1024, abs=0.1) and large == f"{4096 * 16 * 4 / 1024:,.1f} KiB"


def test_the_weights_are_loaded_where_the_config_is_not_enough(tmp_path, capsys):
    # merges its position bias with masks, which cannot be done without numbers
    config = FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, alibi=True)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    assert inspect(tmp_path) == 0
    assert "2 of these layers would lose" in capsys.readouterr().out


def test_latents_are_counted_and_belong_to_all_heads(tmp_path, capsys):
    config = DeepseekV3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=99, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1, moe_intermediate_size=16,
        first_k_dense_replace=4, architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert inspect(tmp_path) == 0
    text = capsys.readouterr().out
    # 4 layers x (latent of 8 + rotary key of 4) x 4 bytes: not the 4 heads x (8 + 8) that are made from them
    assert f"{4 * 12 * 4 * 32768 / 2**20:.1f} MiB" in text
    assert row_of(text, "0")[5] == "shared" and row_of(text, "4,096")[3] == "shared"


def test_windows_count_what_they_keep(tmp_path, capsys):
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, vocab_size=99, max_position_embeddings=8192, sliding_window=16,
        architectures=["Gemma3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert inspect(tmp_path, "--dtype", "float32") == 0
    text = capsys.readouterr().out
    cache = DynamicCache(config=config)
    with torch.no_grad():
        Gemma3ForCausalLM(config)(
            torch.randint(5, 99, (1, 4096)), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
    assert row_of(text, "4,096")[1] == f"{cache_bytes(cache) / 2**20:.1f} MiB"


@pytest.mark.parametrize(
    "name", ["HybridPlanted__Attention", "HybridPlanted", "HybridConfigError", "pipeline", "models"]
)
def test_no_file_can_have_code_imported(tmp_path, capsys, monkeypatch, name):
    """The config names a module that lies on the path and leaves a note when it is imported."""
    tiny_model().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    note = tmp_path / "imported"
    for module in ("HybridPlanted", "Planted"):
        (tmp_path / f"{module}.py").write_text(
            f"open({str(note)!r}, 'w').close()\nclass Attention:\n    def forward(self): ...\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert inspect(tmp_path / "model") == 0  # by the Auto classes, that know the model's type
    assert "0 of 3 convertible layers" in capsys.readouterr().out
    assert not note.exists() and "HybridPlanted" not in sys.modules and "Planted" not in sys.modules


def test_a_type_that_no_auto_class_builds_is_said(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timesformer_of_the_future"}))
    assert inspect(tmp_path) == 1
    assert "timesformer_of_the_future" in capsys.readouterr().err
