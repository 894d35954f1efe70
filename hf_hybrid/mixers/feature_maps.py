"""Feature maps φ and their registry. φ turns queries and keys into non-negative features whose products replace exp(q·k)."""

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import HybridConfigError, closest


class FeatureMap(nn.Module, ABC):
    """
    Args:
        num_heads (`int`): Heads the map is applied to, each with parameters of its own.
        head_dim (`int`): Input size `K`.
        feature_dim (`int`): Width of the learned projection; ignored by maps without one.
    """

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int):
        super().__init__()
        self.num_heads, self.head_dim, self.feature_dim = num_heads, head_dim, feature_dim

    def init_weights(self) -> None:
        """Set every parameter to its starting value, in place."""

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, H, K]` -> `[B, T, H, F]`, non-negative."""


_FEATURE_MAPS: dict[str, type[FeatureMap]] = {}


def register_feature_map(name: str):
    """Class decorator: make a feature map available as `name`. A name can be taken once."""

    def register(feature_map_class):
        if name in _FEATURE_MAPS:
            raise HybridConfigError(
                f"register_feature_map: the name {name!r} is taken by {_FEATURE_MAPS[name].__name__}. Choose another name."
            )
        _FEATURE_MAPS[name] = feature_map_class
        return feature_map_class

    return register


def get_feature_map(name: str) -> type[FeatureMap]:
    """The class registered as `name`; [`HybridConfigError`] with the closest names otherwise."""
    if name not in _FEATURE_MAPS:
        raise HybridConfigError(
            f"feature_map must be one of {', '.join(list_feature_maps())}; got {name!r}.{closest(str(name), _FEATURE_MAPS)}"
        )
    return _FEATURE_MAPS[name]


def list_feature_maps() -> list[str]:
    """Names of all registered feature maps, sorted."""
    return sorted(_FEATURE_MAPS)


@register_feature_map("hedgehog")
class HedgehogFeatureMap(FeatureMap):
    r"""
    $\phi(x) = [\mathrm{softmax}(W x), \mathrm{softmax}(-W x)]$ with one learned $W$ `[K, feature_dim]` per head, started as the
    identity. Output size `2 * feature_dim`.

    Reference: [Hedgehog](https://huggingface.co/papers/2402.04347), eq. 6; the softmax form is [LoLCATs](https://huggingface.co/papers/2410.10254)'.
    """

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int):
        super().__init__(num_heads, head_dim, feature_dim)
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, feature_dim))

    def init_weights(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.head_dim, self.feature_dim).expand_as(self.weight))

    def forward(self, x):
        projected = torch.einsum("bthk,hkf->bthf", x, self.weight.to(x.dtype))
        return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)


@register_feature_map("elu")
class EluFeatureMap(FeatureMap):
    r"""$\phi(x) = \mathrm{elu}(x) + 1$, no parameters. Reference: [Transformers are RNNs](https://huggingface.co/papers/2006.16236), eq. 7."""

    def forward(self, x):
        return F.elu(x) + 1.0


@register_feature_map("relu")
class ReluFeatureMap(FeatureMap):
    r"""$\phi(x) = \max(x, 0)$, no parameters. A row of zeros yields a zero output. Reference: [T2R](https://huggingface.co/papers/2103.13076)."""

    def forward(self, x):
        return F.relu(x)
