"""Loading, generating, image-to-image and resumable batches, on the bundled pipelines and tiny ones of other kinds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from zoo_pipelines import PIPELINES

import diffaccel
from diffaccel.errors import InputError, ModelError, PlanError
from diffaccel.pipelines import BUNDLED, Wrapped, load
from diffaccel.pipelines.batch import MANIFEST, Job, make_jobs, run_jobs
from diffaccel.pipelines.media import check_writable, read_image, save_image, save_video
from diffaccel.pipelines.start_image import can_start_from_image

CIRCLE = BUNDLED["bundled:image"].example


@pytest.fixture(scope="module")
def image_pipeline():
    wrapped = load("bundled:image", device="cpu")
    wrapped.pipe.set_progress_bar_config(disable=True)
    return wrapped


@pytest.fixture(scope="module")
def video_pipeline():
    wrapped = load("bundled:video", device="cpu")
    wrapped.pipe.set_progress_bar_config(disable=True)
    return wrapped


# --- loading ---


def test_bundled_needs_no_network(monkeypatch, image_pipeline):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a bundled pipeline went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    again = load("bundled:image", device="cpu").pipe
    assert all(
        torch.equal(a, b) for a, b in zip(again.vae.parameters(), image_pipeline.pipe.vae.parameters(), strict=True)
    )


def test_local_folder_gives_the_same_pipeline_without_the_defaults(image_pipeline):
    folder = BUNDLED["bundled:image"].path
    wrapped = load(folder, dtype="float32", device="cpu")
    wrapped.pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in BUNDLED["bundled:image"].call.items() if k != "num_inference_steps"}
    (a,) = wrapped.generate_image(CIRCLE, steps=2, **call)
    (b,) = image_pipeline.generate_image(CIRCLE, steps=2)
    assert a.tobytes() == b.tobytes() and not wrapped.defaults


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("bundled:imge", "did you mean 'bundled:image'"),
        ("./nowhere", "no folder"),
        ("/nowhere/at/all", "no folder"),
    ],
)
def test_wrong_model(model, says):
    with pytest.raises(ModelError, match=says):
        load(model)


def test_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ModelError, match=r"holds no model_index\.json"):
        load(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"did you mean .*inner"):
        load(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path / "inner")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="from_single_file"):
        load(file)


def test_missing_hub(monkeypatch):
    """Whatever the hub's client raises without a network, it becomes one error that says what needs none."""
    from diffusers import DiffusionPipeline

    def offline(*args, **kwargs):
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", offline)
    with pytest.raises(ModelError, match=r"some/model.*Name or service not known\).*bundled:image") as caught:
        load("some/model")
    assert "second line" not in str(caught.value)


def test_missing_optional_package(monkeypatch):
    from diffusers import DiffusionPipeline

    def lacks(*args, **kwargs):
        raise ImportError("requires the ftfy library: pip install ftfy")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lacks)
    with pytest.raises(diffaccel.MissingPackageError, match="pip install ftfy"):
        load("some/model")


@pytest.mark.parametrize(("argument", "value"), [("dtype", "float8"), ("device", "gpu"), ("device", "cuda:99")])
def test_wrong_dtype_or_device(argument, value):
    if value.startswith("cuda") and torch.cuda.is_available():
        value = "cuda-none"
    with pytest.raises(InputError, match=value):
        load("bundled:image", **{argument: value})


def test_bundled_prompts_are_understood():
    for bundled in BUNDLED.values():
        prompts, tuning = bundled.prompts(), bundled.tuning_prompts()
        assert len({*prompts, *tuning}) == len(prompts) + len(tuning) and min(len(prompts), len(tuning)) >= 64
        assert not [w for p in [*prompts, *tuning, bundled.example] for w in bundled.unknown_words(p)]


# --- generating ---


def test_image_is_what_the_pipeline_itself_gives(image_pipeline, tmp_path):
    (ours,) = image_pipeline.generate_image(CIRCLE, seed=7, steps=4, out=tmp_path / "deep" / "a.png")
    call = {**BUNDLED["bundled:image"].call, "num_inference_steps": 4}
    theirs = image_pipeline.pipe(prompt=CIRCLE, generator=torch.Generator().manual_seed(7), **call).images[0]
    assert ours.tobytes() == theirs.tobytes()
    assert read_image(tmp_path / "deep" / "a.png").tobytes() == ours.tobytes()


def test_a_trained_picture_shows_its_prompt(image_pipeline):
    (image,) = image_pipeline.generate_image(CIRCLE)
    red, green, blue = image.getpixel((70, 128))
    background = np.asarray(image)[:, 200:].mean((0, 1))
    assert red > 180 > 90 > max(green, blue)
    assert np.ptp(background) < 25 and 100 < background.mean() < 160


def test_seed_means_the_same_in_a_batch(image_pipeline):
    batch = image_pipeline.generate_image([CIRCLE, CIRCLE], seed=5, steps=3)
    alone = [image_pipeline.generate_image(CIRCLE, seed=s, steps=3)[0] for s in (5, 6)]
    for a, b in zip(batch, alone, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2
    assert np.abs(np.asarray(alone[0], int) - np.asarray(alone[1], int)).max() > 20


def test_video(video_pipeline, tmp_path):
    import imageio.v3 as iio

    prompt = BUNDLED["bundled:video"].example
    (video,) = video_pipeline.generate_video(prompt, steps=3, frames=5, out=tmp_path / "a.mp4", fps=4)
    assert [f.size for f in video] == [(96, 96)] * 5
    read = iio.imread(tmp_path / "a.mp4")
    assert read.shape == (5, 96, 96, 3)
    difference = np.abs(read.astype(float) - np.stack([np.asarray(f) for f in video]))
    assert difference.mean() < 8  # H.264 with halved colour


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"prompt": 7}, "prompt must be a text"),
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": ["a", None]}, "prompt must be a text"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"steps": None, "num_inference_steps": 0}, "num_inference_steps must be a whole number >= 1, got 0"),
        ({"size": "256"}, "size must be"),
        ({"size": 100}, "refuses the call: .*divisible by 8"),
        ({"seed": -1}, "a seed must be"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"guidance": "high"}, "guidance must be a number"),
        ({"strength": 0.5}, "no image is given"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1"),
        ({"image": "a.png"}, "image must be"),
        ({"num_frames": 5}, "takes no 'num_frames'"),
        ({"out": "a.gif"}, r"must end in \.png"),
    ],
)
def test_bad_arguments(image_pipeline, tmp_path, monkeypatch, call, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        image_pipeline.generate_image(**{"prompt": CIRCLE, "steps": 1, **call})
    assert not list(tmp_path.iterdir())


def test_the_other_kind_is_refused(image_pipeline, video_pipeline):
    with pytest.raises(InputError, match=r"does text-to-image.*generate_image"):
        image_pipeline.generate_video(CIRCLE)
    with pytest.raises(InputError, match=r"does text-to-video.*generate_video"):
        video_pipeline.generate_image(CIRCLE)


# --- image to image ---


def test_image_to_image_goes_further_with_strength(image_pipeline):
    (red,) = image_pipeline.generate_image(CIRCLE, steps=10)
    prompt = CIRCLE.replace("red", "blue")
    reds = []
    for strength in (0.1, 1.0):
        (image,) = image_pipeline.generate_image(prompt, image=red, strength=strength, steps=10)
        pixel = np.asarray(image, float)[110:146, 60:80].mean((0, 1))
        reds.append(pixel[0] - pixel[2])
    assert reds[0] > 80 and reds[1] < -80


def test_image_to_image_begins_later_and_leaves_no_trace(image_pipeline):
    pipe = image_pipeline.pipe
    before, steps = dict(vars(pipe.scheduler)), []
    start = Image.new("RGB", (256, 256), "gray")
    with diffaccel.accelerate(pipe, diffaccel.Plan(), profile=True):  # the clock watches the same scheduler
        hook = pipe.transformer.register_forward_pre_hook(
            lambda m, a, k: steps.append(float(k["timestep"].flatten()[0])), with_kwargs=True
        )
        image_pipeline.generate_image(CIRCLE, image=start, strength=0.4, steps=10)
        hook.remove()
    pipe.scheduler.set_timesteps(10)
    assert steps == [float(t) for t in pipe.scheduler.timesteps[6:]]
    assert not {"set_timesteps", "step"} & set(vars(pipe.scheduler)) and set(before) == set(vars(pipe.scheduler))
    with pytest.raises(InputError, match="refuses the call"):
        image_pipeline.generate_image(CIRCLE, image=start, steps=10, size=100)
    assert not {"set_timesteps", "step"} & set(vars(pipe.scheduler))


# --- other families: told from the signature of the call ---

_GRADIENT = Image.fromarray(np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8))


def _tiny(name: str) -> Wrapped:
    specimen = PIPELINES[name]
    return Wrapped(specimen.build(), defaults={k: v for k, v in specimen.request.items() if k != "output_type"})


@pytest.mark.parametrize("name", ["sd15", "flux", "wan", "animatediff"])
def test_text_to_image_or_video(name):
    wrapped = _tiny(name)
    if wrapped.makes_video:
        (video,) = wrapped.generate_video("a red circle", steps=2)
        assert len(video) == wrapped.defaults["num_frames"]
        images = video
    else:
        images = wrapped.generate_image(["a red circle", "a blue square"], steps=2)
        assert len(images) == 2
    assert {i.size for i in images} == {(wrapped.defaults["width"], wrapped.defaults["height"])}


@pytest.mark.parametrize("name", ["sd15", "sd15_img2img", "flux", "pixart_sigma"])
def test_image_to_image_by_its_own_class_or_the_schedule(name):
    """sd15_img2img takes images itself, sd15 and flux have a class of diffusers for it, pixart_sigma has none."""
    wrapped = _tiny(name)
    wrapped.defaults.pop("strength", None)
    assert can_start_from_image(wrapped.pipe) == (name in ("sd15", "pixart_sigma"))
    near, far = (
        np.asarray(wrapped.generate_image("a red circle", image=_GRADIENT, strength=s, steps=10)[0], float)
        for s in (0.1, 1)
    )
    assert near.shape == (32, 32, 3)
    assert np.abs(near - far).max() > 1
    if name == "sd15_img2img":
        with pytest.raises(InputError, match=r"does image-to-image; give it an image"):
            wrapped.generate_image("a red circle", steps=2)


def test_image_to_video_without_a_prompt():
    wrapped = _tiny("svd")
    (video,) = wrapped.generate_video(image=_GRADIENT, steps=2)
    assert len(video) == 4
    with pytest.raises(InputError, match="does image-to-video; give it an image"):
        wrapped.generate_video(steps=2)
    with pytest.raises(InputError, match="takes no prompt"):
        wrapped.generate_video("a red circle", image=_GRADIENT)


def test_pipelines_that_cannot_start_from_an_image_say_so(video_pipeline):
    with pytest.raises(InputError, match=r"WanPipeline does text-to-video; it cannot"):
        video_pipeline.generate_video(BUNDLED["bundled:video"].example, image=_GRADIENT)


def test_pipelines_without_prompts():
    (image,) = _tiny("dit").generate_image(steps=2, class_labels=[3])
    assert image.mode == "RGB"
    with pytest.raises(InputError, match="takes no prompt"):
        _tiny("dit").generate_image("a red circle", class_labels=[3])


# --- plans ---


def test_load_with_plan_and_remove(image_pipeline):
    wrapped = load("bundled:image", plan=diffaccel.Plan(caching=diffaccel.StepCache(threshold=0.2)), device="cpu")
    wrapped.pipe.set_progress_bar_config(disable=True)
    (fast,) = wrapped.generate_image(CIRCLE, steps=10)
    assert wrapped.accel.report().to_dict()["techniques"]["caching"]["reused"] > 0
    wrapped.remove()
    assert wrapped.accel is None
    (again,) = wrapped.generate_image(CIRCLE, steps=10)
    (original,) = image_pipeline.generate_image(CIRCLE, steps=10)
    assert again.tobytes() == original.tobytes() != fast.tobytes()


def test_plan_that_does_not_fit(image_pipeline):
    with pytest.raises(PlanError, match=r"no preset 'balancd'.*balanced"):
        image_pipeline.accelerate("balancd")
    with pytest.raises(PlanError, match="roles present"):
        image_pipeline.accelerate(diffaccel.Plan(quantization=[diffaccel.Quantize(sites="nothing.*")]))
    assert image_pipeline.accel is None


# --- batches ---


def _run(wrapped, folder, jobs, **more):
    return run_jobs(wrapped, jobs, folder, settings={"steps": more.get("steps", 1)}, **{"steps": 1, **more})


def test_batch_resumes_where_it_was_interrupted(image_pipeline, tmp_path):
    jobs = make_jobs(["a red circle", "a blue square", "a red circle"], 3, ".png")
    assert [j.file for j in jobs] == [
        "0000-a-red-circle-s3.png",
        "0001-a-blue-square-s4.png",
        "0002-a-red-circle-s5.png",
    ]

    def interrupt(index, job):
        if index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(image_pipeline, tmp_path, jobs, started=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(j.file for j in jobs[:2]), MANIFEST])
    kept = (tmp_path / jobs[0].file).stat().st_mtime_ns
    with (tmp_path / MANIFEST).open("a") as file:
        file.write('{"file": "0002')  # the machine went down in the middle of a line
    assert [r.skipped for r in _run(image_pipeline, tmp_path, jobs)] == [True, True, False]
    assert (tmp_path / jobs[0].file).stat().st_mtime_ns == kept
    assert [r.skipped for r in _run(image_pipeline, tmp_path, jobs)] == [True] * 3
    assert [r.skipped for r in _run(image_pipeline, tmp_path, jobs, overwrite=True)] == [False] * 3


def test_batch_never_takes_or_replaces_what_is_not_its_own(image_pipeline, tmp_path):
    jobs = make_jobs(["a red circle"], 0, ".png")
    (tmp_path / jobs[0].file).write_text("my thesis")
    with pytest.raises(InputError, match=r"exists and is not from a run of diffaccel; use --overwrite"):
        _run(image_pipeline, tmp_path, jobs)
    assert (tmp_path / jobs[0].file).read_text() == "my thesis"
    _run(image_pipeline, tmp_path / "b", jobs)
    with pytest.raises(InputError, match=r"made with other settings \(steps\)"):
        _run(image_pipeline, tmp_path / "b", jobs, steps=2)


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="No space"):
        save_image(_GRADIENT, tmp_path / "a.png")
    with pytest.raises(InputError, match="No space"):
        save_video([_GRADIENT] * 2, tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_media(tmp_path):
    save_video([_GRADIENT, _GRADIENT.rotate(90)], tmp_path / "a.gif", fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 2 and gif.info["duration"] == 100
    odd = [Image.new("RGB", (33, 35), c) for c in ("red", "blue")]
    assert save_video(odd, tmp_path / "odd.mp4").stat().st_size > 0
    with pytest.raises(InputError, match="no frames"):
        save_video([], tmp_path / "b.mp4")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG then nothing")
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_image(tmp_path / "broken.png")
    with pytest.raises(InputError, match="no image file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="cannot write to"):
        check_writable(tmp_path / "broken.png" / "deeper")


def test_manifest_says_how_each_output_was_made(image_pipeline, tmp_path):
    run_jobs(image_pipeline, [Job("a red circle", 1, "x.png")], tmp_path, settings={"model": "m", "steps": 1}, steps=1)
    (line,) = (tmp_path / MANIFEST).read_text().splitlines()
    assert json.loads(line) == {"file": "x.png", "model": "m", "steps": 1, "prompt": "a red circle", "seed": 1}
