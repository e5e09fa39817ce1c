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
    torch.testing.assert_close(module.head_block_mass(q, k, 16, orders), own, rtol=1e-5, atol=1e-5)


def test_memory_stays_bounded():
    """8,192 tokens: all probabilities of one head would be 256 MiB. In a process of its own, whose peak is its own."""
    code = (
        "import resource, torch\n"
        "from diffaccel.kernels.block_mass import block_mass\n"
        "q = torch.randn(1, 1, 8192, 8)\n"
        "block_mass(q[:, :, :64], q[:, :, :64], 64, torch.arange(64)[None])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "block_mass(q, q, 64, torch.stack([torch.arange(8192), torch.randperm(8192)]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 150 * 1024  # KiB
