"""Reuse of activations between trials of a search.

A trial differs from the current mixture in one layer; everything below that layer is unchanged. `PrefixReuse` keeps
what every block saw for every validation batch, and lets a trial start at its first changed block: half the work on
average, and the same numbers. Of several processes all reuse or none does, since who waits for whom depends on it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import HybridError
from .ranks import all_agree


BATCHES_CHANGED = (
    "The validation batches changed between two trials, so that activations cannot be reused. Make the evaluation "
    "deterministic (no shuffling, no random collation), or pass reuse_activations=False."
)


class PrefixReuse:
    """
    Args:
        model (`nn.Module`): A model whose blocks run one after the other, each on its predecessor's output. Whether
            that is so is checked (see `verify`), not assumed.
        layers (`dict[str, nn.Module]`): The attention layers that are swapped, by name, wherever in the model they are.
        max_bytes (`int`): The most bytes of activations to keep.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], max_bytes: int):
        self.model, self.max_bytes = model, max_bytes
        self.block_of = _blocks_of(model, layers)
        self.enabled = bool(layers) and len(self.block_of) == len(layers)
        self._seen = _Recording(max_bytes)
        self._batch, self._matched, self._changed = -1, False, False

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in the order of execution, known after a recording."""
        return self._seen.blocks

    def position(self, layer: str) -> int:
        """Which block, in the order of execution, holds a layer."""
        return self.blocks.index(self.block_of[layer])

    def forget(self) -> None:
        """Let go of all activations."""
        self._seen = _Recording(self.max_bytes)

    @contextlib.contextmanager
    def recording(self, only_first_batch: bool = False) -> Iterator[None]:
        """
        One evaluation of the current mixture: note what every block sees. Whether that is of use, `verify` says
        afterwards. With `only_first_batch`, nothing else is kept, but all is counted: enough for `verify`.
        """
        if not self.enabled:
            yield
            return
        self._seen = _Recording(self.max_bytes, only_first_batch)
        with _removed_after(self._seen.attach(self.model, list(dict.fromkeys(self.block_of.values())))):
            yield

    def verify(self, batches: int) -> bool:
        """
        Whether trials may start at a block, on every process; if not, reuse is off from here on. It takes:

        * one run of the model, and in it one of every block, for each of the evaluation's `batches`: a metric function
          that generates runs the model on its own account;
        * room for the activations;
        * for the first batch, from every block on, the outputs of the whole model, bit for bit: blocks that hand each
          other more than hidden states (shared keys and values, a position bias) are found out here.
        """
        self.enabled = all_agree(self.enabled and self._seen.is_usable(batches, len(set(self.block_of.values()))))
        self.enabled = self.enabled and all_agree(self._is_exact())
        if not self.enabled:
            self.forget()
        return self.enabled

    def _is_exact(self) -> bool:
        args, kwargs, expected = self._seen.first
        exact = True
        try:
            with torch.no_grad():
                # no early end: where weights are sharded, every process must run the same
                for position in range(len(self.blocks)):
                    with self._starting_at(position):
                        exact &= _same(_leaves(self.model(*args, **kwargs)), expected) and not self._changed
        # whatever a block of some model does with too few or too small inputs
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
            return False
        return exact

    @contextlib.contextmanager
    def starting_at(self, position: int) -> Iterator[None]:
        """
        The evaluation in here skips the blocks before `position`, and feeds that block what it saw while recording.

        Raises:
            HybridError: On every process, if the batches were not those of the recording on one.
        """
        with self._starting_at(position):
            yield
        if not all_agree(not self._changed and self._batch + 1 == len(self._seen.keys)):
            raise HybridError(BATCHES_CHANGED)

    @contextlib.contextmanager
    def recording_above(self, position: int) -> Iterator[None]:
        """After a commit at `position`: one evaluation that starts there and replaces what the later blocks see."""
        later = self.blocks[position + 1 :]
        self._seen.inputs[position + 1 :] = [[] for _ in later]

        def before_block(module, args, kwargs):
            self._seen.inputs[self.blocks.index(module)].append(_hidden_states(args, kwargs).detach().clone())

        with (
            _removed_after([module.register_forward_pre_hook(before_block, with_kwargs=True) for module in later]),
            self.starting_at(position),
        ):
            yield

    @contextlib.contextmanager
    def _starting_at(self, position: int) -> Iterator[None]:
        self._batch, self._matched, self._changed = -1, False, False
        keys, inputs = self._seen.keys, self._seen.inputs[position]

        def before_model(module, args, kwargs):
            self._batch += 1
            self._matched = self._batch < len(keys) and _same(_tensors(args, kwargs), keys[self._batch])
            self._changed |= not self._matched  # runs whole; judged at the end, by all processes together

        def after_model(module, args, output):
            self._matched = False

        def before_first(module, args, kwargs):
            return _with_hidden_states(args, kwargs, inputs[self._batch]) if self._matched else None

        handles = [
            self.model.register_forward_pre_hook(before_model, with_kwargs=True),
            self.model.register_forward_hook(after_model),
        ]
        if position:
            handles.append(self.blocks[position].register_forward_pre_hook(before_first, with_kwargs=True))
        with contextlib.ExitStack() as stack:
            stack.enter_context(_removed_after(handles))
            for module in self.blocks[:position]:
                stack.enter_context(self._skipped(module))
            yield

    @contextlib.contextmanager
    def _skipped(self, module: nn.Module) -> Iterator[None]:
        """The block hands its hidden states on, in a run of the model that was recorded."""
        own, forward, as_tuple = module.__dict__.get("forward"), module.forward, self._seen.outputs_tuple[module]

        def pass_through(*args, **kwargs):
            if not self._matched:
                return forward(*args, **kwargs)
            hidden_states = _hidden_states(args, kwargs)
            return (hidden_states,) if as_tuple else hidden_states

        module.forward = pass_through
        try:
            yield
        finally:
            if own is None:
                del module.forward
            else:
                module.forward = own


class _Recording:
    """What hooks note during one evaluation. Anything unexpected makes it useless, never the evaluation wrong."""

    def __init__(self, max_bytes: int, only_first_batch: bool = False):
        self.max_bytes, self.only_first_batch = max_bytes, only_first_batch
        self.size, self.passes, self.is_odd = 0, 0, False
        self.blocks: list[nn.Module] = []
        self.runs: dict[nn.Module, int] = {}
        self.outputs_tuple: dict[nn.Module, bool] = {}
        self.inputs: list[list[torch.Tensor]] = []  # [block][batch]
        self.keys: list[dict[str, torch.Tensor]] = []  # what the model was fed, to recognise a batch
        self.first: tuple[tuple, dict, dict[str, torch.Tensor]] = ((), {}, {})

    def attach(self, model: nn.Module, blocks: list[nn.Module]) -> list:
        handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, with_kwargs=True),
        ]
        for block in blocks:
            handles.append(block.register_forward_pre_hook(self._before_block, with_kwargs=True))
            handles.append(block.register_forward_hook(self._after_block))
        return handles

    def is_usable(self, batches: int, blocks: int) -> bool:
        return (
            not self.is_odd
            and self.size <= self.max_bytes
            and batches > 0
            and len(self.blocks) == blocks
            and all(runs == batches for runs in (self.passes, *self.runs.values()))
            and "logits" in self.first[2]
        )

    def _note(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        self.size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self.size > self.max_bytes:
            self.inputs, self.keys = [[] for _ in self.inputs], []
            return None
        if self.only_first_batch and self.passes > 1:
            return None
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def _before_model(self, module, args, kwargs):
        self.passes += 1
        key = self._note(_tensors(args, kwargs))
        if key is not None:
            self.keys.append(key)

    def _after_model(self, module, args, kwargs, output):
        if self.passes == 1:
            self.first = (args, dict(kwargs), {name: value.clone() for name, value in _leaves(output).items()})

    def _before_block(self, module, args, kwargs):
        if module not in self.runs:
            self.blocks.append(module)
            self.inputs.append([])
        self.runs[module] = self.runs.get(module, 0) + 1
        hidden_states = _hidden_states(args, kwargs)
        self.is_odd |= hidden_states is None
        kept = self._note({} if hidden_states is None else {"hidden_states": hidden_states})
        if kept:
            self.inputs[self.blocks.index(module)].append(kept["hidden_states"])

    def _after_block(self, module, args, output):
        self.outputs_tuple[module] = isinstance(output, tuple)


def _blocks_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The decoder block around each layer: the innermost element of a `ModuleList` that holds it and is not it."""
    names = {id(layer): name for name, layer in layers.items()}
    found = {}
    for module in model.modules():  # from the outside in
        for block in module if isinstance(module, nn.ModuleList) else ():
            for inner in block.modules():
                if id(inner) in names and inner is not block:
                    found[names[id(inner)]] = block
    return found


@contextlib.contextmanager
def _removed_after(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden_states(args: tuple, kwargs: dict) -> torch.Tensor | None:
    hidden_states = kwargs.get("hidden_states", args[0] if args else None)
    return hidden_states if torch.is_tensor(hidden_states) else None


def _with_hidden_states(args: tuple, kwargs: dict, hidden_states: torch.Tensor) -> tuple[tuple, dict]:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden_states}
    return (hidden_states, *args[1:]), kwargs


def _tensors(args: tuple, kwargs: dict) -> dict[str, torch.Tensor]:
    named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    return {name: value for name, value in named.items() if torch.is_tensor(value)}


def _leaves(output: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a model's output by its path: logits, hidden states, a loss that counts what routers did."""
    if torch.is_tensor(output):
        return {name: output.detach()}
    pairs = output.items() if isinstance(output, Mapping) else enumerate(output) if isinstance(output, tuple) else ()
    return {path: leaf for key, value in pairs for path, leaf in _leaves(value, f"{name}.{key}".strip(".")).items()}


def _same(batch: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return batch.keys() == other.keys() and all(_equal(value, other[name]) for name, value in batch.items())


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values, where NaN (a missing value among the inputs) is equal to itself."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
