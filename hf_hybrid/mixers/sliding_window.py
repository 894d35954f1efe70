"""
`sliding_window`: exact softmax over the last tokens and a few sinks. No parameters: the baseline every other mixer must
beat.
"""

import dataclasses

from .base import LinearMixer, MixerConfig, register_mixer
from .checks import INITIALIZATIONS, check_window
from .exact import ExactPart


@dataclasses.dataclass(frozen=True)
class SlidingWindowConfig(MixerConfig):
    """
    Args:
        window_size (`int`, *optional*, defaults to 64): Tokens in the window, the current one included.
        num_sink_tokens (`int`, *optional*, defaults to 4): First tokens of the sequence that stay visible for ever.
        num_memory_tokens (`int` or `tuple[int, ...]`, *optional*, defaults to 0): Tokens that left the window and are
            still attended exactly, by key-value head: those whose keys are least like the others. One number for all
            heads, or one for each of the layer's key-value heads.
        memory_block_size (`int`, *optional*, defaults to 32): Tokens after which the memory chooses again. Beside a
            memory the window holds up to so many more.
    """

    name = "sliding_window"
    window_size: int = 64
    num_sink_tokens: int = 4
    num_memory_tokens: int | tuple[int, ...] = 0
    memory_block_size: int = 32

    def __post_init__(self):
        check_window(self, least=1)


@register_mixer
class SlidingWindow(LinearMixer):
    r"""
    $o_t = \sum_{j} \mathrm{softmax}_j(q_t^\top k_j / \sqrt{K})\, v_j$ with $j$ over the last `window_size` tokens and
    the first `num_sink_tokens`. Keys keep the rotary positions they had in the sequence.

    Reference: [StreamingLLM](https://huggingface.co/papers/2309.17453). Differs from the paper: positions are the
    original ones, not positions within the cache. State: key, value, visible and counts of a [`WindowState`].

    Args:
        window_size (`int`): Tokens in the window, the current one included.
        num_sink_tokens (`int`): Sink tokens.
    """

    config_class = SlidingWindowConfig

    def __init__(self, *, window_size, num_sink_tokens, num_memory_tokens, memory_block_size, **sizes):
        super().__init__(**sizes)
        self.window_size, self.num_sink_tokens = window_size, num_sink_tokens
        self.exact = ExactPart(self, window_size, num_sink_tokens, num_memory_tokens, memory_block_size)

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        pass

    def mix(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        output, final, _ = self.exact(
            query, key, value, valid=valid, state=state or (), inplace_final_state=inplace_final_state
        )
        return output, final
