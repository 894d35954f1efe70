"""Loads this checkpoint through the hf_hybrid package: pip install hf_hybrid."""

import hf_hybrid
from hf_hybrid import HybridAttentionConfig
from hf_hybrid.dynamic import HybridLlamaForCausalLM
