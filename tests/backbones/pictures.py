"""Text with pictures in it, for models that read both: where the placeholders go and how many there are, asked of the model itself."""

import inspect
from collections.abc import Iterator

import torch

from hf_hybrid.conversion.dummy_inputs import _Builder

from .toy_configs import IMAGE_TOKEN
from .toy_inputs import grid, ids, noise


BATCH = 2
# Tokens before and after the placeholders of a picture.
BEFORE, AFTER = 2, 5
MAIN = ("pixel_values", "flattened_patches")


def picture_inputs(model, model_type: str) -> dict | None:
    """
    Rows of text with one picture each that `model` reads and that change its output, or `None`: it reads no pictures beside text, or we cannot make
    them.
    """
    extract = getattr(model, "get_image_features", None) or getattr(model.base_model, "get_image_features", None)
    if model_type not in PICTURES and (extract is None or "input_ids" not in _parameters(model.forward)):
        return None
    for media in _media(model, model_type, extract):
        try:
            with torch.no_grad():
                inputs = media
                if "input_ids" not in media:
                    inputs = _with_text(model, media, _count(extract(**media)) // BATCH)
                mirrored = {name: -value if name in MAIN else value for name, value in inputs.items()}
                one, other = (model(**x) for x in (inputs, mirrored))
        except Exception:  # whatever the family raises for a layout it does not want
            continue
        if "logits" in one and not torch.allclose(one.logits, other.logits, atol=1e-5):
            return inputs
    return None


def _parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def _media(model, model_type: str, extract) -> Iterator[dict]:
    if model_type in PICTURES:
        yield PICTURES[model_type](model)
        return
    wanted = [name for name in _parameters(extract) if name in _parameters(model.forward)]
    builder = _Builder(model, BATCH, 9)
    size = builder.image_sizes_in_pixels()[0]
    several = [noise(BATCH, count, 3, *size) for count in (2, 1, 3)]  # crops, or pictures per row
    beside = {"image_sizes": torch.tensor([size] * BATCH)} if "image_sizes" in wanted else {}
    known = [name for name in wanted if name in builder.ARGUMENTS]
    for names in ([name for name in known if name != "pixel_attention_mask"], known):
        forms = list(builder.build(names))
        for form in (*forms, *({**form, "pixel_values": pixels} for form in forms[:1] for pixels in several)):
            yield {**form, **beside}


def _count(features) -> int:
    """Vectors among what a model makes of pictures."""
    if not isinstance(features, (torch.Tensor, tuple, list)):
        features = features.last_hidden_state if features.pooler_output is None else features.pooler_output
    if isinstance(features, (tuple, list)):
        return sum(x.numel() // x.shape[-1] for x in features)
    return features.numel() // features.shape[-1]


def _with_text(model, media: dict, count: int) -> dict:
    """`count` placeholders per row among text, with what marks them."""
    text = ids(BATCH, BEFORE + count + AFTER)
    text[:, BEFORE : BEFORE + count] = IMAGE_TOKEN
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text), **media}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in _parameters(model.forward):
            inputs[name] = (text == IMAGE_TOKEN).long()
    return inputs


def four_tiles(model):
    """A picture of 64 x 64 pixels per row, as the model cuts it up: itself, made smaller, and its parts."""
    return {"pixel_values": noise(BATCH, 5, 3, 32, 32), "image_sizes": torch.tensor([[64, 64]] * BATCH)}


def places(side: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(BATCH, side * side, 2)


def mllama(model):
    text = ids(BATCH, 9)
    return {
        "input_ids": text,
        "attention_mask": torch.ones_like(text),
        "pixel_values": noise(BATCH, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(BATCH, 9, 1, 4, dtype=torch.long),
    }


# What signature and config do not tell. Where there is no text, it is added.
PICTURES = {
    "gemma4": lambda m: {"pixel_values": noise(BATCH, 16, 192), "image_position_ids": places(4)},
    "granite_docling": lambda m: {
        "pixel_values": noise(BATCH, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
    },
    "llava_next": four_tiles,
    "llava_next_video": four_tiles,
    "llava_onevision": four_tiles,
    "minicpmv4_6": lambda m: {
        "pixel_values": noise(1, 3, 8, 8 * 16 * BATCH),
        "target_sizes": torch.tensor([[4, 4]] * BATCH),
    },
    "mllama": mllama,
    "video_llama_3": lambda m: {
        "pixel_values": noise(BATCH * 16, 192),
        "image_grid_thw": grid(BATCH, 4),
        "image_merge_sizes": torch.tensor([2] * BATCH),
    },
}
