"""CLIP models and what is computed on them: against transformers with the same weights, and in the right direction.

The networks are tiny and random: they tell pictures and captions apart, which is all that these tests need.
"""

import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cosine_similarity

from diffaccel.eval.metrics.clip import OpenClip, load_clip
from diffaccel.eval.metrics.clip_score import clip_score, clip_temporal_consistency
from diffaccel.eval.metrics.features import image_features
from diffaccel.eval.metrics.perceptual import shapes_perceptual

open_clip = pytest.importorskip("open_clip")

SIZE, WIDTH, LAYERS, WORDS, LENGTH, OUT = 32, 64, 2, 54, 16, 24
PROMPTS = ["a red circle", "two blue squares", "a green star on the left"]


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory) -> OpenClip:
    """The bundled evaluator's architecture and tokenizer, untrained, by the same door as the bundled one."""
    from diffaccel.assets.make.evaluator import build, save

    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.encode_image(
            torch.from_numpy(2 * _pictures(16, 128, 128) - 1).permute(0, 3, 1, 2)
        )  # fills the statistics
        save(model, folder)
    return load_clip(f"local-dir:{folder}")


def _pictures(*shape: int, seed: int = 0) -> np.ndarray:
    """Smooth pictures: noise in large squares."""
    *lead, height, width = shape
    coarse = np.random.default_rng(seed).random((*lead, height // 8, width // 8, 3), dtype=np.float32)
    return coarse.repeat(8, axis=-3).repeat(8, axis=-2)


def _processor():
    """Transformers' own, with the letters as vocabulary."""
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=LENGTH)
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE), tokenizer)


def _transformers_model():
    from transformers import CLIPConfig, CLIPModel

    tower = dict(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        hidden_act="gelu",
    )
    text = dict(vocab_size=WORDS, max_position_embeddings=LENGTH, eos_token_id=WORDS - 1, **tower)
    vision = dict(image_size=SIZE, patch_size=8, **tower)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=OUT)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights are too small to tell inputs apart
            parameter.normal_(0, 0.2)
    return model


def _open_clip_model(theirs):
    """open_clip's model with the weights of transformers' model."""
    vision = open_clip.CLIPVisionCfg(image_size=SIZE, patch_size=8, width=WIDTH, layers=LAYERS, head_width=WIDTH)
    text = open_clip.CLIPTextCfg(context_length=LENGTH, vocab_size=WORDS, width=WIDTH, heads=1, layers=LAYERS)
    ours = open_clip.CLIP(OUT, vision, text).eval()
    source, state = theirs.state_dict(), {}

    def tower(prefix, target):
        for i in range(LAYERS):
            here, there = f"{prefix}.encoder.layers.{i}", f"{target}.resblocks.{i}"
            for kind in ("weight", "bias"):
                joined = [source[f"{here}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                state[f"{there}.attn.in_proj_{kind}"] = torch.cat(joined)
                names = {
                    "self_attn.out_proj": "attn.out_proj",
                    "layer_norm1": "ln_1",
                    "layer_norm2": "ln_2",
                    "mlp.fc1": "mlp.c_fc",
                    "mlp.fc2": "mlp.c_proj",
                }
                for name, new in names.items():
                    state[f"{there}.{new}.{kind}"] = source[f"{here}.{name}.{kind}"]

    tower("text_model", "transformer")
    tower("vision_model", "visual.transformer")
    for kind in ("weight", "bias"):
        state[f"ln_final.{kind}"] = source[f"text_model.final_layer_norm.{kind}"]
        state[f"visual.ln_pre.{kind}"] = source[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = source[f"vision_model.post_layernorm.{kind}"]
    state |= {
        "token_embedding.weight": source["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": source["text_model.embeddings.position_embedding.weight"],
        "text_projection": source["text_projection.weight"].T,
        "visual.class_embedding": source["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": source["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": source["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": source["visual_projection.weight"].T,
        "logit_scale": source["logit_scale"],
    }
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and all("attn_mask" in name for name in missing), (missing, unexpected)
    return ours


def test_clip_score_is_transformers_with_the_same_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = _transformers_model()
        ours = _open_clip_model(theirs)
    processor = _processor()

    def tokenize(texts):
        return processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]

    from open_clip.transform import PreprocessCfg, image_transform_v2

    clip = OpenClip(ours, image_transform_v2(PreprocessCfg(size=SIZE), is_train=False), tokenize)
    same = load_clip(lambda: (theirs, processor))
    images = _pictures(3, 48, 64)  # both must resize and cut
    scores = clip_score(clip, images, PROMPTS)
    torch.testing.assert_close(clip_score(same, images, PROMPTS), scores, rtol=0, atol=0.05)

    square = _pictures(3, SIZE, SIZE)  # nothing to resize: nothing but the networks
    pixels = processor.image_processor(images=list(square), do_rescale=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = theirs(input_ids=tokenize(PROMPTS), pixel_values=pixels)
    expected = 100 * cosine_similarity(out.image_embeds, out.text_embeds)
    assert expected.std() > 1
    for model in (clip, same):
        torch.testing.assert_close(clip_score(model, square, PROMPTS).float(), expected, rtol=0, atol=1e-3)


def test_pictures_are_prepared_as_open_clip_does_it_with_files(evaluator):
    """Through PIL and 8 bit, for a size that must be resized and cut. The pictures keep off black and white, where PIL
    cuts what overshoots after each of its two passes."""
    bytes_ = (60 + _pictures(2, 160, 224) * 130).round().astype(np.uint8)
    folder_transform = open_clip.image_transform(128, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    expected = torch.stack([folder_transform(Image.fromarray(x)) for x in bytes_])
    found = evaluator.prepare(torch.from_numpy(bytes_).permute(0, 3, 1, 2).float() / 255)
    assert (found - expected).abs().max() < 2.1 / 127.5  # it rounds after each pass, too
    assert (found - expected).abs().mean() < 0.5 / 127.5
    checkers = torch.from_numpy(_pictures(1, 160, 224).round()).permute(0, 3, 1, 2)
    assert evaluator.prepare(checkers).abs().max() <= 1  # bicubic resizing leaves the range at edges of black and white


def test_score_of_a_video_is_the_mean_of_its_frames(evaluator):
    videos = _pictures(3, 2, 64, 64)
    frames = torch.stack([clip_score(evaluator, videos[:, i], PROMPTS) for i in range(2)])
    torch.testing.assert_close(clip_score(evaluator, videos, PROMPTS), frames.mean(0), rtol=0, atol=1e-4)


def test_score_finds_the_prompt_that_belongs(evaluator):
    """The picture whose features lie in a caption's direction scores higher with it than with another caption, and
    noise on the picture lowers its score."""
    images = torch.from_numpy(_pictures(1, 64, 64)).permute(0, 3, 1, 2).clone().requires_grad_()
    wanted = evaluator.texts(PROMPTS)[0]
    for _ in range(8):  # paint towards the first caption
        features = evaluator.network.encode_image(evaluator.prepare(images))
        (gradient,) = torch.autograd.grad(cosine_similarity(features, wanted[None]).sum(), images)
        images = (images + 0.05 * gradient.sign()).clamp(0, 1).detach().requires_grad_()
    painted = images.detach()
    right, wrong = clip_score(evaluator, painted, PROMPTS[:1]), clip_score(evaluator, painted, PROMPTS[1:2])
    noisy = (painted + 0.5 * torch.randn(painted.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert right > wrong + 1
    assert clip_score(evaluator, noisy, PROMPTS[:1]) < right - 1


def test_consistency_falls_with_how_much_the_picture_changes(evaluator):
    still = np.repeat(_pictures(1, 1, 64, 64), 4, axis=1)
    other = _pictures(1, 4, 64, 64, seed=1)
    scores = [clip_temporal_consistency(evaluator, (1 - w) * still + w * other).item() for w in (0.0, 0.3, 1.0)]
    assert scores[0] == pytest.approx(100, abs=1e-3)
    assert scores == sorted(scores, reverse=True) and scores[0] - scores[1] > 1e-3
    there_and_back = other[:, [0, 1, 0, 1]]
    first, second = evaluator.frames(other)[0, :2]
    assert clip_temporal_consistency(evaluator, there_and_back).item() == pytest.approx(
        100 * float(first @ second), 1e-4
    )


def test_perceptual_distance_is_its_definition(evaluator):
    a, b = _pictures(2, 128, 128), _pictures(2, 128, 128, seed=1)
    tower = evaluator.network.visual
    expected = np.zeros(2)
    with torch.no_grad():
        x, y = (2 * torch.from_numpy(v).permute(0, 3, 1, 2) - 1 for v in (a, b))
        for layer in (tower.stem, tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            x, y = layer(x), layer(y)
            unit = [v / v.norm(dim=1, keepdim=True).clamp(min=1e-12) for v in (x, y)]
            expected += (unit[0] - unit[1]).square().sum(1).mean((1, 2)).numpy() / 5
    assert shapes_perceptual(evaluator, a, b, batch=1).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_perceptual_distance_grows_with_noise_and_blur(evaluator):
    clean = _pictures(2, 3, 64, 64)  # videos
    noise = np.random.default_rng(0).normal(size=clean.shape).astype(np.float32)
    levels = [0.0, 0.01, 0.05, 0.2]
    distances = [shapes_perceptual(evaluator, (clean + s * noise).clip(0, 1), clean).mean().item() for s in levels]
    assert distances[0] == 0
    assert distances == sorted(distances) and len(set(distances)) == len(levels)
    blurred = (clean + np.roll(clean, 4, axis=-2) + np.roll(clean, 4, axis=-3)) / 3
    assert shapes_perceptual(evaluator, blurred, clean).mean() > distances[1]
    torch.testing.assert_close(
        shapes_perceptual(evaluator, blurred, clean), shapes_perceptual(evaluator, clean, blurred), rtol=1e-5, atol=0
    )


def test_a_clip_tower_is_an_extractor(evaluator):
    videos = _pictures(2, 3, 64, 64)
    features = image_features(evaluator, videos, batch=4)
    assert features.shape == (2, 128)
    frame = evaluator(torch.from_numpy(videos[0]).permute(0, 3, 1, 2))
    np.testing.assert_allclose(features[0], frame.double().mean(0).numpy(), rtol=1e-4, atol=1e-6)


def test_grey_counts_as_rgb_and_alpha_is_refused(evaluator):
    grey = _pictures(1, 64, 64)[..., :1]
    assert (evaluator.frames(grey) == evaluator.frames(grey.repeat(3, axis=-1))).all()
    with pytest.raises(ValueError, match="alpha"):
        evaluator.frames(np.zeros((1, 64, 64, 4), np.float32))


def test_nothing_global_changes(evaluator, tmp_path, monkeypatch):
    from diffaccel.assets.make.evaluator import build, save

    save(build(), tmp_path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    state, python = torch.get_rng_state(), random.getstate()
    clip = load_clip(f"local-dir:{tmp_path}")
    clip.network.train()
    clip_score(clip, _pictures(1, 32, 32), PROMPTS[:1])
    assert (torch.get_rng_state() == state).all() and random.getstate() == python
    assert logging.getLogger().handlers == []
    assert clip.network.training and torch.is_grad_enabled()


def test_what_cannot_be_loaded_or_scored_is_refused(evaluator, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"without pretrained weights says nothing; weights of 'ViT-B-32': openai"):
        load_clip("ViT-B-32")
    with pytest.raises(ValueError, match="cannot load CLIP model 'ViT-B-33'"):
        load_clip("ViT-B-33", "openai")
    with pytest.raises(ValueError, match=r"open_clip_config\.json"):
        load_clip(f"local-dir:{tmp_path}")
    for prompts in (PROMPTS[:2], "a red circle"):
        with pytest.raises(ValueError, match="one prompt for each of 3 samples"):
            clip_score(evaluator, _pictures(3, 32, 32), prompts)
    with pytest.raises(ValueError, match="at least 2 frames"):
        clip_temporal_consistency(evaluator, _pictures(3, 32, 32))
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        load_clip("ViT-B-32", "openai")
