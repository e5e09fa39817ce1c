"""Tests run against the installed package: `python -m pytest` puts the checkout root on the path, where ./diffaccel
would hide it.

Several tests run side by side (``pytest -n``), each with one thread; kernel choices that they measure stay out of the
user's cache.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: without a GPU its interpreter runs kernels
if "DIFFACCEL_CACHE" not in os.environ:
    os.environ["DIFFACCEL_CACHE"] = tempfile.mkdtemp(prefix="diffaccel-tests-")
    atexit.register(shutil.rmtree, os.environ["DIFFACCEL_CACHE"], ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
