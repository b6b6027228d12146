"""The training loop: what it promises about repeating, resuming, stopping and going wrong."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from autoencoder.loss import ReconstructionConfig
from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.files.checkpoint import load_model, save_model
from ldm.model.unet import UNet, UNetConfig
from ldm.pipeline import LatentDiffusionPipeline
from tests.tiny import CAPTIONS
from train.batches.encoding import compute_latents
from train.batches.latents import Bucket, CacheKey, Latents
from train.batches.plan import Draw, Plan, normal
from train.data.sources import DataConfig, open_source
from train.fit import record, saving
from train.fit.checkpoint import list_checkpoints, load_checkpoint
from train.fit.failure import RunFailed
from train.fit.loop import fit
from train.fit.optim import OptimConfig
from train.fit.state import FitConfig
from train.rebuild_ema import find_snapshots
from train.rebuild_ema import main as rebuild_ema
from train.tasks.autoencoding import AutoencoderRecipe, Autoencoding
from train.tasks.denoising import ObjectiveConfig
from train.tasks.diffusion import DiffusionRecipe, LatentDiffusion
from train.tasks.text import TextConfig

ROOT = Path(__file__).parent.parent
OPTIM = OptimConfig(lr=3e-3, warmup_steps=4)
VAE = AutoencoderKLConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
    mid_block_add_attention=False,
)
UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=2,
    cross_attention_dim=24,
)
TEXT = TextConfig(width=24, layers=1, heads=2, vocab_size=600, max_length=16)


class Toy:
    """A linear regression with dropout, which draws from the global generator."""

    def __init__(self, poison: Callable[[int], bool] = lambda step: False, stop_after: int = 0) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = ToyModule()
        self.buckets, self.facts = [range(10)], {"width": 5}
        self.poison, self.stop_after = poison, stop_after
        self.seen: list[int] = []
        self.validated: list[int] = []

    def contents(self) -> dict[str, str]:
        return {}

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        self.seen += [draw.index for draw in draws]
        if draws[0].step + 1 == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        x = normal(draws, (5,), "noise") + torch.tensor([[float(draw.index)] for draw in draws]) / 10
        return {"x": x / 0 if self.poison(draws[0].step) else x}

    def validate(self, buckets: Sequence[Sequence[int]]) -> dict[str, float]:
        self.validated = [index for bucket in buckets for index in bucket]
        return {"weight": self.module.state_dict()["linear.weight"].sum().item()}

    def preview(self) -> Image.Image:
        return Image.new("RGB", (2, 2))

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "weight.json").write_text(json.dumps(self.module.state_dict()["linear.weight"].tolist()))


class ToyModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(5, 1), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = (self.linear(self.dropout(x))[:, 0] - x.sum(1)).square()
        return error, {"size": x.abs().mean(1)}


def toy_config(output: Path, **options: Any) -> FitConfig:
    base = FitConfig(output=str(output), steps=20, batch_size=4, optim=OPTIM, workers=0, precision="fp32")
    return replace(base, **{"save_every": 6, "sample_every": 10, **options})


def losses(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_second"} for line in lines]


def state(folder: Path, step: int) -> dict[str, str]:
    """sha256 of the weights, their average and the optimizer after `step`."""
    manifest = json.loads((folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".safetensors")}


def latents(count: int = 12) -> Latents:
    """Made-up latents with the captions of the tiny pipeline."""
    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(count, 1, 4, 8, 6, generator=rng).half()
    captions = {i: [CAPTIONS[i % 3], CAPTIONS[(i + 1) % 3]] for i in range(count)}
    bucket = Bucket(list(range(count)), mean, torch.full_like(mean, 0.1))
    return Latents([bucket], captions, CacheKey("", "made up", 4, 2, [[12, 16, count]], 1, False))


def bucketed() -> Latents:
    """Latents of two shapes and several views, one picture of which could not be decoded."""
    rng = torch.Generator().manual_seed(0)
    buckets = []
    for indices, shape in (([0, 2, 4, 5, 9], (8, 6)), ([1, 3, 6], (4, 8))):
        mean = torch.randn(len(indices), 4, 4, *shape, generator=rng).half()
        buckets.append(Bucket(indices, mean, torch.full_like(mean, 0.1)))
    captions = {i: [CAPTIONS[i % 3]] for bucket in buckets for i in bucket.indices}
    key = CacheKey("", "made up", 4, 2, [[12, 16, 5], [16, 8, 4]], 2, True)
    return Latents(buckets, captions, key)


def diffusion_recipe(output: Path, **options: Any) -> DiffusionRecipe:
    base = DiffusionRecipe(
        output=str(output), steps=20, batch_size=4, autoencoder="", unet=UNET, text_encoder=TEXT, optim=OPTIM
    )
    return replace(base, **{"sample_every": 0, "precision": "fp32", **options})


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(AutoencoderKL(VAE), tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


def stop_at(task: Any, step: int) -> None:
    """SIGTERM comes while the batch of this step, counted from 1, is made; 0: never."""
    plain = task.batch

    def batch(draws: list[Draw]) -> dict[str, Tensor]:
        if draws[0].step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(draws)

    task.batch = batch


def train_diffusion(recipe: DiffusionRecipe, autoencoder: Path, stop_after: int = 0) -> LatentDiffusion:
    task = LatentDiffusion(recipe, autoencoder, latents())
    stop_at(task, stop_after)
    outcome = fit(task, recipe)
    assert outcome.step == (stop_after or recipe.steps)
    assert outcome.exit_code == (75 if stop_after else 0)
    return task


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_20_steps_equal_7_and_resume_and_13(tmp_path, autoencoder, optimizer):
    """Bit for bit: weights, average, optimizer and the logged losses, with a SIGTERM in step 7."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    optim = replace(OPTIM, optimizer=optimizer)
    train_diffusion(diffusion_recipe(whole, workers=1, optim=optim), autoencoder)
    train_diffusion(diffusion_recipe(halves, workers=0, optim=optim), autoencoder, stop_after=7)
    assert [line["step"] for line in losses(halves)] == list(range(1, 8))
    train_diffusion(diffusion_recipe(halves, workers=2, optim=optim), autoencoder)
    assert state(halves, 20) == state(whole, 20)
    assert losses(halves) == losses(whole)


def test_golden_losses(tmp_path, autoencoder):
    """What should not change results must reproduce these; the tolerance is that between kinds of CPU.

    When a change is meant to change them, write `measured` there and say so.
    """
    train_diffusion(diffusion_recipe(tmp_path / "run"), autoencoder)
    measured = [line["loss"] for line in losses(tmp_path / "run")]
    golden = [float(line) for line in (ROOT / "tests/assets/loss_tiny.txt").read_text().split()]
    assert measured == pytest.approx(golden, rel=1e-4)


@pytest.mark.slow
def test_buckets_train_resume_and_validate(tmp_path, autoencoder):
    """20 steps are 7 and 13 with batches of two shapes, and each shape has a loss of its own."""

    def train(name: str, stop_after: int = 0) -> LatentDiffusion:
        recipe = diffusion_recipe(tmp_path / name, steps=20, validation_samples=3, validate_every=10)
        task = LatentDiffusion(recipe, autoencoder, bucketed())
        stop_at(task, stop_after)
        fit(task, recipe)
        return task

    task = train("whole")
    train("halves", stop_after=7)
    train("halves")
    assert state(tmp_path / "halves", 20) == state(tmp_path / "whole", 20)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    plan = Plan(task.buckets, 4, 0, held_out=3)
    shapes = {tuple(task.batch(plan.batch(step))["x0"].shape) for step in range(8)}
    assert shapes == {(4, 4, 8, 6), (4, 4, 4, 8)}
    with torch.no_grad():
        told, alone = task.validate(plan.validation), task.validate([plan.validation[0], []])
    held = [len(bucket) for bucket in plan.validation]
    assert min(held) > 0
    assert told["loss"] == pytest.approx(np.average([told["loss_12x16"], told["loss_16x8"]], weights=held))
    assert "loss_16x8" not in alone


FLOW = ObjectiveConfig(prediction="flow", timestep_density="logit_normal", timestep_shift=3.0)


BALANCED = ObjectiveConfig(weight="none", uncertainty=True)


@pytest.mark.slow
def test_importance_sampling_resumes_bit_for_bit(tmp_path, autoencoder):
    """What it learned of the losses, from the run so far, is in the checkpoint."""

    def train(name: str, stop_after: int = 0) -> None:
        objective = ObjectiveConfig(importance_sampling=True)
        recipe = diffusion_recipe(tmp_path / name, steps=12, objective=objective)
        task = LatentDiffusion(recipe, autoencoder, latents())
        task.module.history.counts.fill_(10)  # as if many steps had been; what a checkpoint holds comes later
        task.module.history.losses[:-1] = torch.linspace(3, 1, 1000)[:, None]
        stop_at(task, stop_after)
        fit(task, recipe)

    train("whole")
    train("halves", stop_after=5)
    train("halves")
    assert state(tmp_path / "halves", 12) == state(tmp_path / "whole", 12)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    tensors = load_checkpoint(tmp_path / "whole/checkpoints/step-00000012").tensors["model"]
    assert tensors["history.counts"].sum() == 10 * 1000 + 12 * 4
    with pytest.raises(ValueError, match=r"objective.importance_sampling chooses the timesteps: leave out"):
        ObjectiveConfig(importance_sampling=True, timestep_shift=2.0)


@pytest.mark.slow
def test_a_learned_variance_trains_resumes_and_draws(tmp_path, autoencoder):
    """Its bound falls; a run in two parts is one; DDPM draws with it, and the other solvers without."""
    options = {"unet": replace(UNET, out_channels=8), "optim": replace(OPTIM, lr=1e-2), "steps": 12}
    task = train_diffusion(diffusion_recipe(tmp_path / "whole", **options), autoencoder)
    train_diffusion(diffusion_recipe(tmp_path / "halves", **options), autoencoder, stop_after=5)
    train_diffusion(diffusion_recipe(tmp_path / "halves", **options), autoencoder)
    assert state(tmp_path / "halves", 12) == state(tmp_path / "whole", 12)
    bounds = [line["bound"] for line in losses(tmp_path / "whole")]
    assert sum(bounds[-4:]) < sum(bounds[:4])
    with torch.no_grad():
        assert math.isfinite(task.validate([[1, 5]])["loss"])
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "whole/model")
    seen = []
    for sampler, more in (("ddpm", 0.0), ("ddpm", 1.0), ("ddim", 0.0), ("ddim", 1.0)):
        pipe.unet.conv_out.bias.data[4:] += more
        seen.append(pipe(CAPTIONS[0], num_inference_steps=3, seed=0, sampler=sampler, output_type="latent"))
    assert not torch.equal(seen[0].images, seen[1].images)
    assert torch.equal(seen[2].images, seen[3].images)
    with pytest.raises(ValueError, match=r"out_channels=8 with objective.prediction=flow"):
        diffusion_recipe(tmp_path, objective=FLOW, **options)
    with pytest.raises(ValueError, match=r"unet.out_channels=5: expected unet.in_channels=4, or twice"):
        diffusion_recipe(tmp_path, unet=replace(UNET, out_channels=5))
    with pytest.raises(ValueError, match=r"objective.variance_weight=0: expected up to 1"):
        ObjectiveConfig(variance_weight=0)


def test_a_unet_that_is_told_more_than_captions_is_refused(tmp_path):
    more = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60}
    with pytest.raises(
        ValueError, match=r"addition_embed_type=text_time, SDXL's: it draws but does not train"
    ):
        diffusion_recipe(tmp_path, unet=replace(UNET, addition_embed_type="text_time", **more))


@pytest.mark.slow
@pytest.mark.parametrize("objective", [ObjectiveConfig(), FLOW, BALANCED])
def test_diffusion_learns_one_batch(tmp_path, autoencoder, objective):
    optim = replace(OPTIM, lr=1e-2)
    recipe = diffusion_recipe(tmp_path / "run", steps=60, optim=optim, objective=objective)
    task = LatentDiffusion(recipe, autoencoder, latents(count=4))
    fit(task, recipe)
    curve = [line.get("error", line["loss"]) for line in losses(tmp_path / "run")]
    assert sum(curve[-10:]) < 0.8 * sum(curve[:10])
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "run/model")
    assert pipe.scheduler.prediction == objective.prediction
    assert pipe(CAPTIONS[0], num_inference_steps=2, seed=0).images[0].size == (16, 16)


@pytest.mark.slow
def test_autoencoder_learns_one_batch_and_measures_its_scale(tmp_path):
    recipe = AutoencoderRecipe(
        output=str(tmp_path / "run"),
        steps=40,
        batch_size=4,
        model=VAE,
        loss=ReconstructionConfig(half_size=0.25),
        data=DataConfig(size=16, length=4),
        optim=replace(OPTIM, lr=5e-3),
        sample_every=40,
        measured=4,
    )
    task = Autoencoding(recipe)
    outcome = fit(task, recipe)
    curve = [line["loss"] for line in losses(tmp_path / "run")]
    assert curve[-1] < 0.5 * curve[0]
    exported = json.loads((outcome.model / "config.json").read_text())
    assert exported["scaling_factor"] != VAE.scaling_factor
    assert exported["shift_factor"] is None
    assert Image.open(tmp_path / "run/samples/step-00000040.png").size == (4 * 16 + 6, 2 * 16 + 2)
    data = compute_latents(recipe.data, outcome.model, tmp_path / "latents")
    (bucket,) = data.buckets
    assert bucket.mean.shape == (4, 1, 4, 8, 8)
    std = (bucket.mean.float().var() + bucket.std.float().square().mean()).sqrt().item()
    assert std * exported["scaling_factor"] == pytest.approx(1, rel=0.05)  # scaled latents: unit variance
    with pytest.raises(ValueError, match="latents of another data"):
        compute_latents(replace(recipe.data, scene_seed=1), outcome.model, tmp_path / "latents")


def test_latent_channels_that_hold_nothing_are_told(tmp_path, caplog):
    """A posterior that is wide for channel 1 and narrow for the others; and a size that has no half."""
    recipe = AutoencoderRecipe(
        output=str(tmp_path),
        steps=4,
        batch_size=1,
        model=VAE,
        data=DataConfig(size=16, length=4),
        optim=OPTIM,
    )
    task = Autoencoding(recipe)
    channels = VAE.latent_channels
    with torch.no_grad():
        task.vae.quant_conv.weight[[1, *range(channels, 2 * channels)]] = 0
        task.vae.quant_conv.bias[[1, channels + 1]] = 0
        task.vae.quant_conv.bias[[channels + k for k in range(channels) if k != 1]] = -20
        noise = task.measure().noise
        task.export(tmp_path / "model")
    assert noise[1] == 1
    assert sum(noise) == pytest.approx(1, abs=1e-2)
    assert "latent channels [1] of 4 hold next to nothing" in caplog.text
    eighth = replace(
        VAE,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    with pytest.raises(ValueError, match=r"data.size=24 with loss.half_size: expected a multiple of 16"):
        replace(recipe, model=eighth, data=DataConfig(size=24), loss=ReconstructionConfig(half_size=0.25))


def decoder_recipe(output: Path, start: Path, steps: int, data: DataConfig) -> AutoencoderRecipe:
    return AutoencoderRecipe(
        output=str(output),
        steps=steps,
        batch_size=2,
        model=VAE,
        data=data,
        optim=OPTIM,
        sample_every=0,
        measured=2,
        start=str(start),
        train_encoder=False,
    )


@pytest.mark.slow
def test_a_decoder_goes_on_learning_and_latents_stay_valid(tmp_path, autoencoder):
    """With train_encoder=false the encoder and the latent scale stay as they were, bit for bit."""
    data, cache = DataConfig(size=16, length=4), tmp_path / "latents"
    before = load_model(AutoencoderKL, autoencoder)
    compute_latents(data, autoencoder, cache)
    recipe = decoder_recipe(tmp_path / "run", autoencoder, steps=5, data=data)
    outcome = fit(Autoencoding(recipe), recipe)
    after = load_model(AutoencoderKL, outcome.model)
    assert after.config == before.config
    assert {
        name.split(".")[0]
        for name, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    } == {"decoder", "post_quant_conv"}
    compute_latents(data, outcome.model, cache)  # a cache of another encoder would be refused
    with pytest.raises(ValueError, match="not of the recipe's model"):
        Autoencoding(replace(recipe, model=replace(VAE, latent_channels=3)))
    with pytest.raises(ValueError, match="train_encoder=false needs start"):
        replace(recipe, start=None)


@pytest.mark.slow
def test_a_decoder_learns_to_draw_clean_pictures_from_noisy_latents(tmp_path, autoencoder):
    recipe = decoder_recipe(tmp_path / "run", autoencoder, steps=200, data=DataConfig(size=16, length=2))

    def error(**options: Any) -> float:
        """Of pictures decoded from noisy latents, after training with these options."""
        name = "-".join(map(str, options.values()))
        task = Autoencoding(replace(recipe, output=str(tmp_path / name), **options))
        fit(task, task.recipe)
        image = torch.stack([task.image(i) for i in range(2)])
        with torch.no_grad():
            latents = task.vae.to_latents(task.vae.encode(image).mean)
            noise = torch.randn(16, *latents.shape, generator=torch.Generator().manual_seed(0))
            return sum((task.vae.decode(latents + each) - image).square().mean().item() for each in noise)

    assert error(latent_noise=1.0) < 0.9 * error(latent_noise=0.0)
    with pytest.raises(ValueError, match=r"latent_noise=0\.5: expected 0, or more with train_encoder=false"):
        replace(recipe, train_encoder=True, latent_noise=0.5)


def test_latents_are_read_back_and_a_stale_cache_is_refused(tmp_path, autoencoder):
    data, folder = DataConfig(size=16, length=3), tmp_path / "latents"
    first = compute_latents(data, autoencoder, folder)
    again = compute_latents(data, autoencoder, folder)
    assert torch.equal(first.buckets[0].mean, again.buckets[0].mean)
    assert torch.equal(first.buckets[0].std, again.buckets[0].std)
    assert first.captions == again.captions
    vae = AutoencoderKL(VAE)
    save_model(vae, autoencoder)
    with pytest.raises(ValueError, match="another autoencoder"):
        compute_latents(data, autoencoder, folder)
    (folder / "cache.json").unlink()
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ValueError, match="is damaged"):
        compute_latents(data, autoencoder, folder)


def test_masks_join_a_cache_of_latents_and_weigh_the_loss(tmp_path, autoencoder):
    data, folder = DataConfig(size=16, length=3), tmp_path / "latents"
    assert compute_latents(data, autoencoder, folder).buckets[0].mask is None
    with_masks = compute_latents(data, autoencoder, folder, masks=True)
    draws = Plan([range(3)], 3, 0).batch(0)
    weight = with_masks.mask(draws)
    side = weight.shape[-1]
    for draw, cells in zip(draws, weight, strict=True):
        mask = np.asarray(open_source(data).mask(draw.index), np.float64) / 255
        averaged = mask.reshape(side, 16 // side, side, 16 // side).mean((1, 3))
        np.testing.assert_allclose(cells[0], averaged, atol=1.01 / 255)
    recipe = diffusion_recipe(tmp_path / "run", objective=ObjectiveConfig(mask_weight=5.0))
    task = LatentDiffusion(recipe, autoencoder, with_masks)
    batch = task.batch(draws)
    torch.testing.assert_close(batch["area_weight"], 1 + 4 * weight)
    weighed, plain = task.module(**batch)[0], task.module(**{**batch, "area_weight": None})[0]
    assert not torch.allclose(weighed, plain)
    with pytest.raises(ValueError, match="read without their masks"):
        LatentDiffusion(recipe, autoencoder, latents()).batch(draws)
    with pytest.raises(ValueError, match=r"objective\.mask_weight=0\.5: expected 1 to 1000"):
        ObjectiveConfig(mask_weight=0.5)
    path = folder / "masks-00000.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"masks-00000\.safetensors is damaged"):
        compute_latents(data, autoencoder, folder, masks=True)


def test_a_frozen_text_encoder_is_not_trained_and_not_saved(tmp_path, autoencoder, tiny_pipeline):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    text = TextConfig(train=False, path=str(tmp_path / "pipeline"))
    task = train_diffusion(diffusion_recipe(tmp_path / "run", steps=4, text_encoder=text), autoencoder)
    checkpoint = load_checkpoint(tmp_path / "run/checkpoints/step-00000004")
    assert all(name.startswith("unet.") for name in checkpoint.tensors["model"])
    for name, value in tiny_pipeline.text_encoder.state_dict().items():
        assert torch.equal(task.text_encoder.state_dict()[name], value)


def test_offset_noise_and_input_perturbation(tmp_path, autoencoder):
    """Offset noise is one number a channel; both are functions of the draw, and off by default."""
    recipe = diffusion_recipe(tmp_path / "run")
    loud = replace(recipe, objective=ObjectiveConfig(offset_noise=0.5, input_perturbation=0.1))
    draws = Plan([range(12)], 4, 0).batch(3)
    plain, other = (LatentDiffusion(each, autoencoder, latents()).batch(draws) for each in (recipe, loud))
    assert "perturbation" not in plain
    offset = other["noise"] - plain["noise"]
    torch.testing.assert_close(offset, offset.mean((2, 3), keepdim=True).expand_as(offset))
    assert 0.3 < offset[:, :, 0, 0].std() < 0.7
    assert other["perturbation"].std().item() == pytest.approx(0.1, rel=0.1)
    alone = LatentDiffusion(loud, autoencoder, latents()).batch(draws[2:3])
    assert all(torch.equal(alone[name][0], other[name][2]) for name in ("noise", "perturbation"))
    with pytest.raises(ValueError, match=r"objective\.input_perturbation=-1: expected 0, or up to 1"):
        ObjectiveConfig(input_perturbation=-1)


@pytest.mark.slow
def test_gradient_checkpointing_trains_the_same(tmp_path, autoencoder):
    for name, options in (("plain", {}), ("checkpointed", {"gradient_checkpointing": True})):
        train_diffusion(diffusion_recipe(tmp_path / name, steps=4, **options), autoencoder)
    assert losses(tmp_path / "plain") == losses(tmp_path / "checkpointed")


def test_captions_are_chosen_and_dropped_by_count():
    draws = [Draw(index=0, step=step, position=0, count=1, seed=0) for step in range(400)]
    chosen = latents().choose_captions(draws, dropout=0.1)
    assert chosen == latents().choose_captions(draws, dropout=0.1)
    assert set(chosen) == {"", *latents().captions[0]}
    assert 20 < chosen.count("") < 60  # a tenth of 400


def test_timesteps_are_stratified_over_the_global_batch(tmp_path, autoencoder):
    task = LatentDiffusion(diffusion_recipe(tmp_path / "run"), autoencoder, latents())
    draws = [Draw(index=i, step=3, position=i, count=8, seed=0) for i in range(8)]
    whole = task.batch(draws)["t"]
    assert sorted(t * 8 // 1000 for t in whole.tolist()) == list(range(8))
    assert torch.equal(torch.cat([task.batch(draws[:3])["t"], task.batch(draws[3:])["t"]]), whole)


def test_micro_batches_add_up_to_the_batch(tmp_path):
    class Plain(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.module.dropout.p = 0.0

    for name, micro in (("whole", 0), ("parts", 1)):
        fit(Plain(), toy_config(tmp_path / name, micro_batch=micro))
    whole, parts = (
        load_checkpoint(tmp_path / name / "checkpoints/step-00000020") for name in ("whole", "parts")
    )
    torch.testing.assert_close(parts.tensors["model"], whole.tensors["model"])


def test_what_a_run_leaves_behind(tmp_path):
    task = Toy()
    outcome = fit(task, toy_config(tmp_path, keep_last=2))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000018",
        "step-00000020",
    ]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-00000010.png",
        "step-00000020.png",
    ]
    assert len(task.seen) == 80
    lines = losses(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[0].keys() == {"step", "loss", "size", "grad_norm", "lr", "skipped"}
    average = load_checkpoint(tmp_path / "checkpoints/step-00000020").tensors["ema"]["linear.weight"]
    assert json.loads((outcome.model / "weight.json").read_text()) == average.tolist()
    assert "steps: 20" in (tmp_path / "config.yaml").read_text()


def test_validation_is_on_what_is_in_no_batch_and_by_the_average(tmp_path):
    task = Toy()
    fit(task, toy_config(tmp_path, validation_samples=3, validate_every=8))
    assert len(task.validated) == 3
    assert not set(task.validated) & set(task.seen)
    assert set(task.seen) | set(task.validated) == set(range(10))
    lines = [line for line in losses(tmp_path) if "validation/weight" in line]
    assert [line["step"] for line in lines] == [8, 16, 20]
    average = load_checkpoint(tmp_path / "checkpoints/step-00000020").tensors["ema"]["linear.weight"]
    assert lines[-1]["validation/weight"] == pytest.approx(average.sum().item())


@pytest.mark.slow
def test_validation_of_a_diffusion_model(tmp_path, autoencoder):
    """Nothing but the weights changes it."""
    recipe = diffusion_recipe(tmp_path / "run", optim=replace(OPTIM, lr=1e-2))
    task = LatentDiffusion(recipe, autoencoder, latents())
    with torch.no_grad():
        before = task.validate([[1, 5, 7]])
        assert task.validate([[1, 5, 7]]) == before
    assert before.keys() == {"loss", *(f"loss_t{t:03d}" for t in (62, 187, 312, 437, 562, 687, 812, 937))}
    levels = [value for name, value in before.items() if name != "loss"]
    assert before["loss"] == pytest.approx(sum(levels) / 8)
    fit(task, recipe)
    with torch.no_grad():
        assert task.validate([[1, 5, 7]])["loss"] < before["loss"]


@pytest.mark.slow
def test_an_average_of_what_is_no_part_of_a_model_is_refused(tmp_path):
    fit(Toy(), toy_config(tmp_path, ema_widths=(0.05, 0.1), snapshot_every=5))
    with pytest.raises(ValueError, match="trained no unet, text_encoder, vae"):
        rebuild_ema(["--run", str(tmp_path), "--width", "0.1", "--output", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_width_of_the_average_is_chosen_afterwards(tmp_path, autoencoder):
    """A width that was tracked comes back from its last snapshot; another lies elsewhere."""
    run = tmp_path / "run"
    recipe = diffusion_recipe(run, ema_widths=(0.05, 0.1), snapshot_every=5, export_dtype="float16")
    train_diffusion(recipe, autoencoder, stop_after=7)
    train_diffusion(recipe, autoencoder)
    tracked = load_checkpoint(run / "checkpoints/step-00000020").tensors["ema-0.1"]
    assert len(find_snapshots(run)) == 8
    for width in (0.1, 0.07):
        assert rebuild_ema(["--run", str(run), "--width", str(width), "--output", str(run / f"{width}")]) == 0
    same, other = (load_model(UNet, run / f"{width}/unet").state_dict() for width in (0.1, 0.07))
    for name, value in same.items():
        torch.testing.assert_close(value, tracked[f"unet.{name}"], atol=1e-3, rtol=1e-3)
    assert any(not torch.equal(value, other[name]) for name, value in same.items())
    assert not torch.equal(same["conv_in.weight"], load_model(UNet, run / "model/unet").conv_in.weight)
    noted = [json.loads((run / name / "training.json").read_text()) for name in ("model", "0.07")]
    assert noted[0] == {"step": 20, "ema": f"average of decay {recipe.ema_decay:g}"}
    assert noted[1] == {"step": 20, "ema": "average of a power function, width 0.07"}
    pipe = LatentDiffusionPipeline.from_pretrained(run / "0.07")
    assert pipe("a red fox", num_inference_steps=1, height=16, width=16).images[0].size == (16, 16)
    with pytest.raises(ValueError, match=r"exists: choose another"):
        rebuild_ema(["--run", str(run), "--width", "0.1", "--output", str(run / "model")])
    with pytest.raises(ValueError, match=r"holds no snapshot: train with --ema-widths"):
        rebuild_ema(["--run", str(tmp_path), "--width", "0.1", "--output", str(tmp_path / "new")])


def test_validation_of_an_autoencoder(tmp_path):
    recipe = AutoencoderRecipe(
        output=str(tmp_path),
        steps=4,
        batch_size=1,
        model=VAE,
        data=DataConfig(size=16, length=8),
        optim=OPTIM,
    )
    task = Autoencoding(recipe)
    with torch.no_grad():
        values = task.validate([range(8)])
        pictures = torch.stack([task.image(index) for index in range(8)])
        error = (task.reconstruct(pictures).clamp(-1, 1) - pictures).square().mean().item()
    terms = {"loss", "l1", "mse", "gradient", "kl", "equivariance", "latent_std", "psnr", "ssim"}
    channels = {f"{name}_c{channel}" for name in ("std", "noise") for channel in range(4)}
    assert values.keys() == terms | channels
    assert values["psnr"] == pytest.approx(10 * math.log10(4 / error), abs=1e-3)


def test_a_finished_run_says_so_and_writes_a_missing_export(tmp_path):
    fit(Toy(), toy_config(tmp_path))
    again = Toy()
    assert fit(again, toy_config(tmp_path)).exit_code == 0
    assert again.seen == []
    (tmp_path / "exported.json").unlink()
    (tmp_path / "model/weight.json").unlink()
    fit(Toy(), toy_config(tmp_path))
    assert (tmp_path / "model/weight.json").exists()


def test_resuming_drops_metrics_after_the_checkpoint(tmp_path):
    """A kill -9 between saves: what was logged after the last checkpoint happens again."""
    fit(Toy(stop_after=9), toy_config(tmp_path, log_every=1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "loss": 1}\n{"step": 11, "lo')
    fit(Toy(), toy_config(tmp_path))
    fit(Toy(), toy_config(tmp_path / "whole"))
    assert losses(tmp_path) == losses(tmp_path / "whole")
    assert state(tmp_path, 20) == state(tmp_path / "whole", 20)


def test_another_run_is_not_gone_on_with(tmp_path):
    fit(Toy(stop_after=5), toy_config(tmp_path))
    with pytest.raises(ValueError, match=r"batch_size: 4 then, 8 now\n  seed: 0 then, 1 now"):
        fit(Toy(), toy_config(tmp_path, batch_size=8, seed=1))
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        fit(Toy(), toy_config(tmp_path, resume="none"))
    outcome = fit(Toy(), toy_config(tmp_path, steps=10, optim=replace(OPTIM, lr=1e-4)))  # these may change
    assert outcome.finished


def test_changed_settings_are_told(tmp_path, caplog):
    fit(Toy(stop_after=5), toy_config(tmp_path))
    with caplog.at_level(logging.INFO, logger="train"):
        fit(Toy(), toy_config(tmp_path, steps=10, optim=replace(OPTIM, lr=1e-4)))
    assert "changed settings:\n  optim.lr: 0.003 then, 0.0001 now\n  steps: 20 then, 10 now\n" in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("can't allocate memory: 9")]
)
def test_out_of_memory_says_what_to_do(tmp_path, error):
    task = Toy()

    def forward(x: Tensor) -> None:
        raise error

    task.module.forward = forward  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match=r"out of memory at step 0, with 4 samples .*: set micro_batch=2"):
        fit(task, toy_config(tmp_path))


def test_non_finite_gradients_are_skipped_and_counted(tmp_path):
    fit(Toy(poison=lambda step: step in (3, 4)), toy_config(tmp_path))
    skipped = [line["skipped"] for line in losses(tmp_path)]
    assert skipped == [0, 0, 0, 1] + [2] * 16
    assert losses(tmp_path)[3]["loss"] is None
    weight = load_checkpoint(tmp_path / "checkpoints/step-00000020").tensors["model"]["linear.weight"]
    assert weight.isfinite().all()


def test_ten_bad_steps_in_a_row_end_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"10 steps in a row .* step 17.*step-00000012") as error:
        fit(Toy(poison=lambda step: step >= 7), toy_config(tmp_path, save_every=6, keep_last=9))
    assert "lower optim.lr" in str(error.value)


def disk(monkeypatch: pytest.MonkeyPatch, full: Callable[[int], bool], seconds: float = 0.0) -> list[int]:
    """Makes saves slow, and those of some steps fail; returns the steps of those that end well."""
    saved: list[int] = []

    def save_checkpoint(folder: Path, step: int, *args: Any) -> Path:
        time.sleep(seconds)
        if full(step):
            raise OSError("No space left on device")
        path = plain(folder, step, *args)
        saved.append(step)
        return path

    plain = saving.save_checkpoint
    monkeypatch.setattr(saving, "save_checkpoint", save_checkpoint)
    return saved


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_does_not_end_the_run_but_the_last_save_does(tmp_path, monkeypatch, caplog, beside):
    saved = disk(monkeypatch, full=lambda step: step != 12)
    with pytest.raises(RunFailed, match=r"could not be saved: No space left .* is .*step-00000012"):
        fit(Toy(), toy_config(tmp_path, async_save=beside))
    assert saved == [12]
    for step in (6, 18):
        assert f"no checkpoint at step {step}, training goes on" in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]
    assert not (tmp_path / "exported.json").exists()


def test_the_last_state_of_a_full_disk_goes_elsewhere(tmp_path, monkeypatch):
    plain, run = (
        saving.save_checkpoint,
        toy_config(tmp_path / "run", emergency_output=str(tmp_path / "other")),
    )

    def save_checkpoint(folder: Path, *args: Any) -> Path:
        if folder.parent == tmp_path / "run":
            raise OSError("No space left on device")
        return plain(folder, *args)

    monkeypatch.setattr(saving, "save_checkpoint", save_checkpoint)
    rescued = tmp_path / "other/step-00000007"
    with pytest.raises(RunFailed, match=rf"No space left on device; it lies in {rescued} instead: --resume"):
        fit(Toy(stop_after=7), run)
    monkeypatch.undo()
    fit(Toy(), replace(run, resume=str(rescued)))
    fit(Toy(), toy_config(tmp_path / "whole"))
    assert state(tmp_path / "run", 20) == state(tmp_path / "whole", 20)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_saves_beside_the_training_hold_the_state_of_their_step(tmp_path, monkeypatch):
    """Bit for bit, while slow saves are overtaken by steps; and a stop waits for the one in hand."""
    fit(Toy(), toy_config(tmp_path / "whole", keep_last=9))
    saved = disk(monkeypatch, full=lambda step: False, seconds=0.05)
    beside = {"async_save": True, "keep_last": 9}
    fit(Toy(stop_after=7), toy_config(tmp_path / "run", **beside))
    assert saved == [6, 7]
    fit(Toy(), toy_config(tmp_path / "run", **beside))
    assert saved == [6, 7, 12, 18, 20]
    for step in (6, 12, 18, 20):
        assert state(tmp_path / "run", step) == state(tmp_path / "whole", step)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_rotation_to_one_checkpoint_never_leaves_none(tmp_path, monkeypatch):
    """Whenever something is about to be deleted, the newest checkpoint is whole and of this step."""
    plain = saving.clean

    def clean(folder: Path, keep_last: int, step: int) -> None:
        assert load_checkpoint(list_checkpoints(folder)[-1]).step == step
        plain(folder, keep_last, step)

    monkeypatch.setattr(saving, "clean", clean)
    fit(Toy(), toy_config(tmp_path, keep_last=1, async_save=True))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000020"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reader_that_fails_ends_the_run_with_its_own_words(tmp_path, workers):
    """In a thread as in the loop; and the same command goes on, bit for bit."""

    class Broken(Toy):
        def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
            if draws[0].step == 8:
                raise OSError(f"picture {draws[0].index}: Input/output error")
            return super().batch(draws)

    with pytest.raises(OSError, match=r"picture \d+: Input/output error"):
        fit(Broken(), toy_config(tmp_path / "run", workers=workers))
    fit(Toy(), toy_config(tmp_path / "run", workers=workers))
    fit(Toy(), toy_config(tmp_path / "whole"))
    assert state(tmp_path / "run", 20) == state(tmp_path / "whole", 20)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_two_runs_do_not_share_a_folder(tmp_path):
    class Nested(Toy):
        def preview(self) -> Image.Image:
            with pytest.raises(ValueError, match="another run is writing"):
                fit(Toy(), toy_config(tmp_path))
            return super().preview()

    fit(Nested(), toy_config(tmp_path))


def test_an_output_that_cannot_be_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    task = Toy()
    with pytest.raises(ValueError, match="cannot be written"):
        fit(task, toy_config(tmp_path / "file"))
    assert task.seen == []


def test_a_time_limit_saves_and_stops(tmp_path):
    outcome = fit(Toy(), toy_config(tmp_path, max_minutes=1e-9))
    assert (outcome.step, outcome.exit_code, outcome.reason) == (0, 75, "max_minutes")
    assert fit(Toy(), toy_config(tmp_path)).finished


def test_a_failing_tracker_is_left_out(tmp_path, monkeypatch, caplog):
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("unreachable")

    monkeypatch.setattr(record.Accelerator, "init_trackers", fail)
    monkeypatch.setattr(record.Accelerator, "log", fail)
    fit(Toy(), replace(toy_config(tmp_path, steps=4), tracker=None))
    assert "unreachable" not in caplog.text
    instance = record.Record(tmp_path, toy_config(tmp_path, tracker="tensorboard"), record.Accelerator())
    instance.start_tracker()
    instance.tracking = True
    instance.track({"step": 1, "loss": 2.0})
    assert not instance.tracking
    instance.picture(1, Image.new("RGB", (2, 2)))
    assert (tmp_path / "samples/step-00000001.png").exists()
    assert caplog.text.count("unreachable") == 2


@pytest.mark.slow
def test_tensorboard_gets_metrics_validation_and_pictures(tmp_path):
    pytest.importorskip("tensorboard", reason="a tracker of its own")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"validation_samples": 3, "validate_every": 10, "log_every": 5, "tracker": "tensorboard"}
    fit(Toy(), toy_config(tmp_path / "run", **options))
    events = EventAccumulator(str(tmp_path / "run/run")).Reload()
    lines = {line["step"]: line["loss"] for line in losses(tmp_path / "run") if "loss" in line}
    told = {event.step: event.value for event in events.Scalars("loss")}
    assert told == {
        step: pytest.approx(lines[step]) for step in (5, 6, 10, 12, 15, 18, 20)
    }  # or before a save
    assert [event.step for event in events.Scalars("validation/weight")] == [10, 20]
    pictures = events.Images("samples")
    assert [(event.step, event.width, event.height) for event in pictures] == [(10, 2, 2), (20, 2, 2)]
