"""Every denoiser of the zoo runs reordered block-sparse attention, or says why its calls stayed dense."""

import pytest
import torch
from zoo import ZOO

from diffaccel import BlockSparse, Plan, PlanError, accelerate
from diffaccel.attention.calibrate import calibrate_section
from diffaccel.errors import DiffAccelError

pytestmark = pytest.mark.filterwarnings("ignore:diffaccel. sparse attention is slower")
SECTION = BlockSparse(density=0.5, block_size=16, steps=(0.0, 1.0), reorder=True, masks=2)
# Too few tokens at this size; keys of text beside those of the image; linear attention. All others run sparse.
DENSE = {
    **dict.fromkeys(("latte", "prior"), "fewer than 4 blocks of tokens"),
    **dict.fromkeys(("nucleus_moe", "prx", "stable_cascade"), "queries and keys differ in number"),
    **dict.fromkeys(("sana", "sana_video"), "linear attention"),
}


@pytest.fixture(autouse=True)
def _sparse_path(monkeypatch):
    """These sequences are so short that the kernel would choose a dense path."""
    monkeypatch.setenv("DIFFACCEL_KERNELS", "block_sparse_attention=blocks")


def out(specimen, model):
    with torch.no_grad():
        return specimen.outputs(model(**specimen.inputs()))


def calibrated(specimen, model):
    """As `calibrate` does with a pipeline; the first call of a shape only teaches the layouts."""
    with accelerate(model, Plan()) as accel:

        def run():
            for _ in range(2):
                out(specimen, model)

        return calibrate_section(0, SECTION, accel._context, run, run)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_reordered_or_why_not(name):
    specimen = ZOO[name]
    model = specimen.build()
    plain = out(specimen, model)
    try:
        artefacts = calibrated(specimen, model)
        with accelerate(model, Plan(attention=SECTION, artefacts=artefacts)) as accel:
            sparse = out(specimen, model)
            report = accel.report().techniques[0]
    except (DiffAccelError, PlanError) as refusal:
        assert name in DENSE, refusal
        reason = str(refusal)
    else:
        if report.facts["calls_sparse"]:
            assert max((a - b).abs().max().item() for a, b in zip(sparse, plain, strict=True)) > 0
            assert name not in DENSE
        reason = str(report.facts["calls_dense"])
        assert report.facts["calls_sparse"] or name in DENSE, reason
    assert DENSE.get(name, "") in reason
    assert all(torch.equal(a, b) for a, b in zip(out(specimen, model), plain, strict=True))
