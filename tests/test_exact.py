"""Exact reuse: equal to the bit, never stale, and really not computed again."""

import copy

import pytest
import torch
from torch import nn
from zoo import ZOO, trajectory
from zoo_pipelines import PIPELINES

from diffaccel import ExactReuse, GuidanceReuse, Plan, PlanError, Quantize, StepCache, accelerate
from diffaccel.exact.constants import ConstantHook, Constants
from diffaccel.exact.trim import _text_and_mask
from diffaccel.hooks import install

CONSTANTS = Plan(exact=ExactReuse(encoders=False, trim=False))
TRIM = Plan(exact=ExactReuse(constants=False, encoders=False))
ENCODERS = Plan(exact=ExactReuse(constants=False, trim=False))
EVERYTHING = Plan(exact=ExactReuse())


def facts(accel):
    return accel.report().techniques[-1].facts


# --- constants --------------------------------------------------------------------------------------------------------


# fmt: off
KINDS = [
    "allegro", "cogvideox", "flux", "hunyuan_video", "latte", "pixart_sigma", "qwen_image", "sana", "sd15_heun", "sd3",
    "sdxl", "wan", "wan22",
]
# fmt: on


@pytest.mark.parametrize("name", [name for name in KINDS if name in PIPELINES])
def test_pipelines_give_the_same_to_the_bit(name):
    specimen = PIPELINES[name]
    pipe = specimen.build()
    plain = specimen.call(pipe, steps=4)
    with accelerate(pipe, CONSTANTS) as accel:
        assert torch.equal(specimen.call(pipe, steps=4), plain)
        first = facts(accel)["constants_reused"]
        assert torch.equal(specimen.call(pipe, steps=4), plain)
        assert facts(accel)["constants_reused"] == 2 * first  # nothing is kept from one run to the next
    assert torch.equal(specimen.call(pipe, steps=4), plain)


@pytest.mark.parametrize("name", ["pixart_sigma", "wan", "sd15"])
def test_keys_and_values_of_the_text_are_projected_once_per_prompt(name):
    specimen = PIPELINES[name]
    pipe, counts = specimen.build(), {}
    root = pipe.unet if name == "sd15" else pipe.transformer
    for path, module in root.named_modules():
        if "attn2" in path and path.endswith((".to_k", ".to_v")):
            module.register_parameter("bias", module.bias)
            weight_forward = module.forward

            def counted(*args, path=path, forward=weight_forward, **kwargs):
                counts[path] = counts.get(path, 0) + 1
                return forward(*args, **kwargs)

            module.forward = counted
    with accelerate(pipe, CONSTANTS):
        specimen.call(pipe, steps=5)
    assert len(counts) >= 4 and set(counts.values()) == {2 if name == "wan" else 1}  # Wan guides in two calls


def hooked(function):
    class Module(nn.Module):
        def forward(self, x, scale=1.0):
            self.calls += 1
            return function(x) * scale

    module, constants = Module().eval(), Constants()
    module.calls = 0
    hook = ConstantHook(constants)
    install(module, hook, "exact")
    return module, constants, hook


def test_the_same_memory_unwritten_is_the_same():
    module, constants, _ = hooked(lambda x: x + 1)
    text = torch.zeros(2, 3)
    assert module(text).sum() == 6 and module(text).sum() == 6 and module.calls == 2  # not yet known as a constant
    constants.add(text)
    for again in (text, text, text.view(2, 3), text[:]):
        assert module(again).sum() == 6
    assert module.calls == 3
    assert module(text, scale=2.0).sum() == 12 and module(text.t()).shape == (3, 2) and module.calls == 5
    text.add_(1)
    assert module(text).sum() == 12  # written into: no constant any more
    constants.add(text)
    assert module(text).sum() == 12 and module(text).sum() == 12 and module.calls == 7
    constants.clear()
    assert module(text).sum() == 12 and module.calls == 8


def test_memory_that_is_given_to_another_tensor():
    module, constants, _ = hooked(lambda x: x + 1)
    for value in range(20):  # each new tensor is likely to get the address of the one before
        text = torch.full((1000,), float(value))
        constants.add(text)
        assert module(text)[0] == value + 1
        del text


def test_outputs_that_somebody_writes_into_are_not_given_again():
    module, constants, hook = hooked(lambda x: x + 1)
    text = torch.zeros(3)
    constants.add(text)
    module(text).mul_(5)
    for _ in range(3):
        assert module(text).sum() == 3
    assert hook.spared == 0


def test_constants_go_on_from_module_to_module_and_no_further():
    (first, constants, _), (second, _, hook) = hooked(lambda x: x + 1), hooked(lambda x: 2 * x)
    hook._constants = constants
    text = torch.zeros(2)
    constants.add(text)
    for step in range(3):
        assert second(first(text))[0] == 2
        assert second(first(text) + step)[0] == 2 + 2 * step  # a new tensor
    assert (first.calls, second.calls) == (1, 4)


def test_a_repeated_timestep_is_embedded_once():
    """Heun's schedule has each timestep twice, at two places in memory."""
    model, calls = ZOO["flux"].build(), []
    model.time_text_embed.timestep_embedder.linear_1.register_forward_hook(lambda *_: calls.append(1))
    inputs = list(trajectory(ZOO["flux"], steps=4))
    fixed = {k: v for k, v in inputs[0].items() if k not in ("hidden_states", "timestep")}
    times = torch.tensor([0.9, 0.7, 0.7, 0.5])
    with torch.no_grad():
        plain = [
            model(hidden_states=x["hidden_states"], timestep=times[i : i + 1], **fixed)[0] for i, x in enumerate(inputs)
        ]
        with accelerate(model, CONSTANTS) as accel:
            accel.clock._schedule_set(type("Scheduler", (), {"timesteps": times})())
            got = []
            calls.clear()
            for i, x in enumerate(inputs):
                got.append(model(hidden_states=x["hidden_states"], timestep=times[i].expand(1), **fixed)[0])
                accel.clock.advance()
    assert all(map(torch.equal, got, plain))
    assert len(calls) == 4 and facts(accel)["constants_reused"] > 0


def test_training_and_gradients_are_left_alone():
    module, constants, hook = hooked(lambda x: x + torch.zeros((), requires_grad=True))
    text = torch.zeros(3)
    constants.add(text)
    assert module(text) is not module(text) and hook.spared == 0
    module.train()
    with torch.no_grad():
        assert module(text) is not module(text) and hook.spared == 0


@pytest.mark.parametrize(
    "others",
    [
        dict(caching=StepCache(threshold=100, min_steps=1)),
        dict(guidance=GuidanceReuse(every=2, steps=(0.0, 1.0))),
        dict(quantization=[Quantize(sites="cross.*", steps=(0.5, 1.0))]),
    ],
)
@pytest.mark.filterwarnings("ignore:diffaccel")
def test_together_with_what_is_not_exact(others):
    """The same as the others alone: also where quantized keys and values change in the middle of the schedule."""
    specimen = PIPELINES["pixart_sigma"]
    pipe = specimen.build()
    with accelerate(pipe, Plan(**others)):
        expected = specimen.call(pipe, steps=6)
    with accelerate(pipe, Plan(exact=CONSTANTS.exact, **others)):
        assert torch.equal(specimen.call(pipe, steps=6), expected)


# --- text encoders ----------------------------------------------------------------------------------------------------


def test_the_same_prompt_is_encoded_once():
    specimen = PIPELINES["pixart_sigma"]
    pipe, calls = specimen.build(), []
    pipe.text_encoder.encoder.block[0].register_forward_hook(lambda *_: calls.append(1))
    plain = [specimen.call(pipe, prompt=p, steps=2) for p in ("a red circle", "a blue square")]
    with accelerate(pipe, ENCODERS) as accel:
        calls.clear()
        for i in (0, 1, 0, 1):
            assert torch.equal(specimen.call(pipe, prompt=("a red circle", "a blue square")[i], steps=2), plain[i])
        assert len(calls) == 3  # two prompts, and the empty one
        assert facts(accel)["texts_reused"] == 5
        with torch.no_grad():
            next(pipe.text_encoder.parameters()).mul_(1.5)
        changed = specimen.call(pipe, prompt="a red circle", steps=2)
    assert torch.equal(changed, specimen.call(pipe, prompt="a red circle", steps=2))
    assert not torch.equal(changed, plain[0])


def test_encoders_that_give_several_things(name="sd3"):
    specimen = PIPELINES[name]
    pipe = specimen.build()
    plain = specimen.call(pipe, steps=2)
    with accelerate(pipe, ENCODERS) as accel:
        for _ in range(2):
            assert torch.equal(specimen.call(pipe, steps=2), plain)
        assert facts(accel)["texts_reused"] > 0
    assert not any("_diffusers_hook" in vars(e.module) for e in accel._context.encoders)


# --- padding ----------------------------------------------------------------------------------------------------------


def padded(name, lengths, total=12):
    """Arguments with text of these lengths, the rest hidden by the mask, or the masks."""
    specimen = ZOO[name]
    kwargs = specimen.inputs(batch=len(lengths))
    mask = torch.arange(total) < torch.tensor(lengths)[:, None]
    masks = [k for k, v in kwargs.items() if "mask" in k and getattr(v, "shape", None) == mask.shape]
    return specimen, kwargs | {k: mask.to(kwargs[k].dtype) for k in masks}


def pairs(name):
    return _text_and_mask(padded(name, (5, 8))[1]) is not None


# Others take several texts, or bring their masks in another form.
MASKED = (
    *("kandinsky3", "lumina", "lumina2", "ltx", "mochi", "pixart_alpha", "pixart_sigma"),
    *("prx", "qwen_image", "sana"),
)


def test_the_text_and_its_mask_are_found():
    assert set(MASKED) <= {name for name in ZOO if pairs(name)}
    assert not pairs("flux") and not pairs("wan")


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("lengths", [(5, 8), (7, 7)])
def test_hidden_padding_is_cut_without_effect(name, lengths):
    specimen, kwargs = padded(name, lengths)
    model = specimen.build()
    with torch.no_grad():
        plain = specimen.outputs(model(**kwargs))
        with accelerate(model, TRIM) as accel:
            got = specimen.outputs(model(**kwargs))
            report = accel.report().techniques[0]
    scale = max(float(v.abs().max()) for v in plain)
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * scale, rtol=0)
    assert (report.facts["padding_cut"] == 2 * (12 - max(lengths))) is not bool(report.notes)


def test_it_is_really_shorter_and_read_once():
    specimen, kwargs = padded("pixart_sigma", (5, 8))
    model, widths = specimen.build(), []
    model.transformer_blocks[0].attn2.to_k.register_forward_hook(lambda m, i, o: widths.append(o.shape[1]))
    with torch.no_grad(), accelerate(model, EVERYTHING) as accel:
        for step in range(3):
            model(**kwargs | {"hidden_states": kwargs["hidden_states"] * (1 - 0.1 * step)})
        report = facts(accel)
    assert widths[:2] == [12, 8] and set(widths[2:]) == {8}
    assert report["constants_reused"] > 0  # the shorter text is the same tensor at every step


def test_a_model_that_looks_behind_the_mask_is_left_alone():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask):
            return hidden_states * self.w + encoder_hidden_states.mean()

    model = Peeking()
    text, mask = torch.randn(1, 6, 4), torch.tensor([[1, 1, 1, 0, 0, 0]])
    x = torch.randn(1, 3, 4)
    with accelerate(model, TRIM) as accel:
        got = model(x, 1.0, text, encoder_attention_mask=mask)
        report = accel.report().techniques[0]
    assert torch.equal(got, model(x, 1.0, text, mask))
    assert report.facts["padding_cut"] == 0 and "looks at it in spite of the mask" in report.notes[0]


@pytest.mark.parametrize("mask", [[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_only_the_end_is_cut(mask):
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask=None):
            seen.append(encoder_hidden_states.shape[1])
            return hidden_states * self.w

    model = Model()
    with accelerate(model, TRIM):
        model(torch.ones(1, 3, 4), 1.0, torch.ones(1, 4, 2), torch.tensor([mask]))
    assert seen == [4]


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_settings(tmp_path):
    with pytest.raises(PlanError, match="everything off"):
        ExactReuse(constants=False, encoders=False, trim=False)
    with pytest.raises(PlanError, match=r"ExactReuse\.trim must be True or False, got 1"):
        ExactReuse(trim=1)
    plan = Plan(exact=ExactReuse(trim=False), caching=StepCache())
    assert Plan.load(plan.save(tmp_path)) == plan and plan.without("exact").exact is None


def test_no_trace_is_left():
    pipe = PIPELINES["wan"].build()
    before = {n: sorted(vars(m)) for n, m in pipe.transformer.named_modules()}
    twin = copy.deepcopy(pipe.transformer)
    with accelerate(pipe, EVERYTHING):
        PIPELINES["wan"].call(pipe, steps=2)
    assert {n: sorted(vars(m)) for n, m in pipe.transformer.named_modules()} == before
    assert sorted(vars(twin)) == sorted(vars(pipe.transformer))
