"""`hf-hybrid benchmark`: what a hybrid saves."""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from ..errors import HybridConfigError
from ..evaluation.speed import compare_speed
from ..modeling_hybrid import HybridModelMixin
from .options import PlacedModelArguments, load_on


@dataclass
class BenchmarkArguments:
    """What to time."""

    teacher: str | None = field(
        default=None, metadata={"help": "Model to compare with; by default the hybrid's base model."}
    )
    lengths: str = field(default="1024,4096", metadata={"help": "Comma-separated context lengths, in tokens."})
    decode_tokens: int = field(default=8, metadata={"help": "Tokens decoded per round."})
    rounds: int = field(default=3, metadata={"help": "Side-by-side rounds; medians are reported."})

    def context_lengths(self) -> list[int]:
        """
        Raises:
            HybridConfigError: If one of `lengths` is no number of tokens.
        """
        parts = [part.strip() for part in self.lengths.split(",")]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise HybridConfigError(
                f"--lengths must be comma-separated numbers of tokens; got {self.lengths!r}. Pass e.g. 1024,4096."
            )
        return [int(part) for part in parts]


OPTIONS = (PlacedModelArguments, BenchmarkArguments)


def run(model: PlacedModelArguments, options: BenchmarkArguments) -> None:
    """Prefill and decode time and cache bytes of a hybrid beside its teacher's."""
    lengths, hybrid = options.context_lengths(), model.load()
    if not isinstance(hybrid, HybridModelMixin):
        raise HybridConfigError(
            f"{model.model} is not a hybrid checkpoint; nothing to compare. Make one with `hf-hybrid convert` or "
            "`search`."
        )
    name = options.teacher or hybrid.config.hybrid["base_model"]["name_or_path"]
    if not name:
        raise HybridConfigError("The checkpoint does not name its base model. Pass --teacher.")
    teacher = load_on(name, hybrid.dtype, hybrid.device)
    title = f"{model.model} beside {name}, {hybrid.device}"
    table = Table("tokens", "what", "teacher", "hybrid", "ratio", title=title, title_justify="left")
    for length in lengths:
        speed = compare_speed({"teacher": teacher, "hybrid": hybrid}, length, options.decode_tokens, options.rounds)
        for what in ("prefill", "decode"):
            ours, theirs = getattr(speed["hybrid"], what), getattr(speed["teacher"], what)
            times = (f"{theirs.seconds * 1e3:,.1f} ms", f"{ours.seconds * 1e3:,.1f} ms")
            table.add_row(f"{length:,}", what, *times, f"{ours.ratio:.2f}x")
        ours, theirs = speed["hybrid"].cache_bytes, speed["teacher"].cache_bytes
        sizes = (f"{theirs / 2**20:.2f} MiB", f"{ours / 2**20:.2f} MiB")
        table.add_row(f"{length:,}", "cache", *sizes, f"{theirs / ours:.2f}x")
    Console().print(table)
