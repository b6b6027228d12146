"""Validation loss by timestep: of runs by their logs, of any model on any data, side by side."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from autoencoder.vae import AutoencoderKL
from ldm import evaluate
from ldm.files.checkpoint import save_model
from ldm.metrics.losses import FORMAT, by_timestep, read_losses, read_measured, save_measured
from tests.test_audit import scene
from tests.test_consistency import few_step_pipeline
from tests.test_fit import VAE, diffusion_recipe
from tests.tiny import tiny_pipeline
from train import evaluate_losses, train_ldm
from train.config import to_yaml
from train.data.sources import DataConfig


def test_losses(tmp_path, monkeypatch, capsys):
    """A run's validations by step, the last line cut short; several runs by their newest."""
    monkeypatch.chdir(tmp_path)
    for run, fall in (("one", 0.1), ("two", 0.3)):
        lines = [{"step": step, "loss": 1.0} for step in (1, 2)]
        lines += [
            {"step": step, "validation/loss": 1.0, "validation/loss_64": 1.0}
            | {f"validation/loss_t{t:03d}": 1 / (1 + fall * step + t / 500) for t in (62, 562, 937)}
            for step in range(100, 1001, 100)
        ]
        (tmp_path / run).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / run / "metrics.jsonl").write_text(text + '{"step": 1100, "validation/lo')
    assert evaluate.main(["losses", "one", "--lines=3", "--output=out"]) == 0
    assert capsys.readouterr().out == "out/report.md\n"
    rows = (tmp_path / "out/report.md").read_text().split("\n\n")[2].splitlines()
    assert rows[0] == "| | 62 | 562 | 937 |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| step 100", "| step 500", "| step 1,000"]
    assert rows[-1].endswith(f"| {1 / (1 + 100 + 937 / 500):.4f} |")
    assert (tmp_path / "out/losses.png").is_file()
    assert evaluate.main(["losses", "one", "two"]) == 0
    assert "| two, step 1,000 |" in (tmp_path / "losses/report.md").read_text()
    shutil.copytree(tmp_path / "one", tmp_path / "other/one")
    assert evaluate.main(["losses", "one", "other/one"]) == 0
    told = (tmp_path / "losses/report.md").read_text()
    assert "| one, step" in told
    assert "| other/one, step" in told
    (tmp_path / "two/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}')
    for run, told in {"nowhere": "nowhere is neither a run nor", "two": "--validation-samples"}.items():
        capsys.readouterr()
        assert evaluate.main(["losses", run]) == 2
        assert told in capsys.readouterr().err


def test_measured_losses_beside_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values = {"loss": 0.3, "loss_t062": 0.5, "loss_t937": 0.1, "loss_16x32": 0.2}
    save_measured(tmp_path / "measured", values, {"model": "x"})
    assert read_measured(tmp_path / "measured") == {62: 0.5, 937: 0.1}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 7, "validation/loss_t062": 0.25}\n')
    assert evaluate.main(["losses", "run", "measured", "--output=out"]) == 0
    rows = (tmp_path / "out/report.md").read_text().split("\n\n")[2].splitlines()
    assert rows[2:] == ["| run, step 7 | 0.2500 | – |", "| measured | 0.5000 | 0.1000 |"]
    (tmp_path / "measured/losses.json").write_text('{"format": "other"}')
    capsys.readouterr()
    assert evaluate.main(["losses", "measured"]) == 2
    assert f"has the format 'other': expected {FORMAT}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_numbers_as_the_validation_of_a_training(tmp_path, capsys):
    """Of pictures of two shapes, so in two buckets, with latents of their own and with those of the run."""
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for seed in range(7):
        wide = Image.new("RGB", (32, 16))
        wide.paste(scene(seed, 16), (8, 0))
        (wide if seed % 2 else scene(seed, 16)).save(photos / f"{seed}.png")
        (photos / f"{seed}.txt").write_text(f"picture {seed}")
    torch.manual_seed(0)
    save_model(AutoencoderKL(VAE), tmp_path / "autoencoder")
    data = DataConfig(source=str(photos), size=16, max_aspect=2.0, side_multiple=8)
    recipe = diffusion_recipe(run, steps=4, batch_size=2, validation_samples=3, validate_every=4)
    recipe = replace(recipe, autoencoder=str(tmp_path / "autoencoder"), data=data, prompts=("a fox",))
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert train_ldm.main(["--config", str(tmp_path / "recipe.yaml")]) == 0
    words = ["--model", str(run), "--data.source", str(photos), "--data.size", "16", "--data.max_aspect", "2"]
    words += ["--data.side_multiple", "8", "--pictures", "3"]
    logged = read_losses(run)[4]
    for name, more in {"own": [], "cached": ["--latents", str(run / "latents")]}.items():
        capsys.readouterr()
        assert evaluate_losses.main([*words, *more, "--output", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / name}/report.md\n"
        facts = json.loads((tmp_path / name / "losses.json").read_text())
        assert by_timestep(facts["losses"]) == pytest.approx(logged, rel=1e-6)
        assert facts["protocol"]["pictures"] == 3
        assert (
            facts["protocol"]["ema"]
            == f"average of decay {recipe.ema_decay:g}, step 4, as its training.json says"
        )
    with pytest.raises(ValueError, match="holds no pipeline: name its folder, or a run"):
        evaluate_losses.main([*words, "--model", str(tmp_path), "--output", str(tmp_path / "x")])


def test_a_model_with_other_classes_is_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "x"), "--data.size", "32"]
    words += ["--data.length", "8", "--pictures", "2", "--data.label", "subject"]
    with pytest.raises(
        ValueError, match=r"the model has None classes, with the one for none, and the data \d+"
    ):
        evaluate_losses.main(words)


def test_a_model_that_is_told_its_guidance_is_refused(tmp_path):
    few_step_pipeline().save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "x"), "--data.size", "32"]
    with pytest.raises(ValueError, match=r"distilled with its guidance.*no validation here"):
        evaluate_losses.main([*words, "--data.length", "8", "--pictures", "2"])
