"""Loads this checkpoint through the hf_hybrid package: pip install hf_hybrid."""
