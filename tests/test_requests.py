"""Lines of a file: read strictly, all of them before any is drawn, and packed by what they ask for alone."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.recipes import requests
from ldm.recipes.requests import Request, pack, read_requests


def written(tmp_path, *lines: object, name: str = "x.jsonl") -> str:
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_line_has_its_own_options_else_those_of_all(tmp_path):
    source = written(
        tmp_path, {"prompt": "a"}, "", {"prompt": "b", "seed": 3, "steps": 9, "name": "b"}, {"prompt": "c"}
    )
    a, b, c = read_requests(source, {"steps": 5, "seed": 70}).values()
    assert a == Request(prompt="a", name="00001", seed=70, steps=5)
    assert b == Request(prompt="b", name="b", seed=3, steps=9)
    assert c == Request(prompt="c", name="00004", seed=73, steps=5)
    assert next(iter(read_requests(source, {}).values())).seed == 0


def test_prompts_and_standard_input(tmp_path, monkeypatch):
    source = written(tmp_path, "\ufeffa fox ", "", "{not an object", name="x.txt")
    assert {where: r.prompt for where, r in read_requests(source, {}).items()} == {
        f"{source}:1": "a fox",
        f"{source}:3": "{not an object",
    }
    for text, prompts in ((b"a\nb\r\n", ["a", "b"]), (b'\n{"prompt": "c"}\n', ["c"])):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert [request.prompt for request in read_requests("-", {}).values()] == prompts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"promt": "a"}, "x.jsonl:2: unknown key promt='a'; did you mean prompt?"),
        ({"prompt": "a", "guidance": 3}, "unknown key guidance=3; did you mean guidance_scale?"),
        ({"prompt": "a", "num_images": 3}, "x.jsonl:2: num_images: a line is one picture"),
        ({"seed": 1}, "x.jsonl:2: prompt not given"),
        ({"prompt": "a", "steps": 0}, "x.jsonl:2: steps=0: expected a whole number from 1"),
        ({"prompt": "a", "steps": "9"}, "x.jsonl:2: steps='9' is not of type int"),
        ({"prompt": "a", "seed": -1}, "seed=-1: expected"),
        ({"prompt": "a", "guidance_scale": 101}, "guidance_scale=101.0: expected"),
        ({"prompt": "a", "width": 7}, "width=7: expected"),
        ({"prompt": "a\ud800"}, "prompt is not valid Unicode"),
        ({"prompt": "a", "name": "../a"}, "x.jsonl:2: name='../a': expected a file's name"),
        ({"prompt": "a", "name": ".a"}, "name='.a': expected"),
        ({"prompt": "a", "name": ""}, "name='': expected"),
        ({"prompt": "a", "name": "a.png"}, "without .png"),
        ({"prompt": "a", "name": "a\ud800"}, "expected a file's name"),
        ({"prompt": "a", "name": "ä" * 101}, "at most 200 bytes"),
        ({"prompt": "a", "name": "FOX"}, "x.jsonl:2: name='FOX' is that of .*x.jsonl:1 too"),
        ('{"prompt": "a"', "x.jsonl:2: not valid JSON"),
        ('{"prompt": "a", "guidance_scale": NaN}', "guidance_scale=nan is not of type float"),
        ("[" * 100_000, "x.jsonl:2: not valid JSON"),
        ('"a"', "x.jsonl:2: a JSON str: expected an object"),
    ],
)
def test_a_line_that_cannot_be(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_requests(written(tmp_path, {"prompt": "a", "name": "fox"}, line), {})
    assert "more lines" not in str(caught.value)


def test_a_file_that_cannot_be(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"a f\xf6x")
    for source, message in (
        (str(tmp_path / "no.txt"), "no.txt: No such file"),
        (str(tmp_path / "latin.txt"), "not UTF-8 at byte 3"),
        (written(tmp_path, "prompt", name="x.csv"), "expected a .jsonl with an object a line"),
        (written(tmp_path, "", " ", name="x.txt"), "holds no prompt: expected one a line"),
        (
            written(tmp_path, {"a": 1}, {"prompt": "b"}, {"c": 1}),
            r"x.jsonl:1: .*\(and 1 more lines cannot be\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_requests(source, {})


@given(st.lists(st.tuples(st.sampled_from([64, 96]), st.integers(1, 3))), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_batches_hold_every_request_once_beside_its_like(asked, size):
    wanted = [Request(prompt="a", height=height, steps=steps) for height, steps in asked]
    batches = pack(wanted, lambda request: size)
    assert sorted(place for batch in batches for place in batch) == list(range(len(wanted)))
    assert all(batch == sorted(batch) and len(batch) <= size for batch in batches)
    assert all(len({wanted[place].alike for place in batch}) == 1 for batch in batches)
    short = [wanted[batch[0]].alike for batch in batches if len(batch) < size]
    assert len(short) == len(set(short))  # one of a kind
    assert [batch[0] for batch in batches] == sorted(batch[0] for batch in batches)


def test_every_option_of_a_call_that_is_not_a_row_of_it_makes_batches():
    """What Request has, a row of a batch has its own of, or `alike` names it."""
    rows = {"prompt", "name", "negative_prompt", "seed", "image", "mask", "extend", "variation_seed"}
    rows.add("class_label")
    values = {name: index for index, name in enumerate(requests.Request.__dataclass_fields__)}
    request = object.__new__(Request)
    for name, value in values.items():
        object.__setattr__(request, name, value)
    kinds = {True, False}  # whether there is an image, a mask
    assert set(request.alike) - kinds == {value for name, value in values.items() if name not in rows} - kinds
