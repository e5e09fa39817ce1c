"""Closeness to the reference: against the originals, and in the right direction. Preference scores by stand-ins."""

import sys
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch

from diffaccel.eval.metrics.cosine import latent_cosine
from diffaccel.eval.metrics.flicker import temporal_difference_error
from diffaccel.eval.metrics.lpips import Lpips
from diffaccel.eval.metrics.preference import hpsv2, image_reward, preference
from diffaccel.eval.metrics.psnr import psnr
from diffaccel.eval.metrics.ssim import ssim


def _noisy(level: float, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    clean = rng.random(shape, dtype=np.float32).cumsum(-2).cumsum(-3)  # with slopes, as pictures have
    clean = clean / clean.max()
    return (clean + level * rng.normal(size=shape).astype(np.float32)).clip(0, 1), clean


@pytest.mark.parametrize("level", [0.003, 0.03, 0.3])
@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_are_scikit_images(level, channels):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    samples, reference = _noisy(level, 2, 40, 33, channels)
    expected_db = [peak_signal_noise_ratio(r, s, data_range=1) for r, s in zip(reference, samples, strict=True)]
    assert psnr(samples, reference).tolist() == pytest.approx(expected_db, abs=1e-3)
    settings = dict(data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    expected = [structural_similarity(r, s, **settings) for r, s in zip(reference, samples, strict=True)]
    assert ssim(samples, reference).tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_psnr_and_ssim_fall_with_noise(metric):
    values = [metric(*_noisy(level, 2, 32, 32, 3)).mean().item() for level in (0.01, 0.03, 0.1, 0.3)]
    assert values == sorted(values, reverse=True)


def test_flicker_counts_what_changes_over_time_only():
    reference = np.full((1, 6, 8, 8, 3), 0.5, np.float32)
    flickering, brighter = reference.copy(), reference + 0.1
    flickering[:, 1::2] += 0.1
    assert temporal_difference_error(brighter, reference).item() == pytest.approx(0, abs=1e-7)
    assert temporal_difference_error(flickering, reference).item() == pytest.approx(0.1, abs=1e-6)
    popping = reference.copy()
    popping[:, 3:] += 0.1  # one jump in five differences
    assert temporal_difference_error(popping, reference).item() == pytest.approx(0.02, abs=1e-6)
    assert psnr(popping, reference) > psnr(brighter, reference)  # which is why PSNR alone does not do


def test_flicker_compares_motions():
    step = np.eye(8, dtype=np.float32)[None, :, None, :, None].repeat(3, -1)  # [1, 8, 1, 8, 3]: a dot that moves right
    assert temporal_difference_error(step, step).item() == 0
    assert (
        temporal_difference_error(step[:, ::-1], step).item() > temporal_difference_error(0.9 * step, step).item() > 0
    )
    with pytest.raises(ValueError, match="at least 2 frames"):
        temporal_difference_error(step[:, 0], step[:, 0])
    with pytest.raises(ValueError, match="differ in shape"):
        temporal_difference_error(step[:, :4], step)


def test_latent_cosine():
    a = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[1.0, 1.0]]])
    b = torch.tensor([[[6.0, 8.0]], [[0.0, 2.0]], [[-1.0, -1.0]]])
    assert latent_cosine(a, b).tolist() == pytest.approx([1, 0, -1], abs=1e-12)
    assert latent_cosine(a.half(), b.half()).dtype == torch.float64
    latents, noise = torch.randn(2, 4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    values = [latent_cosine(latents + s * noise, latents).mean().item() for s in (0.0, 0.1, 0.5, 2.0)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), "one shape"),
        (torch.ones(3), torch.ones(3), "one shape"),
        (torch.ones(2, 3), torch.zeros(2, 3), "reference: a sample is all zeros"),
        (torch.full((2, 3), torch.nan), torch.ones(2, 3), "latents: a sample holds NaN"),
    ],
)
def test_latents_without_an_angle_are_refused(a, b, says):
    with pytest.raises(ValueError, match=says):
        latent_cosine(a, b)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)


def test_lpips_without_weights_says_where_to_put_them(no_network, tmp_path):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"{tmp_path}/hub/checkpoints"):
        Lpips()
    assert (torch.get_rng_state() == state).all()


def test_lpips_with_random_backbone_weights(monkeypatch):
    """The values mean nothing, the direction does: a random backbone's features tell pictures apart, too."""
    import torchvision
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = torchvision.models.squeezenet1_1(weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: weights)
    lpips = Lpips("squeeze")
    values = [lpips(*_noisy(level, 2, 64, 72, 3)) for level in (0.0, 0.02, 0.1, 0.4)]
    assert values[0].tolist() == [0, 0] and values[0].dtype == torch.float64
    means = [v.mean().item() for v in values]
    assert means == sorted(means)
    samples, reference = _noisy(0.1, 1, 2, 64, 64, 3)
    frames = lpips(samples[0], reference[0])
    assert lpips(samples, reference).item() == pytest.approx(frames.mean().item(), rel=1e-6)
    theirs = learned_perceptual_image_patch_similarity(
        *(2 * torch.from_numpy(x[0]).permute(0, 3, 1, 2) - 1 for x in (samples, reference)), "squeeze", reduction="none"
    )
    assert frames.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    assert not lpips.metric.all_scores  # torchmetrics would keep the values of every call
    with pytest.raises(ValueError, match="64 x 64"):
        lpips(*_noisy(0.1, 1, 32, 64, 3))


def test_inception_without_weights_says_which_file_to_fetch(no_network, tmp_path):
    from diffaccel.eval.metrics.inception import Inception

    with pytest.raises(ValueError, match=r"Fetch https://github.com/toshas/.*\.pth"):
        Inception()
    with pytest.raises(ValueError, match="cannot be had"):
        Inception(tmp_path / "missing.pth")


def test_preference_asks_the_scorer_frame_by_frame():
    """A stand-in that likes bright pictures and long prompts."""
    images = np.stack([np.full((4, 6, 3), v, np.float32) for v in (0.0, 0.999)])  # 0.999 rounds to 255
    asked = []

    def scorer(picture, prompt):
        asked.append((picture.size, picture.mode, prompt))
        return picture.getpixel((0, 0))[0] / 255 + len(prompt)

    assert preference(scorer, images, ["a", "bcd"]).tolist() == [1, 4]
    assert asked == [((6, 4), "RGB", "a"), ((6, 4), "RGB", "bcd")]
    assert preference(scorer, images[None], ["a"]).tolist() == [1.5]  # of a video, the mean
    with pytest.raises(ValueError, match="one prompt for each of 2"):
        preference(scorer, images, ["a"])
    with pytest.raises(ValueError, match="nan"):
        preference(lambda picture, prompt: float("nan"), images, ["a", "b"])


def test_preference_packages_are_called_as_they_want_it(monkeypatch):
    calls = []
    model = SimpleNamespace(score=lambda prompt, picture: calls.append((prompt, picture)) or 0.5)
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda name: model))
    package = SimpleNamespace(score=lambda picture, prompt, hps_version: [float(hps_version == "v2.1")])
    monkeypatch.setitem(sys.modules, "hpsv2", package)
    assert image_reward()("picture", "prompt") == 0.5 and calls == [("prompt", "picture")]
    assert hpsv2()("picture", "prompt") == 1.0


@pytest.mark.parametrize(
    ("load", "module", "pip"), [(image_reward, "ImageReward", "image-reward"), (hpsv2, "hpsv2", "hpsv2")]
)
def test_a_missing_preference_package_is_named(load, module, pip, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {pip}"):
        load()
