"""Structure: blocks, roles and attention modules of denoisers, without any list of classes."""

from collections import Counter
from typing import ClassVar

import peft
import pytest
import torch
from torch import nn
from zoo import ZOO

from diffaccel import ModelError, PlanError
from diffaccel.denoiser import Denoiser, find_denoisers, select, timestep_parameter
from diffaccel.sites import ROLES

# Counted by hand from the tiny configurations: repeated blocks, self- or joint attentions, cross-attentions, linears.
KNOWN = {
    "pixart_sigma": dict(
        blocks=3, attn=3, cross=3, roles={"attn.q": 3, "cross.k": 3, "ff.in": 3, "ff.out": 3, "final": 1}
    ),
    "sd3": dict(blocks=3, attn=3, cross=0, roles={"attn.q": 3, "attn.added_q": 3, "attn.added_out": 2, "ff.in": 5}),
    "flux": dict(blocks=4, attn=4, cross=0, roles={"fused.in": 2, "fused.out": 2, "attn.out": 2, "ff.in": 4}),
    "wan": dict(blocks=3, attn=3, cross=3, roles={"attn.out": 3, "cross.out": 3, "ff.in": 3, "final": 1}),
    "omnigen": dict(blocks=3, attn=3, cross=0, roles={"attn.k": 3}),
    "unet_sd15": dict(blocks=6, attn=6, cross=6, roles={"cross.q": 6, "ff.in": 6, "modulation": 12}),
}

MOSTLY_OTHER = {"stable_cascade": 0.7}
"""Its modulation and its text mappers are linears in residual stacks whose names and shapes say nothing."""


@pytest.mark.parametrize("name", ZOO)
def test_every_denoiser_has_a_structure(name):
    model = ZOO[name].build()
    (denoiser,) = find_denoisers(model)
    assert denoiser.blocks and denoiser.attentions
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    assert [site.name for site in denoiser.layers] == layers  # nothing lost, nothing twice
    assert {site.role for site in denoiser.layers} <= set(ROLES)
    roles = Counter(site.role for site in denoiser.layers)
    assert any(role.startswith(("attn.", "cross.")) for role in roles)
    parameters = sum(p.numel() for site in denoiser.layers for p in site.module.parameters() if site.role == "other")
    allowed = MOSTLY_OTHER.get(name, 0.3)
    assert parameters < allowed * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_known_structures(name):
    denoiser = Denoiser.of(ZOO[name].build(), "transformer")
    known = KNOWN[name]
    assert len(denoiser.blocks) == known["blocks"]
    assert Counter(site.role for site in denoiser.attentions) == Counter(attn=known["attn"]) + Counter(
        cross=known["cross"]
    )
    roles = Counter(site.role for site in denoiser.layers)
    assert {role: roles[role] for role in known["roles"]} == known["roles"]


class _Mixer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gather = nn.Linear(width, 3 * width)
        self.scatter = nn.Linear(width, width)


class _Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mixer = _Mixer(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)


class _Nameless(nn.Module):
    """A denoiser with names that nobody knows."""

    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.trunk = nn.ModuleList(_Layer(width) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def forward(self, x, timestep):
        return x


def test_unknown_names_are_told_by_shape():
    (denoiser,) = find_denoisers(_Nameless())
    assert [name for name, _ in denoiser.blocks] == ["trunk.0", "trunk.1", "trunk.2"]
    assert [site.name for site in denoiser.attentions] == ["trunk.0", "trunk.1", "trunk.2"]  # each block for itself
    roles = {site.name: site.role for site in denoiser.layers}
    assert roles["stem"] == "embed" and roles["head"] == "final"
    assert roles["trunk.1.mixer.gather"] == "attn.qkv" and roles["trunk.1.mixer.scatter"] == "attn.out"
    assert roles["trunk.1.up"] == "ff.in" and roles["trunk.1.down"] == "ff.out"
    assert roles["trunk.1.modulation"] == "modulation"


def test_lora_wrappers_keep_roles():
    model = ZOO["pixart_sigma"].build()
    before = {site.name: site.role for site in Denoiser.of(model, "transformer").layers}
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"]), model)
    after = {site.name.replace(".base_layer", ""): site.role for site in Denoiser.of(model, "transformer").layers}
    assert after == before


def test_compiled_modules_are_unwrapped():
    model = ZOO["dit"].build()
    (denoiser,) = find_denoisers(torch.compile(model, backend="eager"))
    assert denoiser.module is model


def test_select_names_the_roles_that_exist():
    denoisers = find_denoisers(ZOO["dit"].build())
    assert len(select(denoisers, "attn.q", "layers")) == 3
    with pytest.raises(PlanError, match=r"cross\.\*.*roles present: .*attn\.q \(3\)"):
        select(denoisers, "cross.*", "layers")


def test_what_is_no_denoiser_is_refused():
    class Pipeline:
        components: ClassVar = {"vae": nn.Linear(2, 2), "scheduler": object()}

    with pytest.raises(ModelError, match="vae"):
        find_denoisers(Pipeline())
    with pytest.raises(ModelError, match="expected a diffusers pipeline"):
        find_denoisers("model")


def test_timestep_parameter_is_found_by_name():
    assert timestep_parameter(ZOO["z_image"].build()) == "t"
    assert timestep_parameter(ZOO["hidream"].build()) == "timesteps"
    assert timestep_parameter(nn.Linear(2, 2)) is None
