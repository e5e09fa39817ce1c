"""Distances of sets of features: against known values, against the originals, and in the right direction."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from diffaccel.eval.metrics.cmmd import cmmd
from diffaccel.eval.metrics.features import image_features, video_features
from diffaccel.eval.metrics.frechet import frechet, frechet_infinity
from diffaccel.eval.metrics.inception import Inception
from diffaccel.eval.metrics.inception_score import inception_score


def _with_moments(mean: np.ndarray, covariance: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Samples whose own mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(linalg.cholesky(np.cov(x, rowvar=False)))
    return x @ linalg.cholesky(covariance) + mean


def _covariance(d: int, seed: int) -> np.ndarray:
    half = np.random.default_rng(seed).normal(size=(d, d))
    return half @ half.T + 0.1 * np.eye(d)


def test_frechet_of_gaussians_is_what_scipys_matrix_root_gives():
    s, t = _covariance(12, 1), _covariance(12, 2)
    shift = np.random.default_rng(3).normal(size=12)
    expected = shift @ shift + np.trace(s + t - 2 * linalg.sqrtm(s @ t).real)
    result = frechet(_with_moments(shift, s, 50), _with_moments(np.zeros(12), t, 70, seed=1))
    assert result.value == pytest.approx(expected, rel=1e-8)
    assert (result.samples, result.reference) == (50, 70)


def test_frechet_of_commuting_gaussians_by_hand():
    """Of independent axes it is the squared difference of means and of standard deviations, summed up."""
    a = _with_moments(np.array([1.0, 0.0]), np.diag([4.0, 9.0]), 30)
    b = _with_moments(np.array([0.0, 2.0]), np.diag([1.0, 25.0]), 30, seed=1)
    assert frechet(a, b).value == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-9)


def test_frechet_is_torch_fidelitys():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    rng = np.random.default_rng(0)
    a, b = (
        rng.normal(size=(200, 48)).clip(0),
        rng.normal(0.2, 1.3, size=(150, 48)).clip(0),
    )  # after a ReLU, as Inception
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.tensor(x)) for x in (a, b)), False)
    assert frechet(a, b).value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-8)


def test_frechet_bears_dead_features():
    """Constant features make both covariances singular, where a general matrix root may turn complex or fail."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 8)), rng.normal(size=(60, 8))
    dead = [np.hstack([x, np.full((60, 4), 3.0)]) for x in (a, b)]
    assert frechet(*dead).value == pytest.approx(frechet(a, b).value, rel=1e-6)
    assert frechet(dead[0], dead[0]).value == pytest.approx(0, abs=1e-6)


def test_too_few_samples_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="8 samples are too few for 8 features: need 9"):
        frechet(rng.normal(size=(8, 8)), rng.normal(size=(100, 8)))
    with pytest.raises(ValueError, match="8 reference"):
        frechet(rng.normal(size=(100, 8)), rng.normal(size=(8, 8)))
    with pytest.raises(ValueError, match="need 32"):
        frechet_infinity(rng.normal(size=(31, 8)), rng.normal(size=(100, 8)))


def test_frechet_infinity_is_nearer_to_the_truth():
    rng = np.random.default_rng(0)
    reference = _with_moments(np.zeros(16), np.eye(16), 1000)  # the truth is 0
    plain, infinite = [], []
    for _ in range(5):
        samples = rng.normal(size=(200, 16))
        plain.append(frechet(samples, reference).value)
        infinite.append(frechet_infinity(samples, reference).value)
    assert np.mean(plain) > 0.3
    assert np.abs(infinite).mean() < np.mean(plain) / 4
    assert frechet_infinity(samples, reference) == frechet_infinity(samples, reference)


def _cmmd_of_the_paper(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, with all distances spelt out."""

    def kernel(a, b):
        return np.exp(-np.square(a[:, None] - b[None]).sum(-1) / (2 * 10**2)).mean()

    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    return 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


def test_cmmd_is_its_definition(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.3, 1, size=(70, 16)), rng.normal(size=(50, 16))
    monkeypatch.setattr("diffaccel.eval.metrics.cmmd._ROWS", 32)  # several blocks and a remainder
    assert cmmd(x, y) == pytest.approx(_cmmd_of_the_paper(x, y), rel=1e-9)
    assert cmmd(7 * x, y) == pytest.approx(cmmd(x, y), rel=1e-9)


def test_unbiased_cmmd_does_not_depend_on_the_number_of_samples():
    rng = np.random.default_rng(0)
    draws = [(rng.normal(0.5, 1, size=(n, 16)), rng.normal(0.5, 1, size=(400, 16))) for n in (20, 40) * 10]
    assert np.mean([cmmd(a, b) for a, b in draws]) > 0.2
    assert abs(np.mean([cmmd(a, b, unbiased=True) for a, b in draws])) < 0.02
    with pytest.raises(ValueError, match="at least 2"):
        cmmd(draws[0][0][:1], draws[0][1], unbiased=True)


@pytest.mark.parametrize("distance", [lambda a, b: frechet(a, b).value, cmmd], ids=["frechet", "cmmd"])
def test_distances_grow_with_shift_spread_and_collapse(distance):
    rng = np.random.default_rng(0)
    reference, fresh = rng.normal(1, 1, size=(2, 400, 8))
    shifted = [distance(fresh + np.eye(8)[0] * step, reference) for step in (0.0, 0.5, 1.0, 2.0)]
    assert shifted == sorted(shifted) and shifted[1] > 2 * shifted[0]
    assert distance(1 + 2 * (fresh - 1), reference) > 2 * distance(fresh, reference)
    collapsed = fresh[:1] + 0.01 * rng.normal(size=fresh.shape)
    assert distance(collapsed, reference) > 5 * distance(fresh, reference)
    assert distance(reference, reference) == pytest.approx(0, abs=1e-9)
    assert distance(fresh, reference) == pytest.approx(distance(reference, fresh), rel=1e-9)


def test_inception_score_of_known_distributions():
    sure, unsure = np.eye(10)[np.arange(500) % 10], np.full((500, 10), 0.1)
    assert inception_score(sure, splits=1).mean == pytest.approx(10)  # sure, and all classes: the most
    assert inception_score(unsure).mean == pytest.approx(1)
    assert inception_score(np.eye(10)[np.zeros(500, int)]).mean == pytest.approx(1)  # sure, but always the same
    half = (sure + unsure) / 2
    assert 1 < inception_score(half).mean < inception_score(sure).mean


def test_inception_score_is_torch_fidelitys():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.tensor(np.random.default_rng(0).normal(0, 2, size=(103, 7)))
    theirs = isc_features_to_metric(logits)
    ours = inception_score(logits.softmax(1))
    assert (ours.mean, ours.deviation) == pytest.approx(tuple(theirs.values()), rel=1e-9)
    assert ours.samples == 103


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: frechet(x[:, 0], x), r"samples as features \[N, D\], got shape \[20\]"),
        (lambda x: frechet(x, np.where(x > 2, np.nan, x)), "reference: features hold NaN"),
        (lambda x: frechet(x, x[:, :2]), "samples have 3 features, the reference 2"),
        (lambda x: cmmd(x, x[:, :2]), "samples have 3 features, the reference 2"),
        (lambda x: cmmd(0 * x, x), "samples: an embedding is all zeros"),
        (lambda x: inception_score(x), "softmax"),
        (lambda x: inception_score(np.eye(3)), r"splits must lie in \[1, 3\]"),
    ],
)
def test_what_is_no_feature_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(np.random.default_rng(0).normal(size=(20, 3)) + 1)


def test_extractors_see_frames_or_videos_in_batches():
    videos = np.random.default_rng(0).random((5, 3, 4, 6, 3), dtype=np.float32)
    sizes = []

    def means(pictures):
        sizes.append(tuple(pictures.shape))
        return pictures.mean((-2, -1))

    np.testing.assert_allclose(image_features(means, videos, batch=4), videos.mean((1, 2, 3)), rtol=1e-5)
    assert sizes == [(4, 3, 4, 6)] * 3 + [(3, 3, 4, 6)]
    swing = video_features(lambda clips: clips.diff(dim=1).mean((-2, -1)).flatten(1), videos, batch=2)
    np.testing.assert_allclose(swing[:, :3], (videos[:, 1] - videos[:, 0]).mean((1, 2)), rtol=1e-3, atol=1e-6)


def test_a_module_is_run_in_eval_mode_and_left_as_it_was():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 4))
    network[2].eval()
    images = np.ones((3, 4, 4, 3), np.float32)
    features = image_features(network, images)
    assert (features == features[0]).all()  # no dropout
    assert [m.training for m in network.modules()] == [True, True, True, False]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("extractor", "says"),
    [
        (lambda x: x, r"one row of features for each of 2 samples, got \[2, 3, 4, 4\]"),
        (lambda x: x.mean((0, 2, 3))[None], r"got \[1, 3\]"),
        (lambda x: None, "got NoneType"),
        (lambda x: x.flatten(1) * math.nan, "NaN"),
    ],
)
def test_a_wrong_extractor_is_refused(extractor, says):
    with pytest.raises(ValueError, match=says):
        image_features(extractor, np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="at least 2 frames"):
        video_features(extractor, np.zeros((2, 4, 4, 3), np.float32))


def test_inception_gives_features_and_probabilities(monkeypatch):
    """With random weights, since the real ones come from the network: shapes, range and rounding."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    inception = Inception()
    images = np.random.default_rng(0).random((2, 32, 32, 3), dtype=np.float32)
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2)
    bytes_ = (255 * pictures).round().byte()
    np.testing.assert_array_equal(image_features(inception, images), inception.network(bytes_)[0].double().numpy())
    probabilities = inception.probabilities(pictures)
    assert probabilities.shape == (2, 1008)
    assert 1 <= inception_score(probabilities, splits=1).mean <= 2  # of two samples, two classes at most
