"""Where attention can be replaced: `recording` (one dry forward), `rules` (why something is no site)."""

from .dry_forward import ProbedModel, probe_attention


__all__ = ["ProbedModel", "probe_attention"]
