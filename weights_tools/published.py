"""The published model's configuration and published figures, for planning without a download.

Configurations are those of zai-org/GLM-Image as released; figures are others' and name their source.
"""

from __future__ import annotations

from glmimg.presets import Preset

__all__ = ["H100_ROWS", "NAMES", "PUBLISHED"]

NAMES = ("glm-image", "zai-org/GLM-Image")

PUBLISHED: Preset = {
    "vision_language_encoder": {
        "image_start_token_id": 16384,
        "image_end_token_id": 16385,
        "image_token_id": 167855,
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": 168064,
            "vision_vocab_size": 16512,
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "max_position_embeddings": 131072,
            "pad_token_id": 167841,
            "eos_token_id": 16385,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 12, 12],
                "partial_rotary_factor": 0.5,
            },
        },
        "vision_config": {
            "depth": 40,
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_heads": 16,
            "patch_size": 16,
            "image_size": 2048,
        },
        "vq_config": {"embed_dim": 2048, "num_embeddings": 16384, "latent_channels": 1536},
    },
    "transformer": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 30,
        "attention_head_dim": 128,
        "num_attention_heads": 32,
        "text_embed_dim": 1472,
        "time_embed_dim": 512,
        "condition_dim": 256,
        "prior_vq_quantizer_codebook_size": 16384,
    },
    "text_encoder": {
        "vocab_size": 384,
        "d_model": 1472,
        "d_kv": 64,
        "d_ff": 3584,
        "num_layers": 12,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 512, 1024, 1024],
        "layers_per_block": 3,
        "latent_channels": 16,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "sample_size": 1024,
        "force_upcast": True,
    },
    "generation": {},
}

# The model card's table: diffusers on one H100, everything resident; side, pictures at once, seconds, memory.
H100_ROWS = (
    (512, 1, 27.30, 34.26),
    (512, 4, 39.34, 37.83),
    (1024, 1, 64.34, 37.82),
    (1024, 4, 108.22, 52.09),
    (2048, 1, 252.59, 45.08),
)
