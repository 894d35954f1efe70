"""Inputs of model types whose arguments cannot be told from signature and config: `INPUTS[model_type](model, batch size, length)`."""

import torch


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ids(*shape: int, high: int = 90) -> torch.Tensor:
    return torch.randint(5, high, shape, generator=torch.Generator().manual_seed(0))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


def grid(batch: int, side: int) -> torch.Tensor:
    return torch.tensor([[1, side, side]] * batch)


def with_placeholders(batch: int, length: int, token: int, count: int) -> torch.Tensor:
    """Text in which `count` tokens stand for a picture."""
    text = ids(batch, length)
    text[:, 1 : 1 + count] = token
    return text


# ---------------------------------------------------------------------------------------- those that take several lines


def blip_2(model, batch, length):
    text = ids(batch, length) if "Retrieval" in type(model).__name__ else with_placeholders(batch, length, 98, 4)
    return {"pixel_values": noise(batch, 3, 32, 32), "input_ids": text, "attention_mask": ones(batch, length)}


def forecast(context, features):
    def inputs(model, batch, length):
        return {
            "past_values": noise(batch, context),
            "past_time_features": noise(batch, context, features),
            "past_observed_mask": torch.ones(batch, context),
            "future_values": noise(batch, 4),
            "future_time_features": noise(batch, 4, features),
        }

    return inputs


def omdet_turbo(model, batch, length):
    return {
        "pixel_values": noise(batch, 3, 64, 64),
        "classes_input_ids": ids(2 * batch, 5),
        "classes_attention_mask": ones(2 * batch, 5),
        "tasks_input_ids": ids(batch, length),
        "tasks_attention_mask": ones(batch, length),
        "classes_structure": torch.full((batch,), 2),
    }


def perceiver(model, batch, length):
    if "MaskedLM" in type(model).__name__:
        return {"inputs": ids(batch, length)}
    return {"inputs": noise(batch, 3, model.config.image_size, model.config.image_size)}


def pi0(model, batch, length):
    images = torch.full((batch, 16), model.config.vlm_config.image_token_id)
    text = torch.cat([images, ids(batch, length)], dim=1)
    return {
        "state": noise(batch, 8),
        "noise": noise(batch, 4, 8),
        "timestep": torch.full((batch,), 0.5),
        "input_ids": text,
        "attention_mask": torch.ones_like(text),
        "pixel_values": noise(batch, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool),
    }


def pix2struct(model, batch, length):
    places = torch.cartesian_prod(torch.arange(1.0, 4), torch.arange(1.0, 4))[None].repeat(batch, 1, 1)
    return {
        "flattened_patches": torch.cat([places, noise(batch, 9, 12)], dim=-1),
        "decoder_input_ids": ids(batch, length),
    }


def decision_transformer(model, batch, length):
    return {
        "states": noise(batch, length, 17),
        "actions": noise(batch, length, 4),
        "rewards": noise(batch, length, 1),
        "returns_to_go": noise(batch, length, 1),
        "timesteps": torch.arange(length).expand(batch, -1),
        "attention_mask": ones(batch, length),
    }


def gemma4_assistant(width):
    def inputs(model, batch, length):
        shared = {kind: (noise(batch, 2, length, 8),) * 2 for kind in ("full_attention", "sliding_attention")}
        return {"inputs_embeds": noise(batch, length, width), "shared_kv_states": shared}

    return inputs


def video_session(session_class, size, objects, **kwargs):
    """A tracking session of two frames, with a point on each object in the first."""
    session = session_class(
        video=noise(2, 3, size, size), video_height=size, video_width=size, dtype=torch.float32, **kwargs
    )
    for number in range(objects):
        point = {
            "point_coords": torch.tensor([[[[4.0 + 8 * number, 6.0]]]]),
            "point_labels": torch.ones(1, 1, 1, dtype=torch.int32),
        }
        session.add_point_inputs(session.obj_id_to_idx(number + 1), 0, point)
        session.obj_with_new_inputs.append(number + 1)
    return session


def second_frame(model, session):
    """The frame on which the memory of the first is attended to."""
    with torch.no_grad():
        model(session, frame_idx=0)
    session.cache.clear_all()
    return {"inference_session": session, "frame_idx": 1}


def edgetam_video(model, batch, length):
    from transformers.models.edgetam_video.modeling_edgetam_video import EdgeTamVideoInferenceSession

    return second_frame(model, video_session(EdgeTamVideoInferenceSession, 64, batch, max_vision_features_cache_size=1))


def sam2_video(model, batch, length):
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    return second_frame(model, video_session(Sam2VideoInferenceSession, 64, batch, max_vision_features_cache_size=1))


def sam3_tracker_video(model, batch, length):
    from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import Sam3TrackerVideoInferenceSession

    return second_frame(
        model, video_session(Sam3TrackerVideoInferenceSession, 32, batch, max_vision_features_cache_size=1)
    )


def sam3_video(model, batch, length):
    from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

    session = video_session(Sam3VideoInferenceSession, 32, 0, max_vision_features_cache_size=1)
    prompt = session.add_prompt("toy")
    session.prompt_input_ids[prompt] = ids(1, length)
    session.prompt_attention_masks[prompt] = ones(1, length)
    return {"inference_session": session, "frame_idx": 0}


# ------------------------------------------------------------------------------------------------------------ the table

# fmt: off
INPUTS = {
    "align": lambda m, b, n: {"input_ids": ids(b, n), "pixel_values": noise(b, 3, 32, 32)},
    "audioflamingo3_encoder": lambda m, b, n: {"input_features": noise(b, 8, 40), "input_features_mask": ones(b, 40)},
    "autoformer": forecast(16, 2),
    "blip-2": blip_2,
    "blip_2_qformer": lambda m, b, n: {"query_embeds": noise(b, n, 32), "encoder_hidden_states": noise(b, 5, 32)},
    "decision_transformer": decision_transformer,
    "dia": lambda m, b, n: {"input_ids": ids(b, n), "decoder_input_ids": ids(b, n - 2, 3)},
    "edgetam_video": edgetam_video,
    "evolla": lambda m, b, n: {
        "input_ids": ids(b, n), "attention_mask": ones(b, n), "protein_input_ids": ids(b, n), "protein_attention_mask": ones(b, n)},
    "fun_asr_nano_encoder": lambda m, b, n: {"input_features": noise(b, n, 56), "input_features_mask": ones(b, n)},
    "gemma3n_audio": lambda m, b, n: {"audio_mel": noise(b, 64, 128), "audio_mel_mask": torch.zeros(b, 64, dtype=torch.bool)},
    "gemma4_audio": lambda m, b, n: {"input_features": noise(b, 64, 8), "attention_mask": torch.ones(b, 64, dtype=torch.bool)},
    "gemma4_unified_assistant": gemma4_assistant(64),
    "gemma4_vision": lambda m, b, n: {
        "pixel_values": noise(b, 16, 192), "pixel_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(b, 16, 2)},
    "granite_speech5_ctc": lambda m, b, n: {"input_features": noise(b, 40, 32)},
    "granite_speech5_encoder": lambda m, b, n: {"input_features": noise(b, 40, 32)},
    "idefics": lambda m, b, n: {"input_ids": ids(b, n), "pixel_values": noise(b, 2, 3, 32, 32), "image_attention_mask": ones(b, n, 2)},
    "informer": forecast(10, 1),
    "inkling2_vision": lambda m, b, n: {"pixel_values": noise(4 * b, 16, 16, 3), "image_grid_thw": grid(b, 2)},
    "instructblip": lambda m, b, n: {
        "input_ids": with_placeholders(b, n, 98, 4), "pixel_values": noise(b, 3, 32, 32), "qformer_input_ids": ids(b, 5)},
    "instructblipvideo": lambda m, b, n: {
        "input_ids": with_placeholders(b, n, 98, 8), "pixel_values": noise(b, 2, 3, 32, 32), "qformer_input_ids": ids(b, 5)},
    "jev": lambda m, b, n: {
        "input_ids": ids(b, n), "marks": torch.tensor([[n]] * b), "num_options": torch.tensor([[3]] * b), "question_type_ids": ones(b, 1)},
    "kimi_k25_vision": lambda m, b, n: {"pixel_values": noise(16 * b, 3, 8, 8), "grid_thw": grid(b, 4)},
    "kosmos-2": lambda m, b, n: {
        "input_ids": ids(b, n), "pixel_values": noise(b, 3, 32, 32), "image_embeds_position_mask": (torch.arange(n) < 4).expand(b, n)},
    "kyutai_speech_to_text": lambda m, b, n: {"input_ids": torch.cat([ids(b, n, 1), ids(b, n, 4, high=16)], dim=-1)},
    "lxmert": lambda m, b, n: {"input_ids": ids(b, n), "visual_feats": noise(b, 4, 16), "visual_pos": noise(b, 4, 4).sigmoid()},
    "mimi_decoder": lambda m, b, n: {"latents": noise(b, 32, 6)},
    "minicpm_ocr_vision": lambda m, b, n: {"pixel_values": noise(1, 3, 8, 8 * 16 * b), "target_sizes": torch.tensor([[4, 4]] * b)},
    "minicpmv4_7_vision": lambda m, b, n: {"pixel_values": noise(1, 3, 8, 8 * 16 * b), "target_sizes": torch.tensor([[4, 4]] * b)},
    "moonshine_streaming": lambda m, b, n: {"input_values": noise(b, 3200), "decoder_input_ids": ids(b, n)},
    "muse_glimmer_assistant": lambda m, b, n: {
        "noise_embeds": noise(b, 4, 32), "context_hidden_states": noise(b, n, 64),
        "attention_mask": {"full_attention": None, "sliding_attention": None}},
    "muse_spark_audio": lambda m, b, n: {"input_values": noise(b, 1920 * 4)},
    "musicgen": lambda m, b, n: {"input_ids": ids(4 * b, n)},
    "musicgen_melody": lambda m, b, n: {"input_ids": ids(4 * b, n)},
    "neucodec": lambda m, b, n: {"input_values": noise(b, 1, 80), "input_features": noise(b, 10, 160)},
    "omdet-turbo": omdet_turbo,
    "oneformer": lambda m, b, n: {"pixel_values": noise(b, 3, 64, 64), "task_inputs": ids(b, 9)},
    "perceiver": perceiver,
    "pi0": pi0,
    "pix2struct": pix2struct,
    "pocket_tts_audio_tokenizer_decoder": lambda m, b, n: {"latents": noise(b, 32, n)},
    "qwen3_asr_encoder": lambda m, b, n: {"input_features": noise(b, 8, 200), "input_features_mask": ones(b, 200)},
    "sam2_video": sam2_video,
    "sam3_tracker_video": sam3_tracker_video,
    "sam3_video": sam3_video,
    "seggpt": lambda m, b, n: {
        "pixel_values": noise(b, 3, 16, 16), "prompt_pixel_values": noise(b, 3, 16, 16), "prompt_masks": noise(b, 3, 16, 16)},
    "speech-encoder-decoder": lambda m, b, n: {"input_values": noise(b, 400), "decoder_input_ids": ids(b, n)},
    "time_series_transformer": forecast(10, 1),
    "timesfm": lambda m, b, n: {
        "past_values": noise(b, 32), "past_values_padding": torch.zeros(b, 32, dtype=torch.long), "freq": torch.zeros(b, 1, dtype=torch.long)},
    "tvp": lambda m, b, n: {"input_ids": ids(1, n), "pixel_values": noise(1, 2, 3, 64, 64), "attention_mask": ones(1, n)},
    "vibevoice_acoustic_tokenizer_decoder": lambda m, b, n: {"hidden_states": noise(b, 32, n)},
    "vibevoice_acoustic_tokenizer_encoder": lambda m, b, n: {"hidden_states": noise(b, 1, 4 * n)},
    "video_llama_3_vision": lambda m, b, n: {
        "pixel_values": noise(b * 16, 192), "grid_thw": grid(b, 4), "merge_sizes": torch.tensor([2] * b)},
    "voxtral_realtime": lambda m, b, n: {"input_ids": ids(b, n), "input_features": noise(b, 8, 8 * n)},
    "xcodec": lambda m, b, n: {"input_values": noise(b, 1, 160)},
    "xcodec2": lambda m, b, n: {"input_values": noise(b, 1, 160), "input_features": noise(b, 40, 160)},
}
# fmt: on
