"""What a repair did, for the report's file and the model card."""

import dataclasses
import json
import os


REPORT_FILE = "repair_report.json"


@dataclasses.dataclass
class RepairReport:
    """
    What a repair did.

    Attributes:
        steps (`int`), tokens (`int`): Taken, and read by the hybrid.
        trained (`list[str]`): What trained, see [`RepairArguments`].
        recall_share (`float`): Share of rows with something to recall.
        before, after (`dict[str, float]`): Metrics on `eval_dataset`; empty without one.
    """

    steps: int
    tokens: int
    trained: list[str]
    recall_share: float
    before: dict[str, float]
    after: dict[str, float]

    def save(self, folder: str) -> None:
        """Write `repair_report.json`."""
        path = os.path.join(folder, REPORT_FILE)
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=2)
        os.replace(path + ".tmp", path)

    def markdown(self) -> str:
        """The section of a model card."""
        parts = " and ".join(f"`{part}`" for part in self.trained)
        lines = [
            "## Repair",
            "",
            f"After the replacement, {parts} trained for {self.steps} steps ({self.tokens:,} tokens) on the "
            "divergence of the hybrid's predictions from its teacher's.",
        ]
        names = [name for name in self.after if name in self.before]
        if names:
            lines += ["", "| on the evaluation data | before | after |", "|---|---|---|"]
            lines += [f"| {name} | {self.before[name]:.4g} | {self.after[name]:.4g} |" for name in names]
        return "\n".join(lines) + "\n"


__all__ = ["REPORT_FILE", "RepairReport"]
