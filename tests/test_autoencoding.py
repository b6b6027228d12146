"""Training an autoencoder from new weights: it learns, resumes with its adversary, and is measured."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from autoencoder.discriminator import AdversaryConfig
from autoencoder.loss import ReconstructionConfig
from autoencoder.similarity import decibels, ssim
from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import load_model, save_model
from tests.test_fit import OPTIM, VAE, losses, state, stop_at
from tests.test_perceptual import weights  # noqa: F401 (a fixture)
from train import evaluate_autoencoder
from train.batches.plan import Plan, fixed_draws
from train.data.sources import DataConfig
from train.fit.checkpoint import load_checkpoint
from train.fit.loop import fit
from train.measure.fidelity import encoded, judge
from train.tasks.autoencoding import AutoencoderRecipe, Autoencoding

ADVERSARY = AdversaryConfig(weight=0.5, start=0.5, width=8, layers=2)


def autoencoder_recipe(output: Path, **options: Any) -> AutoencoderRecipe:
    base = AutoencoderRecipe(
        output=str(output), steps=20, batch_size=2, model=VAE, data=DataConfig(size=16, length=4), optim=OPTIM
    )
    return replace(base, **{"sample_every": 0, "measured": 4, "precision": "fp32", **options})


def train(recipe: AutoencoderRecipe, stop_after: int = 0) -> Autoencoding:
    task = Autoencoding(recipe)
    stop_at(task, stop_after)
    assert fit(task, recipe).step == (stop_after or recipe.steps)
    return task


@pytest.mark.slow
def test_with_an_adversary_12_steps_equal_8_and_4(tmp_path):
    """Bit for bit, discriminator and learned scale included; stopped after the adversary's start at 6."""
    loss, optim = ReconstructionConfig(variance=True), replace(OPTIM, weight_decay=0.0)
    options = {"steps": 12, "loss": loss, "adversary": ADVERSARY, "optim": optim}
    train(autoencoder_recipe(tmp_path / "whole", save_every=6, keep_last=9, **options))
    train(autoencoder_recipe(tmp_path / "parts", workers=0, **options), stop_after=8)
    task = train(autoencoder_recipe(tmp_path / "parts", workers=1, **options))
    assert state(tmp_path / "parts", 12) == state(tmp_path / "whole", 12)
    lines = losses(tmp_path / "whole")
    assert losses(tmp_path / "parts") == lines

    verdicts = [[line[name] for line in lines] for name in ("discriminator", "generator", "adaptive_weight")]
    assert all(not any(values[:6]) and all(values[6:]) for values in verdicts)  # the gate
    before, after = (load_checkpoint(tmp_path / f"whole/checkpoints/step-{n:08d}") for n in (6, 12))
    new = Autoencoding(autoencoder_recipe(tmp_path / "new", **options)).module.state_dict()
    moved = {
        name
        for name, value in after.tensors["model"].items()
        if not torch.equal(value, before.tensors["model"][name])
    }
    judges = {name for name in new if name.startswith("discriminator.")}
    assert judges <= moved
    assert all(torch.equal(new[name], before.tensors["model"][name]) for name in judges)
    assert before.tensors["model"]["log_scale"] != 0

    assert {name.split(".")[0] for name in after.tensors["ema"]} == {"vae"}
    assert (
        load_model(AutoencoderKL, tmp_path / "whole/model").state_dict().keys()
        == task.vae.state_dict().keys()
    )
    with pytest.raises(ValueError, match=r"adversary: .*then"):
        train(autoencoder_recipe(tmp_path / "whole", **{**options, "adversary": AdversaryConfig()}))


@pytest.mark.slow
def test_an_adversary_cannot_join_a_run_that_had_none(tmp_path):
    train(autoencoder_recipe(tmp_path, steps=4))
    path = tmp_path / "checkpoints/step-00000004"
    manifest = json.loads((path / "manifest.json").read_text())
    trainer = json.loads((path / "trainer.json").read_text())
    del trainer["facts"]["adversary"]  # a checkpoint from before there were any
    (path / "trainer.json").write_text(json.dumps(trainer))
    del manifest["trainer.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"of a module with other parts: .* the first is discriminator"):
        train(autoencoder_recipe(tmp_path, steps=6, adversary=ADVERSARY))


@pytest.mark.slow
def test_a_tiny_autoencoder_learns_four_pictures_by_heart(tmp_path):
    """Far better than their mean colours are; and what latents are shown as is nearer than these too."""
    optim = replace(OPTIM, lr=1e-2)
    loss = ReconstructionConfig(equivariance=0.0)
    recipe = autoencoder_recipe(tmp_path / "run", steps=60, batch_size=4, optim=optim, loss=loss)
    task = train(recipe)
    pictures = torch.stack([task.image(index) for index in range(4)])
    flat = pictures.mean((2, 3), keepdim=True).expand_as(pictures)
    assert task.measure().psnr > decibels(F.mse_loss(flat, pictures).item()) + 4
    vae, small = load_model(AutoencoderKL, tmp_path / "run/model"), F.avg_pool2d(pictures, 2)
    with torch.no_grad():
        colours = vae.to_colours(vae.to_latents(vae.encode(pictures).mean))
    assert F.mse_loss(colours, small) < 0.75 * small.var((0, 2, 3)).mean()
    Autoencoding(replace(recipe, start=str(tmp_path / "run"), output=str(tmp_path / "more")))


def test_a_validation_reads_and_encodes_each_picture_once(tmp_path, monkeypatch):
    """For the loss and for the fidelity, which are those of either alone."""
    task = Autoencoding(autoencoder_recipe(tmp_path, data=DataConfig(size=16, length=40)))
    held_out, plain, seen = list(range(3, 40)), task.vae.encode, []
    monkeypatch.setattr(task.vae, "encode", lambda image: (seen.append(len(image)), plain(image))[1])
    with torch.no_grad():
        told = task.validate([held_out])
    assert sum(seen) == len(held_out)
    monkeypatch.undo()
    batches = task.squares.batches(held_out)
    assert told["psnr"] == pytest.approx(judge(task.vae, encoded(task.vae, batches)).psnr, rel=1e-5)
    (one, two) = fixed_draws([held_out])
    with torch.no_grad():
        parts = [
            task.module(**task.seen(draws, task.squares.stack([draw.index for draw in draws])))[0]
            for draws in (one, two)
        ]
    assert told["loss"] == pytest.approx(torch.cat(parts).mean().item(), rel=1e-5)


@pytest.mark.slow
def test_a_strong_kl_falls(tmp_path):
    strong = ReconstructionConfig(kl=10.0, equivariance=0.0)
    train(autoencoder_recipe(tmp_path, steps=20, optim=replace(OPTIM, lr=1e-2), loss=strong))
    kl = [line["kl"] for line in losses(tmp_path)]
    assert sum(kl[-5:]) < 0.5 * sum(kl[:5])


def test_what_is_shrunk_and_turned_is_a_function_of_the_draw(tmp_path):
    """On by default for new weights alone: one size a step, a turn a picture, none where it was not asked."""
    recipe = autoencoder_recipe(tmp_path, loss=ReconstructionConfig())
    assert recipe.terms.equivariance == 0.5
    assert replace(recipe, loss=ReconstructionConfig(half_size=0.25)).terms.equivariance == 0
    assert replace(recipe, start="somewhere").terms.equivariance == 0
    task, plan = Autoencoding(recipe), Plan([range(4)], 4, 0)
    batches = [task.batch(plan.batch(step)) for step in range(12)]
    assert {batch["transformed"].shape[2] for batch in batches} <= {4, 6, 8, 10, 12, 14, 16}
    assert len({batch["transformed"].shape[2] for batch in batches}) > 3
    assert set(torch.cat([batch["turns"] for batch in batches]).tolist()) == {0, 1, 2, 3}
    part = task.batch(plan.batch(5)[1:3])
    for name, value in part.items():
        assert torch.equal(value, batches[5][name][1:3]), name
    plain = Autoencoding(replace(recipe, loss=ReconstructionConfig(equivariance=0.0)))
    assert plain.batch(plan.batch(0)).keys() == {"image", "noise"}


@pytest.mark.slow
def test_perceptual_features_from_files(tmp_path, weights, caplog):  # noqa: F811
    """Given weights they judge; without them the log says by what else; they are in no checkpoint."""
    torch.save(weights[0], tmp_path / "vgg16.pth")
    torch.save(weights[1], tmp_path / "heads.pth")
    files = {"vgg": str(tmp_path / "vgg16.pth"), "lpips_heads": str(tmp_path / "heads.pth")}
    recipe = autoencoder_recipe(tmp_path / "run", steps=4, loss=ReconstructionConfig(**files))
    with caplog.at_level("INFO"):
        task = train(recipe)
    assert "no loss.vgg" not in caplog.text
    assert all(line["lpips"] > 0 for line in losses(tmp_path / "run"))
    assert {name.split(".")[0] for name in task.module.state_dict()} == {"vae"}
    assert task.validate([range(2)])["lpips"] == pytest.approx(task.measure().lpips, rel=1)
    with caplog.at_level("INFO"):
        Autoencoding(replace(recipe, loss=ReconstructionConfig(ms_ssim=0.5)))
    assert "no loss.vgg: reconstructions are judged by l1 1, mse 1, gradient 1, ms_ssim 0.5" in caplog.text


def test_fidelity_of_pictures_and_latents():
    """Against each figure's definition over all pictures at once; batches of any size give the same."""
    vae, image = AutoencoderKL(VAE), torch.rand(5, 3, 16, 24) * 2 - 1
    got = judge(vae, encoded(vae, image.split(2)))
    with torch.no_grad():
        posterior = vae.encode(image)
        decoded = vae.decode(vae.to_latents(posterior.mean)).clamp(-1, 1)
    assert got.psnr == pytest.approx(10 * math.log10(4 / F.mse_loss(decoded, image).item()))
    assert got.ssim == pytest.approx(ssim(decoded, image).mean().item())
    assert got.kl == pytest.approx(posterior.kl().mean().item())
    assert math.isnan(got.lpips)
    assert got.mean == pytest.approx(posterior.mean.mean((0, 2, 3)).tolist(), abs=1e-6)
    variance = posterior.mean.var((0, 2, 3), correction=0) + posterior.std.square().mean((0, 2, 3))
    assert got.std == pytest.approx(variance.sqrt().tolist(), rel=1e-4)
    cells = posterior.mean.permute(0, 2, 3, 1).reshape(-1, 4).double()
    colours = F.avg_pool2d(image, 2).permute(0, 2, 3, 1).reshape(-1, 3).double()
    design = torch.cat([cells, torch.ones_like(cells[:, :1])], dim=1)
    expected = torch.linalg.lstsq(design, colours).solution
    fitted = torch.tensor([*got.rgb_factors, got.rgb_bias], dtype=torch.float64)
    torch.testing.assert_close(fitted, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="no picture to judge"):
        judge(vae, [])


def test_the_command_prints_tables_and_writes_a_sheet(tmp_path, capsys):
    save_model(AutoencoderKL(replace(VAE, sample_size=16)), tmp_path / "model")
    sheet = tmp_path / "sheet.png"
    argv = ["--model", str(tmp_path), "--data", "shapes", "--count", "10", "--output", str(sheet)]
    assert evaluate_autoencoder.main([*argv, "--prior", "9"]) == 0
    told = capsys.readouterr().out
    names, values = (line.split() for line in told.splitlines()[:2])
    assert " ".join(names) == "pictures size PSNR dB SSIM KL nats"
    assert values[:2] == ["10", "16x16"]
    assert len(re.findall(r"^ +\d ", told, re.MULTILINE)) == 4
    assert Image.open(sheet).size == (8 * 18 - 2, 6 * 18 - 2)  # 8 + 2 pictures, twice, and 8 + 1 samples
    with pytest.raises(ValueError, match="exists: give another name"):
        evaluate_autoencoder.main(argv)
    with pytest.raises(ValueError, match="size=15"):
        evaluate_autoencoder.main([*argv, "--size", "15", "--overwrite"])


def test_samples_of_the_prior_are_counted():
    vae = AutoencoderKL(VAE)
    with torch.no_grad():
        three = evaluate_autoencoder.prior_samples(vae, 16, 3, seed=4)
        last = evaluate_autoencoder.prior_samples(vae, 16, 1, seed=6)
    assert three.shape == (3, 3, 16, 16)
    torch.testing.assert_close(three[2:], last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adversary": replace(ADVERSARY, layers=3)}, "needs 24 pixels a side; take fewer layers"),
        ({"loss": ReconstructionConfig(ms_ssim=1.0), "data": DataConfig(size=8)}, "needs pictures of 11"),
        (
            {"data": DataConfig(size=16, max_aspect=2.0)},
            r"data.max_aspect=2.0 has no effect: an autoencoder learns from squares, leave it out",
        ),
        ({"data": DataConfig(size=16, max_enlargement=1.5)}, r"data.max_enlargement=1.5 has no effect"),
    ],
)
def test_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        autoencoder_recipe(tmp_path, **options)
