"""Block masks: which blocks, how they are kept, moved and completed."""

import pytest
import torch

from diffaccel.attention.layout import Layout
from diffaccel.attention.masks import band, completed, heaviest, image_blocks, packed, resampled, unpacked


def test_heaviest_blocks_by_row_and_the_rest_where_it_is_worth_most():
    value = torch.tensor([[[5.0, 4.0, 0.0], [1.0, 2.0, 3.0], [9.0, 0.0, 8.0]]])
    keep = heaviest(value, torch.tensor([4]))
    assert keep[0].int().tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 1]]
    assert heaviest(value, torch.tensor([5]))[0].int().tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 1]]
    assert heaviest(value, torch.tensor([0])).sum() == 3, "every query keeps something"
    assert heaviest(value, torch.tensor([9])).all()


def test_each_head_has_its_own_count():
    value = torch.rand(2, 6, 6)
    keep = heaviest(value, torch.tensor([12, 21]))
    assert keep.sum((1, 2)).tolist() == [12, 21]
    assert keep.sum(2).aminmax().min >= 2 and keep[1].sum(1).max() <= 4


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_band(density):
    keep = band(20, density)
    assert abs(float(keep.float().mean()) - density) < 0.06
    assert keep.diagonal().all() and torch.equal(keep, keep.T)
    sink = band(20, density, sink=True)
    assert sink[0].all() and sink[:, 0].all() and abs(float(sink.float().mean()) - density) < 0.06


@pytest.mark.parametrize("n", [1, 5, 8])
def test_packed_bits_come_back(n):
    mask = torch.rand(2, 3, n, n) < 0.5
    bits = packed(mask)
    assert bits.dtype == torch.uint8 and bits.shape == (2, 3, -(-n * n // 8))
    assert torch.equal(unpacked(bits, n), mask)


def test_text_is_dense_wherever_it_stands():
    layout = Layout((4, 4), 5, 2, "latents")
    assert image_blocks(layout, 8) == 2 and image_blocks(Layout((3, 3), 1, 0, "latents"), 4) == 2
    assert image_blocks(Layout((3, 3), 0, 0, "latents"), 4) == 3
    keep = completed(torch.eye(2, dtype=torch.bool)[None], layout, 8)
    assert keep[0].int().tolist() == [[1, 0, 1], [0, 1, 1], [1, 1, 1]]


def test_resampling_keeps_shares_of_the_way():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :2, 2:] = True
    larger = resampled(mask, 8)
    expected = torch.eye(8, dtype=torch.bool)
    expected[:4, 4:] = True
    assert torch.equal(larger[0], expected)
    assert resampled(larger, 4)[0, 0].tolist() == [True, False, True, True]
