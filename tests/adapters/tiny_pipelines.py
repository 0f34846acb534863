"""Real diffusers pipelines of a few thousand random weights, built without files or network.

Pictures of 16 to 64 pixels; each class is the one that users have, from configs as small as it takes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer() -> CLIPTokenizer:
    """A tokenizer of single letters."""
    vocab = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{c}</w>" for c in _LETTERS)]
    with tempfile.TemporaryDirectory() as folder:
        words, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        words.write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(words), str(merges), model_max_length=16)


def clip_encoder(size: int = 32, *, projects: bool = False) -> Any:
    """A CLIP text encoder of two layers."""
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=size,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=16,
        projection_dim=size,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5TokenizerFast:
    """A tokenizer of single letters for T5."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in "\u2581" + _LETTERS)]
    return T5TokenizerFast(tokenizer_object=Tokenizer(Unigram(pieces, unk_id=2)), extra_ids=0)


def t5_encoder(kind: str = "t5") -> Any:
    """A T5 encoder of one layer."""
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 1, "num_heads": 4}
    model = UMT5EncoderModel(UMT5Config(**sizes)) if kind == "umt5" else T5EncoderModel(T5Config(**sizes))
    return model.eval()


def image_vae(channels: int = 4, **how: Any) -> AutoencoderKL:
    """A VAE that halves the sides of a picture."""
    return AutoencoderKL(
        block_out_channels=[32, 32],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        sample_size=32,
        **how,
    ).eval()


def unet(in_channels: int = 4, **how: Any) -> UNet2DConditionModel:
    """A UNet with one block of cross attention."""
    sizes: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 16,
        "in_channels": in_channels,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
    }
    return UNet2DConditionModel(**{**sizes, **how}).eval()


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _stable_diffusion(kind: Any, in_channels: int = 4) -> Any:
    torch.manual_seed(0)
    return _quiet(
        kind(
            vae=image_vae(),
            text_encoder=clip_encoder(),
            tokenizer=clip_tokenizer(),
            unet=unet(in_channels),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion 1.x, 32 pixels."""
    return _stable_diffusion(StableDiffusionPipeline)


def image_to_image() -> StableDiffusionImg2ImgPipeline:
    """Stable Diffusion 1.x that begins with a picture."""
    return _stable_diffusion(StableDiffusionImg2ImgPipeline)


def inpainting() -> StableDiffusionInpaintPipeline:
    """Stable Diffusion 1.x that fills a masked place."""
    return _stable_diffusion(StableDiffusionInpaintPipeline, 9)


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """SDXL with both of its text encoders, 32 pixels."""
    torch.manual_seed(0)
    denoiser = unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,  # six sizes of 8 and the pooled text of 32
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
    )
    return _quiet(
        StableDiffusionXLPipeline(
            vae=image_vae(),
            text_encoder=clip_encoder(),
            text_encoder_2=clip_encoder(projects=True),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=denoiser,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            add_watermarker=False,
        )
    )


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 with its three text encoders, 32 pixels."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ).eval()
    vae = image_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=clip_encoder(projects=True),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_encoder(projects=True),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(),
            tokenizer_3=t5_tokenizer(),
        )
    )


def flux() -> FluxPipeline:
    """Flux, whose latents are packed, 32 pixels."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    vae = image_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=clip_encoder(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5_encoder(),
            tokenizer_2=t5_tokenizer(),
            transformer=transformer,
        )
    )


def pixart() -> PixArtAlphaPipeline:
    """PixArt-alpha, which takes unknown keyword arguments, 16 pixels."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ).eval()
    return _quiet(
        PixArtAlphaPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder(),
            vae=image_vae(),
            transformer=transformer,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        )
    )


def wan() -> WanPipeline:
    """Wan, a video of 16 pixels."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    return _quiet(
        WanPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder("umt5"),
            vae=vae,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        )
    )
