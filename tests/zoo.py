"""The model zoo: ``ZOO["flux"].build()`` is a tiny FLUX, ``ZOO["flux"].inputs()`` the arguments of a forward."""

from zoo_base import Grid, Specimen, tensors_of, trajectory
from zoo_image import IMAGE
from zoo_packed import PACKED
from zoo_unet import UNET
from zoo_video import VIDEO

__all__ = ["ZOO", "Grid", "Specimen", "tensors_of", "trajectory"]

ZOO: dict[str, Specimen] = {specimen.name: specimen for specimen in (*IMAGE, *PACKED, *VIDEO, *UNET)}
