"""Denoisers and pipelines outside the zoo: audio, history frames, other argument names; modular pipelines."""

import diffusers
import pytest
import torch
from diffusers import modular_pipelines
from diffusers.pipelines.deprecated.spectrogram_diffusion import T5FilmDecoder
from zoo_base import initialise, noise, tensors_of
from zoo_pipelines import PIPELINES

from diffaccel import BlockSparse, DiffAccelError, Plan, Quantize, StepCache, accelerate

QUANTIZE = Plan(quantization=[Quantize()])
SPARSE = Plan(attention=[BlockSparse(density=0.5, steps=(0.0, 1.0), block_size=16)])
CACHE = Plan(caching=StepCache(threshold=100, max_skips=2, min_steps=1))
TOGETHER = Plan(quantization=QUANTIZE.quantization, attention=SPARSE.attention, caching=CACHE.caching)

pytestmark = pytest.mark.filterwarnings("ignore")

WAN = dict(
    num_attention_heads=2, attention_head_dim=16, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2
)


def anyflow():
    model = diffusers.AnyFlowTransformer3DModel(**WAN, in_channels=4, rope_max_seq_len=64)

    def feed(x, progress):
        t = torch.full((1, 4), 1000 * (1 - progress))
        return dict(hidden_states=x, timestep=t, r_timestep=0.9 * t, encoder_hidden_states=noise(1, 12, 32))

    return model, (1, 4, 4, 8, 12), feed


def helios():
    model = diffusers.HeliosTransformer3DModel(**WAN, in_channels=4, rope_dim=(4, 6, 6))

    def feed(x, progress):
        return dict(
            hidden_states=x,
            timestep=torch.tensor([1000 * (1 - progress)]),
            encoder_hidden_states=noise(1, 12, 32),
            indices_hidden_states=torch.arange(20, 24)[None],
            indices_latents_history_short=torch.arange(18, 20)[None],
            indices_latents_history_mid=torch.arange(16, 18)[None],
            indices_latents_history_long=torch.arange(16)[None],
            latents_history_short=noise(1, 4, 2, 8, 12),
            latents_history_mid=noise(1, 4, 2, 8, 12),
            latents_history_long=noise(1, 4, 16, 8, 12),
        )

    return model, (1, 4, 4, 8, 12), feed


def stable_audio_3():
    model = diffusers.StableAudio3DiTModel(
        io_channels=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=32,
        global_cond_dim=24,
        local_add_cond_dim=6,
        timestep_features_dim=16,
        num_memory_tokens=4,
    )

    def feed(x, progress):
        return dict(
            hidden_states=x,
            timestep=torch.tensor([1 - progress]),
            encoder_hidden_states=noise(1, 12, 32),
            global_hidden_states=noise(1, 24),
            local_add_cond=noise(1, 6, 64),
        )

    return model, (1, 8, 64), feed


def wan_animate():
    model = diffusers.WanAnimateTransformer3DModel(
        **WAN,
        in_channels=12,
        latent_channels=4,
        image_dim=32,
        added_kv_proj_dim=32,
        rope_max_seq_len=64,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )

    def feed(x, progress):
        return dict(
            hidden_states=x,
            timestep=torch.tensor([1000 * (1 - progress)]),
            encoder_hidden_states=noise(1, 12, 32),
            encoder_hidden_states_image=noise(1, 5, 32),
            pose_hidden_states=noise(1, 4, 3, 8, 12),
            face_pixel_values=noise(1, 3, 9, 16, 16),
        )

    return model, (1, 12, 4, 8, 12), feed


def t5_film():
    model = T5FilmDecoder(
        input_dims=8, targets_length=64, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=64, dropout_rate=0.0
    )

    def feed(x, progress):
        memory = [(noise(1, 12, 32), torch.ones(1, 12))]
        time = torch.tensor([1 - progress])
        return dict(encodings_and_masks=memory, decoder_input_tokens=x, decoder_noise_time=time)

    return model, (1, 64, 8), feed


@pytest.mark.parametrize("make", [anyflow, helios, stable_audio_3, wan_animate, t5_film])
def test_denoisers_outside_the_zoo(make):
    model, shape, feed = make()
    initialise(model, seed=1)
    model.eval().requires_grad_(False)

    def run(clock=None):
        if clock is not None:
            clock.start(6)
        outputs = []
        for i in range(6):
            kwargs = feed((1 - i / 6) * noise(*shape, seed=9) + i / 6 * noise(*shape), i / 6)
            outputs.append(torch.cat([t.flatten() for t in tensors_of(model(**kwargs))]))
            if clock is not None:
                clock.advance()
        return torch.stack(outputs)

    before = run()
    film = make is t5_film  # attention of its own, and a timestep by another name
    for plan in (QUANTIZE, SPARSE, CACHE, TOGETHER):
        with accelerate(model, plan) as accel:
            if film and plan.attention:
                with pytest.raises(DiffAccelError, match="scaled_dot_product_attention"):
                    run()
                continue
            after = run(accel.clock if film else None)
            assert torch.isfinite(after).all() and not torch.equal(after, before)
            facts = {t.technique: t.facts for t in accel.report().techniques}
            if plan is QUANTIZE:
                assert (after - before).norm() < 0.1 * before.norm()
            if plan.attention:
                assert facts["attention"]["calls_sparse"] > 0
            if plan.caching:
                assert facts["caching"]["reused"] > 0
        assert torch.equal(run(), before)


@pytest.mark.parametrize(("name", "blocks"), [("sdxl", "StableDiffusionXLAutoBlocks"), ("flux", "FluxAutoBlocks")])
def test_modular_pipelines(name, blocks):
    classic = PIPELINES[name].build()
    pipe = getattr(modular_pipelines, blocks)().init_pipeline()
    known = {k: v for k, v in classic.components.items() if k in pipe._component_specs and v is not None}
    pipe.update_components(**known)

    def draw(steps=8):
        return pipe(output="images", **PIPELINES[name].arguments(steps=steps))

    before = draw()
    with accelerate(pipe, TOGETHER) as accel:
        fast = draw()
        assert torch.isfinite(fast).all() and not torch.equal(fast, before)
        assert torch.equal(draw(), fast)  # a second run starts afresh
        facts = {t.technique: t.facts for t in accel.report().techniques}
        branches = 2 if name == "sdxl" else 1
        assert facts["caching"]["computed"] + facts["caching"]["reused"] == 2 * 8 * branches
        assert facts["caching"]["reused"] > 0 and facts["attention"]["calls_sparse"] > 0
    assert torch.equal(draw(), before)
