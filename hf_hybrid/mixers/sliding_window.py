"""
`sliding_window`: exact softmax over the last tokens and a few sinks. No parameters: the baseline every other mixer must
beat.
"""

import dataclasses

from ..ops import WindowState, window_attention
from .base import LinearMixer, MixerConfig, register_mixer
from .checks import INITIALIZATIONS, check_window


@dataclasses.dataclass(frozen=True)
class SlidingWindowConfig(MixerConfig):
    """
    Args:
        window_size (`int`, *optional*, defaults to 64): Tokens in the window, the current one included.
        num_sink_tokens (`int`, *optional*, defaults to 4): First tokens of the sequence that stay visible for ever.
    """

    name = "sliding_window"
    window_size: int = 64
    num_sink_tokens: int = 4

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

    def __init__(self, *, window_size: int, num_sink_tokens: int, **sizes):
        super().__init__(**sizes)
        self.window_size, self.num_sink_tokens = window_size, num_sink_tokens

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        pass

    def mix(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        output, final = window_attention(
            query,
            key,
            value,
            window_size=self.window_size,
            num_sinks=self.num_sink_tokens,
            scale=self.head_dim**-0.5,
            valid=valid,
            state=WindowState(*state, None) if state else None,
            inplace_final_state=inplace_final_state,
        )
        return output, tuple(final[:4])
