"""Arguments for one small forward of any model, from the signature of its `forward` and the sizes in its config.

Conventions differ (features before or after time, one modality or two), and nothing in a config says which holds. So
this gives several sets of arguments, the likeliest first; whoever needs one tries them until the model accepts.
"""

import inspect
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .offload import execution_device


# Tokens of a text: more than one sliding or chunked mask block of toy models, cheap for large ones.
LENGTH = 9
# Samples of raw audio, at 16 kHz a quarter of a second: a dozen frames of wav2vec 2.0's feature encoder (stride 320).
SAMPLES = 4000
# Frames of a spectrogram where the config has no length of its own.
FRAMES = 64


def dummy_inputs(model: PreTrainedModel, batch_size: int = 1, length: int = LENGTH) -> Iterator[dict]:
    """
    Sets of keyword arguments for `model`, the likeliest first.

    Args:
        model (`PreTrainedModel`): On any real device; tensors are made there, floating ones in the model's dtype.
        batch_size (`int`, *optional*, defaults to 1): Rows.
        length (`int`, *optional*, defaults to 9): Tokens per row of text.
    """
    builder = _Builder(model, batch_size, length)
    for names in _argument_sets(model):
        yield from builder.build(names)


def _argument_sets(model) -> Iterator[list[str]]:
    """Which arguments to pass, as lists of names without repetition."""
    parameters = inspect.signature(model.forward).parameters
    known = [name for name in parameters if name in _Builder.ARGUMENTS]
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    main = model.main_input_name if isinstance(model.main_input_name, str) else model.main_input_name[0]
    first = [name for name in known if name == main or name in required] or known[:1]
    decoder = [name for name in ("decoder_input_ids",) if name in known]
    text = [name for name in ("input_ids",) if name in known]
    rest = [name for name in _Builder.COMPANIONS if name in known]
    media = [name for name in _Builder.MEDIA if name in known]
    extras = [name for name in ("attention_mask", "bbox") if name in known]
    seen: list[list[str]] = []
    for names in (
        text + decoder,  # text first: a multimodal model reads text alone
        first + decoder,
        *(text + [one] for one in media),
        *([one] + decoder for one in media),
        first + decoder + rest,
        *(text + [one] + decoder + rest for one in media),
        first,
        text + media[:1] + rest + extras,
        known,
    ):
        names = [name for name in known if name in names or name in required]
        if names and names not in seen:
            seen.append(names)
            yield names


def _find(config: PreTrainedConfig, *names: str, default=None):
    """The first of `names` that the config or one of its parts has, a number or a sequence of numbers."""
    parts = [config, *(getattr(config, key, None) for key in type(config).sub_configs)]
    for part in parts:
        for name in names:
            value = getattr(part, name, None) if part is not None else None
            if isinstance(value, (int, tuple, list)) and not isinstance(value, bool) and value:
                return value
    return default


def _pair(value) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


class _Builder:
    """Makes tensors by the name of the argument."""

    MEDIA = ("pixel_values", "pixel_values_videos", "input_features", "input_values", "audio_values")
    # what a model needs beside its main input to know how that is laid out
    COMPANIONS = (
        "grid_thw",
        "merge_sizes",
        "image_grid_thw",
        "spatial_shapes",
        "pixel_attention_mask",
        "pixel_mask",
        "image_sizes",
        "bbox",
    )

    def __init__(self, model, batch_size: int, length: int):
        self.model, self.config = model, model.config
        self.batch, self.length = batch_size, length
        self.device = execution_device(model)
        self.dtype = model.dtype if model.dtype.is_floating_point else torch.float32
        self.generator = torch.Generator().manual_seed(0)

    def build(self, names: list[str]) -> Iterator[dict]:
        """
        Every combination that the conventions of a single argument leave open; the others take their likeliest form.
        """
        forms = {name: self.ARGUMENTS[name](self) for name in names if name in self.ARGUMENTS}
        longest = max((len(form) for form in forms.values()), default=0)
        for index in range(longest):
            yield {name: form[min(index, len(form) - 1)] for name, form in forms.items()}

    def noise(self, *shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator)
        return values.to(device=self.device, dtype=self.dtype)

    def integers(self, *shape: int, high: int) -> torch.Tensor:
        low = min(5, high - 1)  # above the special tokens of most tokenizers
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator).to(self.device)

    def decoder_input_ids(self):
        # of another length than the encoder's: what attends to both is told apart by it
        return [ids[:, : max(self.length - 2, 1)] for ids in self.input_ids()[:1]]

    def input_ids(self):
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        vocabulary = _find(text, "vocab_size") or _find(self.config, "vocab_size", default=100)
        ids = self.integers(self.batch, self.length, high=min(int(_pair(vocabulary)[0]), 1000))
        choices = torch.stack([ids, ids.flip(-1)], dim=1)  # multiple choice
        ended = ids.clone()  # classifiers on encoder-decoders read the last end-of-text token
        ended[:, -1] = _pair(_find(self.config, "eos_token_id", default=1))[0]
        return [ids, choices, ended]

    def attention_mask(self):
        return [torch.ones(self.batch, self.length, dtype=torch.long, device=self.device)]

    def bbox(self):
        return [torch.ones(self.batch, self.length, 4, dtype=torch.long, device=self.device)]

    def image_sizes_in_pixels(self) -> list[tuple[int, int]]:
        size = _find(self.config, "image_size", "img_size", "input_size")
        patch = _pair(_find(self.config, "patch_size", "patch_sizes", default=16))[0]
        guesses = [_pair(size)] if size is not None else []
        return [*guesses, (4 * patch, 4 * patch), (224, 224), (64, 64)]

    def channels(self) -> int:
        return _pair(_find(self.config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3))[0]

    def patch_dim(self) -> int:
        patch = _pair(_find(self.config, "patch_size", default=16))[0]
        return self.channels() * patch**2 * _pair(_find(self.config, "temporal_patch_size", default=1))[0]

    def pixel_values(self):
        images = [self.noise(self.batch, self.channels(), *size) for size in self.image_sizes_in_pixels()]
        frames = _pair(_find(self.config, "num_frames", "frames_per_clip", default=2))[0]
        size = self.image_sizes_in_pixels()[0]
        videos = [self.noise(self.batch, frames, self.channels(), *size)]
        side = self.grid_side()
        patches = [self.noise(self.batch, side * side, self.patch_dim())]  # NaFlex
        flat = [self.noise(self.batch * side * side, self.patch_dim())]  # Qwen-VL
        return [*images[:1], *videos, *patches, *flat, *images[1:]]

    def pixel_values_videos(self):
        frames = _pair(_find(self.config, "num_frames", "frames_per_clip", default=2))[0]
        return [self.noise(self.batch, frames, self.channels(), *self.image_sizes_in_pixels()[0])]

    def grid_side(self) -> int:
        return 2 * _pair(_find(self.config, "spatial_merge_size", default=1))[0]

    def grid_thw(self):
        side = self.grid_side()
        return [torch.tensor([[1, side, side]] * self.batch, device=self.device)]

    def merge_sizes(self):
        return [
            torch.full((self.batch,), _pair(_find(self.config, "spatial_merge_size", default=2))[0], device=self.device)
        ]

    def spatial_shapes(self):
        side = self.grid_side()
        return [torch.tensor([[side, side]] * self.batch, device=self.device)]

    def pixel_attention_mask(self):
        return [torch.ones(self.batch, self.grid_side() ** 2, dtype=torch.long, device=self.device)]

    def pixel_mask(self):
        size = self.image_sizes_in_pixels()[0]
        return [torch.ones(self.batch, *size, dtype=torch.long, device=self.device)]

    def hidden_states(self):
        side = self.grid_side()
        width = _pair(_find(self.config, "hidden_size", "d_model", "embed_dim", default=16))[0]
        return [
            self.noise(self.batch * side * side, self.patch_dim()),
            self.noise(self.batch, self.length, width),
        ]

    def inputs_embeds(self):
        width = _pair(_find(self.config, "hidden_size", "d_model", default=16))[0]
        return [self.noise(self.batch, self.length, width)]

    def features(self) -> int:
        names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size", "input_dim")
        return _pair(_find(self.config, *names, default=80))[0]

    def frames(self) -> int:
        positions = _find(self.config, "max_source_positions")
        fixed = (
            _find(self.config, "max_length") if hasattr(self.config, "time_stride") else None
        )  # spectrogram transformer
        if fixed is not None:
            return int(fixed)
        return 2 * int(positions) if positions is not None and int(positions) <= 4096 else FRAMES

    def input_features(self):
        frames, features = self.frames(), self.features()
        return [
            self.noise(self.batch, features, frames),
            self.noise(self.batch, frames, features),
            self.noise(self.batch, 1, frames, features),
        ]

    def input_values(self):
        frames, features = self.frames(), self.features()
        spectrogram = self.noise(self.batch, frames, features)
        raw = self.noise(self.batch, SAMPLES)
        waves = [spectrogram, raw] if hasattr(self.config, "time_stride") else [raw, spectrogram]
        return [*waves, raw[:, None]]

    def past_values(self):
        context = _pair(_find(self.config, "context_length", default=32))[0]
        channels = _pair(_find(self.config, "num_input_channels", default=1))[0]
        lags = _find(self.config, "lags_sequence", default=[0])
        return [
            self.noise(self.batch, context, channels),
            self.noise(self.batch, context + max(lags)),
        ]

    ARGUMENTS = {
        "input_ids": input_ids,
        "decoder_input_ids": decoder_input_ids,
        "attention_mask": attention_mask,
        "bbox": bbox,
        "pixel_values": pixel_values,
        "pixel_values_videos": pixel_values_videos,
        "grid_thw": grid_thw,
        "image_grid_thw": grid_thw,
        "spatial_shapes": spatial_shapes,
        "pixel_attention_mask": pixel_attention_mask,
        "pixel_mask": pixel_mask,
        "hidden_states": hidden_states,
        "inputs_embeds": inputs_embeds,
        "input_features": input_features,
        "input_values": input_values,
        "audio_values": input_values,
        "past_values": past_values,
        "merge_sizes": merge_sizes,
    }


__all__ = ["dummy_inputs"]
