"""A window, sinks and a bounded memory of exact keys, a block of tokens at a time.

Rows are laid on a grid of blocks first, without their padding (`_on_grid`). Keys alone then say what every block's
memory holds (`choose_memories`): one pass over the blocks that looks at no query. What is left is attention of every
block over its own few hundred keys, many blocks at once.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..matmul import matmul_mode
from ..naive import TINY
from ..naive_memory import MemoryState, empty_memory_state, sum_dtype


# Blocks whose keys are gathered at once, in bytes of keys and values: enough for large products, and little beside
# the rest of a layer.
SPAN_BYTES = 32_000_000


class Grid(NamedTuple):
    """
    New tokens behind the ring's, on a grid of blocks: place `p` of the stream is position `base - R + p`, `R` = `W +
    C`. `L` = `R + N C`, `N` blocks.
    """

    key: torch.Tensor  # [B, H_kv, L, K]
    value: torch.Tensor  # [B, H_kv, L, V]
    query: torch.Tensor  # [B, N C, H, K], from place R on
    base: torch.Tensor  # [B]: position of the first block's first token
    phase: torch.Tensor  # [B]: tokens of that block seen before
    total: torch.Tensor  # [B]: tokens seen after this call
    rank: torch.Tensor | None  # [B, T]: place of each token's query on the grid, where rows differ
    blocks: int
    # base, phase and total of all rows, where they are the same and known
    known: tuple[int, int, int] | None


def chunk_memory_attention(
    query,
    key,
    value,
    *,
    window_size,
    num_sinks,
    num_memory_tokens,
    memory_block_size,
    scale,
    linear=None,
    valid=None,
    state=None,
):
    """
    Blockwise [`naive_memory_attention`]: same arguments, shapes and results. Scores and sums are fp32 or wider.
    """
    sizes = {
        "window_size": window_size,
        "num_sinks": num_sinks,
        "num_memory_tokens": num_memory_tokens,
        "memory_block_size": memory_block_size,
    }
    if state is None:
        state = empty_memory_state(key, value, **sizes)
    grid = _on_grid(query, key, value, valid, state, **sizes)
    memory, lost, lost_exists, filled, key_sum = choose_memories(grid, state, **sizes)
    pool_key, pool_value, sinks = _pool(grid, state, num_sinks, num_memory_tokens)
    recurrent = None if state.recurrent is None else state.recurrent.to(_wide(query))
    outputs = []
    row_bytes = (query.shape[3] + value.shape[3]) * query.element_size() * query.shape[0] * key.shape[2]
    width = num_sinks + num_memory_tokens + window_size + memory_block_size
    span = max(1, SPAN_BYTES // (row_bytes * width))
    for first in range(0, grid.blocks, span):
        last = min(first + span, grid.blocks)
        index, visible = _reach(grid, sinks, memory, filled, first, last, **sizes)
        keys, values = _gathered(pool_key, index), _gathered(pool_value, index)  # [B, H_kv, n, width, .]
        queries = _by_block(grid.query, first, last, memory_block_size, key.shape[2])
        if linear is None:
            mixed = _softmax(queries, keys, values, visible, scale)
        else:
            maps = linear.feature_map_q, linear.feature_map_k
            lost_key = _gathered(pool_key, num_sinks + lost[:, :, first:last])
            lost_value = _gathered(pool_value, num_sinks + lost[:, :, first:last])
            states, recurrent = _states(
                recurrent, maps[1], lost_key, lost_value, lost_exists[:, first:last], _wide(query)
            )
            mixed = _with_state(queries, keys, values, visible, scale, linear, states)
        outputs.append(mixed.flatten(2, 3).transpose(1, 2))  # [B, n C, H, V]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    final = _final_state(grid, state, pool_key, pool_value, sinks, memory, key_sum, recurrent, **sizes)
    return _off_grid(output, grid, query, valid), final


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _on_grid(query, key, value, valid, state, *, window_size, num_sinks, num_memory_tokens, memory_block_size) -> Grid:
    batch, length = query.shape[:2]
    ring, first, block = window_size + memory_block_size, num_sinks + num_memory_tokens, memory_block_size
    old_key, old_value = state.key[:, :, first:].to(key.dtype), state.value[:, :, first:].to(value.dtype)
    new_key, new_value = key.transpose(1, 2), value.transpose(1, 2)
    base, phase = state.seen // block * block, state.seen % block
    if valid is None and (seen := seen_in_all_rows(state.seen)) is not None:
        begin, offset = seen // block * block, seen % block
        blocks = -(-(offset + length) // block)
        places = (begin + torch.arange(ring + offset, device=key.device)) % ring
        rest = blocks * block - offset - length

        def laid(old, new):
            return F.pad(torch.cat([old.index_select(2, places), new], dim=2), (0, 0, 0, rest))

        queries = F.pad(query, (0, 0, 0, 0, offset, rest))
        known = begin, offset, seen + length
        keys, values = laid(old_key, new_key), laid(old_value, new_value)
        return Grid(keys, values, queries, base, phase, state.seen + length, None, blocks, known)
    exists = torch.ones(batch, length, dtype=torch.bool, device=key.device) if valid is None else valid
    blocks = -(-(length + block - 1) // block)
    number = exists.sum(1)
    order = (~exists).int().argsort(dim=1, stable=True)  # real tokens first
    place = torch.arange(ring + blocks * block, device=key.device) - ring - phase[:, None]  # [B, L] among new tokens
    new = ring + order.gather(1, place.clamp(0, length - 1))
    source = torch.where(place < 0, (base[:, None] + place + ring + phase[:, None]) % ring, new)

    def taken(old, new):
        return _gathered(torch.cat([old, new], dim=2), source[:, None].expand(-1, old.shape[1], -1))

    own = order.gather(1, place[:, ring:].clamp(0, length - 1))
    queries = query.gather(1, own[:, :, None, None].expand(-1, -1, *query.shape[2:]))
    rank = (phase[:, None] + exists.cumsum(1) - 1).clamp_min(0)
    keys, values = taken(old_key, new_key), taken(old_value, new_value)
    return Grid(keys, values, queries, base, phase, state.seen + number, rank, blocks, None)


def seen_in_all_rows(count) -> int | None:
    """The count of tokens that all rows share; `None` where they differ, or looking would cost more than it saves."""
    if torch.compiler.is_compiling() or count.device.type != "cpu":
        return None
    counts = count.tolist()
    return counts[0] if counts.count(counts[0]) == len(counts) else None


def _off_grid(output, grid, query, valid):
    """Outputs of the new tokens in the order they came in, `[B, T, H, V]`; zeros for padding."""
    if grid.known is not None:
        return output[:, grid.known[1] : grid.known[1] + query.shape[1]]
    index = grid.rank[:, :, None, None].expand(-1, -1, *output.shape[2:])
    output = output.gather(1, index)
    return output if valid is None else output * valid[:, :, None, None]


@torch.no_grad()
def choose_memories(grid, state, *, window_size, num_sinks, num_memory_tokens, memory_block_size):
    """
    What the memory holds while each block runs.

    Returns:
        `(memory, lost, lost_exists, filled, key_sum)`: int `[B, H_kv, N, M]`, places in [old memory, stream]; int `[B,
        H_kv, N, C]`, those that leave it before the block, and which of them exist, bool `[B, N, C]`; int `[B, N]`,
        how many are filled; fp64 `[B, H_kv, K]`.
    """
    batch, heads = grid.key.shape[:2]
    size, block, ring = num_memory_tokens, memory_block_size, window_size + memory_block_size
    old = state.key[:, :, num_sinks : num_sinks + size].to(grid.key.dtype)
    stream = F.normalize(torch.cat([old, grid.key], dim=2).to(sum_dtype(grid.key)), dim=-1)
    sums, device = state.key_sum, grid.key.device
    memory = torch.arange(size, device=device).expand(batch, heads, -1)
    memories, lost, lost_exists, filled = [], [], [], []
    for i in range(grid.blocks):
        n = grid.base + i * block  # [B]: tokens behind
        active = (n > 0) & (n < grid.total)
        if i == 0:
            active = active & (grid.phase == 0)
        before = (n - block - window_size - num_sinks).clamp(0, size)
        held = torch.arange(size, device=device) < before[:, None]  # [B, M]
        joins = torch.arange(block, device=device) + (n - ring)[:, None] >= num_sinks  # [B, C]
        exists = torch.cat([held, joins], dim=1)
        behind = stream[:, :, size + ring + (i - 1) * block : size + ring + i * block]
        new_sums = sums + behind.sum(2)
        places = torch.cat(
            [memory, (size + i * block + torch.arange(block, device=device)).expand(batch, heads, -1)], 2
        )
        # until the memory is full, all that leave the window stay
        mean = (new_sums / n.clamp_min(1)[:, None, None]).unsqueeze(-1)
        likeness = torch.matmul(_gathered(stream, places), mean).squeeze(-1).float()
        order = likeness.masked_fill(~exists[:, None], torch.inf).sort(dim=-1, stable=True).indices
        there = exists[:, None].expand_as(order).gather(2, order)
        keeps, leaves = order[..., :size], order[..., size:]
        keeps = torch.where(there[..., :size], keeps, keeps + size + block).sort(-1).values % (size + block)
        now = active[:, None, None]
        memory = torch.where(now, places.gather(2, keeps), memory)
        sums = torch.where(now, new_sums, sums)
        memories.append(memory)
        lost.append(places.gather(2, leaves))
        lost_exists.append(there[:, 0, size:] & active[:, None])
        filled.append((n - window_size - num_sinks).clamp(0, size))
    return torch.stack(memories, 2), torch.stack(lost, 2), torch.stack(lost_exists, 1), torch.stack(filled, 1), sums


def _pool(grid, state, num_sinks, num_memory_tokens):
    """
    `(keys, values, places of the sinks)`: [old sinks, old memory, stream] of each row, and int `[B, S]` into it.
    """
    first = num_sinks + num_memory_tokens
    pools = (
        torch.cat([old[:, :, :first].to(new.dtype), new], dim=2)
        for old, new in ((state.key, grid.key), (state.value, grid.value))
    )
    slot = torch.arange(num_sinks, device=grid.key.device)
    ring = state.key.shape[2] - first
    new = (first + ring + slot - grid.base[:, None]).clamp(0, first + grid.key.shape[2] - 1)
    sinks = torch.where(slot < (grid.base + grid.phase)[:, None], slot, new)
    return *pools, sinks


def _reach(grid, sinks, memory, filled, first, last, *, window_size, num_sinks, num_memory_tokens, memory_block_size):
    """
    Keys that the blocks from `first` to `last` reach: their places in the pool, int `[B, H_kv, n, S + M + W + C]`, and
    who sees them, bool `[B, n, C, S + M + W + C]` (or `[1, 1, C, …]` where it is the same for all).
    """
    batch, heads = memory.shape[:2]
    block, ring, device = memory_block_size, window_size + memory_block_size, memory.device
    number = last - first
    start = torch.arange(first, last, device=device) * block  # of each block, in the stream: R further on
    offset = torch.arange(ring, device=device) + block
    window = num_sinks + num_memory_tokens + start[:, None] + offset  # [n, R]
    index = torch.cat(
        [
            sinks[:, None, None].expand(-1, heads, number, -1),
            num_sinks + memory[:, :, first:last],
            window.expand(batch, heads, -1, -1),
        ],
        dim=3,
    )
    token = torch.arange(block, device=device)[:, None]
    causal = offset - block - window_size <= token  # [C, R]: within the block
    if grid.known is not None and grid.known[0] + first * block >= window_size + num_sinks + num_memory_tokens:
        visible = F.pad(causal, (num_sinks + num_memory_tokens, 0), value=True)[None, None]
        return index, visible
    position = (grid.base[:, None] + start)[:, :, None, None] + token  # [B, n, C, 1], of the queries
    sees_sinks = torch.arange(num_sinks, device=device) <= position
    sees_memory = torch.arange(num_memory_tokens, device=device) < filled[:, first:last, None, None]
    other = (grid.base[:, None] + start)[:, :, None] - ring + offset  # [B, n, R], positions of the window
    sees_window = causal & (other >= num_sinks)[:, :, None]
    shape = (batch, number, block, -1)
    return index, torch.cat([x.expand(shape) for x in (sees_sinks, sees_memory, sees_window)], dim=3)


def _gathered(x, index):
    """`x[b, h, index[b, h, ...]]`: `[B, H, P, K]` and `[B, H, ...]` -> `[B, H, ..., K]`."""
    flat = index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, index.shape[2:])


def _by_block(query, first, last, block, num_kv_heads):
    """`[B, N C, H, K]` -> `[B, n, H_kv, G C, K]`."""
    query = query[:, first * block : last * block].unflatten(1, (-1, block)).transpose(2, 3)
    return query.unflatten(2, (num_kv_heads, -1)).flatten(3, 4).transpose(1, 2)


def _softmax(query, key, value, visible, scale):
    """`[B, H_kv, n, G C, K]` queries over `[B, H_kv, n, width, K]` keys -> `[B, H, n, C, V]`."""
    batch, heads, number, rows, _ = query.shape
    groups = rows // visible.shape[2]
    # every query sees something: itself, as a sink or in the window
    mask = visible.repeat(1, 1, groups, 1).expand(batch, number, -1, -1).flatten(0, 1)[:, None]
    if visible.shape[:2] == (1, 1):
        mask = mask[:1]
    folded = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B n, H_kv, ...]
    output = F.scaled_dot_product_attention(*folded, attn_mask=mask, scale=scale)
    output = output.view(batch, number, heads, groups, -1, output.shape[-1])
    return output.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def _with_state(query, key, value, visible, scale, linear, states):
    """The same with linear attention over `states` `[B, H_kv, n, F, V + 1]` under one normaliser."""
    batch, heads, number, rows, _ = query.shape
    wide, groups = _wide(query), rows // visible.shape[2]
    hidden = ~visible.repeat(1, 1, groups, 1)[:, None]
    with matmul_mode(query, batch * number * rows):
        scores = torch.matmul(query.to(wide), key.to(wide).transpose(-1, -2)) * scale
        scores = scores.masked_fill(hidden, -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        mixed = torch.matmul(weights, F.pad(value.to(wide), (0, 1), value=1.0))
        by_head = query.unflatten(3, (groups, -1)).transpose(2, 3).flatten(1, 2)  # [B, H, n, C, K]
        features = linear.feature_map_q.features(by_head.flatten(2, 3), *linear.feature_map_q.weights())
        features = features.unflatten(2, (number, -1)).unflatten(1, (heads, groups)).to(wide)
        read = torch.matmul(features.transpose(2, 3).flatten(3, 4), states)  # [B, H_kv, n, G C, V + 1]
    factor = linear.log_weight.to(wide).exp().view(heads, 1, groups, 1, 1)
    mixed, read = (x.unflatten(3, (groups, -1)) for x in (mixed, read))
    mixed = mixed + factor * read
    weight = mixed[..., -1:]
    output = mixed[..., :-1] / weight.masked_fill(weight <= TINY, torch.inf)
    return output.to(query.dtype).transpose(2, 3).flatten(1, 2)


def _states(recurrent, feature_map, key, value, exists, wide):
    """
    Features of lost keys `[B, H_kv, n, C, K]` and their values, summed: states of the blocks, `[B, H_kv, n, F, V + 1]`,
    and after the last.
    """
    features = feature_map.features(key.flatten(2, 3), *feature_map.weights()).unflatten(2, key.shape[2:4])
    features = (features * exists[:, None, :, :, None]).to(wide)
    increments = torch.matmul(features.transpose(-1, -2), F.pad(value.to(wide), (0, 1), value=1.0))
    states = increments.cumsum(2)
    if recurrent is not None:
        states = states + recurrent.unsqueeze(2)
    return states, states[:, :, -1]


def _final_state(
    grid,
    state,
    pool_key,
    pool_value,
    sinks,
    memory,
    key_sum,
    recurrent,
    *,
    window_size,
    num_sinks,
    num_memory_tokens,
    memory_block_size,
):
    heads, ring, first = grid.key.shape[1], window_size + memory_block_size, num_sinks + num_memory_tokens
    slot = torch.arange(ring, device=memory.device)
    latest = grid.total[:, None] - 1
    places = latest - (latest - slot) % ring - grid.base[:, None] + ring + first
    index = torch.cat(
        [
            sinks[:, None].expand(-1, heads, -1),
            num_sinks + memory[:, :, -1],
            places[:, None].expand(-1, heads, -1),
        ],
        dim=2,
    )
    # places that are not filled yet are zeros: sinks, then the memory as of the last block that began
    begun = (latest // memory_block_size * memory_block_size - window_size - num_sinks).clamp(0, num_memory_tokens)
    held = torch.cat(
        [
            torch.arange(num_sinks, device=memory.device) < grid.total[:, None],
            torch.arange(num_memory_tokens, device=memory.device) < begun,
            torch.ones_like(places, dtype=torch.bool),
        ],
        dim=1,
    )[:, None, :, None]
    key, value = (_gathered(x, index) * held for x in (pool_key, pool_value))
    return MemoryState(key, value, key_sum, grid.total, recurrent)
