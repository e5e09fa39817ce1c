"""Prompt files: every published form is read, and what cannot be read says why."""

import json

import pytest

from diffaccel.errors import InputError
from diffaccel.pipelines.prompts import read_prompts

COCO = {
    "images": [{"id": 1}, {"id": 2}],
    "annotations": [
        {"image_id": 2, "id": 7, "caption": "A dog on a sofa. "},
        {"image_id": 1, "id": 8, "caption": "Two cats."},
        {"image_id": 2, "id": 9, "caption": "A sofa with a dog."},
    ],
}
FORMS = {
    "lines.txt": ("# mine\na cat\n\n  a dog \n", ["a cat", "a dog"]),
    "no_ending": ("a cat\n", ["a cat"]),
    "list.json": ('["a cat", "a dog"]', ["a cat", "a dog"]),
    "coco.json": (json.dumps(COCO), ["A dog on a sofa.", "Two cats."]),
    "mjhq.json": ('{"00ff": {"category": "food", "prompt": "soup"}, "01": {"prompt": "bread"}}', ["soup", "bread"]),
    "vbench.json": ('[{"prompt_en": "in a still frame, a stop sign", "dimension": ["x"]}]', None),
    "rows.jsonl": ('{"caption": "a cat"}\n\n"a dog"\n', ["a cat", "a dog"]),
    "parti.tsv": ('Prompt\tCategory\nbond\tAbstract\na "b" c\tArts\n', ["bond", 'a "b" c']),
    "drawbench.csv": ('Prompts,Category\n"red, green",Colors\n', ["red, green"]),
    "excel.csv": ("\ufeffprompt\r\na cat\r\n", ["a cat"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path, name):
    content, prompts = FORMS[name]
    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name) == (prompts or ["in a still frame, a stop sign"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not JSON"),
        ("a.jsonl", '"fine"\n{', "not JSON in line 2"),
        ("a.json", "7", "must hold a list or an object of prompts, got int"),
        ("a.json", '["fine", 7]', "prompt 1 must be a text, got int 7"),
        ("a.json", '[{"promt": "x"}]', "entry 0 has none of prompt, .* but promt"),
        ("a.json", '{"x": {"prompt": 3}}', "prompt of entry x must be a text, got 3"),
        ("a.csv", "title,year\nx,1\n", "entry 0 has none of"),
        ("a.txt", "# nothing\n\n", "holds no prompts"),
        ("a.csv", "prompt\n", "holds no prompts"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"cannot read prompts from '.*mine.txt': No such file or directory$"):
        read_prompts(tmp_path / "mine.txt")
    with pytest.raises(InputError, match=r"That set does not ship with diffaccel: download PartiPrompts\.tsv"):
        read_prompts(tmp_path / "parti-prompts.tsv")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read prompts from"):
        read_prompts(tmp_path / "bytes.txt")
