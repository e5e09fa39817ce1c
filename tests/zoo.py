"""The model zoo: ``ZOO["flux"].build()`` is a tiny FLUX, ``ZOO["flux"].inputs()`` the arguments of a forward."""

import torch
from zoo_base import Grid, Specimen, planes, tensors_of, trajectory
from zoo_custom import Curio
from zoo_image import IMAGE
from zoo_packed import PACKED
from zoo_unet import UNET
from zoo_video import VIDEO

__all__ = ["ZOO", "Grid", "Specimen", "tensors_of", "trajectory"]

CUSTOM = [
    Specimen(
        "curio",
        Curio,
        {},
        lambda grid: {"canvas": planes(grid), "hints": torch.arange(grid.batch * 3).view(grid.batch, 3) % 8},
        "before",
        latents=("canvas",),
        time="sigma",
        time_max=1.0,
    )
]

ZOO: dict[str, Specimen] = {specimen.name: specimen for specimen in (*IMAGE, *PACKED, *VIDEO, *UNET, *CUSTOM)}
