"""What the commands print with: results on stdout, everything else on stderr, so that ``--json`` can be piped."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

from rich.console import Console
from rich.text import Text

from diffaccel.errors import MissingPackageError

out = Console()
err = Console(stderr=True)


def fail(message: str) -> None:
    """One red line, on one line whatever it contains."""
    err.print(Text("error: " + " ".join(message.split()), style="bold red"), soft_wrap=True)


def note(message: str) -> None:
    """A dim line for people."""
    err.print(Text(message, style="dim"), soft_wrap=True)


def print_json(data: Any) -> None:
    """JSON without colour or wrapping."""
    print(json.dumps(data, indent=2, allow_nan=False))


def quiet_libraries() -> None:
    """Keep the libraries' loading bars and notices out of the output. This process only, before the model is loaded."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise MissingPackageError(f"{error}; run `pip install -e .` in the checkout") from error
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
