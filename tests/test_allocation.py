"""Sensitivities and what is made of them: the program finds the best choice, keeps to its budget, explains itself."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_quantization import snapshot, unchanged
from zoo_pipelines import PIPELINES

from diffaccel import Plan, PlanError, Quantize, accelerate
from diffaccel.quantization.allocation import BUDGETS, Allocation, allocate, allocate_in_groups, ambiguous, closed_form
from diffaccel.quantization.heatmap import draw
from diffaccel.quantization.replay import Recorder, at_work, errors, guided
from diffaccel.quantization.sensitivities import Sensitivities, load_sensitivities, regroup, sharpen
from diffaccel.quantization.sensitivity import WAYS, measure

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel", "ignore:__array__")

NARROW, WIDE = Quantize(weights="int4", group=32), Quantize()


def made(sites=4, ranges=2, seed=0, candidates=(NARROW, WIDE)):
    """Sensitivities at random, errors falling by about 16 from candidate to candidate."""
    generator = torch.Generator().manual_seed(seed)
    C = len(candidates)
    scale = torch.exp(2 * torch.randn(sites, 1, ranges, generator=generator, dtype=torch.float64))
    error = scale * (16.0 ** -torch.arange(C))[None, :, None]
    weights = torch.randint(1, 5, (sites,), generator=generator).double() * 1000
    widths = torch.tensor([c.form().scheme.bits for c in candidates], dtype=torch.float64)
    return Sensitivities(
        sites=tuple(f"transformer.blocks.{i}.{'attn2' if i % 2 else 'attn1'}.to_q" for i in range(sites)),
        roles=tuple("cross.q" if i % 2 else "attn.q" for i in range(sites)),
        weights=weights,
        candidates=candidates,
        ranges=tuple((r / ranges, (r + 1) / ranges) for r in range(ranges)),
        error=error,
        text=error.flip(0),
        shows=torch.linspace(2, 1, ranges, dtype=torch.float64),
        bytes=weights[:, None] * widths / 8,
        before=weights * 4,
        macs=weights * 100,
        seconds=weights[:, None] * 1e-9 * torch.arange(1, C + 1),
    )


def every(s, *, constant=False):
    """Every possible allocation."""
    S, C, R = s.error.shape
    for choice in itertools.product(range(C), repeat=S * (1 if constant else R)):
        rows = torch.tensor(choice).view(S, -1)
        yield Allocation(s, rows.expand(S, R) if constant else rows)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("kind", BUDGETS)
def test_the_program_finds_the_best_within_the_budget(kind, constant):
    for seed in range(3):
        s = made(seed=seed)
        costs = sorted(a.cost(kind) for a in every(s, constant=constant))
        for budget in (costs[len(costs) // 3], costs[2 * len(costs) // 3], costs[-1]):
            best = min(a.error for a in every(s, constant=constant) if a.cost(kind) <= budget * (1 + 1e-9))
            found = allocate(s, budget=budget, kind=kind, constant=constant)
            assert found.cost(kind) <= budget * (1 + 1e-6) and found.error == pytest.approx(best, rel=1e-3)


def test_a_site_of_two_widths_stores_the_wider_one_only():
    s = made(sites=2, ranges=2)
    mixed = Allocation(s, torch.tensor([[0, 1], [0, 0]]))
    assert mixed.cost("bytes") == pytest.approx(float((s.bytes[0, 1] + s.bytes[1, 0]) / s.before.sum()))
    apart = replace(s, candidates=(replace(NARROW, group=None), WIDE))  # which no weight holds both of
    stored = float((s.bytes[0].sum() + s.bytes[1, 0]) / s.before.sum())
    assert Allocation(apart, mixed.choice).cost("bytes") == pytest.approx(stored)


def test_average_bits_over_sites_and_steps():
    s = replace(made(sites=2, ranges=2), weights=torch.tensor([1000.0, 3000.0], dtype=torch.float64))
    assert Allocation(s, torch.tensor([[0, 1], [0, 0]])).cost("bits") == pytest.approx((6 + 3 * 4) / 4)


def test_sections_say_what_was_chosen():
    s = made(sites=3, ranges=4)
    choice = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]])
    sections = Allocation(s, choice).sections
    for r, (begin, end) in enumerate(s.ranges):
        for i, name in enumerate(s.sites):
            at = [x for x in sections if name in x.sites.split() and x.steps[0] <= begin and end <= x.steps[1]]
            assert len(at) == 1 and at[0].weights == s.candidates[choice[i, r]].weights
    assert len(sections) == 6
    assert Plan(quantization=sections)


def test_a_budget_that_nothing_meets_is_refused():
    for kind in BUDGETS:
        with pytest.raises(PlanError, match="the cheapest choice takes"):
            allocate(made(), budget=1e-12, kind=kind)
    with pytest.raises(PlanError, match="bytes, bits"):
        allocate(made(), budget=1, kind="watts")
    with pytest.raises(PlanError, match="narrowest"):
        closed_form(made(), bits=2)


def test_the_closed_form_is_near_the_program():
    for seed in range(5):
        s = made(sites=12, ranges=2, seed=seed)
        best, fast = allocate(s, budget=6, kind="bits"), closed_form(s, bits=6)
        assert fast.cost("bits") <= 6 + 1e-9 and best.error <= fast.error * 1.001 < 2 * best.error


def test_groups_are_judged_apart_and_share_the_bits():
    s = made(sites=8, ranges=1)
    for ratio in (0.7, 1.0, 1.2):
        found = allocate_in_groups(s, bits=6, text="cross.*", ratio=ratio)
        assert 5 < found.cost("bits") <= 6 + 1e-6
    even = allocate_in_groups(s, bits=6, text="cross.*", ratio=1.0)
    swapped = allocate_in_groups(replace(s, text=s.error), bits=6, text="cross.*", ratio=1.0)
    rest = torch.tensor([r != "cross.q" for r in s.roles])
    assert torch.equal(even.choice[rest], swapped.choice[rest])
    assert not torch.equal(even.choice[~rest], swapped.choice[~rest])  # another measure, another choice
    with pytest.raises(PlanError, match="not all"):
        allocate_in_groups(s, bits=6, text="*")


def test_what_was_not_measured_takes_the_mean_of_other_ranges():
    s = made(sites=3, ranges=2)
    s.error[1, :, 0] = float("nan")
    assert allocate(s, budget=6, kind="bits").cost("bits") <= 6 + 1e-6


def test_an_allocation_explains_itself(tmp_path):
    s = made(sites=3, ranges=2)
    found = allocate(s, budget=6, kind="bits")
    lines = str(found).splitlines()
    assert len(lines) == 5 and all(name in line for name, line in zip(s.sites, lines[1:], strict=False))
    assert "W4A8 g32" in str(found) and "W8A8" in str(found) and "bits on average" in lines[-1]
    draw(found, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_the_ambiguous_are_those_near_the_budget_and_can_be_measured_again():
    s = made(sites=8, ranges=1)
    names = ambiguous(s, budget=6, kind="bits", margin=0.1)
    assert 0 < len(names) < 8
    mask = torch.tensor([name in names for name in s.sites])
    exact = replace(s, sites=tuple(names), error=s.error[mask] * 100, text=s.text[mask])
    sharper = sharpen(s, exact)
    assert torch.equal(sharper.error[~mask], s.error[~mask]) and torch.equal(sharper.error[mask], exact.error)
    with pytest.raises(PlanError, match="cannot sharpen"):
        sharpen(s, replace(exact, candidates=(NARROW, replace(WIDE, rotate=True))))


# --- measured ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_measured_on_a_pipeline(way):
    specimen = PIPELINES["pixart_sigma"]
    pipe = specimen.build()
    call = specimen.arguments(steps=4)
    start = snapshot(pipe.transformer)
    sites = "transformer.transformer_blocks.0.attn1.* transformer.transformer_blocks.1.ff.*"
    done = []
    s = measure(pipe, [WIDE, NARROW], [call], sites=sites, ranges=2, way=way, advance=done.append)
    assert unchanged(pipe.transformer, start)
    assert len(s.sites) == 6 and s.candidates[0].weights == "int4"  # coarse to fine
    assert s.error.shape == (6, 2, 2) and bool((s.error[:, 0] > s.error[:, 1]).all()) and bool((s.error > 0).all())
    assert s.text.isnan().all() == (way == "local") and bool((s.shows > 0).all())
    assert bool((s.bytes[:, 0] < s.bytes[:, 1]).all()) and bool((s.seconds > 0).all()) and s.macs.min() > 0
    found = allocate(s, budget=6.5, kind="bits")
    with accelerate(pipe, Plan(quantization=found.sections)) as accel:
        facts = accel.report().techniques[0].facts
        assert facts["bytes_after"] / facts["bytes_before"] == pytest.approx(found.cost("bytes"), rel=0.1)
        specimen.call(pipe, steps=4)
        with pytest.raises(PlanError, match="already accelerated"):
            measure(pipe, [WIDE], [call])
    assert unchanged(pipe.transformer, start) and len(done) >= 8


def test_errors_are_those_of_what_guidance_makes_of_the_halves():
    """Shared by both halves an error stays, of one half it grows by the scale, and by what the text changes."""
    pipe = PIPELINES["pixart_sigma"].build()
    call = PIPELINES["pixart_sigma"].arguments(steps=2)
    with at_work(pipe) as context:
        recorder = Recorder(context, lambda call: call.step == 0)
        pipe(**call)
        recorder.remove()
        (recorded,) = recorder.calls
        y = recorded.output[0]
        halves = torch.tensor([1.0, 0.0]).repeat_interleave(len(y) // 2).view(-1, 1, 1, 1)
        energy = guided(y.double(), 3.0).square().sum()
        for wrong, factor in ((torch.ones_like(y), 1.0), (halves * torch.ones_like(y), 2.0), (1 - halves + 0 * y, 3.0)):
            off = replace(recorded, output=[y + 1e-3 * wrong])
            (error,) = errors([off], context, batched=True, guidance=3.0)
            assert error.output == pytest.approx(float((1e-3 * factor) ** 2 * y.numel() / 2 / energy), rel=1e-2)
            assert next(errors([off], context, batched=True)).output < 2e-6 * y.numel() / y.square().sum()


def test_bad_arguments_of_a_measurement():
    pipe = PIPELINES["pixart_sigma"].build()
    for bad in ({"candidates": []}, {"way": "guess"}, {"ranges": 0}):
        with pytest.raises(PlanError, match="measure needs"):
            measure(pipe, **{"candidates": [WIDE], "requests": [], **bad})


def test_sensitivities_keep_in_a_file(tmp_path):
    candidates = (replace(NARROW, balance=0.5, steps=(0.0, 1.0)), WIDE)
    found = made(candidates=candidates)
    found.save(tmp_path / "s.safetensors")
    again = load_sensitivities(tmp_path / "s.safetensors")
    assert (again.candidates, again.sites, again.ranges, again.roles) == (
        found.candidates,
        found.sites,
        found.ranges,
        found.roles,
    )
    assert torch.equal(allocate(again, budget=6, kind="bits").choice, allocate(found, budget=6, kind="bits").choice)
    for bad in (b"", b"broken"):
        (tmp_path / "s.safetensors").write_bytes(bad)
        with pytest.raises(PlanError, match="measure them again"):
            load_sensitivities(tmp_path / "s.safetensors")
    with pytest.raises(PlanError, match="measure them again"):
        load_sensitivities(tmp_path / "missing")


def test_ranges_that_are_put_together_cost_and_lose_the_same():
    fine = made(ranges=4)
    coarse = regroup(fine, 2)
    assert coarse.ranges == ((0.0, 0.5), (0.5, 1.0))
    for chosen in every(regroup(made(sites=2, ranges=4), 2)):
        s = made(sites=2, ranges=4)
        same = Allocation(s, chosen.choice.repeat_interleave(2, 1))
        assert same.error == pytest.approx(chosen.error) and same.cost("bits") == pytest.approx(chosen.cost("bits"))
    best, free = allocate(coarse, budget=6, kind="bits").error, allocate(fine, budget=6, kind="bits").error
    assert free <= best <= allocate(regroup(fine, 1), budget=6, kind="bits").error
    with pytest.raises(PlanError, match="4 ranges"):
        regroup(fine, 3)
    with pytest.raises(PlanError, match="cannot become 0"):
        regroup(fine, 0)
