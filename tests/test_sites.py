"""Site patterns."""

import pytest

from diffaccel import PlanError
from diffaccel.sites import SitePattern

SITES = {
    ("attn.q", "transformer", "blocks.0.attn1.to_q"),
    ("cross.k", "transformer", "blocks.0.attn2.to_k"),
    ("ff.in", "transformer", "blocks.0.ff.net.0.proj"),
    ("ff.in", "transformer_2", "blocks.1.ff.net.0.proj"),
    ("embed", "transformer", "patch_embedding"),
}


def matched(pattern):
    parsed = SitePattern(pattern)
    return {name for role, component, name in SITES if parsed.matches(role, component, name)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("attn.*", {"blocks.0.attn1.to_q"}),
        ("attn.* cross.*", {"blocks.0.attn1.to_q", "blocks.0.attn2.to_k"}),
        ("transformer_2:ff.*", {"blocks.1.ff.net.0.proj"}),
        ("transformer_2.*", {"blocks.1.ff.net.0.proj"}),
        ("transformer.blocks.0.*", {"blocks.0.attn1.to_q", "blocks.0.attn2.to_k", "blocks.0.ff.net.0.proj"}),
        ("* !ff.* !embed", {"blocks.0.attn1.to_q", "blocks.0.attn2.to_k"}),
        ("!transformer:*", {"blocks.1.ff.net.0.proj"}),
        ("FF.*", set()),
    ],
)
def test_patterns(pattern, expected):
    assert matched(pattern) == expected


@pytest.mark.parametrize("pattern", ["", "  ", None, "transformer:", 3])
def test_wrong_patterns_are_refused(pattern):
    with pytest.raises(PlanError, match="sites"):
        SitePattern(pattern)
