"""Feature maps φ and their registry. φ turns queries and keys into features whose products replace exp(q·k).

A map is a pure function of its input and its weights, so that the ops can apply it to a chunk of tokens at a time, and
again in the backward pass.
"""

import functools
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import HybridConfigError, closest


class FeatureMap(nn.Module, ABC):
    """
    Args:
        num_heads (`int`): Heads the map is applied to, each with parameters of its own.
        head_dim (`int`): Input size `K`.
        feature_dim (`int`, *optional*): Width of the learned projection; `None` takes
            [`FeatureMap.default_feature_dim`]. Ignored by maps without one.
    """

    # name of the same map in the compiled kernels, if they have it
    compiled: ClassVar[str | None] = None
    # whether there is a learned projection, whose width `feature_dim` sets
    has_projection: ClassVar[bool] = False

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int | None = None):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.feature_dim = feature_dim or self.default_feature_dim(head_dim)

    @staticmethod
    def default_feature_dim(head_dim: int) -> int:
        return head_dim

    @property
    def output_dim(self) -> int:
        """`F`, the number of features of one token and head."""
        return self.head_dim

    def init_weights(self, identity: bool = True) -> None:
        """Set every parameter to its starting value, in place: so that nothing is lost of the input, or at random."""

    def weights(self) -> tuple[torch.Tensor, ...]:
        """What [`FeatureMap.features`] takes beside its input: by default all parameters, in their order."""
        return tuple(weight for weight in self._parameters.values() if weight is not None)

    @abstractmethod
    def features(self, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        """
        `[.., H, T, K]` -> `[.., H, T, F]`. Products of two feature vectors must not be negative. Keeps nothing and
        changes nothing.
        """

    def step_features(self, x: torch.Tensor) -> torch.Tensor:
        """
        [`FeatureMap.features`] of one token, `[B, 1, H, K]` -> `[B, 1, H, F]`: where calls cost more than arithmetic.
        """
        return self.features(x.transpose(1, 2), *self.weights()).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[.., H, T, K]` -> `[.., H, T, F]`."""
        return self.features(x, *self.weights())


_FEATURE_MAPS: dict[str, type[FeatureMap]] = {}


def register_feature_map(name: str):
    """Class decorator: make a feature map available as `name`. A name can be taken once."""

    def register(feature_map_class):
        if name in _FEATURE_MAPS:
            raise HybridConfigError(
                f"register_feature_map: the name {name!r} is taken by {_FEATURE_MAPS[name].__name__}. Choose another "
                "name."
            )
        _FEATURE_MAPS[name] = feature_map_class
        return feature_map_class

    return register


def get_feature_map(name: str) -> type[FeatureMap]:
    """The class registered as `name`; [`HybridConfigError`] with the closest names otherwise."""
    if name not in _FEATURE_MAPS:
        raise HybridConfigError(
            f"feature_map must be one of {', '.join(list_feature_maps())}; got "
            f"{name!r}.{closest(str(name), _FEATURE_MAPS)}"
        )
    return _FEATURE_MAPS[name]


def list_feature_maps() -> list[str]:
    """Names of all registered feature maps, sorted."""
    return sorted(_FEATURE_MAPS)


def _by_head(x):
    """
    `[.., H, T, K]` -> `[H, N, K]`: all rows of a head in one product. Broadcasting would copy the weight once per
    leading index.
    """
    return x.movedim(-3, 0).reshape(x.shape[-3], -1, x.shape[-1])


def _in_place_of(rows, x):
    """`[H, N, F]` -> view `[.., H, T, F]`, rows where those of `x` are."""
    return rows.view(x.shape[-3], *x.shape[:-3], x.shape[-2], -1).movedim(0, -3)


def _two_softmaxes(projected):
    """`[.., F]` -> `[.., 2, F]`: softmax of it and of its negative."""
    both = projected.new_empty(*projected.shape[:-1], 2, projected.shape[-1])
    both[..., 0, :].copy_(projected)
    torch.neg(projected, out=both[..., 1, :])
    return torch.softmax(both, -1, out=both)


class _Hedgehog(torch.autograd.Function):
    """
    $[\\mathrm{softmax}(x W), \\mathrm{softmax}(-x W)]$, `[.., H, T, K]` with `[H, K, F]`, in half the passes over
    memory.
    """

    @staticmethod
    def forward(ctx, x, weight):
        rows = _by_head(x)
        both = _two_softmaxes(_in_place_of(torch.bmm(rows, weight), x))
        ctx.save_for_backward(rows, weight, both)
        return both.flatten(-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, weight, both = ctx.saved_tensors
        grad = torch._softmax_backward_data(grad.reshape(both.shape), both, -1, both.dtype)
        grad_rows = _by_head(grad[..., 0, :] - grad[..., 1, :])
        grad_x = _in_place_of(torch.bmm(grad_rows, weight.mT), grad[..., 0, :]) if ctx.needs_input_grad[0] else None
        return grad_x, (torch.bmm(rows.mT, grad_rows) if ctx.needs_input_grad[1] else None)


@register_feature_map("hedgehog")
class HedgehogFeatureMap(FeatureMap):
    r"""
    $\phi(x) = [\mathrm{softmax}(K^{-1/4} W x), \mathrm{softmax}(-K^{-1/4} W x)]$ with one learned $W$
    `[K, feature_dim]` per head, started as the identity. Output size `2 * feature_dim`. The factor is half of the usual
    $1 / \sqrt K$ on each side.

    Reference: [Hedgehog](https://huggingface.co/papers/2402.04347), eq. 6; the softmax form is
    [LoLCATs](https://huggingface.co/papers/2410.10254)'.
    """

    compiled = "hedgehog"
    has_projection = True

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int | None = None):
        super().__init__(num_heads, head_dim, feature_dim)
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, self.feature_dim))
        self._two_sided: tuple | None = None  # (what it was made of, [H, K, 2 F])

    @property
    def output_dim(self) -> int:
        return 2 * self.feature_dim

    def init_weights(self, identity: bool = True) -> None:
        with torch.no_grad():
            if identity:
                self.weight.copy_(torch.eye(self.head_dim, self.feature_dim).expand_as(self.weight))
            else:
                nn.init.normal_(self.weight, std=self.head_dim**-0.5)

    def features(self, x, weight):
        scaled = weight.to(x.dtype) * self.head_dim**-0.25
        if torch.compiler.is_compiling():
            projected = torch.matmul(x, scaled)
            return torch.stack([projected, -projected], dim=-2).softmax(-1).flatten(-2)
        if torch.is_grad_enabled():
            return _Hedgehog.apply(x, scaled)
        return _two_softmaxes(_in_place_of(torch.bmm(_by_head(x), scaled), x)).flatten(-2)

    def weights(self):
        self._two_sided = None  # every call of more than one token, so every prompt, makes decoding start afresh
        return (self.weight,)

    def step_features(self, x):
        weight = self.weight
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.shape[0] != 1 or weight.is_inference():
            return self.features(x.transpose(1, 2), weight).transpose(1, 2)
        made_of = (weight.data_ptr(), weight._version, x.dtype)
        if self._two_sided is None or self._two_sided[0] != made_of:
            # fp32 or wider: products of one row are no faster in bf16, and what is done with the features is fp32
            scaled = weight.to(torch.promote_types(x.dtype, torch.float32)) * self.head_dim**-0.25
            self._two_sided = (made_of, torch.cat([scaled, -scaled], dim=-1))
        two_sided = self._two_sided[1]
        projected = torch.bmm(x.view(self.num_heads, 1, -1).to(two_sided.dtype), two_sided)  # [H, 1, 2 F]
        return projected.view(self.num_heads, 2, -1).softmax(-1).view(1, 1, self.num_heads, -1)


def _constant(make, *key):
    """A cached constant; under a compiler, which must not see tensors made outside, a new one."""
    return make.__wrapped__(*key) if torch.compiler.is_compiling() else make(*key)


class _Elu(torch.autograd.Function):
    """
    elu(x) + 1. PyTorch's own gradients of `clamp` and `elu` do not vectorise on a CPU; the result itself tells the
    derivative.
    """

    @staticmethod
    def forward(ctx, x):
        result = x.clamp_max(0.0).exp_().add_(x.clamp_min(0.0))
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad):
        (result,) = ctx.saved_tensors
        return grad * result.clamp_max(1.0)


@register_feature_map("elu")
class EluFeatureMap(FeatureMap):
    r"""
    $\phi(x) = \mathrm{elu}(x) + 1$, no parameters. Reference: [Transformers are
    RNNs](https://huggingface.co/papers/2006.16236), eq. 7.
    """

    compiled = "elu"

    def features(self, x):
        if torch.compiler.is_compiling():
            return F.elu(x) + 1.0
        return _Elu.apply(x) if torch.is_grad_enabled() else x.clamp_max(0.0).exp_().add_(x.clamp_min(0.0))

    def step_features(self, x):
        return self.features(x)


@register_feature_map("relu")
class ReluFeatureMap(FeatureMap):
    r"""
    $\phi(x) = \max(x, 0)$, no parameters. A row of zeros yields a zero output. Reference:
    [T2R](https://huggingface.co/papers/2103.13076).
    """

    compiled = "relu"

    def features(self, x):
        return F.relu(x)

    def step_features(self, x):
        return torch.relu(x)


@register_feature_map("softmax")
class SoftmaxFeatureMap(FeatureMap):
    r"""$\phi(x) = \mathrm{softmax}(K^{-1/4} x)$, no parameters. Reference: [Efficient
    Attention](https://huggingface.co/papers/1812.01243), eq. 5, which normalises keys along tokens; here both sides are
    normalised along features, so that the map knows no other token."""

    compiled = "softmax"

    def features(self, x):
        return (x * self.head_dim**-0.25).softmax(-1)


@register_feature_map("dpfp")
class DpfpFeatureMap(FeatureMap):
    r"""
    Deterministic parameter-free projection with $\nu = 1$: $r = [\max(x, 0), \max(-x, 0)]$, $\phi(x)_i = r_i\, r_{i-1}$
    (cyclic). Output size `2 K`. Reference: [Linear Transformers Are Secretly Fast Weight
    Programmers](https://huggingface.co/papers/2102.11174), eq. 37.
    """

    compiled = "dpfp"

    @property
    def output_dim(self) -> int:
        return 2 * self.head_dim

    def features(self, x):
        both = F.relu(torch.cat([x, -x], dim=-1))
        return both * both.roll(1, dims=-1)


@functools.cache
def _pairs(size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    row, column = torch.triu_indices(size, size, device=device)
    factor = torch.where(row == column, 0.5**0.5, 1.0).to(dtype)
    return row, column, factor


@register_feature_map("taylor")
class TaylorFeatureMap(FeatureMap):
    r"""
    $\phi(q)^\top \phi(k) = 1 + s + s^2 / 2$ with $s = (W q)^\top W' k / \sqrt K$: the exponential to second order,
    never below 1/2. One learned $W$ `[K, feature_dim]` per head (16 by default), started with orthonormal columns, the
    identity where the sizes agree. Output size `1 + F + F (F + 1) / 2`. Reference:
    [Based](https://huggingface.co/papers/2402.18668), section 4.1; each pair of coordinates is kept once, where the
    paper keeps it twice.
    """

    compiled = "taylor"
    has_projection = True

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int | None = None):
        super().__init__(num_heads, head_dim, feature_dim)
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, self.feature_dim))

    @staticmethod
    def default_feature_dim(head_dim: int) -> int:
        return min(16, head_dim)

    @property
    def output_dim(self) -> int:
        return 1 + self.feature_dim + self.feature_dim * (self.feature_dim + 1) // 2

    def init_weights(self, identity: bool = True) -> None:
        copies = -(-self.head_dim // self.feature_dim)
        # coordinates k, k + F, k + 2 F .. are averaged
        start = torch.eye(self.feature_dim).repeat(copies, 1)[: self.head_dim]
        with torch.no_grad():
            if identity:
                self.weight.copy_((start / start.norm(dim=0).clamp_min(1.0)).expand_as(self.weight))
            else:
                nn.init.normal_(self.weight, std=self.head_dim**-0.5)

    def features(self, x, weight):
        scaled = weight.to(x.dtype) * self.head_dim**-0.25
        projected = _in_place_of(torch.bmm(_by_head(x), scaled), x)
        row, column, factor = _constant(_pairs, self.feature_dim, x.dtype, x.device)
        squares = projected[..., row] * projected[..., column] * factor
        return torch.cat([torch.ones_like(projected[..., :1]), projected, squares], dim=-1)
