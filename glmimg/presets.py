"""Architectures by name, as the configuration values of a checkpoint folder's components.

A preset is a plain dict: `vision_language_encoder`, `transformer`, `text_encoder`, `vae`, `scheduler`,
`preprocessor` and `generation` hold what the matching file of the folder holds (see docs/checkpoint-format.md).
`generation` carries, beside the published keys, the settings that a checkpoint of another size needs:
`preview_side` (published rule: 16), `num_inference_steps`, `decoder_guidance_scale`, `default_size`, `min_size`,
`max_size`.

No torch is imported here: command-line help and planning read presets.
"""

from __future__ import annotations

from typing import Any

Preset = dict[str, dict[str, Any]]


def _preset(
    *,
    codes: int,
    text_pieces: int,
    width: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vision_width: int,
    vision_depth: int,
    vision_heads: int,
    code_dim: int,
    decoder_heads: int,
    decoder_head_dim: int,
    decoder_layers: int,
    time_dim: int,
    glyph_width: int,
    glyph_layers: int,
    vae_channels: tuple[int, int, int, int],
    temperature: float = 0.9,
    top_p: float = 0.75,
    keep_unchanged: float = 0.0,
) -> Preset:
    vision_vocab = codes + 16  # the codes, image start, image end, and spare rows as in the published vocabulary
    head_dim = width // heads
    pairs = head_dim // 4  # rotary frequencies: half of the head rotates, two channels each
    section = [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8]
    return {
        "vision_language_encoder": {
            "image_start_token_id": codes,
            "image_end_token_id": codes + 1,
            "image_token_id": vision_vocab + 1,
            "tie_word_embeddings": False,
            "text_config": {
                "vocab_size": vision_vocab + text_pieces,
                "vision_vocab_size": vision_vocab,
                "hidden_size": width,
                "intermediate_size": intermediate,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "max_position_embeddings": 8192,
                "pad_token_id": vision_vocab,
                "eos_token_id": codes + 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": section,
                    "partial_rotary_factor": 0.5,
                },
            },
            "vision_config": {
                "depth": vision_depth,
                "hidden_size": vision_width,
                "intermediate_size": vision_width * 4,
                "num_heads": vision_heads,
                "patch_size": 16,
                "image_size": 256,
            },
            "vq_config": {"embed_dim": code_dim, "num_embeddings": codes, "latent_channels": vision_width},
        },
        "transformer": {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": decoder_layers,
            "attention_head_dim": decoder_head_dim,
            "num_attention_heads": decoder_heads,
            "text_embed_dim": glyph_width,
            "time_embed_dim": time_dim,
            "condition_dim": 64,
            "prior_vq_quantizer_codebook_size": codes,
        },
        "text_encoder": {
            "vocab_size": 384,
            "d_model": glyph_width,
            "d_kv": glyph_width // 4,
            "d_ff": glyph_width * 8 // 3 // 16 * 16,
            "num_layers": glyph_layers,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
            "tie_word_embeddings": False,
        },
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": list(vae_channels),
            "layers_per_block": 1,
            "norm_num_groups": vae_channels[0] // 8,  # smaller groups forget colours (training/autoencoder_task.py)
            "latent_channels": 16,
            "mid_block_add_attention": False,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "sample_size": 256,
            "latents_mean": [0.0] * 16,
            "latents_std": [1.0] * 16,
        },
        "scheduler": {
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": True,
            "time_shift_type": "linear",
            "base_shift": 0.25,
            "max_shift": 0.75,
            "base_image_seq_len": 256,
        },
        "preprocessor": {
            "patch_size": 16,
            "temporal_patch_size": 1,
            "merge_size": 1,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "size": {"shortest_edge": 64 * 64, "longest_edge": 512 * 512},
        },
        "generation": {
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p,
            "eos_token_id": codes + 1,
            "pad_token_id": vision_vocab + 1,
            "preview_side": 4,
            "num_inference_steps": 10,  # by UniPC as near to where the flow ends as 20 by Euler
            "decoder_sampler": "unipc",
            "keep_unchanged": keep_unchanged,
            "decoder_guidance_scale": 1.5,  # transformers gives the plain name a meaning of its own
            "default_size": [256, 256],
            "min_size": 64,
            "max_size": 512,
        },
    }


PRESETS: dict[str, Preset] = {
    # The embedded model: 38 million parameters, 76 MB in bf16.
    "mini": _preset(
        codes=2048,
        text_pieces=4096,
        width=320,
        intermediate=864,
        layers=8,
        heads=5,
        kv_heads=1,
        vision_width=256,
        vision_depth=6,
        vision_heads=4,
        code_dim=32,
        decoder_heads=5,
        decoder_head_dim=64,
        decoder_layers=10,
        time_dim=128,
        glyph_width=192,
        glyph_layers=4,
        vae_channels=(16, 48, 96, 128),
        # By eye: surer than at 1.0, while the published nucleus would leave out things in favour of plain background.
        temperature=0.4,
        top_p=0.95,
        keep_unchanged=0.25,  # a small decoder repaints worse than it was
    ),
    # For tests: every part of the architecture, a second to run.
    "tiny": _preset(
        codes=64,
        text_pieces=512,
        width=64,
        intermediate=96,
        layers=2,
        heads=4,
        kv_heads=2,
        vision_width=32,
        vision_depth=2,
        vision_heads=2,
        code_dim=8,
        decoder_heads=4,
        decoder_head_dim=16,
        decoder_layers=2,
        time_dim=32,
        glyph_width=32,
        glyph_layers=2,
        vae_channels=(8, 8, 16, 16),
    ),
}
