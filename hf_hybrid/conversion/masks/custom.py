"""Masks [B, H, Q, KV] that come into a model as they are: followed by its linear layers, or refused; never ignored."""

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from ...errors import UnsupportedModelError
from .packing import hides_only_others
from .padding import PICTURE_BLOCKS, Span, is_block_mask, shown


# The forward's arguments that may be a mask over the tokens of a text.
MASK_ARGUMENTS = ("attention_mask", "decoder_attention_mask")


@dataclasses.dataclass
class CustomMasks:
    """
    Masks [B, H, Q, KV] that came into a model as they are: from users, or from `generate`, which makes them for static
    caches. Transformers hands them to the layers unread; linear layers can follow some of them only, and find out
    before they compute ([`CustomMasks.check`]).

    Attributes:
        shapes (`set[tuple[int, int]]`): Queries and keys of the masks given. Towers that make masks of their own are
            left alone.
        pictures (`bool`): Whether the family lets the tokens of a picture see each other, which conversion has said is
            lost.
    """

    shapes: set[tuple[int, int]]
    pictures: bool = False
    _fine: dict[tuple, weakref.ref] = dataclasses.field(default_factory=dict)

    def __getstate__(self):
        return {**vars(self), "_fine": {}}

    def includes(self, mask) -> bool:
        """Whether `mask` may be one of those given: it has the queries and keys of one."""
        return _may_be_custom(mask) and tuple(mask.shape[-2:]) in self.shapes

    def check(self, mask, causal: bool, offset, segments, span: Span, past: int | torch.Tensor | None) -> None:
        """
        Refuse a mask that a linear layer would not follow. Looking costs a few passes over it. Of single tokens a mask
        does not say whether what it hides is padding: not for them.

        Args:
            mask: What reached the layer: bool (`True`: seen), added to scores, or flex attention's `BlockMask`.
            causal (`bool`): Whether the layer is.
            offset (`int` or `torch.Tensor`): Position of the first new token on the mask's key axis.
            segments (`torch.Tensor`, *optional*): Packed sequence of every token, int `[B, T]`.
            span (`Span`): How far the host itself looks back.
            past (`int` or `torch.Tensor`, *optional*): Tokens that the layer's state has taken in, of every row `[B]`;
                `None`: not known.

        Raises:
            UnsupportedModelError: If the mask says more than the layer can follow.
        """
        block = is_block_mask(mask)
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
            if not causal:
                problem = None if hides_only_others(seen, segments) else "hides more"
            elif not any(bool(form.all()) for form in _forms(seen, offset, segments, span, self.pictures, past)):
                problem = "lets tokens see later ones" if bool(seen.triu(int(offset) + 1).any()) else "hides more"
        if problem is not None:
            raise UnsupportedModelError(
                f"A linear layer follows masks that hide padding{', the future' if causal else ''} and other packed "
                f"sequences; the 4D attention mask of shape {list(mask.shape)} {problem}. Pass a mask [B, T] of the "
                "tokens that exist; packed sequences are fine, also by position_ids that restart."
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


def _forms(seen, offset, segments, span: Span, pictures: bool, past) -> Iterator[torch.Tensor]:
    """
    Where `seen` agrees with each mask that a causal layer can follow, or that the host itself lays over its own
    attention.
    """
    queries, keys = seen.shape[-2:]
    exists = seen.any(-2, keepdim=True)  # a key that some query sees: [B, H, 1, KV]
    at = torch.arange(queries, device=seen.device) + offset
    # what a padded query sees is nobody's business
    real = exists[..., 0, :].gather(-1, at.clamp_max(keys - 1).expand(*seen.shape[:2], -1))[..., None]
    packed = segments is not None and keys == queries
    same = segments[:, None, :, None] == segments[:, None, None, :] if packed else torch.ones_like(seen[..., :1])
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


def _may_be_custom(mask) -> bool:
    return (torch.is_tensor(mask) and mask.ndim == 4) or is_block_mask(mask)


def _given_masks(args: tuple, kwargs: dict) -> set[tuple[int, int]]:
    """
    Queries and keys of what may be a mask [B, H, Q, KV] among the arguments of a forward; cheap, and mostly empty.
    """
    given = (*args[:4], *(kwargs.get(name) for name in MASK_ARGUMENTS))
    return {
        tuple(mask.shape[-2:])
        for value in given
        for mask in (value.values() if isinstance(value, dict) else (value,))
        if _may_be_custom(mask)
    }


def tell_of_masks(model: nn.Module, args: tuple, kwargs: dict, layers: Callable[[], Iterable[nn.Module]]) -> None:
    """
    Before every forward: tell the linear layers of `model`, which `layers` lists, of the 4D masks among its arguments,
    and whether it is given positions. They know until the next forward: a checkpointed layer runs once more in the
    backward pass.
    """
    told = model.__dict__.get("_hybrid_told_of_masks", (False, False))
    # (with a cache, hosts do not take positions for those of packed rows either)
    positions = kwargs.get("position_ids") is not None and kwargs.get("past_key_values") is None
    shapes = set() if torch.compiler.is_compiling() else _given_masks(args, kwargs)
    if told == (bool(shapes), positions) and not shapes:
        return
    masks = CustomMasks(shapes, pictures=model.config.model_type in PICTURE_BLOCKS) if shapes else None
    for layer in layers():
        layer.custom_masks, layer.positions_given = masks, positions
    model.__dict__["_hybrid_told_of_masks"] = (bool(shapes), positions)


__all__ = ["CustomMasks", "tell_of_masks"]
