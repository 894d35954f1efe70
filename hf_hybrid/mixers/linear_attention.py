"""`linear_attention`: feature-map linear attention, with an optional exact window and sinks under one shared normaliser."""

import dataclasses

import torch
from torch import nn

from ..ops import linear_attention, sliding_window
from .base import LinearMixer, MixerConfig, check_int, register_mixer
from .feature_maps import get_feature_map
from .window import WindowState, advance_window, empty_window


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(MixerConfig):
    """
    Args:
        feature_map (`str`, *optional*, defaults to `"hedgehog"`): A name of `list_feature_maps()`.
        feature_dim (`int`, *optional*): Width of the feature map's projection; `None` means the head size.
        window_size (`int`, *optional*, defaults to 64): Tokens attended exactly, the current one included; 0 for a purely linear layer.
        num_sink_tokens (`int`, *optional*, defaults to 4): First tokens of the sequence attended exactly for ever; 0 where there is no window.
    """

    name = "linear_attention"
    feature_map: str = "hedgehog"
    feature_dim: int | None = None
    window_size: int = 64
    num_sink_tokens: int = 4

    def __post_init__(self):
        get_feature_map(self.feature_map)
        if self.feature_dim is not None:
            check_int(self.name, "feature_dim", self.feature_dim, 1)
        check_int(self.name, "window_size", self.window_size, 0)
        check_int(self.name, "num_sink_tokens", self.num_sink_tokens, 0)
        if not self.window_size:
            object.__setattr__(self, "num_sink_tokens", 0)


@register_mixer
class LinearAttention(LinearMixer):
    r"""
    $S_t = S_{t-1} + \phi(k_t)\,[v_t, 1]^\top$, $[n_t, d_t] = \phi(q_t)^\top S_t$, $o_t = n_t / d_t$.

    With a window $\mathcal{W}_t$ (last `window_size` tokens and sinks) the state holds only what left the window, and
    $$o_t = \frac{\sum_{j \in \mathcal{W}_t} e^{s_{tj} - m_t} v_j + e^{a}\, \phi(q_t)^\top S_{t-w}^{(v)}}{\sum_{j \in \mathcal{W}_t} e^{s_{tj} - m_t} + e^{a}\, \phi(q_t)^\top S_{t-w}^{(1)}},
    \quad s_{tj} = q_t^\top k_j / \sqrt{K},\; m_t = \max_{j \in \mathcal{W}_t} s_{tj}.$$

    References: [Hedgehog](https://huggingface.co/papers/2402.04347) (feature map), [LoLCATs](https://huggingface.co/papers/2410.10254)
    (shared normaliser, eq. 7). Differs from LoLCATs: the window slides token by token, sinks are kept, and $a$ (one learned
    log-weight per query head) starts at -4, so that the student begins as the training-free window and the state earns its weight.

    State: [`WindowState`] (with a window), then `[B, H_kv, F, V + 1]` fp32.

    Args:
        feature_map (`str`), feature_dim (`int` or `None`), window_size (`int`), num_sink_tokens (`int`): see [`LinearAttentionConfig`].
    """

    config_class = LinearAttentionConfig
    # log-weight of the linear part before training: 1.8 % per unit of feature product. Measured in LOG.md.
    initial_log_weight = -4.0

    def __init__(self, *, feature_map: str, feature_dim: int | None, window_size: int, num_sink_tokens: int, **sizes):
        super().__init__(**sizes)
        self.window_size, self.num_sink_tokens = window_size, num_sink_tokens
        make = get_feature_map(feature_map)
        width = feature_dim or self.head_dim
        self.feature_map_q = make(self.num_heads, self.head_dim, width)
        self.feature_map_k = make(self.num_key_value_heads, self.head_dim, width)
        # a purely linear layer has nothing to weigh against: a parameter it does not use would break DDP
        self.log_weight = nn.Parameter(torch.empty(self.num_heads)) if window_size else None

    def init_weights(self) -> None:
        self.feature_map_q.init_weights()
        self.feature_map_k.init_weights()
        if self.log_weight is not None:
            with torch.no_grad():
                self.log_weight.fill_(self.initial_log_weight)

    def mix(self, query, key, value, hidden_states, *, valid, state):
        # the usual 1 / sqrt(K) on the scores, half on each side
        scale = self.head_dim**-0.25
        feature_query = self.feature_map_q(query * scale)
        if not self.window_size:
            feature_key = self.feature_map_k(key * scale) * valid[..., None, None].to(key.dtype)
            output, recurrent_state = linear_attention(
                feature_query, feature_key, value, initial_state=state[0] if state else None, output_final_state=True
            )
            return output, (recurrent_state,)

        *window_state, recurrent_state = state if state else (None,)
        if window_state:
            window_state = WindowState(*window_state)
        else:
            window_state = empty_window(key, value, self.window_size, self.num_sink_tokens)
        inputs, final_window = advance_window(key, value, valid, window_state)
        numerator, denominator = sliding_window(
            query, **inputs._asdict(), window_size=self.window_size, scale=self.head_dim**-0.5
        )
        # token t - w leaves the window at step t: the linear part is plain linear attention over keys delayed by w
        length = query.shape[1]
        delayed_key, delayed_value = inputs.key[:, :length], inputs.value[:, :length]
        feature_key = self.feature_map_k(delayed_key * scale) * inputs.valid[:, :length, None, None].to(key.dtype)
        linear, recurrent_state = linear_attention(
            feature_query, feature_key, delayed_value,
            initial_state=recurrent_state, output_final_state=True, normalize=False,
        )  # fmt: skip
        linear = linear.to(numerator.dtype) * self.log_weight.to(numerator.dtype).exp()[:, None]
        output = (numerator + linear[..., :-1]) / (denominator + linear[..., -1:]).clamp_min(1e-30)
        return output.to(query.dtype), (*final_window, recurrent_state)
