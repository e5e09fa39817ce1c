"""Small denoisers, plans and loops for the tests of step caching."""

import math

import torch
from torch import nn

from diffaccel import Plan, StepCache, accelerate
from diffaccel.plan import Artefacts

FORECASTS = ("hold", "residual", "linear", "trend")


class Doubler(nn.Module):
    """A denoiser whose computed output, twice its input, cannot be taken for a reused one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.calls = 0

    def forward(self, hidden_states, timestep, encoder_hidden_states=None):
        self.calls += 1
        return self.scale * hidden_states


class Scripted(nn.Module):
    """Gives ``script(latents, timestep)``, whatever that is."""

    def __init__(self, script):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)
        self.script = script

    def forward(self, hidden_states, timestep, encoder_hidden_states=None, audio_hidden_states=None):
        if audio_hidden_states is not None:
            return self.script(hidden_states, audio_hidden_states, timestep)
        return self.script(hidden_states, timestep)


def always(forecast="hold", **settings):
    """A plan that skips whatever may be skipped: MagCache with ratios that never change. Computes every other step."""
    section = dict(policy="mag", threshold=100, protect_first=0, max_skips=1, min_steps=1, forecast=forecast)
    flat = [table([1.0] * 3, [1000.0, 500.0, 0.0], component) for component in ("transformer", "unet")]
    return Plan(caching=StepCache(**section | settings), artefacts=Artefacts(flat[0] | flat[1]))


def table(gammas, timesteps=None, component="transformer", branch="cond"):
    timesteps = timesteps or [1000.0 - 10 * i for i in range(len(gammas))]
    name = f"caching.{component}.{branch}"
    return {f"{name}.timesteps": torch.tensor(timesteps).double(), f"{name}.ratios": torch.tensor(gammas).double()}


def magcache(ratios, **settings):
    return Plan(caching=StepCache.magcache(**settings), artefacts=Artefacts(ratios))


def computed_steps(accel):
    (steps,) = accel.report().techniques[0].facts["steps_computed"].values()
    return steps


def run(model, plan, latents, timesteps=None, begin=0):
    """Outputs and computed steps of one run by hand over ``latents``."""
    timesteps = timesteps or [1000.0 - 10 * i for i in range(len(latents))]
    plan = plan if isinstance(plan, Plan) else Plan(caching=plan)
    with accelerate(model, plan) as accel:
        accel.clock.start(begin + len(latents), begin)
        outputs = []
        for x, t in zip(latents, timesteps, strict=True):
            outputs.append(model(x, t))
            accel.clock.advance()
        return outputs, computed_steps(accel)


def run_by_hand(accel, model, latents, **arguments):
    accel.clock.start(len(latents))
    outputs = []
    for i, x in enumerate(latents):
        outputs.append(model(x, 1000.0 - i, **arguments))
        accel.clock.advance()
    return outputs


def walk(steps, shape=(2, 3, 4), seed=0, scale=0.05):
    """Latents that move a little each step."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator)
    moves = [scale * torch.randn(shape, generator=generator) * (1 + math.sin(i)) for i in range(steps)]
    return [start + sum(moves[:i], torch.zeros(shape)) for i in range(steps)]
