"""Metrics against values worked out by hand, and the one convention for samples."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.eval.metrics.psnr import psnr
from diffaccel.eval.metrics.samples import as_samples
from diffaccel.eval.metrics.ssim import ssim


def _noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def test_psnr_of_known_errors():
    reference = np.full((3, 8, 8, 3), 0.5, np.float32)
    samples = reference.copy()
    samples[1] += 0.1
    samples[2, :4] += 0.1  # half of the pixels: half the squared error
    db = psnr(samples, reference)
    assert math.isinf(db[0])
    assert db[1:].tolist() == pytest.approx([20, 20 + 10 * math.log10(2)], abs=1e-5)


def test_a_video_is_one_sample_and_its_error_is_pooled_over_frames():
    reference = np.zeros((1, 4, 12, 12, 3), np.float32)
    samples = reference.copy()
    samples[0, 0] = 0.2  # one frame of four: mean squared error 0.01
    assert psnr(samples, reference).tolist() == pytest.approx([20], abs=1e-4)


def test_ssim_of_a_video_is_the_mean_over_frames():
    reference, samples = _noise(1, 3, 16, 20, 3), _noise(1, 3, 16, 20, 3, seed=1)
    samples[0, 0] = reference[0, 0]
    frames = ssim(samples[0], reference[0])
    assert frames[0] == pytest.approx(1, abs=1e-5)
    assert ssim(samples, reference).item() == pytest.approx(frames.mean().item(), abs=1e-6)


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b = np.full((1, 16, 16, 1), 0.4, np.float32), np.full((1, 16, 16, 1), 0.6, np.float32)
    c1 = 0.01**2
    assert ssim(a, b).item() == pytest.approx((2 * 0.24 + c1) / (0.16 + 0.36 + c1), abs=4e-4)


@pytest.mark.parametrize("frames", [None, 3])
def test_arrays_tensors_bytes_and_pictures_mean_the_same(frames):
    lead = (2,) if frames is None else (2, frames)
    array = (_noise(*lead, 12, 14, 3) * 255).round().astype(np.uint8)
    as_float = array.astype(np.float32) / 255
    if frames is None:
        pictures = [Image.fromarray(a) for a in array]
    else:
        pictures = [[Image.fromarray(f) for f in video] for video in array]
    tensor = torch.from_numpy(as_float).movedim(-1, -3)
    expected = as_samples(as_float)
    assert expected.shape == (2, frames or 1, 3, 12, 14)
    for form in (array, list(array), list(as_float), tensor, list(tensor), pictures):
        torch.testing.assert_close(as_samples(form), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.zeros((8, 8, 3), np.float32), r"expected images or videos \[N, H, W, C\]"),
        (np.full((1, 8, 8, 3), -1.0, np.float32), r"\[0, 1\], got \[-1, -1\]"),
        (np.full((1, 8, 8, 3), np.nan, np.float32), "NaN"),
        (np.zeros((1, 8, 8, 5), np.float32), "channels"),
        (np.zeros((1, 8, 8, 3), np.int64), "uint8"),
        ([], "no samples"),
    ],
)
def test_what_is_no_sample_is_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        as_samples(bad)


def test_different_shapes_and_too_small_images_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(_noise(1, 8, 8, 3), _noise(1, 8, 9, 3))
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(_noise(1, 8, 8, 3), _noise(1, 8, 8, 3))
