"""Which places of a denoiser a section of a plan speaks of: ``sites="attn.* ff.* !transformer.blocks.0.*"``.

A pattern is a space-separated list of globs. Each is tried on a site's role (``ff.in``), then on its full name
(``transformer.blocks.0.ff.net.2``). ``component:glob`` restricts a glob to one component, ``!glob`` excludes. A pattern
of exclusions only starts from everything. Text encoders are meant only where they are named: ``text_encoder*:ff.*``.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from diffaccel.errors import PlanError

ROLES = (
    *("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out"),
    *("attn.added_q", "attn.added_k", "attn.added_v", "attn.added_out"),
    *("cross.q", "cross.k", "cross.v", "cross.out"),
    *("ff.in", "ff.out", "fused.in", "fused.out"),
    *("modulation", "embed", "final", "conv", "skip", "other"),
)
"""What a linear or convolution is for. Attention calls have the roles ``attn`` (self or joint) and ``cross``."""


@dataclass(frozen=True)
class _Glob:
    glob: str
    component: str
    exclude: bool

    def covers(self, role: str, component: str, name: str) -> bool:
        if self.component and not fnmatchcase(component, self.component):
            return False
        return fnmatchcase(role, self.glob) or fnmatchcase(f"{component}.{name}", self.glob)


class SitePattern:
    """A parsed ``sites=`` pattern.

    Raises:
        PlanError: the pattern is empty or not text.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text.split():
            raise PlanError(f"sites must be a text of space-separated globs such as 'attn.* ff.*', got {text!r}")
        self.text = text
        self._globs = []
        for word in text.split():
            body = word.removeprefix("!")
            component, _, glob = body.rpartition(":")
            if not glob:
                raise PlanError(f"sites={text!r}: {word!r} names no site; write a glob such as 'attn.*' after it")
            self._globs.append(_Glob(glob, component, exclude=word.startswith("!")))

    def names(self, component: str) -> bool:
        """Whether it speaks of ``component`` by name: with a prefix, or a name that begins with it."""
        said = (g for g in self._globs if not g.exclude)
        return any(fnmatchcase(component, g.component) or g.glob.startswith(f"{component}.") for g in said)

    def matches(self, role: str, component: str, name: str) -> bool:
        """Whether the site with this role and dotted ``name`` inside ``component`` is meant."""
        includes = [g for g in self._globs if not g.exclude]
        wanted = any(g.covers(role, component, name) for g in includes) if includes else True
        return wanted and not any(g.covers(role, component, name) for g in self._globs if g.exclude)
