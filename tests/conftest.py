"""Tests run against the installed package: `python -m pytest` puts the checkout root on the path, where ./diffaccel
would hide it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
