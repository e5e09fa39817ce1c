"""A student learns from recorded calls: to the bit after a kill, by features, by adapters, and without guidance."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from zoo_pipelines import PIPELINES

from diffaccel import Distillation, InputError, Plan, PlanError, Pruning, Quantize, accelerate, distill, prune
from diffaccel.denoiser import find_denoisers
from diffaccel.distillation.losses import distance
from diffaccel.distillation.states import State, collate, load_run, save_run
from diffaccel.latents import output_tensors

CALL = dict(num_inference_steps=4, height=16, width=16, use_resolution_binning=False, clean_caption=False)
PROMPTS = ["a red circle moving right", "a small blue square"]


def pair(name="pixart_sigma"):
    """A pruned student and its teacher."""
    teacher, student = PIPELINES[name].build(), PIPELINES[name].build()
    inputs = PIPELINES[name].arguments(steps=2)
    inputs.pop("generator")
    plan = prune(student, Pruning(ratio=0.15, method="magnitude"), prompts=[inputs])
    accelerate(student, plan).bake()
    return student, teacher


def call_of(name):
    return {
        k: v for k, v in PIPELINES[name].arguments(steps=4).items() if k not in ("generator", "prompt", "output_type")
    }


def learn(student, teacher, folder, **settings):
    values = dict(steps=12, batch=4, rate=3e-4, warmup=2, save_every=4) | settings
    distill(
        student,
        teacher=teacher,
        prompts=PROMPTS,
        folder=folder,
        settings=Distillation(**values),
        quiet=True,
        **call_of("pixart_sigma"),
    )
    return student


def curve(folder, column="loss"):
    with (Path(folder) / "curve.csv").open() as file:
        return [row[column] for row in csv.DictReader(file)]


def weights(pipe):
    return torch.cat([p.detach().flatten() for p in pipe.transformer.parameters()])


def test_heals_and_resumes_to_the_bit_after_a_kill(tmp_path):
    student, teacher = pair()
    before, asked = weights(student), [p.requires_grad for p in student.transformer.parameters()]
    learn(student, teacher, tmp_path / "whole")
    losses = [float(v) for v in curve(tmp_path / "whole")]
    assert len(losses) == 12 and sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert not torch.equal(weights(student), before)
    assert [p.requires_grad for p in student.transformer.parameters()] == asked

    # Killed in the middle of step 7: steps 5 to 7 are lost, and what they wrote to the curve.
    code = """
import os, signal, sys
import diffaccel.distillation.trainer as trainer
from test_distillation import learn, pair
add = trainer._Curve.add
def killing(self, row):
    add(self, row)
    if row["step"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
trainer._Curve.add = killing
learn(*pair(), sys.argv[1])
"""
    tests = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": tests, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "killed")], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len(curve(tmp_path / "killed")) == 7
    resumed, teacher = pair()
    learn(resumed, teacher, tmp_path / "killed")
    for column in ("step", "loss", "output", "rate"):
        assert curve(tmp_path / "killed", column) == curve(tmp_path / "whole", column)
    assert torch.equal(weights(resumed), weights(student))
    with pytest.raises(InputError, match="another"):
        learn(*pair(), tmp_path / "killed", rate=1e-4)


def test_features_guided_rates_freezing_and_samples(tmp_path):
    student, teacher = pair()
    first = student.transformer.transformer_blocks[0].attn1.to_q.weight.clone()
    last = student.transformer.transformer_blocks[2].attn1.to_q.weight.clone()
    settings = dict(steps=4, features=0.5, attention=0.5, guided_rates=True, freeze=0.34, sample_every=4)
    learn(student, teacher, tmp_path, **settings, checkpointing=True)
    assert all(float(v) > 0 for column in ("output", "features", "attention") for v in curve(tmp_path, column))
    for row in zip(*(curve(tmp_path, c) for c in ("loss", "output", "features", "attention")), strict=True):
        loss, output, features, attention = map(float, row)
        assert loss == pytest.approx(output + 0.5 * features + 0.5 * attention)
    assert torch.equal(student.transformer.transformer_blocks[0].attn1.to_q.weight, first)
    assert not torch.equal(student.transformer.transformer_blocks[2].attn1.to_q.weight, last)
    assert [f.name for f in (tmp_path / "samples").iterdir()] == ["step-000004.png"]
    assert not any(m._forward_hooks for m in teacher.transformer.modules())


def test_adapters_are_merged(tmp_path):
    student, teacher = pair()
    names, before = list(student.transformer.state_dict()), weights(student)
    bias = student.transformer.transformer_blocks[0].attn1.to_q.bias.clone()
    learn(student, teacher, tmp_path, lora=4, average=0.0)
    assert list(student.transformer.state_dict()) == names
    assert not any("lora" in n for n, _ in student.transformer.named_modules())
    assert not torch.equal(weights(student), before)
    assert torch.equal(student.transformer.transformer_blocks[0].attn1.to_q.bias, bias)
    losses = [float(v) for v in curve(tmp_path)]
    assert sum(losses[-4:]) < sum(losses[:4])
    student.transformer.save_pretrained(tmp_path / "model")
    loaded = type(student.transformer).from_pretrained(tmp_path / "model")
    assert torch.equal(torch.cat([p.flatten() for p in loaded.parameters()]), weights(student))


@pytest.mark.parametrize("name", ["pixart_sigma", "wan"])  # one call of both halves; two calls
def test_guidance_in_one_call(tmp_path, name):
    specimen = PIPELINES[name]
    pipe = specimen.build()
    (denoiser,) = find_denoisers(pipe)
    call = call_of(name) | {"guidance_scale": 3.0}

    def run(scale):
        calls = []
        handle = denoiser.module.register_forward_hook(lambda m, a, o: calls.append(o[0].shape[0]))
        result = specimen.call(pipe, steps=4, guidance_scale=scale, **{k: v for k, v in call.items() if k == "x"})
        handle.remove()
        return result, sum(calls)

    guided, rows = run(3.0)
    plain, _ = run(1.0)
    settings = Distillation(steps=30, batch=4, rate=3e-3, warmup=2, lora=8, guidance=True, average=0.5)
    distill(pipe, prompts=PROMPTS[:1], folder=tmp_path, settings=settings, quiet=True, runs=2, **call)
    learnt, fewer = run(1.0)
    assert fewer == rows / 2
    assert (learnt - guided).norm() < 0.8 * (plain - guided).norm()


def test_states_are_kept_and_joined(tmp_path):
    shared = torch.randn(1, 300, 4)
    arguments = {"x": torch.ones(1, 2), "timestep": torch.tensor(5.0), "more": {"text": shared, "list": [shared, 1]}}
    one = State(arguments, [torch.ones(1, 2)], "timestep")
    two = State(arguments | {"x": torch.zeros(1, 2), "timestep": torch.tensor(7.0)}, [torch.zeros(1, 2)], "timestep")
    save_run(tmp_path / "run", [one, two], "mine")
    assert (tmp_path / "run").stat().st_size < 1.9 * shared.nbytes
    first, second = load_run(tmp_path / "run", "mine")
    assert first.arguments["timestep"] == 5 and torch.equal(second.arguments["more"]["list"][0], shared)
    both = collate([first, second])
    assert both.arguments["x"].shape == (2, 2) and both.arguments["timestep"].tolist() == [5, 7]
    assert both.arguments["more"]["text"].shape == (2, 300, 4)
    with pytest.raises(InputError, match="another"):
        load_run(tmp_path / "run", "yours")
    with pytest.raises(InputError, match="batch=1"):
        collate(
            [one, State({**arguments, "more": {"text": shared[:, :2], "list": [shared, 1]}}, two.targets, "timestep")]
        )
    (tmp_path / "run").write_bytes(b"broken")
    with pytest.raises(InputError, match="damaged"):
        load_run(tmp_path / "run", "mine")
    assert float(distance([torch.tensor([1.0, 1])], [torch.tensor([2.0, 2])])) == 0.25


@pytest.mark.filterwarnings("ignore:diffaccel")
def test_refusals(tmp_path):
    student, teacher = pair()
    with pytest.raises(InputError, match="teacher"):
        learn(student, None, tmp_path)
    with pytest.raises(PlanError, match="two branches"):
        settings = Distillation(guidance=True)
        distill(teacher, prompts=PROMPTS, folder=tmp_path, settings=settings, quiet=True, **CALL, guidance_scale=1.0)
    with pytest.raises(PlanError, match="cannot learn from"):
        learn(student, PIPELINES["wan"].build(), tmp_path)
    with accelerate(student, Plan(quantization=Quantize())), pytest.raises(PlanError, match="accelerated"):
        learn(student, teacher, tmp_path)
    for bad in (dict(steps=0), dict(rate=0), dict(output=0), dict(guidance=True, features=1), dict(precision="int8")):
        with pytest.raises(InputError, match="Distillation"):
            Distillation(**bad)
    assert not (tmp_path / "curve.csv").exists()


def test_learns_from_a_folder_of_pictures(tmp_path):
    student, teacher = pair()
    data = tmp_path / "data"
    data.mkdir()
    for i in range(2):
        noise = torch.randint(0, 255, (20, 20, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("a red circle")
    settings = Distillation(steps=6, batch=4, rate=3e-4, warmup=1, task=0.5)
    call = call_of("pixart_sigma")
    distill(student, teacher=teacher, data=data, folder=tmp_path, settings=settings, quiet=True, **call)
    assert all(float(v) > 0 for column in ("output", "task") for v in curve(tmp_path, column))
    states = [s for f in sorted((tmp_path / "teacher").iterdir()) for s in load_run(f, _identity_in(f))]
    assert len(states) == 8
    scheduler = teacher.scheduler
    for state in states[:4]:  # the answer leads from the noisy latents back to the picture's
        with torch.no_grad():
            expected = output_tensors(teacher.transformer(**state.arguments))[0]
        torch.testing.assert_close(expected, state.targets[0])
        t = state.arguments["timestep"].reshape(-1)[:1].long()
        alpha = scheduler.alphas_cumprod[t].sqrt()
        noisy, answer = state.arguments["hidden_states"], state.answers[0][:, :4]
        clean = alpha * noisy - (1 - alpha**2).sqrt() * answer
        first = states[0]
        a0 = scheduler.alphas_cumprod[first.arguments["timestep"].reshape(-1)[:1].long()].sqrt()
        same = a0 * first.arguments["hidden_states"] - (1 - a0**2).sqrt() * first.answers[0][:, :4]
        torch.testing.assert_close(clean, same, atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match="captions"):
        distill(student, teacher=teacher, data=tmp_path / "nothing", folder=tmp_path / "x", settings=settings, **call)
    with pytest.raises(InputError, match="task"):
        learn(student, teacher, tmp_path / "y", task=1.0)


def _identity_in(file):
    with safe_open(file, framework="pt") as content:
        return content.metadata()["identity"]
