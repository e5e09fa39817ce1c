"""The drawn world: reproducible, described in words that are read back, and silent about held-out combinations."""

import json

import numpy as np
import pytest

from diffaccel.assets.make import heldout, world
from diffaccel.errors import InputError
from diffaccel.eval.scenes import MOTIONS, RELATIONS, SHAPES, SYMMETRY, TEXTURES, Scene, Thing, caption, parse


def test_a_seed_fixes_every_pixel():
    def drawn(seed):
        rng = np.random.default_rng(seed)
        image = world.draw_image(world.draw_scene(rng), 64, rng)
        return image, world.draw_clip(world.draw_moving_scene(rng), 48, rng)

    for a, b, other in zip(drawn(1), drawn(1), drawn(2), strict=True):
        assert np.array_equal(a, b) and not np.array_equal(a, other)
        assert a.dtype == np.uint8 and a.shape[-1] == 3


def test_training_never_draws_a_held_out_combination():
    held = json.loads((heldout.PROMPTS / "heldout.json").read_text())
    placed, moving = ({tuple(row) for row in held[name]} for name in ("placed", "moving"))
    pairs = {frozenset(map(tuple, pair)) for pair in held["pairs"]}
    rng = np.random.default_rng(0)
    seen: set[object] = set()
    for _ in range(10_000):
        scene = world.draw_scene(rng)
        seen |= {(t.size, t.color, t.shape, t.place) for t in scene.things if t.place}
        if len(scene.things) == 2:
            seen.add(frozenset((t.color, t.shape) for t in scene.things))
        moved = world.draw_moving_scene(rng)
        seen.add((moved.things[0].color, moved.things[0].shape, moved.motion))
    assert not seen & (placed | moving | pairs)
    # all that is not held out does occur, so what is learnt is the rest of the world and not less
    assert len([s for s in seen if isinstance(s, tuple) and len(s) == 4]) == 480 - len(placed)
    assert len([s for s in seen if isinstance(s, tuple) and len(s) == 3]) == 320 - len(moving)


def test_committed_lists_are_what_the_script_writes():
    written = json.loads((heldout.PROMPTS / "heldout.json").read_text())
    assert written == json.loads(json.dumps(heldout.choose()))
    for name, lines in heldout.prompts().items():
        assert (heldout.PROMPTS / name).read_text().splitlines() == lines
        assert len(set(lines)) == len(lines)
    assert [len(lines) for lines in heldout.prompts().values()] == [256, 128, 64, 64]


@pytest.mark.parametrize("name", ["image", "video"])
def test_every_evaluation_prompt_asks_for_a_held_out_combination(name):
    for line in (heldout.PROMPTS / f"heldout_{name}.txt").read_text().splitlines():
        assert heldout.is_held_out(parse(line)), line


@pytest.mark.parametrize("name", ["image", "video"])
def test_settings_are_chosen_on_other_combinations(name):
    for line in (heldout.PROMPTS / f"tuning_{name}.txt").read_text().splitlines():
        assert not heldout.is_held_out(parse(line)), line


def test_captions_are_read_back():
    rng = np.random.default_rng(3)
    for _ in range(300):
        for scene in (world.draw_scene(rng), world.draw_moving_scene(rng)):
            back = parse(world.describe(scene, rng))
            plain = back.texture is None and scene.texture == "plain"
            assert back.things == scene.things and (back.relation, back.motion) == (scene.relation, scene.motion)
            assert back.background == scene.background and (plain or back.texture == scene.texture)


def test_dropped_attributes_are_left_open():
    scene = Scene((Thing("star", "pink", "small", "top"),), None, "striped", "black")
    rng = np.random.default_rng(0)
    assert world.describe(scene, rng, drop=1.0) == "a pink star"
    heard = {world.describe(scene, rng, drop=0.5) for _ in range(200)}
    assert "a small pink star on a striped black background" in heard and "a pink star at the top" in heard


@pytest.mark.parametrize("text", ["", "a dog", "a red circle over a blue star", "a huge red circle"])
def test_other_sentences_are_refused(text):
    with pytest.raises(InputError, match="captions such as"):
        parse(text)


def test_everything_occurs():
    rng = np.random.default_rng(4)
    scenes = [world.draw_scene(rng) for _ in range(400)]
    assert {s.relation for s in scenes} == {None, *RELATIONS}
    assert {s.texture for s in scenes} == set(TEXTURES)
    moving = [world.draw_moving_scene(rng) for _ in range(300)]
    assert {s.motion for s in moving} == set(MOTIONS)
    assert all(SYMMETRY[s.things[0].shape] for s in moving if s.motion == "rotating")
    assert {s.things[0].shape for s in moving} == set(SHAPES)


def test_a_front_object_hides_a_part_of_the_other():
    rng = np.random.default_rng(5)
    scene = Scene((Thing("circle", "red", "small"), Thing("square", "blue", "large")), "in front of", "plain", "white")
    back, front = world.place(scene, rng)
    assert (back.color, front.color) == ("blue", "red")
    apart = np.hypot(back.x - front.x, back.y - front.y)[0]
    assert apart < back.radius[0] + front.radius[0]


@pytest.mark.parametrize("front", SHAPES)
@pytest.mark.parametrize("back", SHAPES)
def test_every_two_shapes_can_overlap(front, back):
    for seed in range(4):
        scene = Scene((Thing(front, "red", "small"), Thing(back, "blue", "large")), "in front of", "plain", "white")
        assert len(world.place(scene, np.random.default_rng(seed))) == 2


def test_captions_in_words():
    pair = Scene(
        (Thing("ring", "red", "small", "left"), Thing("star", "blue", None, "right")), "left of", "checked", "gray"
    )
    assert caption(pair) == "a small red ring left of a blue star on a checked gray background"
    assert caption(pair, places=True) == (
        "a small red ring on the left and a blue star on the right on a checked gray background"
    )
