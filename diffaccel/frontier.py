"""The frontier in a tuned plan's folder: several plans from the nearest to the original to the fastest. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffaccel.errors import PlanError, did_you_mean

FILE = "frontier.json"
NUMBERS = ("psnr", "psnr_worst", "speedup", "memory")
_SMALLER_IS_BETTER = ("memory",)
_CLAUSE = re.compile(r"\s*([a-z_]+)\s*(>=|<=)\s*([\d.]+)\s*")


def pick(folder: Path, at: str) -> Path:
    """The folder of the plan on ``folder``'s frontier that meets ``at`` best.

    Args:
        folder: of a tuned plan.
        at: such as ``psnr>=38`` (the fastest of those) or ``speedup>=2`` (the nearest to the original of those);
            several joined by ``&``.

    Raises:
        PlanError: no frontier there, a text that is no requirement, or nothing on the frontier meets it.
    """
    plans = read(folder)
    wanted = [_clause(part) for part in at.split("&")]
    fitting = [p for p in plans if all(_meets(p, *clause) for clause in wanted)]
    if not fitting:
        have = "; ".join(", ".join(f"{n} {p[n]:.3g}" for n in NUMBERS if n in p) for p in plans)
        raise PlanError(f"no plan on the frontier of {folder} meets {at!r}; it has {have}")
    of_quality = any(name.startswith("psnr") for name, _ in wanted)
    best = max(fitting, key=lambda p: p["speedup"] if of_quality else p["psnr"])
    return folder / str(best["folder"])


def read(folder: Path) -> Sequence[Mapping[str, Any]]:
    """What is on the frontier in ``folder``.

    Raises:
        PlanError: there is none, or it is damaged.
    """
    file = folder / FILE
    try:
        plans = json.loads(file.read_text())["plans"]
    except FileNotFoundError:
        raise PlanError(f"{folder} holds no frontier to pick from; only what diffaccel.tune wrote does") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{file} is damaged ({error}); tune again") from None
    if not isinstance(plans, list) or not all(isinstance(p, dict) and {"folder", *NUMBERS} <= p.keys() for p in plans):
        raise PlanError(f"{file} is damaged: 'plans' lacks {', '.join(('folder', *NUMBERS))}; tune again")
    return plans


def _clause(text: str) -> tuple[str, float]:
    match = _CLAUSE.fullmatch(text)
    if not match:
        raise PlanError(f"at= takes requirements such as 'psnr>=38', got {text.strip()!r}")
    name, sign, number = match.groups()
    if name not in NUMBERS:
        raise PlanError(f"at= {text.strip()!r}: a frontier has no {name!r}{did_you_mean(name, NUMBERS)}")
    try:
        bound = float(number)
    except ValueError:
        raise PlanError(f"at= {text.strip()!r}: {number!r} is no number") from None
    least = name not in _SMALLER_IS_BETTER
    if (sign == ">=") != least:
        raise PlanError(f"at= {text.strip()!r} bounds the good side; write {name}{'>=' if least else '<='}{number}")
    return name, bound


def _meets(plan: Mapping[str, Any], name: str, bound: float) -> bool:
    return plan[name] <= bound if name in _SMALLER_IS_BETTER else plan[name] >= bound
