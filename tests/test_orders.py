"""Orders of the tokens of a grid."""

import math

import pytest
import torch

from diffaccel.attention.layout import Layout
from diffaccel.attention.orders import CURVES, order_names, token_order
from diffaccel.attention.section import ORDERS

GRIDS = ((9,), (8, 8), (5, 3), (7, 12, 12), (5, 3, 4))


@pytest.mark.parametrize("grid", GRIDS)
def test_every_order_is_a_permutation_with_other_tokens_behind(grid):
    layout = Layout(grid, 3, 2, "latents")
    size = math.prod(grid)
    for name in order_names(len(grid)):
        order = token_order(name, layout)
        assert order[:size].sort().values.tolist() == list(range(3, 3 + size))
        assert order[size:].tolist() == [0, 1, 2, 3 + size, 4 + size]


def test_axes_are_read_in_the_order_of_the_name():
    layout = Layout((2, 3, 4), 0, 0, "latents")
    frame, height, width = torch.unravel_index(token_order("wfh", layout), layout.grid)
    assert (width * 6 + frame * 3 + height).tolist() == list(range(24))


@pytest.mark.parametrize("grid", [(8, 8), (16, 16, 16), (4, 8, 8)])
def test_hilbert_steps_to_a_neighbour(grid):
    order = token_order("hilbert", Layout(grid, 0, 0, "latents"))
    places = torch.stack(torch.unravel_index(order, grid), 1)
    assert (places[1:] - places[:-1]).abs().sum(1).max() == 1


def test_morton_visits_octants_in_turn():
    order = token_order("morton", Layout((4, 4, 4), 0, 0, "latents"))
    places = torch.stack(torch.unravel_index(order, (4, 4, 4)), 1)
    octants = (places // 2) @ torch.tensor([4, 2, 1])
    assert octants.tolist() == [i // 8 for i in range(64)]


@pytest.mark.parametrize("curve", CURVES)
def test_curves_in_frames(curve):
    grid = (3, 4, 4)
    frames = torch.unravel_index(token_order(f"f-{curve}", Layout(grid, 0, 0, "latents")), grid)[0]
    assert frames.tolist() == [i // 16 for i in range(48)]
    frames = torch.unravel_index(token_order(f"{curve}-f", Layout(grid, 0, 0, "latents")), grid)[0]
    assert frames.tolist() == [0, 1, 2] * 16


def test_places_in_the_list_never_change():
    """Artefacts hold them."""
    assert ORDERS[:11] == ("n", "hw", "wh", "morton", "hilbert", "fhw", "fwh", "hfw", "hwf", "wfh", "whf")
    assert ORDERS[11:] == ("f-morton", "f-hilbert", "morton-f", "hilbert-f")
    assert set(ORDERS) == {name for axes in (1, 2, 3) for name in order_names(axes)}


def test_an_order_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="'fhw'"):
        token_order("fhw", Layout((8, 8), 0, 0, "latents"))
