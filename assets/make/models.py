"""The untrained parts of the bundled pipelines: every size and every configuration that decides what they are."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from diffaccel.eval.scenes import WORDS

KINDS = ("image", "video", "unet")
TEXT_WIDTH = 128
VOCABULARY = 64
PAD, EOS, UNKNOWN = 0, 1, 2
CLIP_LENGTH = 32
IMAGE_LATENTS, VIDEO_LATENTS = 8, 12
# Longest captions with the end mark; captions are padded to these in training.
LENGTH = {"image": 24, "video": 14, "unet": CLIP_LENGTH}


def tokenizer(length: int = 512) -> PreTrainedTokenizerFast:
    """One token a word of the drawn world, lower case, an end mark, no start mark."""
    vocabulary = {"<pad>": PAD, "</s>": EOS, "<unk>": UNKNOWN}
    for word in WORDS:
        vocabulary[word] = len(vocabulary)
    if len(vocabulary) > VOCABULARY:
        raise ValueError(f"{len(vocabulary)} words do not fit into {VOCABULARY} embeddings")
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
    )


def text_encoder(kind: str) -> Any:
    """T5 for images, UMT5 for videos, CLIP's text tower for the UNet; about 0.5 M parameters each."""
    if kind == "unet":
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=CLIP_LENGTH,
                pad_token_id=PAD,
                bos_token_id=EOS,
                eos_token_id=EOS,
            )
        )
    config, model = (T5Config, T5EncoderModel) if kind == "image" else (UMT5Config, UMT5EncoderModel)
    return model(
        config(
            vocab_size=VOCABULARY,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


def image_vae() -> AutoencoderKL:
    """8 pixels a latent, no attention, so that any size of picture is as good as the trained one."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=IMAGE_LATENTS,
        norm_num_groups=8,
        sample_size=256,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )
    _narrow_posterior(vae.quant_conv)
    return vae.to(memory_format=torch.channels_last)


def video_vae() -> AutoencoderKLWan:
    """4 pixels and 2 frames a latent: 13 x 96 x 96 pixels become 7 x 24 x 24 latents."""
    vae = AutoencoderKLWan(
        base_dim=24,
        z_dim=VIDEO_LATENTS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * VIDEO_LATENTS,
        latents_std=[1.0] * VIDEO_LATENTS,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    _narrow_posterior(vae.quant_conv)
    return vae


def _narrow_posterior(layer: Any) -> None:
    """Starts with little noise on the latents, which otherwise drowns the picture at first."""
    with torch.no_grad():
        half = layer.bias.shape[0] // 2
        layer.bias[half:] = -4.0
        layer.weight[half:] *= 0.1


def denoiser(kind: str) -> Any:
    """PixArt (256 tokens at 256 pixels), Wan (1,008 tokens at 13 frames of 96 pixels) or a UNet."""
    if kind == "unet":
        return UNet2DConditionModel(
            sample_size=32,
            in_channels=IMAGE_LATENTS,
            out_channels=IMAGE_LATENTS,
            block_out_channels=(64, 96, 160),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,  # which this class reads as the number of heads
            norm_num_groups=16,
        )
    if kind == "image":
        model: Any = PixArtTransformer2DModel(
            num_attention_heads=6,
            attention_head_dim=32,
            in_channels=IMAGE_LATENTS,
            out_channels=IMAGE_LATENTS,
            num_layers=8,
            cross_attention_dim=192,
            sample_size=32,
            patch_size=2,
            caption_channels=TEXT_WIDTH,
            use_additional_conditions=False,
            norm_elementwise_affine=False,
        )
    else:
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=VIDEO_LATENTS,
            out_channels=VIDEO_LATENTS,
            text_dim=TEXT_WIDTH,
            freq_dim=256,
            ffn_dim=512,
            num_layers=8,
            cross_attn_norm=True,
            rope_max_seq_len=128,
        )
    _open_gates(model)
    return model


def blocks(model: Any) -> Any:
    """The repeated blocks, a ``ModuleList``, of a transformer denoiser."""
    return getattr(model, "transformer_blocks", None) or model.blocks


def _open_gates(model: Any) -> None:
    """Gates half open and a silent last projection: trains several times faster from the start than closed gates."""
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    with torch.no_grad():
        for block in blocks(model):
            modulation = block.scale_shift_table.view(6, -1)
            modulation[[0, 1, 3, 4]] *= 0.3
            modulation[[2, 5]] = 0.5
            for name, parameter in block.named_parameters():
                if parameter.ndim == 2 and "scale_shift" not in name:
                    nn.init.normal_(parameter, std=(0.5 / parameter.shape[1]) ** 0.5)


def scheduler(kind: str) -> Any:
    """Flow matching for the transformers; for the UNet v-prediction, and noise levels that end in pure noise."""
    if kind == "unet":
        return DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            steps_offset=1,  # unused by this spacing; the pipeline warns about 0
        )
    options = dict(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    if kind == "image":
        return DPMSolverMultistepScheduler(flow_shift=2.5, **options)
    return UniPCMultistepScheduler(flow_shift=4.0, **options)
