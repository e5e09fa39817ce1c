"""The report page: complete, self-contained, and safe against what prompts hold."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageSequence
from zoo_pipelines import PIPELINES

from diffaccel import Plan, StepCache
from diffaccel.errors import InputError
from diffaccel.eval.compare import compare
from diffaccel.eval.page import write_page

PROMPTS = ["a red circle", "</script><b>x</b>"]


def _compare(name, **call):
    pipe = PIPELINES[name].build()
    calls = {k: v for k, v in PIPELINES[name].request.items() if k != "output_type"}
    plans = {"cache": Plan(caching=StepCache(threshold=0.3, min_steps=1))}
    return compare(pipe, plans, PROMPTS, (0, 3), {"num_inference_steps": 3, **calls, **call}, (2,))


@pytest.fixture(scope="module")
def pixart():
    return _compare("pixart_sigma")


def _samples(html):
    return json.loads(re.search(r"^const samples = (.*);$", html, re.MULTILINE)[1])


def _picture(address):
    head, _, body = address.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_every_row_and_sample_is_on_the_page(pixart, tmp_path):
    html = write_page(pixart, tmp_path / "deep" / "report.html").read_text()
    samples = _samples(html)
    assert [(s["prompt"], s["seed"]) for s in samples] == [(p, s) for p in PROMPTS for s in (0, 3)]
    for number, sample in enumerate(samples):
        assert set(sample["pictures"]) == {row.name for row in pixart.rows} == {"reference", "cache", "2 steps"}
        for row, address in sample["pictures"].items():
            saved = (pixart.store.load(row, number)[0].clip(0, 1) * 255).round()
            assert np.array_equal(np.asarray(_picture(address)), saved)  # lossless
    table = html[html.index("<tbody>") : html.index("</tbody>")]
    assert all(f"<td>{row.name}</td>" in table for row in pixart.rows)
    assert f"<td>{pixart.row('cache').psnr.mean:.1f}</td>" in table
    assert "torch 2" in html and "seeds 0, 3" in html and "<svg" in html


def test_nothing_is_fetched_and_prompts_are_no_markup(pixart, tmp_path):
    html = write_page(pixart, tmp_path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["']?https?:|@import|url\(\s*["']?http""", html)
    assert html.count("</script>") == 1 and "<b>x</b>" not in html.replace("<\\/", "</").split("const samples")[0]


def test_clips_are_animations(tmp_path):
    result = _compare("wan", num_frames=9)
    samples = _samples(write_page(result, tmp_path / "report.html", items=1, quality=80).read_text())
    clip = _picture(samples[0]["pictures"]["cache"])
    assert len(samples) == 1 and clip.n_frames == len(result.store.load("cache", 0)) > 1
    assert len({frame.tobytes() for frame in ImageSequence.Iterator(clip)}) > 1


def test_refusals(pixart, tmp_path):
    with pytest.raises(InputError, match="items must be at least 1, got 0"):
        write_page(pixart, tmp_path / "report.html", items=0)
    assert not (tmp_path / "report.html").exists()
