"""What an attention mask says to a layer that has no scores to mask: which tokens exist, and where packed sequences begin. And which masks say more."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig

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
    kwargs: dict, valid: torch.Tensor | None, query: torch.Tensor, mask=None, chunk: int | None = None
) -> torch.Tensor | None:
    """
    Packed sequence of every token, int `[B, T]`, or `None` when each row is one sequence.

    Read from `cu_seq_lens_q`, else from restarts of `position_ids` (the rule of `find_packed_sequence_indices` in transformers) and from the mask: a token
    that does not see the one before it begins a sequence. Padding may have any positions: only what lies between tokens that exist counts.

    Args:
        kwargs (`dict`): `cu_seq_lens_q` and `position_ids`, if the layer is given them.
        valid (`torch.Tensor`, *optional*): Which tokens exist, bool `[B, T]`.
        query (`torch.Tensor`): `[B, T, H, K]`; only its shape and device are used.
        mask (*optional*): Of a layer without past tokens, `[B, 1 or H, T, T or more]`.
        chunk (`int`, *optional*): Tokens that the host's chunked attention sees at once. What its masks hide at every multiple is no beginning (a text of
            just so many tokens cannot be told from a chunk, and is taken for one).
    """
    batch, length = query.shape[:2]
    boundaries = kwargs.get("cu_seq_lens_q")
    if boundaries is not None:
        index = torch.arange(length, device=query.device)
        return torch.bucketize(index, boundaries[1:].to(index), right=True)[None].expand(batch, -1)
    if torch.compiler.is_compiling():
        return None
    exist_both = None if valid is None else valid[:, 1:] & valid[:, :-1]
    starts = torch.zeros(1, length - 1, dtype=torch.bool, device=query.device)
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 2 and positions.shape[-1] == length:
        starts = torch.diff(positions, dim=-1) != 1
        starts = starts if exist_both is None else starts & exist_both
    if torch.is_tensor(mask) and mask.ndim == 4 and mask.shape[-2] == length and mask.shape[-1] >= length:
        hidden = ~shown(mask[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1)[..., : length - 1])
        hidden = hidden if exist_both is None else hidden & exist_both
        if chunk is not None:
            _forget_chunks(hidden, valid, chunk)
        starts = starts | hidden
    if not bool(starts.any()):
        return None
    return torch.cat([starts.new_zeros(starts.shape[0], 1), starts], dim=1).cumsum(-1).expand(batch, -1)


def _forget_chunks(starts: torch.Tensor, valid: torch.Tensor | None, chunk: int) -> None:
    """Take out of `starts`, `[B, T - 1]`, in place, where only a chunk of the same text begins."""
    for row in range(starts.shape[0]):
        begin = 0 if valid is None else int(valid[row].int().argmax())
        for start in (starts[row].nonzero()[:, 0] + 1).tolist():
            if (start - begin) % chunk == 0:
                starts[row, start - 1] = False
            else:
                begin = start


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
    _fine: dict[tuple, object] = dataclasses.field(
        default_factory=dict
    )  # the masks themselves, so that no id is used twice

    def includes(self, mask) -> bool:
        """Whether `mask` may be one of those given: it has the queries and keys of one."""
        is_mask = (torch.is_tensor(mask) and mask.ndim == 4) or type(mask).__name__ == "BlockMask"
        return is_mask and tuple(mask.shape[-2:]) in self.shapes

    def check(
        self, mask, length: int, causal: bool, offset, past_keys: int, segments, config: PreTrainedConfig
    ) -> None:
        """
        Refuse a mask that a linear layer would not follow. Looking costs a few passes over it; nothing is looked at for single tokens, of which a mask
        does not say whether what it hides is padding, nor while compiling.

        Args:
            mask: What reached the layer: bool (`True`: seen), added to scores, or flex attention's `BlockMask`.
            length (`int`): New tokens.
            causal (`bool`): Whether the layer is.
            offset (`int` or `torch.Tensor`): Position of the first new token on the mask's key axis.
            past_keys (`int`): Keys before the mask's first, which a sliding layer's cache has let go.
            segments (`torch.Tensor`, *optional*): Packed sequence of every token, int `[B, T]`.
            config (`PreTrainedConfig`): Of the layer; says whether the host itself looks back through a window.

        Raises:
            UnsupportedModelError: If the mask says more than the layer can follow.
        """
        if length == 1 or torch.compiler.is_compiling() or not self.includes(mask):
            return
        block = not torch.is_tensor(mask)
        window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        key = (id(mask), causal, window, chunk)
        if key in self._fine or (not block and mask.device.type == "meta"):
            return
        seen, biased = _dense(mask) if block else _seen(mask)
        problem = "adds numbers to scores (or hides by another number than the dtype's lowest)" if biased else None
        if problem is None and bool((seen != seen[:, :1]).any()):
            problem = "hides more from some heads than from others"
        if problem is None and causal and seen.shape[-2] == 1:
            problem = "lets tokens see later ones"
        if problem is None and seen.shape[-2] > 1:
            forms = _forms(seen, causal, offset, past_keys, segments, window, chunk, self.pictures)
            if not any(bool(form.all()) for form in forms):
                later = causal and bool(seen.triu(int(offset) + 1).any())
                problem = "lets tokens see later ones" if later else "hides more"
        if problem is not None:
            raise UnsupportedModelError(
                f"A linear layer follows masks that hide padding{', the future' if causal else ''} and other packed sequences; the 4D attention mask of shape {list(mask.shape)} "
                f"{problem}. Pass a mask [B, T] of the tokens that exist; packed sequences are fine, also by position_ids that restart."
            )
        self._fine[key] = mask


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


def _forms(seen, causal, offset, past_keys, segments, window, chunk, pictures) -> Iterator[torch.Tensor]:
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
    past = column <= at[:, None]
    yield (seen == (exists & past & same)) | ~real
    if pictures:
        yield ((seen & past) == (exists & past)) | ~real
    if window is not None:
        yield (seen == (exists & past & same & (at[:, None] - column < window))) | ~real
    if chunk is not None:
        chunks = (column + past_keys) // chunk == (at[:, None] + past_keys) // chunk
        yield (seen == (exists & past & chunks)) | ~real


def given_masks(args: tuple, kwargs: dict) -> set[tuple[int, int]]:
    """Queries and keys of what may be a mask [B, H, Q, KV] among the arguments of a forward; cheap, and mostly empty."""
    given = (*args[:4], *(kwargs.get(name) for name in MASK_ARGUMENTS))
    return {
        tuple(mask.shape[-2:])
        for value in given
        for mask in (value.values() if isinstance(value, dict) else (value,))
        if (torch.is_tensor(mask) and mask.ndim == 4) or type(mask).__name__ == "BlockMask"
    }


@contextlib.contextmanager
def checking_masks(model: nn.Module, shapes: set[tuple[int, int]], layers: Iterable[nn.Module]) -> Iterator[None]:
    """While inside, the linear `layers` of `model` refuse masks of these shapes that they cannot follow."""
    masks = CustomMasks(shapes, pictures=model.config.model_type in PICTURE_BLOCKS)
    layers = list(layers)
    for layer in layers:
        layer.custom_masks = masks
    try:
        yield
    finally:
        for layer in layers:
            layer.custom_masks = None


__all__ = [
    "PICTURE_BLOCKS",
    "CustomMasks",
    "checking_masks",
    "given_masks",
    "packed_segments",
    "shown",
    "valid_tokens",
    "within_keys",
]
