"""Packed rows: several sequences in one, read from whatever tells of them."""

import torch

from .padding import Span, is_block_mask, shown


def packed_segments(
    kwargs: dict, valid: torch.Tensor | None, query: torch.Tensor, mask, causal: bool, span: Span
) -> torch.Tensor | None:
    """
    Packed sequence of every token, int `[B, T]`, or `None` when each row is one sequence.

    Read from `cu_seq_lens_q`, else from restarts of `position_ids` (the rule of `find_packed_sequence_indices` in
    transformers) and from the mask: a token that does not see the one before it begins a sequence. Padding may have any
    positions, and lie between sequences: tokens that exist are compared with the last one before them that does.

    Args:
        kwargs (`dict`): `cu_seq_lens_q` and `position_ids`, if the layer is given them.
        valid (`torch.Tensor`, *optional*): Which tokens exist, bool `[B, T]`.
        query (`torch.Tensor`): `[B, T, H, K]`; only its shape and device are used.
        mask (*optional*): As it reaches the layer. Of a layer without past tokens, `[B, 1 or H, T, T or more]`.
        causal (`bool`): Whether the layer is. What the mask of one that is not hides may also be windows or blocks of
            pictures: it must be that of packed sequences, entry by entry.
        span (`Span`): How far the host itself looks back. What that hides is no beginning.
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
        _forget_what_is_far(hidden, before, valid, span)
        if causal or not bool(hidden.any()) or _is_packed(mask, _number(starts | hidden)):
            starts = starts | hidden
    if not bool(starts.any()):
        return None
    return _number(starts).expand(batch, -1)


def _number(starts: torch.Tensor) -> torch.Tensor:
    """`[B, T]` from where, among tokens 1 to T - 1, sequences begin."""
    return torch.cat([starts.new_zeros(starts.shape[0], 1), starts], dim=1).cumsum(-1)


def _last_before(valid: torch.Tensor | None, length: int, device) -> torch.Tensor:
    """
    For tokens 1 to T - 1 the last token before that exists, `[B, T - 1]`; -1 for the first ones, and for padding
    itself.
    """
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
    if is_block_mask(mask):
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


def _forget_what_is_far(hidden: torch.Tensor, before: torch.Tensor, valid: torch.Tensor | None, span: Span) -> None:
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


def _is_packed(mask, segments: torch.Tensor) -> bool:
    return torch.is_tensor(mask) and hides_only_others(shown(mask), segments)


def hides_only_others(seen: torch.Tensor, segments: torch.Tensor | None) -> bool:
    """
    Whether a mask hides padding and other packed sequences, from all tokens alike, and nothing else.

    Args:
        seen (`torch.Tensor`): What it shows, bool `[B, 1 or H, T, T]`.
        segments (`torch.Tensor`, *optional*): Packed sequence of every token, int `[B, T]`.
    """
    if seen.shape[-1] != seen.shape[-2]:
        return False
    exists = seen.any(-2, keepdim=True)  # a key that some query sees: [B, H, 1, T]
    others = exists.new_zeros(()) if segments is None else segments[:, None, :, None] != segments[:, None, None, :]
    real = exists[..., 0, :, None]  # what a padded query sees is nobody's business
    return bool(((seen == (exists & ~others)) | ~real).all())


__all__ = ["hides_only_others", "packed_segments"]
