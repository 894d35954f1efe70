"""Checks of settings that several mixers share."""

from collections.abc import Collection

from ..errors import HybridConfigError, closest


# What a fresh mixer can take from its place in a pretrained model, beside the layer's own projections. `identity_maps`:
# learned feature maps start as the identity; `quiet_state`: beside a window the state starts at next to no weight;
# `neutral_gates`: output gates start at 1; `half_lives` and `output_scale`: read off the layer's own softmax, see
# `calibration`.
INITIALIZATIONS = ("identity_maps", "quiet_state", "neutral_gates", "half_lives", "output_scale")


def check_initialization(names: "str | Collection[str]") -> tuple[str, ...]:
    """
    Names of [`INITIALIZATIONS`] as a tuple, from a collection or a comma-separated text; `"all"` and `"none"` are
    understood.
    """
    if isinstance(names, str):
        names = {"all": list(INITIALIZATIONS), "none": []}.get(names) or [
            name.strip() for name in names.split(",") if name.strip() != "none"
        ]
    if not isinstance(names, Collection):
        raise HybridConfigError(
            f"initialization must be 'all', 'none', or some of {', '.join(INITIALIZATIONS)}; got {names!r}."
        )
    for name in names:
        if name not in INITIALIZATIONS:
            raise HybridConfigError(
                f"initialization must be 'all', 'none', or some of {', '.join(INITIALIZATIONS)}; got {name!r}."
                f"{closest(str(name), INITIALIZATIONS)}"
            )
    return tuple(names)


def check_int(where: str, name: str, value, least: int) -> None:
    """Shared check of the mixers' integer settings."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise HybridConfigError(f"{where}: {name} must be an integer >= {least}; got {value!r}.")


def check_bool(where: str, name: str, value) -> None:
    if not isinstance(value, bool):
        raise HybridConfigError(f"{where}: {name} must be True or False; got {value!r}.")


def check_window(config, least: int = 0) -> None:
    """
    Shared check of `window_size`, `num_sink_tokens`, `num_memory_tokens` and `memory_block_size`. Without a window
    there is nothing for sinks and a memory to stand beside.
    """
    check_int(config.name, "window_size", config.window_size, least)
    check_int(config.name, "num_sink_tokens", config.num_sink_tokens, 0)
    check_int(config.name, "memory_block_size", config.memory_block_size, 1)
    memory = config.num_memory_tokens
    if isinstance(memory, list | tuple):  # a tuple, so that a config can be compared and hashed
        for size in memory:
            check_int(config.name, "each of num_memory_tokens", size, 0)
        object.__setattr__(config, "num_memory_tokens", tuple(memory))
    else:
        check_int(config.name, "num_memory_tokens", memory, 0)
    if not config.window_size:
        object.__setattr__(config, "num_sink_tokens", 0)
        if any(memory) if isinstance(memory, list | tuple) else memory:
            raise HybridConfigError(
                f"{config.name}: num_memory_tokens must be 0 where window_size is 0, since a memory takes what leaves "
                f"a window; got {memory!r}."
            )
