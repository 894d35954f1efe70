"""Blockwise local distillation inside the model: every mixer imitates the softmax it stands beside, on the softmax's
own queries, keys and values.

While training, the model's forward runs the teacher only (all switches off); in every layer the interception shows the
mixer what the softmax was given, detached, and compares. The sum of these local losses comes *out of the model's
forward*, as any loss does: a side channel, or a backward inside forward, would break DistributedDataParallel. Layers
exchange no gradients.

Where projections train too, or a family computes its softmax inline, there is no one set of queries, keys and values:
the layer runs twice, and the loss is taken on its output.
"""

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import find_labels

from ..conversion.interception import MixerInputs
from ..conversion.layer import CACHE_ARGUMENTS, HybridAttentionMixin, hybrid_layers
from ..errors import HybridConfigError
from ..modeling_hybrid import HybridModelMixin, describe
from .losses import head_errors, normalized_mse, normalized_sum


@dataclasses.dataclass
class LocalLosses:
    """What one forward collects of one layer; a module that several depths share is called several times."""

    layer: list[torch.Tensor] = dataclasses.field(default_factory=list)
    heads: list[torch.Tensor] = dataclasses.field(default_factory=list)


class LocalDistillation:
    """
    The training objective of a model in distillation.

    Args:
        model (`HybridModelMixin`): Of `prepare_distillation_`, or with an adapter.
        recompute (`bool`, *optional*, defaults to `False`): Compute every mixer again in the backward pass instead of
            keeping its intermediate results.
        window_dropout (`float`, *optional*, defaults to 0.0): Share of training forwards, drawn per layer, in which a
            mixer does without its window, so that its state learns to do without.

    Attributes:
        reached (`set[str]`): Layers that any batch of the training reached so far.
        host_units (`set[str]`): Classes that the family wants whole on one device, in `model._no_split_modules` again
            after the distillation.
    """

    def __init__(self, model: HybridModelMixin, recompute: bool = False, window_dropout: float = 0.0):
        self.recompute, self.window_dropout = recompute, window_dropout
        self.names = {layer: name for name, layer in hybrid_layers(model).items()}
        self.reached: set[str] = set()
        self.host_units: set[str] = set()
        self._losses: dict[str, LocalLosses] = {}
        # some hosts run a part of themselves without gradients: its mixers learn all the same
        self._learns = False

    # -- what the model calls

    def run_model(self, model, forward, args: tuple, kwargs: dict) -> dict[str, torch.Tensor]:
        """
        One training forward of the teacher.

        Returns:
            `dict`: `loss`, the sum over layers; `block_losses`, one per layer `[L]`; `head_losses`, one per key-value
            head, all layers' in a row.
        """
        kwargs = self._arguments(model, kwargs)
        self._losses, self._learns = {}, torch.is_grad_enabled()
        layers = list(self.names)
        for layer in layers:
            layer.local_objective = self
        try:
            with torch.no_grad():
                forward(*args, **kwargs)
        finally:
            for layer in layers:
                layer.local_objective = None
        return self._collected(model)

    @staticmethod
    def _arguments(model, kwargs: dict) -> dict:
        parameters = inspect.signature(type(model).forward).parameters
        if not (model.config.is_encoder_decoder and kwargs.get("decoder_input_ids") is None):
            labels = find_labels(model.base_model_class)  # of an encoder-decoder, they are what its decoder reads
            kwargs = {name: value for name, value in kwargs.items() if name not in labels}
        if "use_cache" in parameters:
            kwargs = {**kwargs, "use_cache": False}
        if "logits_to_keep" in parameters:
            # nobody looks at the logits: spare the largest matrix product of a small model (by index: see
            # label_words.py)
            kwargs = {**kwargs, "logits_to_keep": torch.zeros(1, dtype=torch.long, device=model.device)}
        return kwargs

    def _collected(self, model) -> dict[str, torch.Tensor]:
        zero = torch.zeros((), device=model.device)
        blocks, heads = [], []
        for layer, name in self.names.items():
            of_layer = self._losses.get(name)
            if of_layer is None:
                # not reached (a text without pictures): in the graph all the same, or the ranks that were reached would
                # wait for its gradient
                blocks.append(_of_nothing(layer, zero) if self._learns else zero)
                heads.append(zero.expand(layer.hybrid.num_key_value_heads))
            else:
                blocks.append(torch.stack(of_layer.layer).mean().to(model.device))
                heads.append(torch.stack(of_layer.heads).mean(0).to(model.device))
        self._losses = {}
        losses = torch.stack(blocks)
        return {"loss": losses.sum(), "block_losses": losses.detach(), "head_losses": torch.cat(heads).detach()}

    # -- what layers call

    def run_layer(self, layer: HybridAttentionMixin, args: tuple, kwargs: dict) -> Any:
        """The teacher's forward of one layer, and its local loss."""
        if self._shares_projections(layer):
            return layer.observed_forward(self, args, kwargs)
        # the layer's own objective is off while the layer runs by hand
        layer.local_objective = None
        try:
            output = layer.softmax_forward(args, kwargs)
            self._add_at_output(layer, output[0] if isinstance(output, tuple) else output, args, kwargs)
        finally:
            layer.local_objective = self
        return output

    @staticmethod
    def _shares_projections(layer: HybridAttentionMixin) -> bool:
        return layer.hybrid_delta is None and layer._hybrid_port is None

    def observe(self, layer: HybridAttentionMixin, inputs: MixerInputs, target: torch.Tensor) -> None:
        """The local loss of one call of the softmax: `target` is what it gave, `[B, T, H, V]`."""
        mixer = layer.hybrid
        heads = list(mixer.heads)
        if len(heads) < layer.hybrid_site.num_key_value_heads:
            split = layer._split(mixer.heads)
            inputs = dataclasses.replace(
                inputs,
                query=split.linear(inputs.query, axis=2),
                key=split.linear(inputs.key, axis=2),
                value=split.linear(inputs.value, axis=2),
            )
            target = split.linear(target, axis=2)
        # (a layer may be given no hidden states but under a name of its own)
        tensors = [_detached(x) for x in (inputs.query, inputs.key, inputs.value, inputs.hidden_states)]
        target, valid, segments = target.detach(), inputs.valid, inputs.segments

        def losses(*tensors):
            output, _ = mixer(*tensors, valid=valid, segments=segments)
            fits = valid if valid is not None and valid.shape == output.shape[:2] else None
            error, energy = head_errors(output, target, len(heads), fits)
            return normalized_sum(error, energy), (error / energy.clamp_min(1e-12)).mean(0)

        self._add(layer, *self._run(mixer, losses, tensors))

    def _add_at_output(self, layer: HybridAttentionMixin, target, args, kwargs) -> None:
        kwargs = {name: _detached(value) for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}
        args = tuple(_detached(value) for value in args)
        everything = tuple(range(layer.hybrid_site.num_key_value_heads))

        def loss(*args):
            output = layer.linear_forward(everything, args, kwargs)
            output = output[0] if isinstance(output, tuple) else output
            # padding as the layer itself was told: an encoder's mask is not its decoder's, and pictures have none
            valid = layer.last_valid
            fits = valid if valid is not None and valid.shape == output.shape[:-1] else None
            return normalized_mse(output, target, fits)

        value = self._run(layer.hybrid, loss, args)
        self._add(layer, value, value.detach().expand(layer.hybrid.num_key_value_heads))

    def _run(self, mixer, function, tensors):
        # decided here, so that the forward and its recomputation agree
        drop = self.window_dropout and mixer.has_window_and_state() and float(torch.rand(())) < self.window_dropout

        def dropping(*tensors):
            before, mixer.ablated = mixer.ablated, "window" if drop else mixer.ablated
            try:
                return function(*tensors)
            finally:
                mixer.ablated = before

        with torch.set_grad_enabled(self._learns):
            if self.recompute and self._learns:  # a checkpoint whose backward never comes is never freed
                return checkpoint(dropping, *tensors, use_reentrant=False, preserve_rng_state=False)
            return dropping(*tensors)

    def _add(self, layer: HybridAttentionMixin, loss: torch.Tensor, heads: torch.Tensor) -> None:
        name = self.names[layer]
        losses = self._losses.setdefault(name, LocalLosses())
        losses.layer.append(loss)
        losses.heads.append(heads.detach())
        self.reached.add(name)


def _of_nothing(layer: nn.Module, zero: torch.Tensor) -> torch.Tensor:
    """Zero, as a function of all that trains in the layer."""
    trained = [p.to_local() if isinstance(p, DTensor) else p for p in layer.parameters() if p.requires_grad]
    return zero + sum((p.reshape(-1)[:1].sum() * 0.0).to(zero) for p in trained)


def _detached(value):
    if torch.is_tensor(value):
        return value.detach()
    if isinstance(value, tuple):  # position_embeddings
        return tuple(_detached(part) for part in value)
    return value


def start_distillation_(
    model: HybridModelMixin, *, recompute: bool = False, window_dropout: float = 0.0
) -> LocalDistillation:
    """
    From now on `model.train()` makes its forward return local losses; in evaluation it is the task's own forward,
    through the mixture that the switch says.

    Raises:
        HybridConfigError: If the model has no mixers.
    """
    if not isinstance(model, HybridModelMixin) or not hybrid_layers(model):
        raise HybridConfigError(
            f"{describe(model)} has no mixers to distil. Call prepare_distillation_(model, …) first."
        )
    objective, before = LocalDistillation(model, recompute, window_dropout), model.training_objective
    objective.host_units = set(model._no_split_modules or ()) if before is None else before.host_units
    model.__dict__["training_objective"] = objective
    # FSDP2: each mixer must be a unit of its own, since no gradient ever reaches the layer around it. Classes that a
    # family names and this model does not have stop accelerate.
    units = {type(part).__name__ for part in trained_units(hybrid_layers(model).values())}
    units |= objective.host_units & {type(part).__name__ for part in model.modules()}
    model._no_split_modules = units
    return objective


def stop_distillation_(model) -> None:
    """Undo [`start_distillation_`]; does nothing where nothing was started."""
    objective = model.__dict__.pop("training_objective", None)
    if objective is not None:
        model._no_split_modules = objective.host_units


def trained_units(layers: Iterable[HybridAttentionMixin]) -> list[nn.Module]:
    """The modules of a distillation that hold what trains."""
    units: list[nn.Module] = []
    for layer in layers:
        units.append(layer.hybrid)
        units.extend(() if layer.hybrid_delta is None else layer.hybrid_delta.values())
    return units


__all__ = ["LocalDistillation", "start_distillation_", "stop_distillation_", "trained_units"]
