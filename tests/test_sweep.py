"""`python -m ldm.evaluate sweep`: every setting drawn once, counted, timed and compared with the solution."""

import json

import pytest
import torch

from ldm import evaluate
from ldm.metrics.arguments import make_sweep_parser, settings_of
from ldm.metrics.plot import ticks
from ldm.metrics.probes import relative_error
from tests.test_evaluate import paint
from tests.tiny import tiny_pipeline


def test_relative_error():
    exact = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 1.0]]]])
    assert relative_error(exact * 1.5, exact) == pytest.approx(0.5)
    assert relative_error(exact, exact) == 0


def test_settings():
    parse = lambda *words: settings_of(make_sweep_parser().parse_args(["--prompts=x.txt", *words]))
    assert parse("--steps=5,10", "--samplers=ddim, unipc") == [
        {"sampler": sampler, "steps": steps} for sampler in ("ddim", "unipc") for steps in (5, 10)
    ]
    assert parse("--steps=5,5", "--guidance=1") == [{"steps": 5, "guidance_scale": 1.0}]
    for words, told in {
        ("--steps=5,x",): "steps: '5,x' is no list",
        ("--steps=0",): "steps=0: expected",
        ("--count=9",): "--count has no effect without --reference",
        ("--guidance=0.5",): "guidance_scale=0.5: expected",
        ("--probes=-1",): "--probes -1: expected a whole number from 0",
    }.items():
        with pytest.raises(ValueError, match=told):
            parse(*words)
    assert ticks(4, 60) == [5, 10, 20, 50]


@pytest.mark.slow
def test_sweep(tmp_path, monkeypatch, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.pipeline.BUNDLED", tmp_path / "model")
    monkeypatch.setattr("ldm.metrics.probes.MAX_STEPS", 60)
    paint(tmp_path / "real", 8, (32, 32))
    (tmp_path / "x.txt").write_text("a red fox in snow\ntwo blue cats at night\n")
    words = ["sweep", "--prompts=x.txt", "--count=4", "--reference=real", "--output=out", "--probes=2"]
    words += ["--samplers=ddim,euler_a", "--steps=2,8", "--guidance=1,3"]
    assert evaluate.main(words) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "out/sweep.json").read_text())["settings"]
    assert len(rows) == 8
    assert len(list((tmp_path / "out/pictures").iterdir())) == 8 * 4
    for row in rows:
        assert row["calls"] == row["steps"] * (2 if row["guidance_scale"] > 1 else 1)
        assert (row["error"] is None) == (row["sampler"] == "euler_a")
        assert row["seconds"] > 0
        assert row["FD-random-conv"] > 0
    error = {(row["sampler"], row["steps"], row["guidance_scale"]): row["error"] for row in rows}
    for scale in (1, 3):
        assert error["ddim", 8, scale] < error["ddim", 2, scale], "more steps end nearer"
    assert len(list((tmp_path / "out/solutions").iterdir())) == 2, "one a guidance"
    report = (tmp_path / "out/report.md").read_text()
    assert "![error by calls](error-by-calls.png)" in report
    assert (tmp_path / "out/FD-random-conv-by-seconds.png").is_file()
    capsys.readouterr()
    assert evaluate.main(words) == 0
    assert "32 were there" in capsys.readouterr().err
