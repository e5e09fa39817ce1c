"""The parts of tiny pipelines that are not denoisers: tokenizer, encoders, VAEs; all random, made without a hub."""

import string

import diffusers
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = "a an the on in of and to left right up down moving large small red green blue yellow circle square triangle"
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
PIECES = [*SPECIAL, *WORDS.split(), *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]


def seeded(cls: type, *args: object, **kwargs: object) -> nn.Module:
    """An instance whose random weights do not depend on, and do not change, the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(*args, **kwargs).eval().requires_grad_(False)


def tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    """Knows a few words and spells out the others; marks begin and end, as the tokenizers of CLIP do."""
    core = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(PIECES)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("<bos>", 1), ("<eos>", 2)]
    core.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=length, **names)


def t5(width: int = 32) -> nn.Module:
    config = T5Config(
        vocab_size=len(PIECES), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return seeded(T5EncoderModel, config)


def clip(width: int = 32, projection: int | None = None) -> nn.Module:
    """CLIP's text tower, with the projected pooled output if ``projection`` is given."""
    config = CLIPTextConfig(
        vocab_size=len(PIECES),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return seeded(CLIPTextModelWithProjection if projection else CLIPTextModel, config)


def clip_vision(projection: int = 32) -> tuple[nn.Module, CLIPImageProcessor]:
    """Sixteen patches of an image of 224 x 224, the size that Stable Video Diffusion resizes to."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=56,
    )
    return seeded(CLIPVisionModelWithProjection, config), CLIPImageProcessor()


def vae(**overrides: object) -> nn.Module:
    """Two pixels a latent in each direction, four channels."""
    config = dict(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.0,
        scaling_factor=0.5,
    )
    return seeded(diffusers.AutoencoderKL, **(config | overrides))


def vae_svd() -> nn.Module:
    return seeded(
        diffusers.AutoencoderKLTemporalDecoder,
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 32),
    )


def vae_wan(cls: type = diffusers.AutoencoderKLWan) -> nn.Module:
    """Eight pixels a latent in each direction, four frames a latent after the first; Qwen-Image's is its twin."""
    statistics = dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return seeded(cls, base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics)


def vae_cogvideox() -> nn.Module:
    return seeded(
        diffusers.AutoencoderKLCogVideoX,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def vae_ltx() -> nn.Module:
    """32 pixels a latent in each direction, eight frames a latent."""
    return seeded(
        diffusers.AutoencoderKLLTXVideo,
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )


def vae_hunyuan() -> nn.Module:
    return seeded(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def vae_mochi() -> nn.Module:
    """Eight pixels a latent in each direction, six frames a latent."""
    return seeded(
        diffusers.AutoencoderKLMochi,
        latent_channels=4,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )


def vae_sana() -> nn.Module:
    """Four pixels a latent in each direction."""
    return seeded(
        diffusers.AutoencoderDC,
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
    )
