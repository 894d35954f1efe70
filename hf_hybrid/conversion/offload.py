"""Mixers whose weights lie on disk or in main memory until they are needed (accelerate's hooks)."""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import PrefixedDataset
from torch import nn

from ..errors import UnsupportedModelError
from ..mixers import LinearMixer


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` computes: not where its weights lie, if a hook brings them from elsewhere."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def check_not_preloaded(model: nn.Module, sites: list[str]) -> None:
    """
    Raises:
        UnsupportedModelError: If one hook on a site, or around it, fetches the weights of all parts inside
            (`preload_module_classes`): it would look for those of a mixer, too, where they are not.
    """
    for site in sites:
        pieces = site.split(".")
        for end in range(len(pieces) + 1):
            path = ".".join(pieces[:end])
            hook = getattr(model.get_submodule(path), "_hf_hook", None)
            for one in getattr(hook, "hooks", (hook,)):
                if getattr(one, "offload", False) and getattr(one, "place_submodules", False):
                    raise UnsupportedModelError(
                        f"{path or type(model).__name__} is offloaded as a whole (preload_module_classes). Offload the "
                        "model without that, or convert it before it is offloaded."
                    )


def load_offloaded_mixer_whole(mixer: LinearMixer) -> None:
    """
    Offloaded weights come back when the module that holds them is called. A mixer reads those of its feature maps and
    gates without calling them: its own hook fetches them all. Does nothing where nothing is offloaded, and the second
    time.
    """
    if not any("_hf_hook" in part.__dict__ for part in mixer.modules()):
        return
    hooks = {name: getattr(part, "_hf_hook", None) for name, part in mixer.named_modules()}
    offloaded = {name: hook for name, hook in hooks.items() if getattr(hook, "offload", False)}
    if not offloaded or getattr(hooks[""], "place_submodules", False):
        return
    name, hook = next(iter(offloaded.items()))
    # the weights' names begin with the path of the module that holds them
    prefix = hook.weights_map.prefix.removesuffix(f"{name}." if name else "")
    for part in offloaded:
        remove_hook_from_module(mixer.get_submodule(part))
    whole = AlignDevicesHook(
        execution_device=hook.execution_device,
        offload=True,
        weights_map=PrefixedDataset(hook.weights_map.dataset, prefix),
        offload_buffers=hook.offload_buffers,
        place_submodules=True,
        tied_params_map=hook.tied_params_map,
    )
    add_hook_to_module(mixer, whole)
