"""`diffaccel prune` and `diffaccel distill`, one after the other, on the bundled pipeline."""

import json

import torch
from typer.testing import CliRunner

from diffaccel import Plan, accelerate
from diffaccel.cli import app
from diffaccel.errors import InputError
from diffaccel.pipelines.loading import load

RUNNER = CliRunner()
FEW = ["-n", "1", "--steps", "2"]


def test_prune_then_distill(tmp_path):
    pruned, healed = str(tmp_path / "pruned"), str(tmp_path / "healed")
    arguments = ["prune", "--method", "magnitude", "--ratio", "0.2", "-o", pruned, "--json", *FEW]
    done = RUNNER.invoke(app, arguments, catch_exceptions=False)
    facts = json.loads(done.stdout)["techniques"]["pruning"]
    assert 0.78 < facts["parameters_after"] / facts["parameters_before"] < 0.82

    original = load("bundled:image", device="cpu", dtype="float32")
    smaller = load(pruned, device="cpu", dtype="float32")
    assert smaller.defaults == original.defaults
    call = smaller.defaults | {"num_inference_steps": 2, "prompt": "a red circle", "output_type": "latent"}

    def run(pipe):
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    expected = run(smaller.pipe)
    with accelerate(original.pipe, Plan.load(f"{pruned}/plan")):
        torch.testing.assert_close(run(original.pipe), expected)

    arguments = ["distill", "--student", pruned, "--teacher", "bundled:image", "-o", healed, "-n", "1"]
    few = ["--denoising-steps", "2", "--steps", "2", "--batch", "1", "--rate", "1e-3", "--sample-every", "2"]
    done = RUNNER.invoke(app, [*arguments, *few], catch_exceptions=False)
    assert done.exit_code == 0
    assert (tmp_path / "healed/training/samples/step-000002.png").exists()
    learnt = load(healed, device="cpu", dtype="float32")
    assert sum(p.numel() for p in learnt.pipe.transformer.parameters()) == facts["parameters_after"]
    assert not torch.equal(run(learnt.pipe), expected)


def test_what_the_commands_refuse():
    done = RUNNER.invoke(app, ["prune", "--units", "toes", *FEW])
    assert "toes" in str(done.exception)
    done = RUNNER.invoke(app, ["distill", "--student", "bundled:image"])
    assert isinstance(done.exception, InputError) and "--teacher" in str(done.exception)
    for command in ("prune", "distill"):
        shown = RUNNER.invoke(app, [command, "--help"])
        assert shown.exit_code == 0 and f"diffaccel {command}" in shown.stdout
