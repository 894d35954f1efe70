"""Toy hosts: one row per family, built from its own config class, random weights scaled so that attention matters."""

import torch
import transformers


SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 99, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _without(*names, **more):
    return {**{k: v for k, v in SIZES.items() if k not in names}, **more}


# family: (model class, config class, config arguments)
HOSTS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SIZES),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SIZES, "head_dim": 16}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**SIZES, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 12,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": 99,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _without("num_key_value_heads")),
    "opt": ("OPTForCausalLM", "OPTConfig", _without("num_key_value_heads", "intermediate_size", ffn_dim=64, word_embed_proj_dim=32)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SIZES),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, "sliding_window": None}),
}  # fmt: skip


def tiny_model(family: str = "llama", seed: int = 0, **overrides):
    """A toy model of `family` in eval mode."""
    model_class, config_class, arguments = HOSTS[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**arguments, **overrides})
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(
                    4.0
                )  # at their own scale, random attention scores are near zero and every mixer looks exact
    return model


def tiny_llava():
    """A toy model of two towers, two layers each; token 98 stands for a piece of a picture (32 x 32, 16 pieces)."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **small, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **small, "vocab_size": 99},
        image_token_index=98,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def perturb_mixers(model, scale: float = 0.3):
    """Move the mixers' parameters away from their start, so that equal-looking initial values hide nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hybrid." in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model
