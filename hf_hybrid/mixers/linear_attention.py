"""
`linear_attention`: feature-map linear attention, with an optional exact window and sinks under one shared normaliser.
"""

import dataclasses

import torch
from torch import nn

from ..errors import HybridConfigError
from ..ops import LinearPart, bidirectional_linear_attention, linear_attention
from .base import LinearMixer, MixerConfig, register_mixer
from .checks import INITIALIZATIONS, check_int, check_window
from .exact import ExactPart
from .feature_maps import get_feature_map


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(MixerConfig):
    """
    Args:
        feature_map (`str`, *optional*, defaults to `"hedgehog"`): A name of `list_feature_maps()`.
        feature_dim (`int`, *optional*): Width of the feature map's projection; `None` means the map's default.
        window_size (`int`, *optional*, defaults to 64): Tokens attended exactly, the current one included; 0 for a
            purely linear layer. Of causal layers only: a bidirectional layer is always purely linear.
        num_sink_tokens (`int`, *optional*, defaults to 4): First tokens of the sequence attended exactly for ever; 0
            where there is no window.
        num_memory_tokens (`int` or `tuple[int, ...]`, *optional*, defaults to 0): Tokens that left the window and are
            still attended exactly, by key-value head: those whose keys are least like the others. One number for all
            heads, or one for each of the layer's key-value heads.
        memory_block_size (`int`, *optional*, defaults to 32): Tokens after which the memory chooses again. Beside a
            memory the window holds up to so many more.
    """

    name = "linear_attention"
    feature_map: str = "hedgehog"
    feature_dim: int | None = None
    window_size: int = 64
    num_sink_tokens: int = 4
    num_memory_tokens: int | tuple[int, ...] = 0
    memory_block_size: int = 32

    def __post_init__(self):
        feature_map = get_feature_map(self.feature_map)
        if self.feature_dim is not None:
            check_int(self.name, "feature_dim", self.feature_dim, 1)
            if not feature_map.has_projection:
                raise HybridConfigError(
                    f"linear_attention: the feature map {self.feature_map!r} has no projection, so that "
                    f"feature_dim={self.feature_dim} would be ignored. Leave feature_dim out."
                )
        check_window(self)

    def fitted(self, causal: bool) -> "LinearAttentionConfig":
        return self if causal else dataclasses.replace(self, window_size=0, num_memory_tokens=0)


@register_mixer
class LinearAttention(LinearMixer):
    r"""
    $S_t = S_{t-1} + \phi(k_t)\,[v_t, 1]^\top$, $[n_t, d_t] = \phi(q_t)^\top S_t$, $o_t = c\, n_t / d_t$ with one
    learned factor $c$ per query head, started at 1 or by calibration.

    With a window $\mathcal{W}_t$ (last `window_size` tokens and sinks) the state holds only what left the window, and
    $$o_t = \frac{\sum_{j \in \mathcal{W}_t} e^{s_{tj} - m_t} v_j + e^{a}\, \phi(q_t)^\top S_{t-w}^{(v)}}{\sum_{j \in \mathcal{W}_t} e^{s_{tj} - m_t} + e^{a}\, \phi(q_t)^\top S_{t-w}^{(1)}},
    \quad s_{tj} = q_t^\top k_j / \sqrt{K},\; m_t = \max_{j \in \mathcal{W}_t} s_{tj}.$$

    References: [Hedgehog](https://huggingface.co/papers/2402.04347) (feature map),
    [LoLCATs](https://huggingface.co/papers/2410.10254) (shared normaliser, eq. 7). Differs from LoLCATs: the window
    slides token by token, sinks are kept, and $a$ (one learned log-weight per query head) starts at -4, so that the
    student begins as the training-free window and the state earns its weight.

    State: key, value, visible and counts of a [`WindowState`] (with a window), then `[B, H_kv, F, V + 1]` fp32.

    Args:
        feature_map (`str`), feature_dim (`int` or `None`), window_size (`int`), num_sink_tokens (`int`): see
            [`LinearAttentionConfig`].
    """

    config_class = LinearAttentionConfig
    supports_bidirectional = True
    head_layouts = {"log_weight": "H", "output_scale": "H", "feature_map_q.*": "H", "feature_map_k.*": "G"}
    # log-weight of the linear part before training: 1.8 % per unit of feature product. Measured in LOG.md.
    quiet_log_weight = -4.0

    def __init__(
        self,
        *,
        feature_map: str,
        feature_dim: int | None,
        window_size: int,
        num_sink_tokens: int,
        num_memory_tokens,
        memory_block_size: int,
        **sizes,
    ):
        super().__init__(**sizes)
        self.window_size = window_size if self.causal else 0
        self.num_sink_tokens = num_sink_tokens if self.window_size else 0
        self.exact = None
        if self.window_size:
            self.exact = ExactPart(self, window_size, num_sink_tokens, num_memory_tokens, memory_block_size)
        make = get_feature_map(feature_map)
        self.feature_map_q = make(self.num_heads, self.head_dim, feature_dim)
        self.feature_map_k = make(self.num_key_value_heads, self.head_dim, feature_dim)
        # the state is weighed against the window or, without one, brought to the softmax's scale: a parameter that is
        # not used would break DDP
        self.log_weight = nn.Parameter(torch.empty(self.num_heads)) if self.window_size else None
        self.output_scale = None if self.window_size else nn.Parameter(torch.empty(self.num_heads))

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        for feature_map in (self.feature_map_q, self.feature_map_k):
            feature_map.init_weights(identity="identity_maps" in initialization)
        with torch.no_grad():
            if self.log_weight is not None:
                self.log_weight.fill_(self.quiet_log_weight if "quiet_state" in initialization else 0.0)
            if self.output_scale is not None:
                self.output_scale.fill_(1.0)

    @property
    def can_scale_output(self) -> bool:
        return self.output_scale is not None  # beside a window the shared normaliser sees to the scale

    def scale_output(self, factors: torch.Tensor) -> None:
        """Multiply the output of each query head, `[H]`."""
        if self.output_scale is not None:
            with torch.no_grad():
                self.output_scale.mul_(factors.to(self.output_scale))

    def _scaled(self, output):
        return output * self.output_scale.to(output.dtype).unsqueeze(-1)

    def mix(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        maps = {"feature_map_q": self.feature_map_q, "feature_map_k": self.feature_map_k}
        if not self.causal:
            return self._scaled(bidirectional_linear_attention(query, key, value, valid=valid, **maps)), ()
        window_state, recurrent_state = (state[:-1], state[-1]) if state else ((), None)
        parts = self.active_parts()
        if "window" not in parts:
            output, recurrent_state = linear_attention(
                query,
                key,
                value,
                valid=valid,
                initial_state=recurrent_state,
                output_final_state=True,
                inplace_final_state=inplace_final_state,
                **maps,
            )
            if not self.window_size:
                return self._scaled(output), (recurrent_state,)
            window_state = window_state or self.exact.empty_state(key, value)
            return output + 0.0 * self.log_weight.sum().to(output.dtype), (*window_state, recurrent_state)
        output, window_state, final = self.exact(
            query,
            key,
            value,
            linear=LinearPart(**maps, log_weight=self.log_weight) if "state" in parts else None,
            valid=valid,
            state=window_state,
            recurrent=recurrent_state,
            inplace_final_state=inplace_final_state,
        )
        if final is not None:
            recurrent_state = final
        elif recurrent_state is None:  # left out
            shape = (query.shape[0], self.num_key_value_heads, self.feature_map_k.output_dim, self.value_dim + 1)
            recurrent_state = query.new_zeros(shape, dtype=torch.promote_types(query.dtype, torch.float32))
        return output, (*window_state, recurrent_state)
