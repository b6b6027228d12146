"""Rectified flow on this UNet, end to end: fitted, exported, loaded and sampled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldm.pipeline import LatentDiffusionPipeline
from tests.test_fit import FLOW, OPTIM, autoencoder, diffusion_recipe
from train.batches.latents import Bucket, CacheKey, Latents
from train.fit.loop import fit
from train.tasks.diffusion import LatentDiffusion

__all__ = ["autoencoder"]  # a fixture
CAPTIONS, MEANS, STD = ("a red fox in snow", "two blue cats at night"), (1.0, -1.0), 0.3


def normals() -> Latents:
    """Latents of two captions, N(mean, STD**2) of all numbers alike, in the autoencoder's own units."""
    scale = 0.18215
    mean = torch.tensor(MEANS).repeat(4).view(8, 1, 1, 1, 1).expand(8, 1, 4, 8, 6) / scale
    bucket = Bucket(list(range(8)), mean.half(), torch.full_like(mean, STD / scale).half())
    captions = {index: [CAPTIONS[index % 2]] for index in range(8)}
    return Latents([bucket], captions, CacheKey("", "normals", 4, 2, [[12, 16, 8]], 1, False))


@pytest.mark.slow
def test_a_flow_is_learnt_exported_and_sampled(tmp_path, autoencoder):
    """What is drawn has the data's means and nearly its deviation; noise has neither."""
    optim = replace(OPTIM, lr=1e-2, warmup_steps=10, curve="cosine")
    objective = replace(FLOW, timestep_shift=1.0)
    recipe = diffusion_recipe(tmp_path / "run", steps=250, batch_size=8, optim=optim, objective=objective)
    outcome = fit(LatentDiffusion(recipe, autoencoder, normals()), recipe)
    pipe = LatentDiffusionPipeline.from_pretrained(outcome.model, dtype=torch.float32)
    assert pipe.scheduler.prediction == "flow"
    call = {"height": 16, "width": 12, "num_inference_steps": 12, "guidance_scale": 1.0, "seed": 0}
    for text, mean in zip(CAPTIONS, MEANS, strict=True):
        drawn = pipe(text, num_images_per_prompt=8, output_type="latent", **call).images
        assert drawn.mean().item() == pytest.approx(mean, abs=0.15)
        assert drawn.std().item() == pytest.approx(STD, abs=0.15)
