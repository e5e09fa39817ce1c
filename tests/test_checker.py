"""The checker against drawings whose truth is known, and against pictures that are wrong."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from diffaccel.assets.make import world
from diffaccel.errors import InputError
from diffaccel.eval.checker import check_image, check_video, follow, see
from diffaccel.eval.scenes import Scene, Thing

RED_LEFT = Scene((Thing("circle", "red", "large", "left"),), None, "plain", "gray")


def _drawn(scene, seed=0, size=128):
    return world.draw_image(scene, size, np.random.default_rng(seed))


def _accurate(verdicts, least):
    right, of = Counter(), Counter()
    for verdict in verdicts:
        for name, value in verdict.items():
            right[name] += value
            of[name] += 1
    shares = {name: right[name] / of[name] for name in of}
    assert all(share >= least for share in shares.values()), (shares, of)
    return of


def test_images_are_read_at_99_percent():
    rng = np.random.default_rng(11)
    verdicts = []
    for i in range(300):
        scene = world.draw_scene(rng)
        verdicts.append(check_image(world.draw_image(scene, (256, 128, 96, 96, 96)[i % 5], rng), scene))
    of = _accurate(verdicts, 0.99)
    assert of["shape"] == 300 and of["relation"] > 120 and of["place"] > 200


def test_overlapping_objects_are_read():
    rng = np.random.default_rng(12)
    verdicts = []
    while len(verdicts) < 30:
        scene = world.draw_scene(rng, pairs=1.0)
        if scene.relation == "in front of":
            verdicts.append(check_image(world.draw_image(scene, 128, rng), scene))
    _accurate(verdicts, 0.96)


def test_clips_are_read_at_99_percent():
    rng = np.random.default_rng(13)
    scenes = [world.draw_moving_scene(rng) for _ in range(24)]
    verdicts = [check_video(world.draw_clip(scene, world.VIDEO_SIZE, rng, frames=6), scene) for scene in scenes]
    _accurate(verdicts, 0.99)


def test_blur_and_noise_of_a_decoder_do_not_matter():
    rng = np.random.default_rng(14)
    verdicts = []
    for _ in range(24):
        scene = replace(world.draw_scene(rng), texture=None)
        image = world.draw_image(replace(scene, texture="checked"), 128, rng).astype(np.float32)
        image = ndimage.gaussian_filter(image, (0.8, 0.8, 0)) + rng.normal(0, 5, image.shape)
        verdicts.append(check_image(np.clip(image / 255, 0, 1), scene))
    _accurate(verdicts, 0.95)


@pytest.mark.parametrize(
    ("attribute", "shown"),
    [
        ("color", "a large green circle on the left on a gray background"),
        ("shape", "a large red square on the left on a gray background"),
        ("size", "a small red circle on the left on a gray background"),
        ("place", "a large red circle at the top on a gray background"),
        ("background", "a large red circle on the left on a brown background"),
        ("texture", "a large red circle on the left on a striped gray background"),
    ],
)
def test_each_attribute_can_be_wrong_alone(attribute, shown):
    verdict = check_image(_drawn(RED_LEFT), shown)
    assert not verdict.pop("all") and not verdict.pop(attribute)
    assert all(verdict.values()), verdict


def test_relations_and_counts_can_be_wrong():
    pair = Scene(
        (Thing("star", "pink", "small", "left"), Thing("ring", "cyan", "small", "right")), "left of", "plain", "black"
    )
    image = _drawn(pair)
    assert check_image(image, "a pink star left of a cyan ring")["all"]
    for wrong in (
        "a pink star right of a cyan ring",
        "a pink star above a cyan ring",
        "a pink star in front of a cyan ring",
    ):
        assert not check_image(image, wrong)["relation"]
    assert not check_image(image, "a pink star")["count"]
    assert not check_image(_drawn(RED_LEFT), "a red circle left of a blue star")["all"]


def test_front_and_back_are_told_apart():
    front = Scene((Thing("square", "red", "small"), Thing("circle", "blue", "large")), "in front of", "plain", "white")
    image = _drawn(front)
    assert check_image(image, "a red square in front of a blue circle")["all"]
    assert not check_image(image, "a blue circle in front of a red square")["relation"]


def test_an_empty_and_a_noisy_picture_show_nothing():
    empty = np.full((96, 96, 3), 0.45)
    assert see(empty).objects == ()
    assert not check_image(empty, RED_LEFT)["all"]
    noise = np.random.default_rng(0).random((96, 96, 3))
    assert not check_image(noise, RED_LEFT)["shape"]


def test_motion_can_be_wrong():
    scene = Scene((Thing("triangle", "yellow", "small"),), None, "plain", "black", "moving right")
    clip = world.draw_clip(scene, 64, np.random.default_rng(0), frames=7)
    assert check_video(clip, scene)["all"]
    for motion in ("moving left", "moving down", "growing", "rotating"):
        assert not check_video(clip, replace(scene, motion=motion))["motion"]
    assert not check_video(clip[::-1], scene)["motion"]
    assert follow(np.repeat(clip[:1], 7, axis=0)).motion is None
    assert not check_video(np.zeros_like(clip), scene)["visible"]


def test_other_input_is_refused():
    with pytest.raises(InputError, match="square RGB"):
        see(np.zeros((64, 32, 3)))
    with pytest.raises(InputError, match="5 frames"):
        follow(np.zeros((3, 64, 64, 3)))
    with pytest.raises(InputError, match="one moving object"):
        check_video(np.zeros((5, 64, 64, 3)), "a red circle")
