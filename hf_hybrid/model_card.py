"""The model card of a hybrid checkpoint: where it comes from, which layers are linear, what the search measured."""

import os
from importlib import resources

import jinja2
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_hybrid import package_version
from .mixers import MixerConfig, build_mixer
from .selection import SwapReport


CARD_FILE = "README.md"
TEMPLATE = "templates/model_card.md"


# In every card this package writes. A card without it is somebody's own and is left alone.
MARKER = "<!-- written by hf_hybrid; remove this line to keep your edits -->"


def is_own_card(path: str) -> bool:
    """Whether the file is a model card that somebody wrote by hand."""
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as file:
        return MARKER not in file.read()


def number_of_layers(config) -> int:
    """Layers of the whole model as its config counts them: of an encoder-decoder both, of a multimodal model all towers; 0 if it does not say."""
    parts = [getattr(config, key, None) for key in type(config).sub_configs]
    towers = [number_of_layers(part) for part in parts if isinstance(part, PreTrainedConfig)]
    if any(towers):
        return sum(towers)
    own = getattr(config, "num_hidden_layers", None) or getattr(config, "encoder_layers", None) or 0
    decoder = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
    return int(own) + (int(decoder or own) if getattr(config, "is_encoder_decoder", False) else 0)


def write_model_card(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    report: SwapReport | None = None,
    repo_id: str | None = None,
    extra: str = "",
) -> str:
    """
    Write `README.md` for a hybrid model.

    Args:
        model (`PreTrainedModel`): The hybrid.
        folder (`str`): Where to.
        report (`SwapReport`, *optional*): Adds the search's table.
        repo_id (`str`, *optional*): Name in the usage example; defaults to the folder's.
        extra (`str`, *optional*): More Markdown, put before the limits.

    Returns:
        `str`: The path of the card.
    """
    config = model.config
    sites = config.hybrid_sites()
    base_model = config.hybrid["base_model"]["name_or_path"]
    if base_model and (os.path.isabs(base_model) or os.path.isdir(base_model)):
        base_model = None  # a local path means nothing to readers
    rows = [
        {
            "name": name,
            "mixer": settings["name"],
            "heads": site.num_heads,
            "bytes": f"{build_mixer(MixerConfig.from_dict(settings), **site.sizes()).state_bytes():,}",
        }
        for name, (site, settings) in sites.items()
    ]
    auto = next((name for name in model.hybrid_auto_map() if name not in ("AutoConfig", "AutoModel")), "AutoModel")
    name = os.path.basename(os.path.abspath(folder))
    source = (resources.files("hf_hybrid") / TEMPLATE).read_text(encoding="utf-8")
    text = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(source).render(
        title=repo_id or name,
        repo_id=repo_id or name,
        base_model=base_model,
        base_model_type=type(config).model_type,
        version=package_version(),
        auto_class=auto,
        linear=len(sites),
        total=max(number_of_layers(config), len(sites)),
        mixers=", ".join(f"`{mixer}`" for mixer in sorted({settings["name"] for _, settings in sites.values()})) or "none",
        rows=rows,
        report=report,
        extra=extra,
        marker=MARKER,
    )  # fmt: skip
    path = os.path.join(folder, CARD_FILE)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)
    return path
