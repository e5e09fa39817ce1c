"""Every training of the assets: a run that is killed and goes on ends with the weights of one that was not."""

import csv
import json
from dataclasses import replace
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from diffaccel.assets.make import assemble, models, restore, run
from diffaccel.assets.make.denoise import TRAININGS, _rotary
from diffaccel.assets.make.evaluator import EvaluatorTraining, build, save
from diffaccel.assets.make.latents import Latents, encode_shards
from diffaccel.assets.make.loop import Loop
from diffaccel.assets.make.muon import orthogonalise
from diffaccel.assets.make.plain_attention import PlainAttention
from diffaccel.assets.make.recipes import FULL, SMOKE, Phase, VaePhases
from diffaccel.assets.make.text import TextTraining, encode
from diffaccel.assets.make.vae import VaeTraining
from diffaccel.assets.make.wan_clip import decode_clip, encode_clip, whole_clip

SIZES = {"image": 64, "video": 48, "unet": 64}
VAE = {
    "image": VaePhases(joint=1, decoder=1, batch=2, crop=32),
    "video": VaePhases(joint=1, decoder=1, batch=1, crop=16, frames=5),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Results that later stages need, each trained for two steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are the same from run to run
    folder = tmp_path_factory.mktemp("make")
    for kind in models.KINDS:
        assert Loop(TextTraining(kind, 2), folder / f"text-{kind}", bfloat16=False).run()
    for kind, phases in VAE.items():
        assert Loop(VaeTraining(kind, phases), folder / f"vae-{kind}", bfloat16=False).run()
        target = folder / f"latents-{kind}-{SIZES[kind]}"
        assert encode_shards(kind, SIZES[kind], 3, folder / f"vae-{kind}" / "result", target, 100, False)
    yield folder
    torch.set_num_threads(threads)


def _denoiser(work, kind):
    source = "video" if kind == "video" else "image"
    latents = Latents(work / f"latents-{source}-{SIZES[kind]}")
    phases = (Phase(1, SIZES[kind], 2, shift=1.5), Phase(1, SIZES[kind], 1, shift=2.5, falls=True))
    return TRAININGS[kind](kind, phases, work / f"text-{kind}" / "result", [latents, latents])


def _makers(work):
    return {
        **{f"text-{kind}": partial(TextTraining, kind, 2) for kind in models.KINDS},
        **{f"vae-{kind}": partial(VaeTraining, kind, phases) for kind, phases in VAE.items()},
        "evaluator": partial(EvaluatorTraining, 2, 4),
        **{f"denoiser-{kind}": partial(_denoiser, work, kind) for kind in models.KINDS},
    }


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["text-video", "text-unet", "vae-image", "vae-video", "evaluator"])
def test_killed_run_goes_on_to_the_same_weights(name, work, tmp_path):
    _killed_and_not(_makers(work)[name], tmp_path, work / name)


@pytest.mark.parametrize("kind", models.KINDS)
def test_killed_denoiser_goes_on_to_the_same_weights(kind, work, tmp_path):
    _killed_and_not(_makers(work)[f"denoiser-{kind}"], tmp_path, work / f"denoiser-{kind}")


def _killed_and_not(make, tmp_path, whole):
    """``whole`` holds an uninterrupted run, or becomes one."""
    training = make()
    before = {k: v.clone() for k, v in Loop(training, tmp_path / "untrained", bfloat16=False)._floats().items()}
    if not (whole / "done.json").exists():
        assert Loop(make(), whole, bfloat16=False).run()
    reference = Loop(make(), whole, bfloat16=False)  # as its last checkpoint has it
    assert reference.step == 2
    loss = training.loss

    def dies(step, rng):
        if step == 1:
            raise Killed
        return loss(step, rng)

    training.loss = dies
    with pytest.raises(Killed):
        Loop(training, tmp_path / "killed", bfloat16=False, checkpoint_seconds=0, curve_steps=1).run()
    assert not (tmp_path / "killed" / "done.json").exists()
    resumed = Loop(make(), tmp_path / "killed", bfloat16=False, curve_steps=1)
    assert resumed.step == 1
    assert resumed.run()

    assert all(torch.equal(a, b) for a, b in zip(reference.muon.buffers, resumed.muon.buffers, strict=True))
    assert all(torch.equal(v, resumed.average[k]) for k, v in reference.average.items())
    assert any(not torch.equal(v, before[k]) for k, v in reference.average.items())
    rows = list(csv.DictReader((tmp_path / "killed" / "curve.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2"]
    record = json.loads((tmp_path / "killed" / "done.json").read_text())
    assert record["steps"] == 2 and record["processor_minutes"] >= 0


def test_curve_of_lost_steps_is_cut_and_another_length_is_refused(tmp_path):
    def loop(steps=2):
        return Loop(TextTraining("video", steps), tmp_path, bfloat16=False)

    assert not loop().run(seconds=-1)  # no time for a step, but a checkpoint
    (tmp_path / "curve.csv").write_text("step,wall_s,loss\n0,0,1\n1,9,1\n")
    assert loop().step == 0
    assert (tmp_path / "curve.csv").read_text() == "step,wall_s,loss\n0,0,1\n"
    with pytest.raises(ValueError, match="belongs to a run of 2 steps"):
        loop(3)


def test_whole_clip_is_the_librarys_chunked_forward():
    torch.manual_seed(0)
    vae = whole_clip(models.video_vae()).eval()
    with torch.no_grad():
        clip = torch.rand(1, 3, 9, 16, 16) * 2 - 1
        latents = encode_clip(vae, clip)
        assert torch.allclose(latents, vae._encode(clip), atol=1e-5)
        mean = latents[:, : models.VIDEO_LATENTS]
        assert torch.allclose(decode_clip(vae, mean).clamp(-1, 1), vae.decode(mean).sample, atol=1e-5)
    assert not any("forward" in vars(module) for module in models.video_vae().modules())  # others are as they were


@pytest.mark.parametrize("pads", [32, 512])
def test_wan_trains_on_what_its_pipeline_computes(pads, work):
    """One weighted pad is as many zero pads; scaled positions at scale 1 are the library's."""

    class Always(np.random.Generator):
        def choice(self, *_):
            return pads

    training = _denoiser(work, "video")
    denoiser = training.denoiser.eval()
    torch.nn.init.normal_(denoiser.proj_out.weight)  # silent at first
    noisy, time = torch.randn(2, models.VIDEO_LATENTS, 3, 8, 8), torch.tensor([300.0, 700.0])
    captions = ["a red circle moving left", "a large pink star rotating on a white background"]
    with torch.no_grad():
        words, mask = encode("video", training.modules["encoder"], training.tokenizer, captions)
        ours = training.predict(noisy, time, words, mask, Always(np.random.PCG64(0)))
        for block in denoiser.blocks:
            block.attn2.set_processor(WanAttnProcessor())
        padded = torch.zeros(2, pads, words.shape[-1])
        padded[:, : words.shape[1]] = words * mask[..., None]
        theirs = denoiser(noisy, timestep=time, encoder_hidden_states=padded, return_dict=False)[0]
    assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().max()
    library = denoiser.rope(noisy)
    for table, expected in zip(_rotary(denoiser.rope, [1.0, 1.0])(noisy), library, strict=True):
        assert torch.allclose(table, expected.float(), atol=1e-6)


def test_assembled_pipelines_load_by_plain_from_pretrained(work, tmp_path):
    """After the denoiser tests: each pipeline of the trained parts is called as a user would, for one step."""
    for kind in models.KINDS:
        if not (work / f"denoiser-{kind}" / "done.json").exists():
            assert Loop(_makers(work)[f"denoiser-{kind}"](), work / f"denoiser-{kind}", bfloat16=False).run()
        folder = tmp_path / kind
        assemble.assemble(work, kind, folder)
        card = (folder / "README.md").read_text()
        assert f"denoiser-{kind}" in card and "heldout.json" in card
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        assert pipe.text_encoder.dtype == torch.float32
        pipe.set_progress_bar_config(disable=True)
        size = 32 if kind == "video" else 64
        call = {**assemble.CALLS[kind], "height": size, "width": size, "num_inference_steps": 1}
        if kind == "video":
            call["num_frames"] = 5
        out = pipe(prompt="a red circle", output_type="np", **call)
        sample = np.asarray(out.frames if kind == "video" else out.images)[0]
        assert sample.shape[-3:] == (size, size, 3) and np.isfinite(sample).all()


def test_a_longer_training_goes_on_from_what_is_installed(work, tmp_path, monkeypatch):
    """Where checkpoints are gone the next phase begins with the installed weights, on the installed VAE and encoder."""
    monkeypatch.setattr(assemble, "ASSETS", tmp_path / "assets")
    for module in (assemble, restore):
        monkeypatch.setattr(module, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(restore, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(run, "ASSETS", tmp_path / "assets")
    if not (work / "denoiser-image" / "done.json").exists():
        assert Loop(_makers(work)["denoiser-image"](), work / "denoiser-image", bfloat16=False).run()
    assemble.assemble(work, "image", work / "assembled" / "shapes-image")
    assemble.install_all(work)
    fresh = tmp_path / "work"
    restore.restore(fresh)
    assert {p.parent.name for p in fresh.glob("*/done.json")} >= {"vae-image", "text-image"}
    phases = _denoiser(work, "image").phases
    sizes = {("image", phase.size): 2 for phase in phases}
    longer = replace(
        SMOKE, denoisers={**SMOKE.denoisers, "image": (*phases, phases[-1])}, latents=SMOKE.latents | sizes
    )
    assert run.run_all(fresh, longer, only=["latents-image"], bfloat16=False)
    began = []
    monkeypatch.setattr(Loop, "_one_step", lambda self: began.append(self.step) or {"loss": 0.0})
    assert run.run_all(fresh, longer, only=["denoiser-image"], bfloat16=False)
    assert began == [sum(phase.steps for phase in phases)]
    before, after = (
        PixArtTransformer2DModel.from_pretrained(p, torch_dtype=torch.float32).state_dict()
        for p in (work / "assembled" / "shapes-image" / "transformer", fresh / "denoiser-image" / "result" / "denoiser")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_open_clip_loads_the_evaluator_and_pools_at_the_end_mark(tmp_path):
    torch.manual_seed(0)
    trained = build().eval()
    save(trained, tmp_path)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    model.eval()
    ids = tokenizer(["a red circle", "a Red circle moving", "a blue star"])
    assert ids[0].tolist()[:5] == [*models.tokenizer()("a red circle").input_ids, models.PAD]
    with torch.no_grad():
        features = model.encode_text(ids)
        assert torch.equal(features, trained.encode_text(ids))
        longer = torch.nn.functional.pad(ids[:, :-1], (0, 1), value=models.VOCABULARY - 1)
        # what stands after the end mark is not read, though it is the highest token
        assert torch.equal(model.encode_text(longer), features)
        assert not torch.allclose(features[0], features[2])
        from PIL import Image

        pixels = preprocess(Image.new("RGB", (96, 96)))[None]
        assert torch.equal(pixels, torch.full_like(pixels, -1.0))
        assert model.encode_image(pixels).shape == (1, 128)


def test_stages_know_their_order_and_what_is_done(tmp_path, capsys):
    names = [stage.name for stage in run.stages(tmp_path, FULL, False)]
    assert len(set(names)) == len(names) and names.index("vae-video") < names.index("latents-video-96")
    assert names[-2:] == ["assemble", "measure"] and names.index("text-unet") < names.index("denoiser-unet")
    (tmp_path / "vae-image").mkdir()
    (tmp_path / "vae-image" / "done.json").write_text("{}")
    assert run.run_all(tmp_path, FULL, only=["vae-image"])
    assert not run.run_all(tmp_path, FULL, only=["vae-video"], minutes=0)
    assert capsys.readouterr().out.splitlines()[0] == "vae-image: done"
    with pytest.raises(SystemExit, match="no stage begins with 'vea'"):
        run.run_all(tmp_path, FULL, only=["vea"])
    with run._alone(tmp_path / "vae-video"), pytest.raises(SystemExit, match="another process works on vae-video"):
        run.run_all(tmp_path, FULL, only=["vae-video"])


def test_captions_and_pads_fit_the_trained_lengths():
    from diffaccel.assets.make import world

    rng = np.random.default_rng(0)
    tokenizer = models.tokenizer()
    for kind, draw in (("image", world.draw_scene), ("unet", world.draw_scene), ("video", world.draw_moving_scene)):
        longest = max(len(tokenizer(world.describe(draw(rng), rng)).input_ids) for _ in range(300))
        assert longest < models.LENGTH[kind]  # one pad at least, which carries the weight of all in WanTraining


def test_muon_makes_updates_orthogonal():
    update = orthogonalise(torch.randn(2, 12, 40, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.4 and values.max() < 1.6


def test_plain_attention_is_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (10, 7, 7))
    mask = torch.rand(2, 1, 1, 7, generator=generator) > 0.3
    call = torch.nn.functional.scaled_dot_product_attention
    for m in (None, mask, torch.where(mask, 0.5, -1e4)):
        with PlainAttention():
            ours = call(q, k, v, attn_mask=m)
        assert torch.allclose(ours, call(q, k, v, attn_mask=m), atol=1e-5)
        assert not torch.equal(ours, torch.zeros_like(ours))
