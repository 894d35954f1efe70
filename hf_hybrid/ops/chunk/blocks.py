"""How a sequence is cut: blocks of chunks, and the running state over them."""

import torch


# What a block writes and reads again, in bytes: enough work to drown dispatch, little enough to stay in a core's cache.
BLOCK_BYTES = 1_200_000


def blocks(length: int, chunk_size: int, bytes_per_token: int):
    """`(start, stop, tokens per chunk)` of every block: whole chunks, then what is left as one short chunk."""
    whole = length - length % chunk_size
    step = chunks_per_block(chunk_size, bytes_per_token) * chunk_size
    for start in range(0, whole, step):
        yield start, min(start + step, whole), chunk_size
    if whole < length:
        yield whole, length, length - whole


def chunks_per_block(chunk_size: int, bytes_per_token: int) -> int:
    return max(1, round(BLOCK_BYTES / (chunk_size * bytes_per_token)))


def by_chunk(x, start, stop, size):
    """`[B, T, H, K]` -> view `[B, N, H, C, K]` of the tokens from `start` to `stop`."""
    return x[:, start:stop].view(x.shape[0], -1, size, *x.shape[2:]).transpose(2, 3)


def divide(x, y, to):
    """`to = x / y` in place. A compiled graph takes no strided `out=`."""
    if torch.compiler.is_compiling():
        to.copy_(x / y)
    else:
        torch.div(x, y, out=to)


def running_states(state, increments, dtype):
    """
    States before each chunk, `[B, N, H, F, V]` in `dtype`, and after the last, fp32 or wider. Summed from the front,
    never "total minus own": the difference of two large sums would cost digits. `state` `[B, H, F, V]` or `None`;
    `increments` `[B, N, H, F, V]`.
    """
    states = increments.new_empty(increments.shape, dtype=dtype)
    wide = torch.promote_types(increments.dtype, torch.float32)
    for chunk in range(increments.shape[1]):
        if state is None:
            states[:, chunk] = 0.0
            state = increments[:, chunk].to(wide)
        else:
            states[:, chunk] = state
            state = state + increments[:, chunk]
    return states, state
