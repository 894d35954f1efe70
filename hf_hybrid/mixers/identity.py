"""`identity`: no attention at all. The residual stream passes the layer unchanged."""

import dataclasses

from .base import LinearMixer, MixerConfig, register_mixer
from .checks import INITIALIZATIONS


@dataclasses.dataclass(frozen=True)
class IdentityConfig(MixerConfig):
    """No settings."""

    name = "identity"


@register_mixer
class Identity(LinearMixer):
    """
    $o_t = 0$: what is left of the layer is the bias of its output projection, if it has one. Some attention layers of a
    pretrained model do next to nothing ([What Matters in Transformers?](https://huggingface.co/papers/2406.15786)); the
    search finds out which. No parameters, no state.
    """

    config_class = IdentityConfig
    supports_bidirectional = True

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        pass

    def mix(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        return query.new_zeros(*query.shape[:3], self.value_dim), ()
