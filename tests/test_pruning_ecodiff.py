"""Masks are learnt through the whole trajectory: the gradient is that of full back-propagation, in flat memory."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import ZOO
from zoo_pipelines import PIPELINES

from diffaccel import InputError, PlanError, Pruning, accelerate, prune
from diffaccel.denoiser import find_denoisers
from diffaccel.pruning.ecodiff import EcoDiff, hard_concrete, learn
from diffaccel.pruning.groups import groups_of
from diffaccel.pruning.masks import Masks
from diffaccel.pruning.trajectory import Trajectory, frozen


def _arguments(name, steps):
    arguments = PIPELINES[name].arguments(steps=steps)
    return {k: v for k, v in arguments.items() if k not in ("generator", "output_type")}


def _gradients(name, steps, *, checkpointed):
    pipe = PIPELINES[name].build()
    (denoiser,) = find_denoisers(pipe)
    groups = groups_of(denoiser)
    logits = {g.key: torch.full((g.units,), 1.0, requires_grad=True) for g in groups}

    def sample(step):
        generator = torch.Generator().manual_seed(step)
        return {k: hard_concrete(v, torch.rand(v.shape, generator=generator), 0.1) for k, v in logits.items()}

    trajectory = Trajectory(pipe, denoiser.module, _arguments(name, steps), checkpointed=checkpointed)
    wanted = trajectory.plain({}, seed=3)
    with frozen(pipe), Masks(denoiser.module, groups) as masks:
        found = trajectory.masked({}, 3, masks, sample)
        loss = sum((a - b).square().sum() for a, b in zip(found, wanted, strict=True))
        return loss.item(), torch.cat(torch.autograd.grad(loss, list(logits.values())))


@pytest.mark.parametrize("name", ["pixart_sigma", "wan"])
def test_gradient_is_that_of_full_backpropagation(name):
    loss, gradient = _gradients(name, 3, checkpointed=True)
    plain_loss, plain = _gradients(name, 3, checkpointed=False)
    assert loss == plain_loss > 0
    assert gradient.abs().max() > 0
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


class _Peak(TorchDispatchMode):
    """The largest number of bytes that were alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key, size):
        self._known.discard(key)
        self.now -= size


def test_memory_does_not_grow_with_steps():
    peaks = {}
    for steps in (2, 8):
        with _Peak() as watched:
            _gradients("pixart_sigma", steps, checkpointed=True)
        peaks[steps] = watched.peak
    with _Peak() as watched:
        _gradients("pixart_sigma", 8, checkpointed=False)
    assert peaks[8] < 1.2 * peaks[2]
    assert watched.peak > 2 * peaks[8]


SETTINGS = EcoDiff(updates=4, accumulate=1, rate=0.5, weight=2.0, save_every=1)


def _learn(model, groups, denoiser, folder=None, notify=lambda text: None, **changed):
    requests = [ZOO["pixart_sigma"].inputs(progress=p) for p in (0.2, 0.6)]
    settings = dataclasses.replace(SETTINGS, **changed)
    return learn(model, denoiser, groups, requests, {}, settings, folder, notify, target=0.7)


def test_resumes_to_the_bit_and_the_regulariser_counts(tmp_path):
    model = ZOO["pixart_sigma"].build()
    (denoiser,) = find_denoisers(model)
    groups = groups_of(denoiser)
    whole = _learn(model, groups, denoiser)

    class Killed(Exception):
        pass

    def kill(text):
        if "update 3" in text:
            raise Killed

    with pytest.raises(Killed):
        _learn(model, groups, denoiser, tmp_path, kill)
    shorter = _learn(model, groups, denoiser, tmp_path, updates=2)
    assert not torch.equal(shorter[groups[0].key], whole[groups[0].key])
    told = []
    resumed = _learn(model, groups, denoiser, tmp_path, told.append)
    assert len(told) == 2  # the third was not written
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)
    with pytest.raises(InputError, match="another folder"):
        _learn(model, groups, denoiser, tmp_path, rate=0.4)

    free = _learn(model, groups, denoiser, weight=0.0)
    assert all((whole[k] <= free[k] + 1e-6).float().mean() > 0.9 for k in whole)
    assert sum(float(whole[k].sum()) for k in whole) < sum(float(free[k].sum()) for k in free) - 1


def test_learns_what_does_nothing():
    model = ZOO["pixart_sigma"].build()
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.ff.net[2].weight[:, :96] = 0
    before = model(**ZOO["pixart_sigma"].inputs()).sample
    changes = []
    for method in ("ecodiff", "random"):
        section = Pruning(ratio=0.1, units="neurons", method=method)
        settings = EcoDiff(updates=20, accumulate=1, rate=0.3)
        plan = prune(model, section, prompts=[ZOO["pixart_sigma"].inputs()], settings=settings)
        with accelerate(model, plan):
            after = model(**ZOO["pixart_sigma"].inputs()).sample
        changes.append(float((after - before).norm() / before.norm()))
    assert changes[0] < 0.25 * changes[1]


def test_hard_concrete_reaches_both_ends():
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert set(hard_concrete(torch.tensor(8.0), uniform, 0.1).tolist()) == {1.0}
    assert set(hard_concrete(torch.tensor(-8.0), uniform, 0.1).tolist()) == {0.0}
    between = hard_concrete(torch.tensor(0.0), uniform, 0.1)
    assert 0.3 < between.mean() < 0.7 and between.std() > 0.1
    with pytest.raises(PlanError, match="updates"):
        EcoDiff(updates=0)
