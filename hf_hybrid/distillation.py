"""Blockwise local distillation inside the model: a container at every attention site holds the frozen teacher and its student.

While training, the model's forward runs the teacher path only; at every site the student sees the teacher's input, detached, and its
output is compared with the teacher's. The sum of these local losses comes *out of the model's forward*, as any loss does: a side
channel, or a backward inside forward, would break DistributedDataParallel. Blocks exchange no gradients.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Collection, Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_labels

from .attention import CACHE_ARGUMENTS, convert_attention_
from .configuration_hybrid import AttentionSite, check_selection
from .custom_masks import tell_of_masks
from .errors import AlreadyHybridError, HybridConfigError, closest
from .losses import normalized_mse
from .mixers import INITIALIZATIONS, MixerConfig, check_initialization, resolve_mixer_config
from .modeling_hybrid import (
    HybridModelMixin,
    become_hybrid_,
    check_convertible,
    describe,
    new_mixer,
    replace_config_,
    warn_of_losses,
)
from .offload import check_not_preloaded
from .probe import probe_attention


PROJECTIONS = ("shared", "low_rank", "full")


class DistillSite(nn.Module):
    """
    Stands where the attention module stood. Attributes the host's code reads from its attention are the teacher's.

    Args:
        teacher (`nn.Module`): The original attention, frozen.
        student (`nn.Module`): The same with a mixer, trainable as `projections` says.
        site (`AttentionSite`): Sizes, for the checkpoint.
        mixer_config (`MixerConfig`): The student's mixer, for the checkpoint.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, site: AttentionSite, mixer_config: MixerConfig):
        super().__init__()
        self.teacher, self.student = teacher, student
        self.site, self.mixer_config = site, mixer_config
        self.swapped = False
        self.was_reached = False  # by any batch of the training so far
        self.record: _LossRecord | None = None  # set by the model for the duration of one training forward

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("teacher"), name)

    def forward(self, *args, **kwargs):
        if self.record is None:
            return (self.student if self.swapped else self.teacher)(*args, **kwargs)
        with torch.no_grad():
            output = self.teacher(*args, **kwargs)
        self.record.add(self, output[0] if isinstance(output, tuple) else output, args, kwargs)
        return output


class _LossRecord:
    """Collects the local losses of one forward, per site: a module that several depths share is called several times."""

    def __init__(self, recompute: bool, window_dropout: float = 0.0):
        self.recompute, self.window_dropout = recompute, window_dropout
        self.learns = (
            torch.is_grad_enabled()
        )  # some hosts run a part of themselves without gradients: its students learn all the same
        self.losses: dict[DistillSite, list[torch.Tensor]] = {}

    def add(self, site: DistillSite, teacher_output, args, kwargs):
        kwargs = {name: _detached(value) for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}
        args = tuple(_detached(value) for value in args)

        mixer = site.student.hybrid
        # decided here, so that the forward and its recomputation agree
        drop = self.window_dropout and mixer.has_window_and_state() and float(torch.rand(())) < self.window_dropout

        def local_loss(*args):
            before, mixer.ablated = mixer.ablated, "window" if drop else mixer.ablated
            try:
                output = site.student(*args, **kwargs)
            finally:
                mixer.ablated = before
            output = output[0] if isinstance(output, tuple) else output
            # padding as the layer itself was told: an encoder's mask is not its decoder's, and pictures have none
            valid = site.student.last_valid
            return normalized_mse(output, teacher_output, valid if _fits(valid, output) else None)

        with torch.set_grad_enabled(self.learns):
            # recomputed in backward by default: half a MiB per layer is kept instead of every chunk's scores
            if self.recompute and self.learns:  # a checkpoint whose backward never comes is never freed
                loss = checkpoint(local_loss, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                loss = local_loss(*args)
        self.losses.setdefault(site, []).append(loss)
        site.was_reached = True

    def block_losses(self, sites: Iterable[DistillSite], device) -> torch.Tensor:
        """`[number of sites]`, in the order of `sites`; 0 where the batch did not reach the site (a text without pictures)."""
        zero = torch.zeros((), device=device)
        losses = [self.losses.get(site) for site in sites]
        return torch.stack([zero if loss is None else torch.stack(loss).mean().to(device) for loss in losses])


def _fits(valid: torch.Tensor | None, output: torch.Tensor) -> bool:
    return valid is not None and valid.shape == output.shape[:-1]


def _detached(value):
    if torch.is_tensor(value):
        return value.detach()
    if isinstance(value, tuple):  # position_embeddings
        return tuple(_detached(part) for part in value)
    return value


class DistillModelMixin:
    """Put in front of a model class while it is distilled. In training, `forward` returns the local losses; in evaluation it is the
    task's own forward, through the students of swapped layers and the teachers of the others."""

    distill_sites: dict[str, DistillSite]
    recompute_students = True
    # share of training forwards, drawn per site, in which a student does without its window, so that its state learns to do without
    window_dropout = 0.0

    def _distill_forward(self, task_forward, *args, **kwargs):
        tell_of_masks(self, args, kwargs, lambda: (site.student for site in self.distill_sites.values()))
        if not self.training:
            return task_forward(*args, **kwargs)
        record = _LossRecord(self.recompute_students, self.window_dropout)
        if not (self.config.is_encoder_decoder and kwargs.get("decoder_input_ids") is None):
            for name in self._label_names:  # of an encoder-decoder, they are what its decoder reads
                kwargs.pop(name, None)
        if "use_cache" in self._forward_parameters:
            kwargs["use_cache"] = False
        if "logits_to_keep" in self._forward_parameters:
            # nobody looks at the logits: spare the largest matrix product of a small model (by index: see tasks.py)
            kwargs["logits_to_keep"] = torch.zeros(1, dtype=torch.long, device=self.device)
        for site in self.distill_sites.values():
            site.record = record
        try:
            task_forward(*args, **kwargs)
        finally:
            for site in self.distill_sites.values():
                site.record = None
        losses = record.block_losses(self.distill_sites.values(), self.device)
        return {"loss": losses.sum(), "block_losses": losses.detach()}

    def train(self, mode: bool = True):
        # everything inside stays in eval mode: dropout in the teacher would be noise in the target
        super().train(False)
        self.training = mode
        return self

    def save_pretrained(self, *args, **kwargs):
        raise AlreadyHybridError(
            f"{type(self).__name__} is in distillation: it holds teachers and students. Save the hybrid with trainer.save_model() or after "
            "trainer.finalize(), the students with save_mixer_bank."
        )

    def gradient_checkpointing_enable(self, *args, **kwargs):
        self.recompute_students = True

    def gradient_checkpointing_disable(self):
        self.recompute_students = False


@functools.cache
def _distill_class(base: type) -> type:
    forward = base.forward

    @functools.wraps(forward)  # keep the signature: the Trainer drops dataset columns by inspecting it
    def distill_forward(self, *args, **kwargs):
        return self._distill_forward(functools.partial(forward, self), *args, **kwargs)

    namespace = {
        "forward": distill_forward,
        "_forward_parameters": frozenset(inspect.signature(forward).parameters),
        "_label_names": tuple(find_labels(base)),
        "config_class": base.config_class,
        "__module__": base.__module__,
    }
    return type("Distill" + base.__name__, (DistillModelMixin, base), namespace)


def prepare_distillation_(
    model: PreTrainedModel,
    mixer: str | dict | MixerConfig = "linear_attention",
    layers=None,
    *,
    projections: str = "shared",
    rank: int = 8,
    initialization: str | Collection[str] = INITIALIZATIONS,
    example_inputs: dict | None = None,
) -> PreTrainedModel:
    """
    Put a [`DistillSite`] at every selected attention site, in place. Everything but the students is frozen.

    Args:
        model (`PreTrainedModel`): The teacher.
        mixer, layers, example_inputs: As in [`convert_to_hybrid`].
        projections (`str`, *optional*, defaults to `"shared"`): What of a student trains beside its mixer. `"shared"`: nothing, it uses
            the teacher's frozen query, key, value and output projections. `"low_rank"`: a low-rank difference to them. `"full"`: copies.
        rank (`int`, *optional*, defaults to 8): Rank of that difference.
        initialization (`str` or `Collection[str]`, *optional*): What fresh mixers take from their place in the pretrained model, all of
            `mixers.INITIALIZATIONS` by default. `half_lives` and `output_scale` are for [`calibrate_mixers`].

    Raises:
        AlreadyHybridError: If the model is hybrid or in distillation already.
        HybridConfigError, NoMatchingAttentionError, UnknownMixerError, UnsupportedModelError: See their messages; nothing was changed.
    """
    config = resolve_mixer_config(mixer)
    check_convertible(model)
    if projections not in PROJECTIONS:
        raise HybridConfigError(
            f"projections must be one of {', '.join(PROJECTIONS)}; got {projections!r}.{closest(str(projections), PROJECTIONS)}"
        )
    if not isinstance(rank, int) or rank < 1:
        raise HybridConfigError(f"rank must be an integer >= 1; got {rank!r}.")
    if isinstance(model, HybridModelMixin):
        raise AlreadyHybridError(
            f"{describe(model)} is converted already. Distillation starts from full attention: call restore_full_attention(model) first."
        )
    initialization = check_initialization(initialization)
    probed = probe_attention(model, example_inputs)
    chosen = check_selection(layers, probed.sites, describe(model))
    check_not_preloaded(model, [site.name for site in chosen])
    modules = dict(model.named_modules())
    built = {}
    for site in chosen:
        teacher = modules[site.name]
        student = _new_student(teacher, projections, rank)
        mixer_module = new_mixer(
            config, site, teacher, initialization
        ).float()  # fp32 master weights: bf16 would swallow small updates
        convert_attention_(student, mixer_module)
        built[site.name] = DistillSite(teacher, student, site, config.fitted(site.causal))
    warn_of_losses({site.name: probed.lost[site.name] for site in chosen})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, site in built.items():
        for parameter_name, parameter in site.student.named_parameters():
            trains = (
                projections == "full" or parameter_name.startswith("hybrid.") or ".parametrizations." in parameter_name
            )
            parameter.requires_grad_(trains and not parameter_name.endswith(".original"))
        model.set_submodule(name, site)
    model.__class__ = _distill_class(type(model))
    model.distill_sites = built
    # FSDP2: each student must be a unit of its own, since no gradient ever reaches the layer around it
    students = {type(site.student).__name__ for site in built.values()}
    model._undistilled_no_split_modules = model._no_split_modules
    model._no_split_modules = sorted(students | set(model._no_split_modules or ()))
    model.distill_projections, model.distill_rank = projections, rank
    return model


class _LowRankDelta(nn.Module):
    """Parametrisation $W + B A$ of a projection's weight, `A` `[rank, in]` random and `B` `[out, rank]` zero, so that it starts at `W`."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) * weight.shape[1] ** -0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight):
        return weight + (self.B @ self.A).to(weight.dtype)


def _new_student(teacher: nn.Module, projections: str, rank: int) -> nn.Module:
    if projections == "full":
        config = getattr(teacher, "config", None)  # shared with the model; some ported families have none
        return copy.deepcopy(teacher, {} if config is None else {id(config): config})
    student = _shallow_clone(teacher)
    if projections == "low_rank":
        for name, linear in _projections(student):
            clone = _shallow_clone(linear)
            parametrize.register_parametrization(clone, "weight", _LowRankDelta(linear.weight, rank))
            student.set_submodule(name, clone)
    return student


def _projections(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, (nn.Linear, Conv1D))]


def _shallow_clone(module: nn.Module) -> nn.Module:
    """Another module over the same parameters and children, to which things can be added without touching the original."""
    clone = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        setattr(clone, registry, dict(getattr(module, registry)))
    return clone


def _exported(site: DistillSite) -> nn.Module:
    """The student as it goes into a checkpoint: projections merged, mixer in the model's dtype."""
    student = _shallow_clone(site.student)
    for name, linear in [(n, m) for n, m in site.student.named_modules() if parametrize.is_parametrized(m)]:
        merged = _shallow_clone(site.teacher.get_submodule(name))
        merged._parameters["weight"] = nn.Parameter(linear.weight.detach().clone())
        student._modules = dict(student._modules)
        student.set_submodule(name, merged)
    dtype = next(site.teacher.parameters()).dtype
    mixer = student.hybrid
    if any(parameter.dtype != dtype for parameter in mixer.parameters()):
        student._modules["hybrid"] = copy.deepcopy(mixer).to(dtype)
    return student


def discard_students_(model) -> None:
    """Undo [`prepare_distillation_`], in place: the model is the teacher again, all of it trainable."""
    for name, site in model.distill_sites.items():
        model.set_submodule(name, site.teacher)
    model.__class__ = type(model).__mro__[2]
    _forget_distillation_(model)


def _forget_distillation_(model):
    model._no_split_modules = model._undistilled_no_split_modules
    for attribute in ("distill_sites", "distill_projections", "distill_rank", "_undistilled_no_split_modules"):
        delattr(model, attribute)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def swap_layers_(model, names) -> None:
    """Make exactly the sites in `names` run through their students."""
    names = set(names)
    unknown = sorted(names - set(model.distill_sites))
    if unknown:
        raise HybridConfigError(f"swap_layers: {unknown[0]!r} has no student; {len(model.distill_sites)} sites have.")
    for name, site in model.distill_sites.items():
        site.swapped = name in names


def swapped_layers(model) -> list[str]:
    return [name for name, site in model.distill_sites.items() if site.swapped]


@contextlib.contextmanager
def as_hybrid(model):
    """
    For the duration of the block, `model` is the hybrid it would be after [`finalize_`]: swapped sites are linear layers, the others the
    untouched teacher, the class a `Hybrid…` one. Nothing is copied but merged projections.
    """
    distill_class, sites, config = type(model), model.distill_sites, model.config
    try:
        _leave_distillation_(model)
        yield model
    finally:
        for name, site in sites.items():
            model.set_submodule(name, site)
        model.__class__ = distill_class
        replace_config_(model, model.config, config)
        model.__dict__.pop("_hybrid_built", None)


def finalize_(model):
    """Drop the inactive branch of every site, in place: swapped layers keep their student, the others their teacher. All trainable."""
    _leave_distillation_(model)
    _forget_distillation_(model)
    return model


def _leave_distillation_(model):
    linear = {}
    for name, site in model.distill_sites.items():
        model.set_submodule(name, _exported(site) if site.swapped else site.teacher)
        if site.swapped:
            linear[name] = (site.site, site.mixer_config.to_dict())
    model.__class__ = type(model).__mro__[2]
    become_hybrid_(model, linear, model.distill_projections)
