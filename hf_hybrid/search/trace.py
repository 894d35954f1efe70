"""`swap_trace.jsonl`: every trial of a search on disk, so that none is paid for twice."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OutputFolderError
from .ranks import from_rank_zero, rank


TRACE_FILE = "swap_trace.jsonl"


class SwapTrace:
    """
    A header that says whose trials these are, then one line per trial, written as it happens. A search that is started
    again on the same file finds its trials there and does not repeat them. Of several processes, rank 0 reads and
    writes; the others are told what it read, so that all look up the same trials. To make one is therefore a
    collective.

    Args:
        path (`str` or `Path`): The file.
        identity (`dict`): What a trial's outcome depends on, beside the layers that were linear: weights, data, metric
            function. See [`search_identity`].

    Raises:
        OutputFolderError: If the file holds trials of something else.
        CheckpointError: If a line in the middle of the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike, identity: dict[str, Any]):
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        lines = from_rank_zero(self._read)
        self._known: dict[tuple[str, ...], dict[str, float]] = {
            _key(row["swapped"]): row["metrics"] for row in lines if row["type"] == "trial"
        }
        # values of single rows, of searches that race
        self.rows: list[dict[str, Any]] = [row for row in lines if row["type"] == "rows"]
        self.search: str | None = None
        self._starts = sum(row["type"] == "search" for row in lines)
        self._rows = {json.dumps(row, sort_keys=True) for row in lines}

    def _read(self) -> list[dict]:
        """All whole lines. A line cut off by a kill is dropped, and the file shortened to what precedes it."""
        if not self.path.exists():
            return []
        rows: list[dict] = []
        end = 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            row = _parse(line)
            if row is not None:
                rows.append(row)
                end += len(line)
            elif number < len(lines):
                raise CheckpointError(
                    f"{self.path}, line {number}: cannot be read; got {line[:60]!r}. The file was edited or damaged."
                )
        self._check_identity(rows)
        if end < self.path.stat().st_size:
            os.truncate(self.path, end)
        return rows

    def _check_identity(self, rows: list[dict]) -> None:
        theirs = rows[0].get("identity") or {} if rows else self.identity
        changed = sorted(key for key in {*theirs, *self.identity} if theirs.get(key) != self.identity.get(key))
        if changed:
            raise OutputFolderError(
                f"{self.path} holds another search: {', '.join(changed)} changed since. Choose another output folder, "
                "or delete the file to search again."
            )

    def _append(self, row: dict) -> None:
        if not self._rows and row["type"] != "header":  # no file before there is something to keep
            self._append({"type": "header", "identity": self.identity})
        line = json.dumps(row, sort_keys=True)
        if line in self._rows:  # said by the search that is being continued
            return
        self._rows.add(line)
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def lookup(self, swapped: Iterable[str]) -> dict[str, float] | None:
        """The metrics of an earlier trial of these layers, in whatever order they were swapped, or `None`."""
        return self._known.get(_key(swapped))

    def add_trial(self, swapped: list[str], metrics: dict[str, float], **entries) -> None:
        """Keep a trial; `entries` (its round and candidate) are for readers of the file."""
        self._known[_key(swapped)] = metrics
        self._append({"type": "trial", **entries, "swapped": swapped, "metrics": metrics})

    @property
    def has_searches(self) -> bool:
        """Whether the file says where searches start."""
        return self._starts > 0

    def start_search(self, settings: dict[str, Any]) -> None:
        """From here on, steps are of a search with these settings; said each time it starts."""
        settings = json.loads(json.dumps(settings))
        self.search = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        self._starts += 1
        self._append({"type": "search", "search": self.search, "start": self._starts, "settings": settings})

    def add_rows(self, metric: str, units: list[str], rows: list[int], values: list[list[float]]) -> None:
        """Keep the metric and the loss of single rows under a set of units."""
        self._append({"type": "rows", "metric": metric, "units": units, "rows": rows, "values": values})

    def add_event(self, kind: str, **entries) -> None:
        """A line for readers of the file: a commit, a result."""
        self._append({"type": kind, **({} if self.search is None else {"search": self.search}), **entries})


def steps_of(path: str | os.PathLike) -> dict[int, list[str]]:
    """
    The steps of a search by their number of linear units, from its trace; of several searches in one file, the latest.

    Raises:
        CheckpointError: If there is no such file, or no step in it.
    """
    rows = [_parse(line) for line in Path(path).read_bytes().splitlines(keepends=True)] if Path(path).exists() else []
    latest = next((row["search"] for row in reversed(rows) if row and row["type"] == "search"), None)
    commits = [row for row in rows if row and row["type"] == "commit" and row.get("search") == latest]
    steps = {len(row["swapped"]): list(row["swapped"]) for row in commits}
    if not steps:
        raise CheckpointError(
            f"{path}: no step of a search is there. Pass the {TRACE_FILE} of a search's output folder."
        )
    return steps


def _key(swapped: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(swapped))


def _parse(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if line.endswith(b"\n") and isinstance(row, dict) and "type" in row else None
