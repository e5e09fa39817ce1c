"""``diffaccel inspect``: what a model consists of."""

from __future__ import annotations

from diffaccel.cli.arguments import Device, Dtype, Json, Model

EXAMPLES = """
[bold]Examples[/]

diffaccel inspect

diffaccel inspect -m bundled:video --json
"""


def inspect(model: Model = "bundled:image", device: Device = None, dtype: Dtype = None, as_json: Json = False) -> None:
    """Show blocks, sites and attention calls, and where parameters, operations and time go."""
    raise NotImplementedError
