"""What several processes must do alike in a search. A process that is alone agrees with itself."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from ..errors import HybridError


T = TypeVar("T")


def rank() -> int:
    """This process's number; 0 where there is only one."""
    return distributed.get_rank() if _are_several() else 0


def gathered(value: Any) -> list[Any]:
    """`value` of every process, by rank. A collective: every process must call it."""
    if not _are_several():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def all_agree(flag: bool) -> bool:
    """Whether `flag` is true on every process, so that all of them take the same path. A collective."""
    return all(gathered(bool(flag)))


def from_rank_zero(compute: Callable[[], T]) -> T:
    """
    What `compute` returns on rank 0, on every process; the others do not call it. A collective.

    Raises:
        HybridError: On every process, if `compute` raised it (or an `OSError`) on rank 0: the others must not wait.
    """
    if not _are_several():
        return compute()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = compute()
        except (HybridError, OSError) as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _are_several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
