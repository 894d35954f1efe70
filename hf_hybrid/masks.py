"""What an attention mask says to a layer that has no scores to mask: which tokens exist, and where packed sequences begin. And which masks say more."""

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from .errors import UnsupportedModelError


# Families whose text layers let the tokens of one picture see each other.
PICTURE_BLOCKS = ("colpali", "gemma3", "gemma4", "gemma4_unified", "molmo2", "paligemma", "shieldgemma2", "step3p7")


def valid_tokens(mask, length: int, offset, device) -> torch.Tensor | None:
    """
    Which new tokens exist, bool `[B, T]`, from whatever form of mask reaches the layer; `None` when all do.

    A causal mask tells by its diagonal: a padded token does not see itself. `offset` is the position of the first new token on the
    mask's key axis.
    """
    if mask is None:
        return None
    if type(mask).__name__ == "BlockMask":  # flex attention
        batch = torch.arange(mask.shape[0], device=device)[:, None].expand(-1, length)
        row = torch.arange(length, device=device).expand_as(batch)
        return mask.mask_mod(batch, torch.zeros_like(batch), row, row + offset)
    if mask.ndim == 2:  # flash attention
        return mask[:, -length:].bool()
    if mask.ndim == 4:
        mask = mask[:, 0]  # [B, Q, KV]; heads share which tokens exist
    if mask.shape[-2] == 1 and length > 1:  # one row for all queries: a bidirectional mask
        diagonal = mask[:, 0, -length:]
    else:
        index = torch.arange(length, device=mask.device) + within_keys(offset, length, mask.shape[-1])
        index = index[None, :, None].expand(mask.shape[0], -1, 1)
        diagonal = mask.gather(2, index)[..., 0]
    return shown(diagonal)


def shown(mask: torch.Tensor) -> torch.Tensor:
    """What a mask shows, as booleans: it is those already, or numbers that are added to scores."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise UnsupportedModelError(
            f"The 4D attention mask has dtype {mask.dtype}. Pass booleans (True: seen), numbers that are added to scores, or a mask [B, T]."
        )
    return mask > torch.finfo(mask.dtype).min / 2


def within_keys(offset, length: int, num_keys: int):
    """
    `offset`, at most so that `length` tokens end with the last of `num_keys` keys. Where every layer is linear, a static cache lays all masks out like
    its first layer's, and a full sliding one ends at the newest token whatever its position.
    """
    most = max(num_keys - length, 0)
    return offset.clamp_max(most) if torch.is_tensor(offset) else min(offset, most)


def packed_segments(
    kwargs: dict,
    valid: torch.Tensor | None,
    query: torch.Tensor,
    mask=None,
    causal: bool = True,
    span: "Span | None" = None,
) -> torch.Tensor | None:
    """
    Packed sequence of every token, int `[B, T]`, or `None` when each row is one sequence.

    Read from `cu_seq_lens_q`, else from restarts of `position_ids` (the rule of `find_packed_sequence_indices` in transformers) and from the mask: a token
    that does not see the one before it begins a sequence. Padding may have any positions, and lie between sequences: tokens that exist are compared
    with the last one before them that does.

    Args:
        kwargs (`dict`): `cu_seq_lens_q` and `position_ids`, if the layer is given them.
        valid (`torch.Tensor`, *optional*): Which tokens exist, bool `[B, T]`.
        query (`torch.Tensor`): `[B, T, H, K]`; only its shape and device are used.
        mask (*optional*): Of a layer without past tokens, `[B, 1 or H, T, T or more]`.
        causal (`bool`, *optional*, defaults to `True`): Whether the layer is. What the mask of one that is not hides may also be windows or blocks of pictures:
            it must be that of packed sequences, entry by entry.
        span (`Span`, *optional*): How far the host itself looks back. What that hides is no beginning.
    """
    batch, length = query.shape[:2]
    boundaries = kwargs.get("cu_seq_lens_q")
    if boundaries is not None:
        index = torch.arange(length, device=query.device)
        return torch.bucketize(index, boundaries[1:].to(index), right=True)[None].expand(batch, -1)
    if torch.compiler.is_compiling():
        return None
    before = _last_before(valid, length, query.device)
    starts = torch.zeros(1, length - 1, dtype=torch.bool, device=query.device)
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 2 and positions.shape[-1] == length:
        starts = _restarts(positions, before)
    hidden = _hidden_from_next(mask, before, length)
    if hidden is not None:
        _forget_what_is_far(hidden, before, valid, span or Span())
        if causal or not bool(hidden.any()) or _hides_only_others(mask, _number(starts | hidden)):
            starts = starts | hidden
    if not bool(starts.any()):
        return None
    return _number(starts).expand(batch, -1)


def _number(starts: torch.Tensor) -> torch.Tensor:
    """`[B, T]` from where, among tokens 1 to T - 1, sequences begin."""
    return torch.cat([starts.new_zeros(starts.shape[0], 1), starts], dim=1).cumsum(-1)


def _last_before(valid: torch.Tensor | None, length: int, device) -> torch.Tensor:
    """For tokens 1 to T - 1 the last token before that exists, `[B, T - 1]`; -1 for the first ones, and for padding itself."""
    index = torch.arange(length, device=device)
    if valid is None:
        return index[None, :-1]
    last = torch.where(valid, index, -1).cummax(-1).values[:, :-1]
    return torch.where(valid[:, 1:], last, -1)


def _restarts(positions: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    positions, before = _same_rows(positions, before)
    there = torch.arange(1, positions.shape[1], device=positions.device)
    step = positions[:, 1:] - positions.gather(1, before.clamp_min(0))
    # padding in between may count as positions or not; going back means another sequence either way
    return torch.where(before == there - 1, step != 1, step <= 0) & (before >= 0)


def _hidden_from_next(mask, before: torch.Tensor, length: int) -> torch.Tensor | None:
    """Where a token does not see the one before it, `[B, T - 1]`; `None` if no mask says."""
    if type(mask).__name__ == "BlockMask":
        batch = torch.arange(mask.shape[0], device=before.device)[:, None]
        batch, before = _same_rows(batch, before)
        row = torch.arange(1, length, device=before.device).expand_as(before)
        seen = mask.mask_mod(batch.expand_as(row), torch.zeros_like(row), row, before.clamp_min(0))
    elif torch.is_tensor(mask) and mask.ndim == 4 and mask.shape[-2] == length and mask.shape[-1] >= length:
        below, before = _same_rows(mask[:, 0, 1:], before)
        seen = shown(below.gather(-1, before.clamp_min(0)[..., None])[..., 0])
    else:
        return None
    return ~seen & (before >= 0)


def _same_rows(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both for as many rows as one of them has; the other may have a single one for all."""
    rows = max(one.shape[0], other.shape[0])
    return one.expand(rows, *one.shape[1:]), other.expand(rows, *other.shape[1:])


def _forget_what_is_far(hidden: torch.Tensor, before: torch.Tensor, valid: torch.Tensor | None, span: "Span") -> None:
    """Take out of `hidden`, in place, what the host's own window or chunks hide from every text."""
    if span.window is not None:
        hidden &= torch.arange(1, hidden.shape[1] + 1, device=hidden.device) - before < span.window
    if span.chunk is None:
        return
    for row in range(hidden.shape[0]):
        begin = 0 if valid is None else int(valid[row].int().argmax())
        for start in (hidden[row].nonzero()[:, 0] + 1).tolist():
            if (start - begin) % span.chunk == 0:
                hidden[row, start - 1] = False
            else:
                begin = start


def _hides_only_others(mask, segments: torch.Tensor) -> bool:
    """Whether a mask hides padding and other packed sequences, from all tokens alike, and nothing else."""
    if not torch.is_tensor(mask):
        return False
    seen = shown(mask)
    exists = seen.any(-2, keepdim=True)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    real = exists[..., 0, : seen.shape[-2], None]
    return seen.shape[-1] == seen.shape[-2] and bool(((seen == (exists & same)) | ~real).all())


@dataclasses.dataclass(frozen=True)
class Span:
    """How far a host's causal layer looks back by itself: `window` tokens (sliding window), or to the beginning of its `chunk` of so many."""

    window: int | None = None
    chunk: int | None = None

    @classmethod
    def of(cls, layer: nn.Module, config: PreTrainedConfig | None) -> "Span":
        """Of an attention layer; where the config does not say which layers look back so far, of any."""
        kinds, index = getattr(config, "layer_types", None), getattr(layer, "layer_idx", None)
        kind = kinds[index] if kinds and isinstance(index, int) and index < len(kinds) else "sliding, or chunked"
        return cls(
            window=_of_layer(config, "sliding_window", index) if "sliding" in kind else None,
            chunk=_of_layer(config, "attention_chunk_size", index) if "chunked" in kind else None,
        )


def _of_layer(config: PreTrainedConfig | None, name: str, index: int | None):
    """A setting that may differ between the layers of a model, of the layer at `index`; `None` if there is no such."""
    try:
        return getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return None if config is None or index is None else getattr(config.per_layer_config[index], name, None)


# The forward's arguments that may be a mask over the tokens of a text.
MASK_ARGUMENTS = ("attention_mask", "decoder_attention_mask")


@dataclasses.dataclass
class CustomMasks:
    """
    Masks [B, H, Q, KV] that came into a model as they are: from users, or from `generate`, which makes them for static caches. Transformers hands
    them to the layers unread; linear layers can follow some of them only, and find out before they compute ([`CustomMasks.check`]).

    Attributes:
        shapes (`set[tuple[int, int]]`): Queries and keys of the masks given. Towers that make masks of their own are left alone.
        pictures (`bool`): Whether the family lets the tokens of a picture see each other, which conversion has said is lost.
    """

    shapes: set[tuple[int, int]]
    pictures: bool = False
    _fine: dict[tuple, weakref.ref] = dataclasses.field(default_factory=dict)

    def __getstate__(self):
        return {**vars(self), "_fine": {}}

    def includes(self, mask) -> bool:
        """Whether `mask` may be one of those given: it has the queries and keys of one."""
        is_mask = (torch.is_tensor(mask) and mask.ndim == 4) or type(mask).__name__ == "BlockMask"
        return is_mask and tuple(mask.shape[-2:]) in self.shapes

    def check(
        self, mask, length: int, causal: bool, offset, segments, span: Span, past: int | torch.Tensor | None
    ) -> None:
        """
        Refuse a mask that a linear layer would not follow. Looking costs a few passes over it; nothing is looked at for single tokens, of which a mask
        does not say whether what it hides is padding, nor while compiling.

        Args:
            mask: What reached the layer: bool (`True`: seen), added to scores, or flex attention's `BlockMask`.
            length (`int`): New tokens.
            causal (`bool`): Whether the layer is.
            offset (`int` or `torch.Tensor`): Position of the first new token on the mask's key axis.
            segments (`torch.Tensor`, *optional*): Packed sequence of every token, int `[B, T]`.
            span (`Span`): How far the host itself looks back.
            past (`int` or `torch.Tensor`, *optional*): Tokens that the layer's state has taken in, of every row `[B]`; `None`: not known.

        Raises:
            UnsupportedModelError: If the mask says more than the layer can follow.
        """
        if length == 1 or torch.compiler.is_compiling() or not self.includes(mask):
            return
        block = not torch.is_tensor(mask)
        key = (id(mask), causal, span)
        looked_at = self._fine.get(key)
        if (looked_at is not None and looked_at() is mask) or (not block and mask.device.type == "meta"):
            return
        seen, biased = _dense(mask) if block else _seen(mask)
        problem = "adds numbers to scores (or hides by another number than the dtype's lowest)" if biased else None
        if problem is None and bool((seen != seen[:, :1]).any()):
            problem = "hides more from some heads than from others"
        if problem is None and causal and seen.shape[-2] == 1:
            problem = "lets tokens see later ones"
        if problem is None and seen.shape[-2] > 1:
            forms = _forms(seen, causal, offset, segments, span, self.pictures, past)
            if not any(bool(form.all()) for form in forms):
                later = causal and bool(seen.triu(int(offset) + 1).any())
                problem = "lets tokens see later ones" if later else "hides more"
        if problem is not None:
            raise UnsupportedModelError(
                f"A linear layer follows masks that hide padding{', the future' if causal else ''} and other packed sequences; the 4D attention mask "
                f"of shape {list(mask.shape)} {problem}. Pass a mask [B, T] of the tokens that exist; packed sequences are fine, also by position_ids "
                "that restart."
            )
        self._fine[key] = weakref.ref(mask)


def _seen(mask: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """What a mask shows, and whether it adds numbers to what it shows."""
    seen = shown(mask)
    return seen, mask.is_floating_point() and bool(((mask != 0) & seen).any())


def _dense(mask) -> tuple[torch.Tensor, bool]:
    """The same of a flex attention `BlockMask`."""
    batch, _, queries, keys = mask.shape
    device = mask.kv_num_blocks.device
    b, q, k = (torch.arange(n, device=device) for n in (batch, queries, keys))
    seen = mask.mask_mod(b[:, None, None], torch.zeros_like(b)[:, None, None], q[None, :, None], k[None, None, :])
    return seen.expand(batch, queries, keys)[:, None], False


def _forms(seen, causal: bool, offset, segments, span: Span, pictures: bool, past) -> Iterator[torch.Tensor]:
    """Where `seen` agrees with each mask that a layer can follow, or that the host itself lays over its own attention."""
    queries, keys = seen.shape[-2:]
    exists = seen.any(-2, keepdim=True)  # a key that some query sees: [B, H, 1, KV]
    at = torch.arange(queries, device=seen.device) + offset
    # what a padded query sees is nobody's business
    real = exists[..., 0, :].gather(-1, at.clamp_max(keys - 1).expand(*seen.shape[:2], -1))[..., None]
    packed = segments is not None and keys == queries
    same = segments[:, None, :, None] == segments[:, None, None, :] if packed else torch.ones_like(seen[..., :1])
    if not causal:
        yield (seen == (exists & same)) | ~real
        return
    column = torch.arange(keys, device=seen.device)
    earlier = column <= at[:, None]
    near = earlier if span.window is None else earlier & (at[:, None] - column < span.window)
    # hidden from all new tokens: fine if it was padding when it came
    if past is None or bool((exists[:, 0, 0, : int(offset)].sum(-1) == past).all()):
        yield (seen == (exists & earlier & same)) | ~real
    if span.window is not None:
        yield (seen == (exists & near & same)) | ~real
    if pictures:
        yield (seen == exists) | ~near | ~real
    if span.chunk is not None:
        # chunks are counted from the first token that exists: the last query's begins at a multiple
        last = (real[..., 0] * torch.arange(1, queries + 1, device=seen.device)).argmax(-1)[..., None, None]
        begin = seen.gather(-2, last.expand(*seen.shape[:2], 1, keys)).int().argmax(-1)[..., None]
        chunks = (column - begin) // span.chunk == (at[:, None] - begin) // span.chunk
        yield (seen == (exists & earlier & chunks)) | ~real


def given_masks(args: tuple, kwargs: dict) -> set[tuple[int, int]]:
    """Queries and keys of what may be a mask [B, H, Q, KV] among the arguments of a forward; cheap, and mostly empty."""
    given = (*args[:4], *(kwargs.get(name) for name in MASK_ARGUMENTS))
    return {
        tuple(mask.shape[-2:])
        for value in given
        for mask in (value.values() if isinstance(value, dict) else (value,))
        if (torch.is_tensor(mask) and mask.ndim == 4) or type(mask).__name__ == "BlockMask"
    }


def tell_of_masks(model: nn.Module, args: tuple, kwargs: dict, layers: Callable[[], Iterable[nn.Module]]) -> None:
    """
    Before every forward: tell the linear layers of `model`, which `layers` lists, of the 4D masks among its arguments. They know until the next forward:
    a checkpointed layer runs once more in the backward pass.
    """
    shapes = given_masks(args, kwargs)
    if torch.compiler.is_compiling() or not (shapes or model.__dict__.get("_hybrid_told_of_masks", False)):
        return
    masks = CustomMasks(shapes, pictures=model.config.model_type in PICTURE_BLOCKS) if shapes else None
    for layer in layers():
        layer.custom_masks = masks
    model.__dict__["_hybrid_told_of_masks"] = bool(shapes)


__all__ = [
    "PICTURE_BLOCKS",
    "CustomMasks",
    "Span",
    "given_masks",
    "packed_segments",
    "shown",
    "tell_of_masks",
    "valid_tokens",
    "within_keys",
]
