"""What a mixer is, and the registry of mixers.

A mixer replaces the softmax of one attention layer. It sees the layer's own query, key and value (after projections,
norms and rotary embedding, key-value heads unexpanded) and returns what the softmax would have returned. It takes and
returns state as plain tensors whose first axis is the batch; caches are somebody else's business.
"""

import copy
import dataclasses
import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.func import functional_call

from ..errors import HybridConfigError, UnknownMixerError, closest
from .checks import INITIALIZATIONS
from .heads import query_heads, select_heads
from .rows import mix_beginning, mix_packed


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """
    Settings of one mixer: what can be chosen. Sizes that follow from the model (heads, dims, causality) are not in
    here.

    `name` is the mixer's registered name; fields are JSON values. `MixerConfig.from_dict` restores any of them.
    """

    name: ClassVar[str] = ""

    def fitted(self, causal: bool) -> "MixerConfig":
        """These settings as they apply to a causal or a bidirectional layer: what is stored with a converted layer."""
        return self

    def to_dict(self) -> dict:
        """As JSON has it: lists, no tuples."""
        settings = dataclasses.asdict(self)
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}

    @staticmethod
    def from_dict(settings: dict) -> "MixerConfig":
        """Build the config of the mixer `settings["name"]` from its other entries; unknown entries are an error."""
        settings = dict(settings)
        config_class = get_mixer(settings.pop("name", None)).config_class
        known = [field.name for field in dataclasses.fields(config_class)]
        for key in settings:
            if key not in known:
                raise HybridConfigError(
                    f"The mixer {config_class.name!r} has no setting {key!r}; it has {', '.join(known) or 'none'}."
                    f"{closest(key, known)}"
                )
        return config_class(**settings)


class LinearMixer(nn.Module, ABC):
    """
    Base class of every mixer. Concrete mixers are final: share code by calling functions, not by subclassing them.

    Args:
        num_heads (`int`): Query heads of the layer.
        num_key_value_heads (`int`): Key-value heads of the layer; `num_heads` must be a multiple.
        head_dim (`int`): Size `K` of queries and keys per head.
        value_dim (`int`): Size `V` of values per head.
        hidden_size (`int`): Size of the layer's input, for mixers with data-dependent gates.
        causal (`bool`): Whether token t may see later tokens.
        heads (`Sequence[int]`, *optional*): The layer's key-value heads that the mixer serves; all of them by default.
            From then on `num_key_value_heads` and `num_heads` are counts of these and of the query heads that read
            them.
        settings: The fields of the mixer's config.

    Raises:
        HybridConfigError: If the heads do not divide or are not the layer's, or the mixer has no bidirectional form and
            `causal` is `False`.
    """

    config_class: ClassVar[type[MixerConfig]]
    supports_bidirectional: ClassVar[bool] = False
    needs_hidden_states: ClassVar[bool] = False
    # Axes of every parameter, by its name: `H` query heads, `G` key-value heads, `S` states, other letters for anything
    # else; see `heads.py`. It is what lets a mixer run on some heads. Names may end in `*`.
    head_layouts: ClassVar[dict[str, str]] = {}
    # set by `build_mixer`: what the mixer was built from
    config: MixerConfig
    # the part left out on purpose, of a mixer that has both: "window", "state" or None
    ablated: str | None = None

    def __init__(
        self,
        *,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        value_dim: int,
        hidden_size: int,
        causal: bool,
        heads: Sequence[int] | None = None,
    ):
        super().__init__()
        name = self.config_class.name
        if num_heads % num_key_value_heads:
            raise HybridConfigError(
                f"{name}: num_heads must be a multiple of num_key_value_heads; got {num_heads} and "
                f"{num_key_value_heads}."
            )
        if not causal and not self.supports_bidirectional:
            raise HybridConfigError(
                f"{name} has no bidirectional form, but this attention layer is bidirectional. Leave the layer out of "
                "`layers`."
            )
        self.layer_sizes = {"num_heads": num_heads, "num_key_value_heads": num_key_value_heads}
        self.heads = tuple(range(num_key_value_heads)) if heads is None else tuple(heads)
        if not self.heads or list(self.heads) != sorted({*self.heads} & {*range(num_key_value_heads)}):
            raise HybridConfigError(
                f"{name}: heads must be some of the layer's key-value heads 0..{num_key_value_heads - 1}, in order, "
                f"each once; got {heads!r}."
            )
        self.groups = num_heads // num_key_value_heads  # query heads that read one key-value head
        self.num_heads, self.num_key_value_heads = self.groups * len(self.heads), len(self.heads)
        self.head_dim, self.value_dim, self.hidden_size, self.causal = head_dim, value_dim, hidden_size, causal

    @abstractmethod
    def init_weights(self, initialization: Collection[str] = INITIALIZATIONS) -> None:
        """
        Set every parameter to its starting value, in place and under `no_grad`. Called once, on real (not meta)
        tensors. What is not in `initialization` starts as it would in a model trained from scratch.
        """

    @abstractmethod
    def mix(
        self, query, key, value, hidden_states, *, valid, state, inplace_final_state
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """
        One unpacked stretch of tokens; `valid` is `None` where all of them exist. What a mixer implements; called by
        `forward`.
        """

    @property
    def can_scale_output(self) -> bool:
        """
        Whether the mixer has a `scale_output(factors)`: a factor per query head, `[H]`, on what its state contributes.
        """
        return False

    def has_window_and_state(self) -> bool:
        return bool(getattr(self, "window_size", 0)) and self.config_class.name != "sliding_window"

    def active_parts(self) -> tuple[str, ...]:
        """Which parts of the mixer run: `"window"` and `"state"`, those it has, without the one that is `ablated`."""
        if not getattr(self, "window_size", 0):
            return ("state",)
        return tuple(part for part in ("window", "state") if part != self.ablated)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
        *,
        valid: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        state: tuple[torch.Tensor, ...] | None = None,
        output_final_state: bool = False,
        inplace_final_state: bool = False,
        heads: tuple[int, ...] | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """
        Args:
            query (`torch.Tensor`): `[B, T, H, K]`. Scores are scaled by `head_dim ** -0.5` in here.
            key, value (`torch.Tensor`): `[B, T, H_kv, K]`, `[B, T, H_kv, V]`.
            hidden_states (`torch.Tensor`, *optional*): `[B, T, D]`, the attention layer's input.
            valid (`torch.Tensor`, *optional*): bool `[B, T]`, `False` for padding. Padding before and after a sequence
                changes nothing; inside, it takes up positions of windows and convolutions.
            segments (`torch.Tensor`, *optional*): int `[B, T]`, packed sequence of each token, never decreasing along
                T.
            state (`tuple`, *optional*): What the previous call returned for these sequences.
            output_final_state (`bool`, *optional*, defaults to `False`): Whether to return the state after the last
                token.
            inplace_final_state (`bool`, *optional*, defaults to `False`): Allow a one-token call to overwrite the
                tensors of `state`, which saves the copy. Not under autograd.
            heads (`tuple[int, ...]`, *optional*): Run as the mixer over these of the layer's key-value heads, which
                must be some of its own: queries, keys, values and state are theirs alone. All of its own by default.

        Returns:
            `(output, state)`: `[B, T, H, V]` in the dtype of query, key and value (where they differ: autocast's, else
            the widest), and a tuple of tensors (batch first) or `None`.
        """
        if heads is not None and heads != self.heads:
            mixer, parameters = self._over(heads)
            options = {
                "valid": valid,
                "segments": segments,
                "state": state,
                "output_final_state": output_final_state,
                "inplace_final_state": inplace_final_state,
            }
            return functional_call(mixer, parameters, (query, key, value, hidden_states), options)
        query, key, value = self._checked(query, key, value, hidden_states, valid)
        with torch.autocast(query.device.type, enabled=False):  # autocast would round the fp32 state
            if (
                valid is not None
                and valid.device.type == "cpu"
                and not torch.compiler.is_compiling()
                and bool(valid.all())
            ):
                valid = None  # the ops have a shorter way; on other devices looking would cost more than it saves
            if segments is not None:
                return mix_packed(self, query, key, value, hidden_states, valid, segments, state, output_final_state)
            if valid is not None and state is None and output_final_state and query.shape[1] > 1:
                return mix_beginning(self, query, key, value, hidden_states, valid)
            output, final_state = self.mix(
                query, key, value, hidden_states, valid=valid, state=state, inplace_final_state=inplace_final_state
            )
        return output, (final_state if output_final_state else None)

    def _checked(self, query, key, value, hidden_states, valid):
        """Queries, keys and values in one dtype, if the rest fits them."""
        if self.needs_hidden_states and hidden_states is None:
            raise HybridConfigError(
                f"{self.config_class.name} makes its gates from the layer's input. Pass hidden_states [B, T, D]."
            )
        if valid is not None and (valid.dtype != torch.bool or valid.shape != query.shape[:2]):
            raise HybridConfigError(
                f"{self.config_class.name}: valid must be bool of shape [B, T] = {list(query.shape[:2])}, True for "
                "tokens that exist; got "
                f"{valid.dtype} of shape {list(valid.shape)}. Of an attention mask, pass mask.bool()."
            )
        if not query.dtype == key.dtype == value.dtype:
            # autocast: rotary embedding leaves queries and keys wider than values
            device = query.device.type
            dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return query, key, value

    def _over(self, heads: tuple[int, ...]) -> tuple["LinearMixer", dict[str, torch.Tensor]]:
        """
        A mixer over some of its heads, without weights, and its weights: the parts of these parameters that belong to
        those heads.
        """
        mixers = self.__dict__.setdefault("_mixers_over", {})
        if heads not in mixers:
            wrong = [head for head in heads if head not in self.heads]
            if wrong:
                raise HybridConfigError(
                    f"{self.config_class.name}: heads must be some of the mixer's key-value heads {list(self.heads)}; "
                    f"got {wrong[0]}."
                )
            sizes = {name: getattr(self, name) for name in ("head_dim", "value_dim", "hidden_size", "causal")}
            with torch.device("meta"):
                mixers[heads] = build_mixer(self.config, **self.layer_sizes, **sizes, heads=heads)
        mixer = mixers[heads]
        mixer.ablated = self.ablated
        rows = {name: self._rows(name, value, heads) for name, value in self.named_parameters()}
        return mixer, {**rows, **dict(self.named_buffers())}  # buffers are for all heads alike

    def _rows(self, name: str, parameter: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
        matching = [layout for pattern, layout in self.head_layouts.items() if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise HybridConfigError(
                f"{self.config_class.name} cannot run on some heads only: its `head_layouts` do not say how {name!r} "
                f"is laid out. Add an entry to {type(self).__name__}.head_layouts, or convert whole layers."
            )
        own = [self.heads.index(head) for head in heads]
        queries = query_heads(own, self.groups)
        states = own if self.num_states == self.num_key_value_heads else queries
        indices = {"G": own, "H": queries, "S": states}
        sizes = {
            "G": self.num_key_value_heads,
            "H": self.num_heads,
            "S": self.num_states,
            "K": self.head_dim,
            "V": self.value_dim,
        }
        tensors = {axis: torch.tensor(rows, device=parameter.device) for axis, rows in indices.items()}
        return select_heads(parameter, matching[0], tensors, sizes)

    @property
    def num_states(self) -> int:
        """`H_s`: recurrent states, one per key-value head unless the mixer has more."""
        return self.num_key_value_heads

    def restricted(self, heads: Sequence[int]) -> "LinearMixer":
        """
        A mixer of its own over some of the heads, with copies of their parameters: what a checkpoint of those heads
        holds.
        """
        heads = tuple(heads)
        if heads == self.heads:
            return copy.deepcopy(self)
        empty, tensors = self._over(heads)
        mixer = copy.deepcopy(empty)
        if tensors:
            mixer.to_empty(device=next(iter(tensors.values())).device)
        buffers = dict(self.named_buffers())
        for name, value in tensors.items():
            owner, _, attribute = name.rpartition(".")
            own = value.detach().clone()
            if name not in buffers:
                own = nn.Parameter(own, requires_grad=self.get_parameter(name).requires_grad)
            setattr(mixer.get_submodule(owner), attribute, own)
        return mixer.train(self.training)

    def state_bytes(self, batch_size: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of cache per layer, whatever the length."""
        weight = next(self.parameters(), torch.empty(0))
        make: dict[str, Any] = {"dtype": dtype, "device": weight.device}
        query = torch.zeros(batch_size, 1, self.num_heads, self.head_dim, **make)
        key = torch.zeros(batch_size, 1, self.num_key_value_heads, self.head_dim, **make)
        value = torch.zeros(batch_size, 1, self.num_key_value_heads, self.value_dim, **make)
        hidden = torch.zeros(batch_size, 1, self.hidden_size, **make)
        with torch.no_grad():
            _, state = self(query, key, value, hidden, output_final_state=True)
        return sum(x.numel() * x.element_size() for x in state)


_MIXERS: dict[str, type[LinearMixer]] = {}


def register_mixer(mixer_class: type[LinearMixer]) -> type[LinearMixer]:
    """Class decorator: make a mixer available under `config_class.name`. A name can be taken once."""
    name = mixer_class.config_class.name
    if name in _MIXERS:
        raise HybridConfigError(
            f"register_mixer: the name {name!r} is taken by {_MIXERS[name].__name__}. Choose another name."
        )
    _MIXERS[name] = mixer_class
    return mixer_class


def get_mixer(name: str) -> type[LinearMixer]:
    """The mixer class registered as `name`; [`UnknownMixerError`] with the closest names otherwise."""
    if name not in _MIXERS:
        raise UnknownMixerError(
            f"mixer must be one of {', '.join(list_mixers())}; got {name!r}.{closest(str(name), _MIXERS)}"
        )
    return _MIXERS[name]


def list_mixers() -> list[str]:
    """Names of all registered mixers, sorted."""
    return sorted(_MIXERS)


def resolve_mixer_config(mixer: "str | dict | MixerConfig") -> MixerConfig:
    """A name, a dict with a `name`, or a config: always a config."""
    if isinstance(mixer, MixerConfig):
        return mixer
    if isinstance(mixer, dict):
        return MixerConfig.from_dict(mixer)
    if isinstance(mixer, str):
        return get_mixer(mixer).config_class()
    raise HybridConfigError(f"mixer must be a name, a dict or a MixerConfig; got {mixer!r}.")


def build_mixer(config: MixerConfig, **sizes) -> LinearMixer:
    """
    Build the mixer a config describes for one attention layer of the given sizes (the arguments of [`LinearMixer`]).
    """
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    mixer = get_mixer(config.name)(**sizes, **settings)
    mixer.config = config
    return mixer
