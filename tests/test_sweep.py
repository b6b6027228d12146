"""`python -m ldm.evaluate sweep`: every setting drawn once, counted, timed and compared with the solution."""

import json

import pytest
import torch

from ldm import evaluate
from ldm.metrics.plot import even_ticks, logarithmic, ticked, ticks
from ldm.metrics.probes import relative_error
from ldm.metrics.subcommands import make_sweep_parser, settings_of
from ldm.metrics.sweep import by_calls, write_sweep
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
        ("--probes=0", "--beside=diffusers"): "--beside diffusers has no effect with --probes 0",
    }.items():
        with pytest.raises(ValueError, match=told):
            parse(*words)


def test_tables(tmp_path):
    """A line for each solver of ours and of diffusers' by calls; what one lacks is a dash, or no line."""
    ours = [
        {"sampler": "ddim", "steps": 5, "calls": 10, "seconds": 0.25, "error": 0.21},
        {"sampler": "heun", "steps": 5, "calls": 18, "seconds": 0.5, "error": 0.1},
        {"sampler": "euler_a", "steps": 5, "calls": 10, "seconds": 0.25, "error": None},
    ]
    theirs = [(10, 0.5, 0.2), (None, None, None), (10, 0.5, None)]
    names = [f"diffusers {name}" for name in ("calls", "seconds", "error")]
    rows = [row | dict(zip(names, each, strict=True)) for row, each in zip(ours, theirs, strict=True)]
    assert by_calls(rows, "error") == [
        "| solver | by | 10 | 18 |",
        "|---|---|---:|---:|",
        "| ddim | ours | 0.210 | – |",
        "| ddim | diffusers | 0.200 | – |",
        "| heun | ours | – | 0.100 |",
    ]
    assert len(by_calls(rows, "seconds")) == 2 + 5
    protocol = {"probes": {"pictures": 4, "exact": "dpmpp_2m, 1000 steps", "diffusers": "0.42"}}
    report = write_sweep(tmp_path, rows, protocol).read_text()
    assert "diffusers 0.42 draws with the same weights" in report
    assert (tmp_path / "error-by-calls.png").is_file()


def test_ticks():
    few = ticked(logarithmic("calls"), [40, 10, 10, 20])
    assert few.ticks(9, 46) == [10, 20, 40]
    assert ticked(logarithmic("calls"), [10, 10.1, 40]).ticks(9, 46) == ticks(9, 46)
    assert ticks(4, 60) == [5, 10, 20, 50]
    assert ticks(0.15, 0.29) == pytest.approx([0.16 + 0.02 * k for k in range(7)])
    assert even_ticks(-20, 1020) == [0, 200, 400, 600, 800, 1000]
    assert even_ticks(0.1, 0.9) == pytest.approx([0.1 * k for k in range(1, 10)])


@pytest.mark.slow
def test_beside_diffusers(tmp_path, monkeypatch, caplog):
    """Where both make the same steps, both end as far from the same solution; else diffusers is left out."""
    tiny_pipeline(timestep_spacing="trailing", set_alpha_to_one=True).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.metrics.probes.MAX_STEPS", 40)
    (tmp_path / "x.txt").write_text("a red fox in snow\ntwo blue cats at night\n")
    words = ["sweep", "--model=model", "--prompts=x.txt", "--beside=diffusers", "--probes=2", "--steps=5,10"]
    words += ["--guidance=3", "--samplers=ddim,dpmpp_2m,unipc,euler_a", "--output=out"]
    assert evaluate.main(words) == 0
    rows = json.loads((tmp_path / "out/sweep.json").read_text())["settings"]
    for row in rows:
        assert row["diffusers calls"] == row["calls"]
        assert row["diffusers seconds"] > 0
        if row["sampler"] == "euler_a":
            assert row["diffusers error"] is None
        else:
            assert row["diffusers error"] == pytest.approx(row["error"], rel=0.02, abs=1e-4)
    report = (tmp_path / "out/report.md").read_text()
    assert "| sampler | steps | guidance_scale | calls | seconds | error | diffusers calls |" in report
    assert "| ddim-3 | diffusers |" in report
    tiny_pipeline(rescale_betas_zero_snr=True).save_pretrained(tmp_path / "model")
    assert evaluate.main([*words[:5], "--steps=5", "--samplers=heun", "--output=other"]) == 0
    assert "HeunDiscreteScheduler has other noise levels than this model: left out" in caplog.text


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
    assert "pictures" in json.loads((tmp_path / "out/sweep.json").read_text())["protocol"]["probes"]
    capsys.readouterr()
    assert evaluate.main(words) == 0
    assert "32 were there" in capsys.readouterr().err
