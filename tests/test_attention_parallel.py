"""Reordered sparse attention under Ulysses: two processes give what one gives."""

import subprocess
import sys
from pathlib import Path

CODE = '''
import sys
sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from zoo import ZOO
from diffaccel import BlockSparse, Plan, PlanError, accelerate
from diffaccel.attention.layout import Layout
from diffaccel.attention.masks import heaviest, image_blocks, packed
from diffaccel.attention.patterns import Calibrated
from diffaccel.denoiser import find_denoisers

BLOCK = 16


def plan_for(model, specimen):
    """Orders and masks at random, other ones for each head."""
    generator = torch.Generator().manual_seed(0)
    grid = tuple(s for s in specimen.grid(1, "even")[1:] if s > 1)
    n, found = image_blocks(Layout(grid, 0, 0, ""), BLOCK), {{}}
    for site in find_denoisers(model)[0].attentions:
        if site.role == "attn":
            heads = site.module.heads
            value = torch.rand(heads, n, n, generator=generator)
            masks = packed(heaviest(value, torch.full((heads,), n * n // 2)))[None]
            orders = torch.randint(5, 11, (heads,), generator=generator).to(torch.uint8)
            found |= Calibrated(torch.tensor(grid), orders, masks, torch.ones(heads)).write(0, site)
    return Plan(attention=BlockSparse(reorder=True, block_size=BLOCK, masks=1, steps=(0.0, 1.0)), artefacts=found)


def forward(model, specimen):
    with torch.no_grad():
        return model(**specimen.inputs(1, "even"), return_dict=False)[0]


def work(rank, alone):
    import diffusers
    dist.init_process_group("gloo", init_method="file://" + {meeting!r}, rank=rank, world_size=2)
    specimen = ZOO["wan"]
    model = specimen.build()
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and there is no accelerator here
    torch._C._get_accelerator = lambda *check: torch.device("cpu")
    model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
    with accelerate(model, plan_for(model, specimen)) as accel:
        both = forward(model, specimen)
        sparse = accel.report().techniques[0].facts["calls_sparse"]
    assert sparse > 0, accel.report()
    error = float((both - alone).abs().max())
    assert error < 1e-4, error
    open({meeting!r} + f".agrees{{rank}}", "w").close()
    dist.destroy_process_group()


if __name__ == "__main__":
    specimen = ZOO["wan"]
    model = specimen.build()
    dense = forward(model, specimen)
    with accelerate(model, plan_for(model, specimen)):
        alone = forward(model, specimen)
    assert (alone - dense).abs().max() > 1e-3
    mp.spawn(work, (alone,), nprocs=2)
'''


def test_two_processes_with_half_of_the_heads_each(tmp_path):
    script = tmp_path / "ulysses.py"
    script.write_text(CODE.format(tests=str(Path(__file__).parent), meeting=str(tmp_path / "meeting")))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"meeting.agrees{rank}").exists() for rank in range(2)] == [True, True]
