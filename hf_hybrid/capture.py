"""Reuse of activations between trials of a search.

A trial differs from the current mixture in one layer; everything below that layer is unchanged. `PrefixReuse` keeps what every block saw
for every validation batch, and lets a trial start at its first changed block: half the work on average, and the same numbers.
"""

import contextlib

import torch
from torch import nn

from .errors import HybridError


class PrefixReuse:
    """
    Args:
        model (`nn.Module`): A model whose blocks run one after the other, each on its predecessor's output. Whether that is so is checked
            (see `verify`), not assumed.
        sites (`list[str]`): Names of the attention sites.
        max_bytes (`int`): Stop keeping activations beyond this size.
    """

    def __init__(self, model: nn.Module, sites: list[str], max_bytes: int):
        self.model, self.max_bytes = model, max_bytes
        self.block_of = {site: _block_name(model, site) for site in sites}
        self.blocks: list[nn.Module] = []  # in the order of execution, filled by the first recording
        self._inputs: list[list[torch.Tensor]] = []  # [block][batch]
        self._keys: list[dict[str, torch.Tensor]] = []  # of each batch: what it was fed, to recognise it
        self._first: tuple[tuple, dict, torch.Tensor] | None = None
        self._outputs_tuple: dict[nn.Module, bool] = {}
        self._batch = -1
        self.enabled = all(self.block_of.values())

    def position(self, site: str) -> int:
        return self.blocks.index(self.model.get_submodule(str(self.block_of[site])))

    @contextlib.contextmanager
    def recording(self):
        """One evaluation of the current mixture: note what every block sees."""
        if not self.enabled:
            yield
            return
        modules = {self.model.get_submodule(name) for name in self.block_of.values()}
        self.blocks, self._inputs, self._keys, self._first, self._batch = [], [], [], None, -1
        size = 0

        def before_model(module, args, kwargs):
            self._batch += 1
            self._keys.append({name: x.clone() for name, x in _tensors(args, kwargs).items()})

        def after_model(module, args, kwargs, output):
            if self._first is None:
                self._first = (args, dict(kwargs), _logits(output))

        def before_block(module, args, kwargs):
            nonlocal size
            if module not in self.blocks:
                self.blocks.append(module)
                self._inputs.append([])
            hidden_states = _hidden_states(args, kwargs)
            size += hidden_states.numel() * hidden_states.element_size()
            if size > self.max_bytes:
                self.enabled = False
            if self.enabled:
                self._inputs[self.blocks.index(module)].append(hidden_states.detach().clone())

        def after_block(module, args, kwargs, output):
            self._outputs_tuple[module] = isinstance(output, tuple)

        handles = [
            self.model.register_forward_pre_hook(before_model, with_kwargs=True),
            self.model.register_forward_hook(after_model, with_kwargs=True),
        ]
        for module in modules:
            handles.append(module.register_forward_pre_hook(before_block, with_kwargs=True))
            handles.append(module.register_forward_hook(after_block, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if not self.enabled:
                self.forget()

    @contextlib.contextmanager
    def recording_above(self, position: int):
        """After a commit at `position`: one evaluation that starts there and replaces what the later blocks see."""
        later = self.blocks[position + 1 :]
        self._inputs[position + 1 :] = [[] for _ in later]

        def before_block(module, args, kwargs):
            self._inputs[self.blocks.index(module)].append(_hidden_states(args, kwargs).detach().clone())

        handles = [module.register_forward_pre_hook(before_block, with_kwargs=True) for module in later]
        try:
            with self.starting_at(position):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def starting_at(self, position: int):
        """Evaluations in here skip the blocks before `position`, and feed that block what it saw while recording."""
        self._batch = -1
        skipped, first = self.blocks[:position], self.blocks[position]
        forwards = {module: module.__dict__.get("forward") for module in skipped}

        def before_model(module, args, kwargs):
            self._batch += 1
            if self._batch >= len(self._keys) or not _same(_tensors(args, kwargs), self._keys[self._batch]):
                raise HybridError(
                    "The validation batches changed between two trials, so that activations cannot be reused. Make the evaluation deterministic "
                    "(no shuffling, no random collation), or pass reuse_activations=False."
                )

        def before_first(module, args, kwargs):
            return _with_hidden_states(args, kwargs, self._inputs[position][self._batch])

        handles = [self.model.register_forward_pre_hook(before_model, with_kwargs=True)]
        if position:
            handles.append(first.register_forward_pre_hook(before_first, with_kwargs=True))
        for module in skipped:
            module.forward = _pass_through(self._outputs_tuple[module])
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in forwards.items():
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def verify(self) -> bool:
        """
        Run the first batch from every block on: are the logits those of the whole model, bit for bit? If not, reuse is off. Blocks that hand
        each other more than hidden states (shared keys and values, a position bias) are found out here.
        """
        if not self.enabled or self._first is None or self._first[2] is None:
            self.enabled = False
            return False
        args, kwargs, expected = self._first
        try:
            with torch.no_grad():
                for position in range(len(self.blocks)):
                    with self.starting_at(position):
                        actual = _logits(self.model(*args, **kwargs))
                    if actual is None or not torch.equal(actual, expected):
                        self.enabled = False
                        break
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
            self.enabled = False
        if not self.enabled:
            self.forget()
        return self.enabled

    def forget(self) -> None:
        self.blocks, self._inputs, self._keys, self._first = [], [], [], None


def _block_name(model: nn.Module, site: str) -> str | None:
    """The decoder block around a site: its innermost ancestor that is an element of a `ModuleList`."""
    parts = site.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    return None


def _hidden_states(args, kwargs):
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _with_hidden_states(args, kwargs, hidden_states):
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden_states}
    return (hidden_states, *args[1:]), kwargs


def _pass_through(as_tuple: bool):
    def forward(*args, **kwargs):
        hidden_states = _hidden_states(args, kwargs)
        return (hidden_states,) if as_tuple else hidden_states

    return forward


def _tensors(args, kwargs) -> dict[str, torch.Tensor]:
    named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    return {name: value for name, value in named.items() if torch.is_tensor(value)}


def _same(batch: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return batch.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in batch.items())


def _logits(output) -> torch.Tensor | None:
    logits = getattr(output, "logits", None)
    return logits.detach().clone() if torch.is_tensor(logits) else None
