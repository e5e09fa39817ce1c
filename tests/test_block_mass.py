"""Mass of attention by blocks: equal to the definition in any chunks, and in bounded memory."""

import subprocess
import sys

import pytest
import torch

from diffaccel.kernels import block_mass as module


def inputs(B, H, Hkv, N, D=16):
    return torch.randn(B, N, H, D).transpose(1, 2), torch.randn(B, N, Hkv, D).transpose(1, 2)


def mask_of(kind, B, N):
    if kind == "key padding":
        return torch.rand(B, 1, 1, N) < 0.7
    if kind == "bool":
        mask = torch.rand(B, 1, N, N) < 0.7
        mask[0, :, N // 2] = False  # a query without a key
        return mask
    return torch.randn(N, N) if kind == "additive" else None


@pytest.mark.parametrize("kind", ["none", "key padding", "bool", "additive"])
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "N", "block_size"), [(1, 1, 1, 1, 16), (2, 4, 2, 100, 16), (1, 2, 2, 64, 32)]
)
def test_equals_definition_whatever_the_chunks(B, H, Hkv, N, block_size, kind, monkeypatch):
    torch.manual_seed(0)
    q, k = inputs(B, H, Hkv, N)
    orders = torch.stack([torch.arange(N), torch.randperm(N), torch.randperm(N)])
    mask = mask_of(kind, B, N)
    expected = module.block_mass_ref(q, k, block_size, orders, mask, 0.3)
    for chunk in (4 * N, 4 * N * 7, 2**25):
        monkeypatch.setattr(module, "_CHUNK_BYTES", chunk)
        for got, want in zip(module.block_mass(q, k, block_size, orders, mask, 0.3), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_an_order_for_each_head():
    torch.manual_seed(0)
    q, k = inputs(2, 3, 3, 70)
    orders = torch.stack([torch.randperm(70) for _ in range(3)])
    sums, _ = module.block_mass_ref(q, k, 16, orders)
    own = torch.stack([sums[h, h] for h in range(3)])
    torch.testing.assert_close(module.block_mass(q, k, 16, orders[None])[0][0], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "key padding", "bool", "additive"])
def test_influence_equals_definition_whatever_the_chunks(kind, monkeypatch):
    torch.manual_seed(0)
    q, k = inputs(2, 4, 2, 70)
    v = torch.randn(2, 2, 70, 24)
    orders, mask = torch.stack([torch.arange(70), torch.randperm(70)]), mask_of(kind, 2, 70)
    expected = module.block_influence_ref(q, k, v, 16, orders, mask, 0.3)
    for chunk in (4 * 5 * 24, 4 * 5 * 24 * 9, 2**25):
        monkeypatch.setattr(module, "_CHUNK_BYTES", chunk)
        got = module.block_influence(q, k, v, 16, orders, mask, 0.3)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_influence_is_what_leaving_out_one_block_changes():
    """To first order: a block of little mass. And nothing where all values are the same."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
    k[:, :, 16:32] -= 4 * q.mean(2, keepdim=True)
    p = (q @ k.mT / 4).softmax(-1)
    p[..., :16, 16:32] *= 0.01
    q, k = torch.eye(64)[None, None] * 8, (p / p.sum(-1, keepdim=True)).log().mT.contiguous()  # scores are log p
    p = p / p.sum(-1, keepdim=True)
    found = module.block_influence(q, k, v, 16, torch.arange(64)[None], scale=1 / 8)[0, 0, 0, 1]
    left = p.clone()
    left[..., :16, 16:32] = 0
    change = (left / left.sum(-1, keepdim=True) - p) @ v
    assert float(found) == pytest.approx(float(change[..., :16, :].square().sum()), rel=0.1)
    flat = module.block_influence(q, k, torch.ones_like(v), 16, torch.arange(64)[None], scale=1 / 8)
    assert flat.max() < 1e-9


def test_some_queries_only():
    torch.manual_seed(0)
    q, k = inputs(1, 2, 2, 70)
    v, queries, orders = torch.randn(1, 2, 70, 8), torch.tensor([3, 20, 21, 69]), torch.stack([torch.randperm(70)])
    rank = orders[0].argsort()
    p = (q @ k.mT / 4).softmax(-1)
    sums, _ = module.block_mass(q, k, 16, orders, queries=queries)
    assert sums.sum((2, 3)) == pytest.approx(4.0, abs=1e-5)
    i, j = int(rank[20]) // 16, int(rank[5]) // 16
    rows = [t for t in queries.tolist() if int(rank[t]) // 16 == i]
    columns = [t for t in range(70) if int(rank[t]) // 16 == j]
    assert float(sums[0, 1, i, j]) == pytest.approx(float(p[0, 1][rows][:, columns].sum()), rel=1e-4)
    part = (
        p[0, 1][rows][:, columns] @ v[0, 1, columns] - p[0, 1][rows][:, columns].sum(1)[:, None] * (p @ v)[0, 1, rows]
    )
    found = module.block_influence(q, k, v, 16, orders, queries=queries)
    assert float(found[0, 1, i, j]) == pytest.approx(float(part.square().sum()), rel=1e-3)


def test_memory_stays_bounded():
    """8,192 tokens: all probabilities of one head would be 256 MiB. In a process of its own, whose peak is its own."""
    code = (
        "import resource, torch\n"
        "from diffaccel.kernels.block_mass import block_influence, block_mass\n"
        "q = torch.randn(1, 1, 8192, 8)\n"
        "block_mass(q[:, :, :64], q[:, :, :64], 64, torch.arange(64)[None])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "orders = torch.stack([torch.arange(8192), torch.randperm(8192)])\n"
        "block_mass(q, q, 64, orders)\n"
        "block_influence(q, q, q, 64, orders)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 200 * 1024  # KiB
