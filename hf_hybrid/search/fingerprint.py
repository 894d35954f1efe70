"""A digest of values and functions by their content, never by where they are in memory: the same in another process."""

import dataclasses
import functools
import hashlib
import random
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import DatasetError


# what these packages define stands for itself: their code has versions, their objects change with use (caches, files)
LIBRARIES = frozenset(
    (
        "datasets",
        "evaluate",
        "evaluate_modules",
        "hf_hybrid",
        "numpy",
        "pandas",
        "sklearn",
        "tokenizers",
        "torch",
        "transformers",
    )
)
SCALARS = (type(None), type(...), bool, int, float, complex, str)
# made at the first use, and never the same again
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class Fingerprint:
    """
    Feed values with `add`, read the result with `hexdigest`. Numbers, text, bytes, containers, tensors, arrays and
    pictures count by value; functions by name, bytecode, constants, defaults, what they close over, and what of their
    own package they use; other objects by their class's code and their attributes. Of what libraries define, only the
    name counts, and of their objects the attributes only if they are added themselves (a collator) or a method of
    theirs is.

    Args:
        strict (`bool`, *optional*, defaults to `False`): Refuse objects that show nothing of their content.

    Raises:
        DatasetError: From `add`, in strict mode.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict
        self._hash = hashlib.sha256()
        self._open: set[int] = set()  # containers and objects that are being added, so that a circle ends
        self._code: dict[int, tuple[int, Any]] = {}  # functions and classes already added, by id, kept alive for it

    def hexdigest(self) -> str:
        """16 hexadecimal digits."""
        return self._hash.hexdigest()[:16]

    def add(self, value: Any) -> "Fingerprint":
        """Take in one more value; returns itself."""
        if isinstance(value, SCALARS):
            self._put(type(value).__name__, repr(value).encode())
        elif isinstance(value, bytes | bytearray):
            self._put("bytes", bytes(value))
        elif torch.is_tensor(value):
            self.add_tensor(value)
        elif id(value) in self._code:
            self._put("known", str(self._code[id(value)][0]).encode())
        elif id(value) in self._open:
            self._put("circle", b"")
        else:
            self._open.add(id(value))
            self._add_object(value)
            self._open.discard(id(value))
        return self

    def add_tensor(self, tensor: torch.Tensor) -> None:
        """A tensor's type, shape and bytes; of a quantised one its parts'. A sharded one is gathered: a collective."""
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                self._put("part", name.encode())
                self.add_tensor(getattr(tensor, name))
            return
        self._put("tensor", f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
        if tensor.numel():
            self._hash.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _put(self, kind: str, content: bytes) -> None:
        self._hash.update(f"{kind} {len(content)}:".encode() + content)

    def _add_all(self, kind: str, values: Iterable) -> None:
        values = list(values)
        self._put(kind, str(len(values)).encode())
        for value in values:
            self.add(value)

    def _add_object(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self._add_all("mapping", (part for key in sorted(value, key=repr) for part in (key, value[key])))
        elif isinstance(value, list | tuple):
            self._add_all("sequence", value)
        elif isinstance(value, set | frozenset):
            self._add_all("set", sorted(Fingerprint(self.strict).add(element).hexdigest() for element in value))
        elif isinstance(value, types.CodeType):
            self._put("code", value.co_code)
            self._add_all("constants", (value.co_names, value.co_consts, value.co_freevars))
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, types.MethodType):
            self.add(value.__func__)
            self._add_instance(value.__self__, whole=True)
        elif isinstance(value, functools.partial):
            self._add_all("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, types.ModuleType):
            self._put("module", value.__name__.encode())
        elif isinstance(value, property):
            self._add_all("property", (value.fget,))
        elif hasattr(value, "__array_interface__") or hasattr(value, "__array__"):
            self._add_array(value)
        elif hasattr(value, "__wrapped__"):  # static methods, functools.cache and its like
            self._add_all("wrapped", (value.__wrapped__,))
        else:
            self._add_instance(value, whole=self.strict or len(self._open) == 1)

    def _add_array(self, value: Any) -> None:
        array = np.asarray(value)
        self._put("array", f"{array.dtype.str} {array.shape} {getattr(value, 'mode', '')}".encode())
        if array.dtype.hasobject:
            self._add_all("objects", array.ravel().tolist())
        else:
            self._hash.update(np.ascontiguousarray(array).tobytes())

    def _add_function(self, function: types.FunctionType) -> None:
        self._code[id(function)] = (len(self._code), function)
        self._put("function", _name(function).encode())
        if _is_library(function):
            return
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        self._add_all("parts", (function.__code__, function.__defaults__, function.__kwdefaults__, cells))
        for name in sorted(_names_used(function.__code__) & function.__globals__.keys()):
            used = function.__globals__[name]
            if isinstance(used, types.FunctionType | type) and _root(used) != _root(function):
                self._put("import", _name(used).encode())
            else:
                self._add_all("global", (name, used))

    def _add_class(self, kind: type) -> None:
        self._code[id(kind)] = (len(self._code), kind)
        self._put("class", _name(kind).encode())
        if _is_library(kind):
            return
        self._add_all("bases", kind.__bases__)
        for name, member in sorted(vars(kind).items()):
            is_code = isinstance(member, types.FunctionType | staticmethod | classmethod | property)
            if is_code or (isinstance(member, SCALARS) and not name.startswith("__")):
                self._add_all("member", (name, member))

    def _add_instance(self, value: Any, whole: bool = False) -> None:
        kind = type(value)
        self._add_all("object", (kind, getattr(value, "__qualname__", None)))
        if hasattr(value, "padding_side"):  # a tokenizer, as a collator holds it
            self._add_all("padding", (value.padding_side, getattr(value, "pad_token_id", None)))
        elif whole or not (_is_library(kind) or any(_root(base) in LIBRARIES for base in kind.__mro__)):
            state = _state(value)
            if self.strict and not state:
                raise DatasetError(
                    "The rows of a dataset must hold numbers, text, tensors, arrays or pictures, by which two searches "
                    f"can be told apart; got {_name(kind)}. Let the dataset return plain values and data_collator "
                    "decode them."
                )
            self._add_all("state", (part for name in sorted(state) for part in (name, state[name])))


def _state(value: Any) -> dict[str, Any]:
    """The attributes of an object that were set when it was made, as far as one can tell: no counters of libraries."""
    if dataclasses.is_dataclass(value):
        state = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    else:
        state = dict(getattr(value, "__dict__", {}))
    # None counts as absent: what is made at the first use was None before
    return {name: part for name, part in state.items() if part is not None and not isinstance(part, GENERATORS)}


def _names_used(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*(_names_used(constant) for constant in inner))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - the only way to ask
    except ValueError:
        return False
    return True


def _is_library(thing: Any) -> bool:
    return _root(thing) in LIBRARIES or _root(thing) in sys.stdlib_module_names


def _root(thing: Any) -> str:
    return str(getattr(thing, "__module__", "")).split(".")[0]


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
