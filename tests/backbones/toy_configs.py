"""Toy configs of every model type: transformers' own config classes with small sizes."""

import copy
import dataclasses

from transformers.models.auto.configuration_auto import CONFIG_MAPPING


# The token that stands for a picture, or a part of one. The texts of toy_inputs.py and dummy_inputs.py do not have it.
IMAGE_TOKEN = 98
# Sizes by name of the field, wherever a config class has it.
SIZES = {
    "image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "embedding_size": 32, "emb_dim": 32, "width": 32, "text_embed_dim": 32, "vision_embed_dim": 32,
    "word_embed_proj_dim": 32, "embedding_dim": 32, "out_hidden_size": 32, "projection_dim": 16, "proj_dim": 16, "text_projection_size": 16, "encoder_hidden_size": 32,
    "decoder_hidden_size": 32, "hidden_dim": 64, "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "d_inner": 64, "n_inner": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "feed_forward_size": 64, "dim_feedforward": 64, "mlp_dim": 64, "ffn_hidden_size": 64, "inner_dim": 64, "mlp_ratio": 2, "encoder_intermediate_size": 64,
    "decoder_intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32, "dense_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2,
    "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "encoder_num_layers": 2, "decoder_num_layers": 2, "depth": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4, "encoder_num_heads": 4, "decoder_num_heads": 4,
    "num_key_value_heads": 2, "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4, "multi_query_group_num": 2,
    "head_dim": 8, "d_kv": 8, "key_value_proj_dim": 8, "kv_channels": 8, "attention_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "query_pre_attn_scalar": 8, "rotary_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2,
    "vocab_size": 99, "type_vocab_size": 2, "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8, "codebook_size": 16,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_source_positions": 20, "max_target_positions": 40, "max_seq_len": 64, "max_sequence_length": 64,
    "image_size": 32, "patch_size": 8, "num_channels": 3, "num_mel_bins": 8, "temporal_patch_size": 1, "num_frames": 2, "tubelet_size": 1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "num_shared_experts": 1, "sliding_window": 4, "attention_chunk_size": 8, "local_attention": 4,
    "global_attn_every_n_layers": 2, "laurel_rank": 4, "num_nextn_predict_layers": 0, "num_memory_tokens": 0, "pooling_layers": 1,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8,
    "layers": 2, "attention_heads": 4, "num_queries": 6, "projector_hidden_size": 32, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "sep_token_id": 2, "cls_token_id": 1, "mask_token_id": 3,
}  # fmt: skip
TUPLES = {
    "conv_dim": (32, 32), "conv_stride": (2, 2), "conv_kernel": (3, 3), "tdnn_dim": (32, 32), "tdnn_kernel": (1, 1), "tdnn_dilation": (1, 1)
}  # fmt: skip
# What a model type needs beside or against the sizes above; `None` leaves the class's own default.
# fmt: off
OVERRIDES: dict[str, dict] = {
    "align": {"projection_dim": 80},
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "image_size": 32},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "autoformer": {"prediction_length": 4, "context_length": 14, "label_length": 4, "lags_sequence": [1, 2], "moving_average": 3, "num_time_features":
        2},
    "axk2": {"num_key_value_heads": 4, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 8},
    "bit": {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "embedding_size": 32, "num_groups": 4},
    "blip-2": {"num_query_tokens": 4, "image_text_hidden_size": 16, "image_token_index": 98, "qformer_config.use_qformer_text_input": True},
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4]},
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "bridgetower_vision_model": {"hidden_size": 128},
    "bros": {"hidden_size": 64},
    "chameleon": {"vocabulary_map": {"<image>": 98}},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "resolution": 16, "num_res_blocks": 1},
    "chmv2": {"backbone_config": {"model_type": "dinov3_vit", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 64, "image_size": 32, "patch_size": 8, "num_register_tokens": 2, "out_indices": [1, 2, 3, 4], "reshape_hidden_states":
        True, "apply_layernorm": True, "return_class_token": True}, "fusion_hidden_size": 16, "head_hidden_size": 16, "number_output_channels": 16,
        "post_process_channels": [8, 8, 16, 16]},
    "clap_audio_model": {"patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2], "spec_size": 32, "window_size": 4,
        "patch_size": 4, "patch_stride": [4, 4], "num_hidden_layers": 2},
    "clvp_encoder": {"hidden_size": 64, "num_attention_heads": 2},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {"sliding_attention": {"rope_type": "default",
        "rope_theta": 10000.0}, "full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "conditional_detr": {"num_queries": 10},
    "convnext": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "patch_size": 4},
    "convnextv2": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "patch_size": 4},
    "csm": {"codec_config.upsample_groups": 16, "codec_config.num_quantizers": 4, "codec_config.num_filters": 4, "num_codebooks": 4,
        "text_vocab_size": 99},
    "csm_depth_decoder_model": {"num_codebooks": 4, "backbone_hidden_size": 32},
    "cvt": {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "mlp_ratio": [2.0, 2.0, 2.0]},
    "d_fine": {"backbone_config": {"model_type": "hgnet_v2", "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 32], "stage_mid_channels":
        [8, 8, 8, 8], "stage_out_channels": [16, 16, 32, 32], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1],
        "embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "out_indices": [2, 3, 4]}, "encoder_in_channels": [16, 32, 32],
        "decoder_in_channels": [32, 32, 32], "encoder_hidden_dim": 32, "encoder_layers": 1, "num_queries": 10, "lqe_hidden_dim": 16, "num_denoising":
        0},
    "dab-detr": {"num_queries": 10},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4,
        "moe_top_k": 2}},
    "decision_transformer": {"max_ep_len": 64},
    "deepseek_ocr2_sam_vision_model": {"output_channels": 16, "downsample_channels": [32, 32], "window_size": 2, "global_attn_indexes": [1]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v32": {"num_key_value_heads": 4, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    "deformable_detr": {"num_queries": 10, "two_stage_num_proposals": 10},
    "deimv2": {"backbone_config": {"model_type": "hgnet_v2", "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 32], "stage_mid_channels":
        [8, 8, 8, 8], "stage_out_channels": [16, 16, 32, 32], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1],
        "embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "out_indices": [2, 3, 4]}, "encoder_in_channels": [16, 32, 32],
        "decoder_in_channels": [32, 32, 32], "encoder_hidden_dim": 32, "encoder_layers": 1, "num_queries": 10, "lqe_hidden_dim": 16, "num_denoising":
        0},
    "depth_anything": {"backbone_config": {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio":
        2, "image_size": 32, "patch_size": 8, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}, "reassemble_hidden_size": 32,
        "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16, "head_hidden_size": 16},
    "depth_pro": {"patch_size": 32, "image_model_config": {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads":
        4, "mlp_ratio": 2, "image_size": 32, "patch_size": 8}, "patch_model_config": {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers":
        2, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 32, "patch_size": 8}, "fov_model_config": {"model_type": "dinov2", "hidden_size":
        32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 32, "patch_size": 8}, "fusion_hidden_size": 16,
        "intermediate_hook_ids": [1, 0], "intermediate_feature_dims": [16, 16], "scaled_images_feature_dims": [16, 16, 16]},
    "detr": {"num_queries": 10},
    "dia": {"delay_pattern": [0, 1, 2]},
    "dia_decoder": {"cross_num_attention_heads": 4, "cross_head_dim": 8, "cross_num_key_value_heads": 2, "cross_hidden_size": 32},
    "diffusion_gemma": {"canvas_length": 9},
    "diffusion_gemma_text": {"top_k_experts": 2, "global_head_dim": 16},
    "dinov3_convnext": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "donut-swin": {"num_heads": [2, 2], "depths": [1, 2], "window_size": 4, "patch_size": 4},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 16, "feature_size": 8},
    "dots3_note_text": {"num_key_value_heads": 4, "num_hidden_layers": 3, "layer_types": ["full_attention", "indexed_attention", "sliding_attention"],
        "per_layer_config": {2: {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 12,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}}, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2,
        "shared_experts_intermediate_size": 32},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"], "adapter_in_dim": 32, "adapter_out_dim": 32},
    "edgetam_video": {"vision_config": {"model_type": "sam2_vision_model", "fpn_hidden_size": 128, "backbone_channel_list": [32, 24, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "backbone_config": {"model_type": "sam2_hiera_det_model", "hidden_size": 8,
        "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 24, 32], "num_attention_heads_per_stage": [1, 2, 2,
        4], "window_size_per_stage": [4, 4, 2, 2], "global_attention_blocks": [3]}}, "prompt_encoder_config.hidden_size": 128,
        "mask_decoder_config.hidden_size": 128, "prompt_encoder_config.image_size": 64, "prompt_encoder_config.patch_size": 16,
        "mask_decoder_config.iou_head_hidden_dim": 32, "image_size": 64, "memory_attention_hidden_size": 128, "memory_attention_mlp_hidden_size": 64,
        "memory_attention_rope_feat_sizes": [4, 4], "memory_attention_rope_k_sizes": [2, 2], "perceiver_resampler_num_latents": 4,
        "perceiver_resampler_num_latents_2d": 4, "perceiver_resampler_hidden_size": 64, "perceiver_resampler_mlp_intermediate_size": 64,
        "perceiver_resampler_attention_head_dim": 64, "memory_encoder_hidden_size": 128, "memory_encoder_output_channels": 64,
        "mask_downsampler_embed_dim": 128, "memory_fuser_intermediate_dim": 64, "memory_fuser_embed_dim": 128},
    "efficientloftr": {"out_features": [8, 8, 16, 32], "stage_num_blocks": [1, 1, 1, 1], "num_attention_layers": 2, "num_attention_heads": 8},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "image_size": 32},
    "emu3": {"vocabulary_map": {"<image>": 98}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    "encodec": {"num_filters": 4},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section":
        [1, 1, 2]}},
    "esm": {"esmfold_config": None, "position_embedding_type": "rotary"},
    "evolla": {"protein_encoder_config": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size":
        64, "max_position_embeddings": 64, "pad_token_id": 0, "mask_token_id": 3}, "aligner_num_add_layers": 1, "resampler_depth": 1,
        "resampler_dim_head": 8, "resampler_heads": 4, "resampler_num_latents": 4, "aligner_ffn_mult": 2, "resampler_ff_mult": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_chunk_size": 8},
    "falcon_mamba": {"conv_kernel": 4},
    "fast_vlm": {"vision_config": {"model_type": "resnet", "hidden_size": 32, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1],
        "embedding_size": 16}, "image_token_index": 98},
    "fastspeech2_conformer": {"encoder_linear_units": 64, "decoder_linear_units": 64, "speech_decoder_postnet_layers": 2,
        "speech_decoder_postnet_units": 16, "decoder_kernel_size": 7, "duration_predictor_channels": 16, "energy_predictor_channels": 16,
        "pitch_predictor_channels": 16, "pitch_predictor_layers": 2, "speaking_speed": 1e-06},
    "fastspeech2_conformer_hifigan": {"model_in_dim": 8, "upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]},
    "florence_vision": {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True],
        "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4], "window_size": 4, "projection_dim": 32},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 8, "projector_hidden_size": 32}},
    "fun_asr_nano_encoder": {"num_timestamp_prediction_layers": 1},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_audio": {"conf_num_attention_heads": 4, "conf_num_hidden_layers": 2, "sscp_conv_channel_size": [8, 8]},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention", "sliding_attention",
        "full_attention"]},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0, "backbone_hidden_size": 32},
    "gemma4_audio": {"subsampling_conv_channels": [8, 8], "output_proj_dims": 32},
    "gemma4_unified_assistant": {"backbone_hidden_size": 32, "text_config.num_hidden_layers": 4, "text_config.num_kv_shared_layers": 2,
        "text_config.layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "gemma4_unified_text": {"global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_unified_vision": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32, "patch_size": 4},
    "gemma4_vision": {"pooling_kernel_size": 2, "position_embedding_size": 16, "num_key_value_heads": 4},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}},
    "glm4v_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}},
    "glm5_next_text": {"num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
        "linear_head_dim": 8, "linear_num_heads": 4, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2, "index_kpool": 2, "qk_rope_head_dim":
        0},
    "glm5_next_vision": {"projection_intermediate_size": 32},
    "glm_image_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}},
    "glm_image_vqmodel": {"num_embeddings": 16, "latent_channels": 16},
    "glm_moe_dsa": {"num_key_value_heads": 4, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    "glm_ocr_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gradium_phonon_tts": {"flow_head_config": {"hidden_size": 32, "num_hidden_layers": 2, "condition_dim": 32, "frequency_embedding_size": 16}},
    "granite4_vision": {"vision_config.hidden_size": 64, "qformer_config.cross_attention_frequency": 1, "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "image_token_index": 98},
    "granite_speech5_encoder": {"context_size": 8, "num_key_value_heads": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "grounding-dino": {"num_queries": 10},
    "hgnet_v2": {"embedding_size": 8, "depths": [1, 1], "hidden_sizes": [16, 32], "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16],
        "stage_mid_channels": [8, 8], "stage_out_channels": [16, 32], "stage_num_blocks": [1, 1], "stage_downsample": [False, True],
        "stage_downsample_strides": [2, 2], "stage_light_block": [False, True], "stage_kernel_size": [3, 3], "stage_numb_of_layers": [2, 2]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
        "mrope_section": [2, 1, 1]}},
    "idefics": {"alpha_initializer": "ones"},
    "idefics_vision": {"embed_dim": 32},
    "informer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16,
        "sliding_window_size": 4, "layer_types": ["hybrid_sliding", "hybrid"], "n_layers_per_attn_res_block": 1},
    "inkling2_vision": {"text_hidden_size": 32, "projection_hidden_dim": 32},
    "instructblip": {"num_query_tokens": 4, "image_token_index": 98},
    "instructblipvideo": {"num_query_tokens": 4, "video_token_index": 98},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus_vision_model": {"projection_dim": 32},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32, "num_embeddings": 16,
        "projection_dim": 32, "image_token_embed_dim": 32, "embed_dim": 8},
    "kimi_k25_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "linear_num_heads": 4},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos_2_text_model": {"layers": 2, "attention_heads": 4},
    "kyutai_speech_to_text": {"codebook_vocab_size": 17, "num_codebooks": 4, "audio_pad_token_id": 167, "audio_bos_token_id": 16},
    "layoutlmv3": {"input_size": 32, "coordinate_size": 6, "shape_size": 4},
    "levit": {"image_size": 64, "patch_size": 16, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8,
        8, 8]},
    "lfm2_moe": {"num_hidden_layers": 2, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    "lfm3_vl": {"projector_hidden_size": 32},
    "lfm3_vl_vision": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 36, "channel_shrink_ratio": 1},
    "llama4_text": {"intermediate_size_mlp": 64, "num_experts_per_tok": 1, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers":
        [1, 0]},
    "llama4_vision_model": {"intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    "llava_next": {"image_grid_pinpoints": [[64, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[64, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[64, 64]]},
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 8},
    "lw_detr": {"backbone_config": {"model_type": "lw_detr_vit", "image_size": 64, "patch_size": 8, "num_windows": 4, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "window_block_indices": [0], "out_indices": [1, 2]},
        "projector_scale_factors": [1.0], "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4, "num_queries": 10, "group_detr": 1,
        "decoder_n_points": 2, "hidden_expansion": 1.0},
    "lw_detr_vit": {"image_size": 32, "num_windows": 4, "window_block_indices": [0]},
    "lxmert": {"l_layers": 2, "x_layers": 2, "r_layers": 2, "visual_feat_dim": 16},
    "mamba": {"conv_kernel": 4, "state_size": 8},
    "mamba2": {"conv_kernel": 4, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    "mask2former": {"mask_feature_size": 32, "feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "num_queries": 10, "encoder_layers":
        2, "decoder_layers": 3, "backbone_config": {"model_type": "swin", "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [2, 1, 1, 1],
        "num_heads": [2, 2, 2, 2], "window_size": 4, "mlp_ratio": 2.0, "out_features": ["stage1", "stage2", "stage3", "stage4"]}},
    "maskformer": {"mask_feature_size": 32, "fpn_feature_size": 32, "backbone_config": {"model_type": "swin", "image_size": 64, "patch_size": 4,
        "embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 4, "mlp_ratio": 2.0, "out_features": ["stage1", "stage2",
        "stage3", "stage4"]}},
    "maskformer-swin": {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "mlp_ratio":
        2.0},
    "mimi": {"num_filters": 4, "codebook_dim": 16, "vector_quantization_hidden_dimension": 16, "upsample_groups": 32, "num_quantizers": 8,
        "upsampling_ratios": [8, 4, 2]},
    "mimi_decoder": {"num_filters": 4, "codebook_dim": 16, "vector_quantization_hidden_dimension": 16, "upsample_groups": 32, "num_quantizers": 8,
        "upsampling_ratios": [8, 4, 2]},
    "mimi_encoder": {"num_filters": 4, "codebook_dim": 16, "vector_quantization_hidden_dimension": 16, "upsample_groups": 32, "num_quantizers": 8,
        "upsampling_ratios": [8, 4, 2]},
    "minicpm_ocr": {"insert_layer_id": 0},
    "minicpm_ocr_vision": {"insert_layer_id": 0},
    "minicpmv4_6": {"insert_layer_id": 0},
    "minicpmv4_7": {"insert_layer_id": 0},
    "minicpmv4_7_vision": {"insert_layer_id": 0},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
    "mistral_large4_text": {"num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96, "num_global_layers": 2},
    "mm-grounding-dino": {"backbone_config": {"model_type": "swin", "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "embed_dim": 8, "image_size":
        64, "patch_size": 4, "window_size": 2, "mlp_ratio": 2.0, "out_indices": [2, 3, 4]}, "num_queries": 6, "encoder_n_points": 2,
        "decoder_n_points": 2, "max_text_len": 16},
    "mobilevitv2": {"image_size": 128, "patch_size": None, "n_attn_blocks": (1, 1, 1), "base_attn_unit_dims": (16, 24, 32), "width_multiplier": 0.5},
    "molmo2_adapter": {"vision_feature_layer": [0, 1], "text_hidden_size": 32},
    "molmo2_vision": {"image_size": [32, 32]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moonshine_streaming_encoder": {"sliding_windows": ((4, 1), (4, 0))},
    "mpt": {"attn_config": None},
    "muse_glimmer": {"projector_hidden_size": 32, "out_hidden_size": 128},
    "muse_glimmer_assistant": {"block_size": 4, "target_layer_ids": [0, 1], "layer_types": ["sliding_attention", "full_attention"]},
    "muse_glimmer_vision": {"patch_temporal": 1, "pos_emb_height": 4, "pos_emb_width": 4},
    "muse_spark": {"projector_hidden_size": 32, "out_hidden_size": 128},
    "muse_spark_audio": {"hidden_sizes": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_hidden_layers": 4},
    "muse_spark_text": {"moe_hidden_size": 32},
    "muse_spark_vision": {"patch_temporal": 1, "pos_emb_height": 4, "pos_emb_width": 4},
    "musicgen_decoder": {"vocab_size": 99, "pad_token_id": 98, "bos_token_id": 98},
    "musicgen_melody_decoder": {"vocab_size": 99, "pad_token_id": 98, "bos_token_id": 98},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 98, "num_key_value_heads": 4},
    "nemotron3_diarization": {"head_config": {"hidden_size": 16, "audio_hidden_size": 32, "num_speakers": 2}, "streaming_config": {"num_speakers":
        2}},
    "nemotron3_diarization_audio": {"num_key_value_heads": 4},
    "nemotron_h": {"conv_kernel": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 32},
    "nemotron_h_omni": {"audio_config.projection_hidden_size": 32, "audio_config.projection_bias": False, "vision_config.max_img_size": 64,
        "vision_config.video_temporal_patch_size": 2, "projector_hidden_size": 32, "vision_hidden_size": 32},
    "neucodec": {"num_key_value_heads": 4, "downsampling_ratios": (2, 2, 2), "quantization_dim": 64, "quantization_levels": (4, 4, 4),
        "encoder_hidden_size": 8},
    "omdet-turbo": {"backbone_config": {"model_type": "swin", "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "embed_dim": 8, "image_size": 64,
        "patch_size": 4, "window_size": 2, "mlp_ratio": 2.0, "out_indices": [2, 3, 4]}, "apply_layernorm_after_vision_backbone": False, "image_size":
        64, "text_projection_in_dim": 32, "text_projection_out_dim": 32, "task_encoder_hidden_dim": 32, "class_embed_dim": 32, "num_queries": 6,
        "encoder_hidden_dim": 16, "vision_features_channels": (16, 16, 16), "encoder_in_channels": (16, 32, 64), "encoder_dim_feedforward": 64,
        "decoder_hidden_dim": 16, "decoder_dim_feedforward": 64, "decoder_num_points": 2},
    "oneformer": {"backbone_config": {"model_type": "swin", "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "embed_dim": 8, "image_size": 64,
        "patch_size": 4, "window_size": 2, "mlp_ratio": 2.0, "out_indices": [1, 2, 3, 4]}, "conv_dim": 32, "mask_dim": 32, "hidden_dim": 32,
        "num_queries": 6, "task_seq_len": 9, "text_encoder_width": 32, "text_encoder_context_length": 9, "text_encoder_num_layers": 2,
        "text_encoder_vocab_size": 99, "text_encoder_n_ctx": 2, "encoder_feedforward_dim": 64},
    "paddleocr_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "paligemma": {"projection_dim": 32},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2, "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
        "image_size": 16, "train_size": (16, 16)},
    "perception_lm": {"vision_config": {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2,
        "image_size": 32, "patch_size": 8, "model_args": {"embed_dim": 32}}},
    "pi0": {"vlm_config.projection_dim": 32, "chunk_size": 4, "max_state_dim": 8, "max_action_dim": 8},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 12, "seq_len": 16},
    "pocket_tts": {"flow_head_config": {"hidden_size": 16, "num_hidden_layers": 2, "condition_dim": 32, "frequency_embedding_size": 8},
        "audio_prompt_token_id": 95, "audio_latent_token_id": 96, "audio_prompt_bos_token_id": 97, "audio_bos_token_id": 98},
    "pocket_tts_audio_tokenizer": {"upsample_groups": 32, "num_filters": 4, "latent_stride": 2, "latent_dim": 8},
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": 32, "num_filters": 4, "latent_stride": 2, "latent_dim": 8},
    "poolformer": {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 8, 16, 16)},
    "pp_doclayout_v2": {"backbone_config": {"model_type": "hgnet_v2", "depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 16, 16), "embedding_size": 8,
        "stem_channels": (3, 8, 8), "stage_in_channels": (8, 8, 16, 16), "stage_mid_channels": (8, 8, 8, 8), "stage_out_channels": (8, 16, 16, 16),
        "stage_num_blocks": (1, 1, 1, 1), "stage_numb_of_layers": (1, 1, 1, 1), "out_features": ["stage2", "stage3", "stage4"]}, "encoder_hidden_dim":
        32, "encoder_in_channels": (16, 16, 16), "decoder_in_channels": (32, 32, 32), "num_queries": 6, "decoder_n_points": 2, "num_denoising": 0,
        "class_thresholds": [0.0, 0.0], "class_order": [0, 1], "reading_order_config": {"hidden_size": 32, "num_attention_heads": 4,
        "intermediate_size": 64, "num_hidden_layers": 2, "coordinate_size": 6, "shape_size": 4, "global_pointer_head_size": 8,
        "max_position_embeddings": 64}},
    "pp_doclayout_v3": {"backbone_config": {"model_type": "hgnet_v2", "depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 16, 16), "embedding_size": 8,
        "stem_channels": (3, 8, 8), "stage_in_channels": (8, 8, 16, 16), "stage_mid_channels": (8, 8, 8, 8), "stage_out_channels": (8, 16, 16, 16),
        "stage_num_blocks": (1, 1, 1, 1), "stage_numb_of_layers": (1, 1, 1, 1), "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        "encoder_hidden_dim": 32, "encoder_in_channels": (16, 16, 16), "decoder_in_channels": (32, 32, 32), "num_queries": 6, "decoder_n_points": 2,
        "num_denoising": 0, "x4_feat_dim": 8, "mask_feature_channels": (8, 8), "num_prototypes": 4, "global_pointer_head_size": 8},
    "pp_doclayout_v4": {"backbone_config": {"model_type": "hgnet_v2", "depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 16, 16), "embedding_size": 8,
        "stem_channels": (3, 8, 8), "stage_in_channels": (8, 8, 16, 16), "stage_mid_channels": (8, 8, 8, 8), "stage_out_channels": (8, 16, 16, 16),
        "stage_num_blocks": (1, 1, 1, 1), "stage_numb_of_layers": (1, 1, 1, 1), "out_features": ["stage2", "stage3", "stage4"]}, "encoder_hidden_dim":
        32, "encoder_in_channels": (16, 16, 16), "decoder_in_channels": (32, 32, 32), "num_queries": 6, "decoder_n_points": 2, "num_denoising": 0,
        "global_pointer_head_size": 8},
    "pp_ocrv5_mobile_det": {"backbone_config": {"model_type": "pp_lcnet_v3", "stem_channels": 8, "out_indices": [2, 3, 4, 5], "block_configs": [[[3,
        8, 8, 1, False]], [[3, 8, 8, 2, False]], [[3, 8, 8, 2, False]], [[3, 8, 16, 2, False]], [[5, 16, 16, 2, True]]]}, "neck_out_channels": 16,
        "layer_list_out_channels": (4, 4, 8, 8)},
    "pp_ocrv5_server_det": {"neck_out_channels": 32, "intraclass_block_number": 4, "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2],
        "intraclass_block_config": {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0], "vertical_long_to_small_conv_longratio": [[7, 1], [1,
        1], [3, 0]], "vertical_long_to_small_conv_midratio": [[5, 1], [1, 1], [2, 0]], "vertical_long_to_small_conv_shortratio": [[3, 1], [1, 1], [1,
        0]], "horizontal_small_to_long_conv_longratio": [[1, 7], [1, 1], [0, 3]], "horizontal_small_to_long_conv_midratio": [[1, 5], [1, 1], [0, 2]],
        "horizontal_small_to_long_conv_shortratio": [[1, 3], [1, 1], [0, 1]], "symmetric_conv_long_longratio": [[7, 7], [1, 1], [3, 3]],
        "symmetric_conv_long_midratio": [[5, 5], [1, 1], [2, 2]], "symmetric_conv_long_shortratio": [[3, 3], [1, 1], [1, 1]]}, "backbone_config":
        {"model_type": "hgnet_v2", "depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 16, 16), "embedding_size": 8, "stem_channels": (3, 8, 8),
        "stage_in_channels": (8, 8, 16, 16), "stage_mid_channels": (8, 8, 8, 8), "stage_out_channels": (8, 16, 16, 16), "stage_num_blocks": (1, 1, 1,
        1), "stage_numb_of_layers": (1, 1, 1, 1), "out_features": ["stage1", "stage2", "stage3", "stage4"]}},
    "pp_ocrv5_server_rec": {"backbone_config": {"model_type": "hgnet_v2", "depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 16, 16), "embedding_size":
        8, "stem_channels": (3, 8, 8), "stage_in_channels": (8, 8, 16, 16), "stage_mid_channels": (8, 8, 8, 8), "stage_out_channels": (8, 16, 16, 16),
        "stage_num_blocks": (1, 1, 1, 1), "stage_numb_of_layers": (1, 1, 1, 1), "stage_downsample": [True, True, True, True], "stem_strides": [2, 1,
        1, 1, 1], "stage_downsample_strides": [[2, 1], [1, 2], [2, 1], [2, 1]], "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        "head_out_channels": 20},
    "pp_ocrv6_medium_det": {"neck_out_channels": 32, "intraclass_block_number": 4, "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2],
        "intraclass_block_config": {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0], "vertical_long_to_small_conv_longratio": [[7, 1], [1,
        1], [3, 0]], "vertical_long_to_small_conv_midratio": [[5, 1], [1, 1], [2, 0]], "vertical_long_to_small_conv_shortratio": [[3, 1], [1, 1], [1,
        0]], "horizontal_small_to_long_conv_longratio": [[1, 7], [1, 1], [0, 3]], "horizontal_small_to_long_conv_midratio": [[1, 5], [1, 1], [0, 2]],
        "horizontal_small_to_long_conv_shortratio": [[1, 3], [1, 1], [0, 1]], "symmetric_conv_long_longratio": [[7, 7], [1, 1], [3, 3]],
        "symmetric_conv_long_midratio": [[5, 5], [1, 1], [2, 2]], "symmetric_conv_long_shortratio": [[3, 3], [1, 1], [1, 1]]}, "backbone_config":
        {"model_type": "pp_lcnet_v4", "stem_channels": [3, 8, 8], "out_features": ["stage1", "stage2", "stage3", "stage4"], "block_configs": [[[3, 8,
        8, 1, True]], [[3, 8, 8, 2, False]], [[3, 8, 16, 2, False]], [[3, 16, 16, 2, True]]]}},
    "pp_ocrv6_small_det": {"backbone_config": {"model_type": "pp_lcnet_v4", "stem_channels": [3, 8, 8], "out_features": ["stage1", "stage2", "stage3",
        "stage4"], "block_configs": [[[3, 8, 8, 1, True]], [[3, 8, 8, 2, False]], [[3, 8, 16, 2, False]], [[3, 16, 16, 2, True]]]},
        "neck_out_channels": 16, "layer_list_out_channels": (8, 8, 16, 16)},
    "pp_ocrv6_small_rec": {"backbone_config": {"model_type": "pp_lcnet_v4", "stem_channels": [3, 8, 8], "out_features": ["stage1", "stage2", "stage3",
        "stage4"], "block_configs": [[[3, 8, 8, 1, True]], [[3, 8, 8, 1, False]], [[3, 8, 16, [2, 1], False]], [[3, 16, 32, [2, 1], True]]]},
        "head_out_channels": 20},
    "pp_ocrv6_tiny_rec": {"backbone_config": {"model_type": "pp_lcnet_v4", "stem_channels": [3, 8, 8], "out_features": ["stage1", "stage2", "stage3",
        "stage4"], "block_configs": [[[3, 8, 8, 1, True]], [[3, 8, 8, 1, False]], [[3, 8, 16, [2, 1], False]], [[3, 16, 32, [2, 1], True]]]},
        "head_out_channels": 20},
    "prompt_depth_anything": {"backbone_config": {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "mlp_ratio": 2, "image_size": 32, "patch_size": 8, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}, "reassemble_hidden_size": 32,
        "neck_hidden_sizes": (8, 8, 16, 16), "fusion_hidden_size": 8, "head_hidden_size": 8, "patch_size": 8},
    "pvt": {"image_size": 64, "depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 16, 32), "num_attention_heads": (1, 2, 2, 4), "mlp_ratios": (2, 2, 2,
        2), "sequence_reduction_ratios": (4, 2, 1, 1)},
    "qwen2_5_omni_talker": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "qwen2_5_omni_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 97},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_asr_encoder": {"n_window": 50, "n_window_infer": 100, "downsample_hidden_size": 8, "output_dim": 32},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 97},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"attention_window_size": 4, "block_types": ("recurrent", "attention")},
    "reformer": {"attention_head_size": 8, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4},
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "rf_detr": {"backbone_config": {"model_type": "rf_detr_dinov2", "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_windows": 2, "out_indices": [1, 2]}, "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4,
        "num_queries": 8, "group_detr": 2},
    "roc_bert": {"pronunciation_embed_dim": 16, "pronunciation_vocab_size": 99, "shape_embed_dim": 16, "shape_vocab_size": 99},
    "rt_detr": {"encoder_hidden_dim": 32, "encoder_in_channels": [16, 32, 32], "decoder_in_channels": [32, 32, 32], "num_queries": 8, "num_denoising":
        0, "initializer_range": 0.1, "backbone_config": {"model_type": "rt_detr_resnet", "out_indices": [2, 3, 4], "embedding_size": 16,
        "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}},
    "rt_detr_resnet": {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "rt_detr_v2": {"encoder_hidden_dim": 32, "encoder_in_channels": [16, 32, 32], "decoder_in_channels": [32, 32, 32], "num_queries": 8,
        "num_denoising": 0, "initializer_range": 0.1, "backbone_config": {"model_type": "rt_detr_resnet", "out_indices": [2, 3, 4], "embedding_size":
        16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}},
    "sam2_hiera_det_model": {"hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 2, 4, 4], "window_size_per_stage": [4, 2, 2, 2],
        "global_attention_blocks": [3], "window_positional_embedding_background_size": [2, 2]},
    "sam2_mask_decoder": {"iou_head_hidden_dim": 32},
    "sam2_prompt_encoder": {"image_size": 64, "patch_size": 16},
    "sam2_video": {"num_maskmem": 2, "memory_attention_hidden_size": 128, "memory_attention_num_layers": 2,
        "memory_attention_feed_forward_hidden_size": 32, "memory_encoder_hidden_size": 128, "memory_encoder_output_channels": 64,
        "mask_downsampler_embed_dim": 128, "memory_fuser_embed_dim": 128, "memory_fuser_intermediate_dim": 32, "vision_config.fpn_hidden_size": 128,
        "prompt_encoder_config.hidden_size": 128, "mask_decoder_config.hidden_size": 128, "mask_decoder_config.iou_head_hidden_dim": 128,
        "mask_decoder_config.iou_head_depth": 4, "image_size": 64, "memory_attention_rope_feat_sizes": [4, 4]},
    "sam2_video_mask_decoder": {"iou_head_hidden_dim": 32},
    "sam2_video_prompt_encoder": {"image_size": 64, "patch_size": 16},
    "sam2_vision_model": {"backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32},
    "sam3_detr_decoder": {"num_queries": 8},
    "sam3_geometry_encoder": {"roi_size": 2},
    "sam3_lite_text_detr_decoder": {"num_queries": 8},
    "sam3_lite_text_geometry_encoder": {"roi_size": 2},
    "sam3_tracker_mask_decoder": {"iou_head_hidden_dim": 32},
    "sam3_tracker_video": {"num_maskmem": 2, "memory_attention_hidden_size": 128, "memory_attention_num_layers": 2,
        "memory_attention_feed_forward_hidden_size": 32, "memory_encoder_hidden_size": 128, "memory_encoder_output_channels": 64,
        "mask_downsampler_embed_dim": 128, "memory_fuser_embed_dim": 128, "memory_fuser_intermediate_dim": 32, "vision_config.fpn_hidden_size": 128,
        "prompt_encoder_config.hidden_size": 128, "mask_decoder_config.hidden_size": 128, "mask_decoder_config.iou_head_hidden_dim": 128,
        "mask_decoder_config.iou_head_depth": 4, "image_size": 32, "memory_fuser_num_layers": 1},
    "sam3_tracker_video_mask_decoder": {"iou_head_hidden_dim": 32},
    "sam3_video": {"low_res_mask_size": 16, "score_threshold_detection": 0.0, "new_det_thresh": 0.0},
    "sam3_vision_model": {"fpn_hidden_size": 32, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam3_vit_model": {"window_size": 2, "global_attn_indexes": [1], "pretrain_image_size": 16, "image_size": 32, "patch_size": 8},
    "sam_hq_mask_decoder": {"iou_head_hidden_dim": 32, "vit_dim": 32},
    "sam_hq_vision_model": {"output_channels": 32, "num_pos_feats": 16, "window_size": 2, "global_attn_indexes": [1]},
    "sam_mask_decoder": {"iou_head_hidden_dim": 32},
    "sam_vision_model": {"output_channels": 32, "num_pos_feats": 16, "window_size": 2, "global_attn_indexes": [1]},
    "seamless_m4t": {"t2u_vocab_size": 50, "speech_encoder_layers": 2, "speech_encoder_attention_heads": 4, "speech_encoder_intermediate_size": 32,
        "feature_projection_input_dim": 8, "t2u_encoder_layers": 1, "t2u_encoder_ffn_dim": 32, "t2u_encoder_attention_heads": 4, "t2u_decoder_layers":
        1, "t2u_decoder_ffn_dim": 32, "t2u_decoder_attention_heads": 4, "t2u_max_position_embeddings": 64, "upsample_initial_channel": 32,
        "unit_hifi_gan_vocab_size": 50, "unit_embed_dim": 16, "lang_embed_dim": 16, "spkr_embed_dim": 16, "vocoder_num_langs": 2, "vocoder_num_spkrs":
        2},
    "seamless_m4t_v2": {"t2u_vocab_size": 50, "speech_encoder_layers": 2, "speech_encoder_attention_heads": 4, "speech_encoder_intermediate_size": 32,
        "feature_projection_input_dim": 8, "t2u_encoder_layers": 1, "t2u_encoder_ffn_dim": 32, "t2u_encoder_attention_heads": 4, "t2u_decoder_layers":
        1, "t2u_decoder_ffn_dim": 32, "t2u_decoder_attention_heads": 4, "t2u_max_position_embeddings": 64, "upsample_initial_channel": 32,
        "unit_hifi_gan_vocab_size": 50, "unit_embed_dim": 16, "lang_embed_dim": 16, "spkr_embed_dim": 16, "vocoder_num_langs": 2, "vocoder_num_spkrs":
        2, "char_vocab_size": 50, "t2u_variance_predictor_embed_dim": 32, "t2u_variance_predictor_hidden_dim": 16},
    "seggpt": {"image_size": [32, 16], "pretrain_image_size": 16, "num_hidden_layers": 3, "merge_index": 0, "intermediate_hidden_state_indices": [1,
        2]},
    "shieldgemma2": {"text_config.layer_types": ["full_attention", "sliding_attention"], "mm_tokens_per_image": 4, "image_token_index": 4,
        "boi_token_index": 5, "eoi_token_index": 6, "yes_token_index": 10, "no_token_index": 11},
    "slanet": {"backbone_config": {"model_type": "pp_lcnet", "scale": 0.25, "divisor": 4, "out_features": ["stage2", "stage3", "stage4", "stage5"]},
        "post_conv_out_channels": 16, "out_channels": 10, "max_text_length": 4},
    "speech-encoder-decoder": {"decoder.is_decoder": True, "decoder.add_cross_attention": True},
    "step3p5": {"layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"], "share_expert_dim": 32,
        "sliding_window": 4},
    "step3p7": {"image_token_id": 4},
    "superglue": {"initializer_range": 0.1, "keypoint_encoder_sizes": [16, 32], "gnn_layers_types": ["self", "cross"], "sinkhorn_iterations": 2},
    "superpoint": {"initializer_range": 0.1, "encoder_hidden_sizes": [16, 16, 16, 16], "decoder_hidden_size": 32, "descriptor_decoder_dim": 32,
        "max_keypoints": 8},
    "swin": {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "mlp_ratio": 2.0},
    "swin2sr": {"image_size": 16, "patch_size": 1, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "swinv2": {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "t5gemma2_text": {"dropout_rate": 0.0, "layer_types": ["full_attention", "sliding_attention"]},
    "table-transformer": {"num_queries": 8},
    "textnet": {"stem_out_channels": 16, "hidden_sizes": [16, 16, 16, 32, 32], "image_size": [64, 64]},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1},
    "timesfm": {"patch_length": 8, "context_length": 32, "horizon_length": 8},
    "tipsv2_dpt": {"backbone_config": {"model_type": "tipsv2_vision_model", "out_indices": [1, 2, 3, 4], "apply_layernorm": True,
        "reshape_hidden_states": False, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        "mlp_ratio": 2}, "neck_hidden_sizes": [16, 16, 16, 16], "fusion_hidden_size": 16, "num_depth_bins": 16},
    "tvp": {"visual_prompt_size": 8, "max_img_size": 64, "max_grid_col_position_embeddings": 10, "max_grid_row_position_embeddings": 10},
    "univnet": {"model_in_channels": 8, "model_hidden_channels": 8, "kernel_predictor_hidden_channels": 8},
    "upernet": {"pool_scales": [1, 2], "auxiliary_channels": 16, "auxiliary_in_channels": 32, "backbone_config": {"model_type": "resnet",
        "out_features": ["stage1", "stage2", "stage3", "stage4"], "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}},
    "uvdoc": {"backbone_config": {"model_type": "uvdoc_backbone", "out_indices": [1, 2], "resnet_head": [[3, 8], [8, 8]], "stage_configs": [[[16, 1]],
        [[16, 2]]], "resnet_configs": [[[8, 8, 1, False]], [[8, 16, 1, True]], [[16, 16, 1, True]]]}, "bridge_connector": [16, 16],
        "out_point_positions2D": [[16, 8], [8, 2]]},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "vitmatte": {"initializer_range": 0.1, "convstream_hidden_sizes": [8, 8], "fusion_hidden_sizes": [32, 16, 8]},
    "vitpose_backbone": {"image_size": [32, 16], "patch_size": [8, 8], "part_features": 8, "num_experts": 1},
    "vits": {"flow_size": 16, "spectrogram_bins": 9, "upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]], "duration_predictor_filter_channels": 16, "prior_encoder_num_flows": 2,
        "prior_encoder_num_wavenet_layers": 2, "posterior_encoder_num_wavenet_layers": 2, "num_attention_heads": 2},
    "vjepa2": {"crop_size": 32, "frames_per_clip": 2, "num_pooler_layers": 1, "pred_hidden_size": 32, "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 2},
    "xclip": {"prompt_num_attention_heads": 4},
    "xclip_vision_model": {"mit_hidden_size": 16, "mit_intermediate_size": 32, "mit_num_attention_heads": 4},
    "xcodec": {"acoustic_model_config": {"model_type": "dac", "encoder_hidden_size": 8, "downsampling_ratios": [2, 2], "decoder_hidden_size": 16,
        "upsampling_ratios": [2, 2], "hidden_size": 16}, "target_bandwidths": [16, 32]},
    "xcodec2": {"encoder_hidden_size": 8, "downsampling_ratios": [2, 2], "quantization_dim": 64, "quantization_levels": [4, 4], "num_key_value_heads":
        4},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "attention_head_dim": None,
        "num_key_value_heads": 4},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"], "chunk_size": 8, "mamba_ngroups": 1,
        "adapter_rank": 4},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 4, "router_hidden_size": 16},
    "zoedepth": {"backbone_config": {"model_type": "beit", "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, "use_relative_position_bias":
        True, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        "neck_hidden_sizes": [16, 16, 16, 16], "fusion_hidden_size": 16, "bottleneck_features": 16, "num_attractors": [4, 2, 2, 1],
        "bin_embedding_dim": 16},
}
# fmt: on
# Fields that some classes check against each other: left out together, in this order, until the config is accepted.
RELAXED = (
    (),
    ("head_dim",),
    ("mlp_ratio",),
    ("num_key_value_heads",),
    ("head_dim", "num_key_value_heads"),
    ("mlp_ratio", "head_dim"),
)


# In this composite, parts that are configs of whole models must agree on one more size than elsewhere.
SAM3_WIDE = {
    "vision_config.fpn_hidden_size": 128,
    **{
        f"{part}_config.hidden_size": 128
        for part in ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
    },
}


def toy_config(model_type: str, **overrides):
    """A small config of `model_type`."""
    if model_type == "sam3_video" and not overrides:
        overrides = {"detector_config": toy_config("sam3", **SAM3_WIDE).to_dict()}
    return _toy_config(CONFIG_MAPPING[model_type], overrides)


def _toy_config(config_class, overrides=None):
    arguments = {}
    own = {**OVERRIDES.get(config_class.model_type, {}), **(overrides or {})}
    for field in dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ():
        name, default = field.name, field.default
        if name in own:
            continue
        if name in TUPLES and isinstance(default, (list, tuple)):
            arguments[name] = TUPLES[name]
        elif name in SIZES:
            optional = default is None or default is dataclasses.MISSING
            if isinstance(default, (list, tuple)) or (optional and name in OPTIONAL):
                continue
            arguments[name] = SIZES[name]
    for key, part in config_class.sub_configs.items() if config_class.sub_configs else ():
        if key in own:
            continue
        part_class = part if getattr(part, "model_type", "") else None
        if part_class is None:
            default_type = config_class.sub_configs_defaults[key].model_type
            part_class = CONFIG_MAPPING[default_type] if default_type else None
        if part_class is not None:
            arguments[key] = _toy_config(part_class).to_dict()
    nested = {name: value for name, value in own.items() if "." in name}
    arguments.update({name: value for name, value in own.items() if value is not None and "." not in name})
    for name, value in nested.items():
        part, field = name.split(".", 1)
        arguments[part][field] = value
    for left_out in RELAXED:
        try:
            return config_class(**copy.deepcopy({k: v for k, v in arguments.items() if k not in left_out}))
        except Exception as error:
            last = error
    raise last


OPTIONAL = {
    "sliding_window", "attention_chunk_size", "q_lora_rank", "head_dim", "bos_token_id", "eos_token_id", "decoder_start_token_id",
    "sep_token_id", "cls_token_id", "mask_token_id",
}  # fmt: skip
