"""Every error the library raises on purpose. Each also inherits the builtin a caller would catch."""


class HybridError(Exception):
    """Base class: `except HybridError` catches everything raised by `hf_hybrid` on purpose."""


class HybridConfigError(HybridError, ValueError):
    """A setting, a config or a stored file says something that cannot be true."""


class UnknownMixerError(HybridConfigError):
    """A mixer or feature-map name that no registry knows."""


class UnsupportedModelError(HybridError, NotImplementedError):
    """The model, or the way it is asked to run, cannot be served by linear-attention layers."""


class NoMatchingAttentionError(HybridConfigError):
    """`layers` selected no attention site of the model."""


class AlreadyHybridError(HybridError, RuntimeError):
    """Conversion was asked of a layer that is converted already, or restoration of one that is not."""


class MetricError(HybridError, ValueError):
    """The validation metric is missing, not finite, or below its own floor before anything was swapped."""


class DatasetError(HybridError, ValueError):
    """A dataset is missing, empty or too short for what it is asked to do."""


class OutputFolderError(HybridError, FileExistsError):
    """The output folder holds another run."""


class CheckpointError(HybridError, OSError):
    """A checkpoint or mixer bank is truncated, edited, or belongs to another model."""


class MissingDependencyError(HybridError, ImportError):
    """An optional package is needed: the message names the feature, the extra and the command."""


def closest(name: str, known) -> str:
    """`" Did you mean 'gla'?"` or an empty string: the tail of every unknown-name message."""
    import difflib

    matches = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""
