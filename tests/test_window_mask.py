"""Windows over token grids: small ones by hand, then what holds for all."""

import time

import pytest
import torch

from diffaccel.kernels.window_mask import window_blocks

GRIDS = [((60,), 0, 0, 4), ((8, 8), 0, 0, 8), ((4, 6, 10), 7, 0, 16), ((3, 5, 7), 0, 5, 8), ((5, 9, 16), 30, 11, 32)]


def rows(mask: torch.Tensor) -> list[str]:
    return ["".join(".#"[kept] for kept in row) for row in mask[0].int().tolist()]


def test_line_by_hand():
    # 6 blocks of 2; 16 of 36 is the diagonal and its neighbours.
    assert rows(window_blocks((12,), density=16 / 36, block_size=2)) == [
        "##....",
        "###...",
        ".###..",
        "..###.",
        "...###",
        "....##",
    ]


def test_image_by_hand():
    # 4 x 4 tokens in blocks of half a row: block = (row, side). Nearest are the blocks above and below (distance 1),
    # then the other side of the same row (distance 2), so 4 * 2 diagonal + 2 * 6 vertical = 20 of 64.
    mask = window_blocks((4, 4), density=20 / 64, block_size=2)[0].view(4, 2, 4, 2)
    row, side = torch.arange(4), torch.arange(2)
    near = (row[:, None] - row).abs() <= 1
    assert torch.equal(mask, near[:, None, :, None] & (side[:, None] == side)[None, :, None, :])


def test_frames_are_an_axis():
    # One block a frame: a window in time, although other frames' tokens are far along the row-major line.
    assert rows(window_blocks((3, 2, 2), density=7 / 9, block_size=4)) == ["##.", "###", ".##"]


def test_mixed_blocks_are_text():
    # 3 text + 12 image + 2 text tokens, blocks of 4: block 0 and 3 hold both, block 4 is text, 1 and 2 image.
    assert rows(window_blocks((12,), 3, 2, density=0.5, block_size=4)) == ["#####", "##.##", "#.###", "#####", "#####"]


@pytest.mark.parametrize(("grid", "before", "after", "size"), GRIDS, ids=str)
def test_what_always_holds(grid, before, after, size):
    tokens = before + torch.Size(grid).numel() + after
    n = -(-tokens // size)
    first, last = -(-before // size), n if after == 0 else (tokens - after) // size
    previous = None
    for density in (0.05, 0.125, 0.25, 0.5, 0.75, 1.0):
        mask = window_blocks(grid, before, after, density=density, block_size=size)
        assert mask.shape == (1, n, n) and mask.dtype == torch.bool
        assert torch.equal(mask, mask.mT) and mask[0].diagonal().all()
        assert mask[0, :first].all() and mask[0, last:].all()
        image = mask[0, first:last, first:last]
        asked = max(density, 1 / len(image))
        assert abs(image.double().mean().item() - asked) <= 1 / len(image) ** 2 + 1e-9
        # Every row has its share: no corner is left with next to nothing.
        assert image.double().mean(1).min() >= asked / 2 - 1 / len(image)
        assert previous is None or (mask | ~previous).all()
        previous = mask
    assert previous.all()


def test_reflected_grid_gives_the_reflected_line():
    mask = window_blocks((64,), density=0.4, block_size=4)
    interior = mask[0].float().mean(1)
    assert torch.allclose(interior, interior.flip(0), atol=1 / 16)


def test_axis_scale_narrows_that_axis():
    # Frames far apart: the eight nearest are those of the own frame.
    mask = window_blocks((8, 1, 8), density=8 / 64, block_size=1, axis_scale=(10, 1, 1))
    assert torch.equal(mask[0], torch.block_diag(*[torch.ones(8, 8)] * 8).bool())
    even = window_blocks((8, 1, 8), density=8 / 64, block_size=1)[0].view(8, 8, 8, 8)
    assert even[3, 3, 4, 3] and even[3, 3, 3, 4] and not even[3, 3, 3, 7]


def test_only_text_and_single_blocks_stay_dense():
    assert window_blocks((3,), 5, 5, density=0.1, block_size=8).all()
    assert window_blocks((1,), density=0.5, block_size=64).shape == (1, 1, 1)


def test_75000_tokens_in_seconds():
    start = time.process_time()
    mask = window_blocks((21, 45, 80), density=0.25, block_size=64)
    assert mask.shape == (1, 1182, 1182) and abs(mask.double().mean().item() - 0.25) < 1e-5
    assert time.process_time() - start < 20  # 0.8 s on two quiet cores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (0, 4), "density": 0.5}, "grid and block_size must be positive"),
        ({"grid": (4,), "density": 0.0}, "density must lie in"),
        ({"grid": (4,), "density": 0.5, "text_before": -1}, "text lengths not negative"),
        ({"grid": (4, 4), "density": 0.5, "axis_scale": (1,)}, "one number for each of the 2 axes"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        window_blocks(**arguments)
