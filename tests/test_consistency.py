"""Drawing with a consistency model: stock diffusers' pictures, one call a step, and what it does not hear."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.command import guiding
from ldm.diffusion.guidance import apg, classifier_free, conditional, embedded, thresholded
from ldm.diffusion.noise import start_noise, step_noise
from ldm.diffusion.schedule import Level
from ldm.diffusion.scheduler import Scheduler
from ldm.model.context import Context
from ldm.model.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.options import Defaults
from tests.tiny import SCHEDULER, tiny_pipeline, tiny_xl_pipeline

PROMPTS = ["a red fox in snow", "two blue cats"]
SHAPE = (4, 12, 20)  # of the latents of ODD
ODD = {"height": 24, "width": 40}


def few_step_pipeline(kind: str = "v_prediction", **scheduler: object) -> LatentDiffusionPipeline:
    """The tiny pipeline as if it had been distilled: its UNet is told its guidance."""
    small = tiny_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        unet = UNet(replace(small.unet.config, time_cond_proj_dim=16)).eval()
    distilled = Scheduler.from_config(SCHEDULER | {"prediction_type": kind} | scheduler).distilled()
    parts = small.components | {"unet": unet, "scheduler": distilled}
    pipe = LatentDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return few_step_pipeline()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("v_prediction", {}), ("epsilon", {}), ("v_prediction", {"rescale_betas_zero_snr": True})],
)
def test_stock_diffusers_reads_the_folder_and_draws_the_same(kind, settings, tmp_path, monkeypatch):
    from diffusers import LatentConsistencyModelPipeline
    from diffusers.schedulers import scheduling_lcm

    pipe, seeds, draws = few_step_pipeline(kind, **settings), [3, 8], itertools.count()
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "generation.json").exists()  # its options are those of the stock class
    stock = LatentConsistencyModelPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    noise = step_noise(seeds, SHAPE)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: noise(next(draws)))
    call = {"latents": start_noise(seeds, SHAPE), "output_type": "latent", **ODD}
    theirs = stock(PROMPTS, **call).images
    assert next(draws) == 3
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert again.defaults == pipe.defaults == Defaults(num_inference_steps=4, guidance_scale=8.5)
    for ours in (pipe, again, LatentDiffusionPipeline.from_diffusers(stock)):
        drawn = ours(PROMPTS, seed=seeds, output_type="latent", **ODD).images
        assert (drawn - theirs).abs().max() < 1e-4 * theirs.abs().max()
    weaker = pipe(PROMPTS, seed=seeds, output_type="latent", guidance_scale=2.0, **ODD).images
    assert (weaker - theirs).abs().max() > 1e-2
    draws = itertools.count()
    assert (
        pipe(PROMPTS, seed=seeds, output_type="pt", **ODD).images
        - torch.from_numpy(stock(PROMPTS, latents=call["latents"], output_type="np", **ODD).images).movedim(
            -1, 1
        )
    ).abs().max() < 2 / 255
    twin = pipe.to_diffusers()
    assert isinstance(twin, LatentConsistencyModelPipeline)
    assert twin.unet.time_embedding.cond_proj.weight is pipe.unet.time_embedding.cond_proj.weight


def test_a_step_is_one_call_of_a_row_a_picture(pipe, monkeypatch):
    rows, told = [], []

    def watch(unet: UNet, args: tuple[Tensor, Tensor, Context]) -> None:
        rows.append((len(args[0]), len(args[2])))
        told.append(args[2].guidance_scale.tolist())

    hook = pipe.unet.register_forward_pre_hook(watch)
    pipe(PROMPTS, guidance_scale=6.0, output_type="latent", num_inference_steps=3)
    pipe(PROMPTS[0], guidance_scale=0, output_type="latent", num_inference_steps=1)
    pipe(PROMPTS[0], guidance=thresholded(classifier_free, 3.0), output_type="latent", num_inference_steps=1)
    hook.remove()
    assert rows == [(2, 2)] * 3 + [(1, 1)] * 2
    assert told == [[6.0, 6.0]] * 3 + [[1.0], [8.5]]


def test_a_told_guidance_leaves_nothing_to_guide():
    """Whatever the guidance: it is what it is at scale 1, of a text that tells the scale."""
    unet, xt, level = few_step_pipeline().unet, torch.randn(2, 4, 6, 10), Level(500.0, 0.6, 0.8)
    context, uncond = torch.randn(2, 2, 16, 24)
    with torch.no_grad():
        plain = conditional(unet, Context(context).guided(4.0), "v")(xt, level)
        for guidance in (classifier_free, apg):
            assert torch.equal(embedded(guidance)(unet, context, uncond, 4.0, "v")(xt, level), plain)


def test_a_picture_does_not_depend_on_its_batch(pipe):
    together = pipe(PROMPTS, seed=[1, 2], output_type="latent").images
    alone = pipe(PROMPTS[1], seed=2, output_type="latent").images
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=0)


def test_what_has_no_effect_is_told(pipe, caplog):
    call = {"num_inference_steps": 1, "output_type": "latent"}
    message = "the negative prompt has no effect: this model was distilled with its guidance"
    pipe(PROMPTS[0], negative_prompt="fog", seed=1, **call)
    assert message in caplog.text
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS[0], negative_prompt="fog", strict=True, **call)
    for name, value in (("guidance_rescale", 0.7), ("guidance_interval", (-1.0, 1.0))):
        with pytest.raises(ValueError, match=f"{name}=.*distilled with its guidance"):
            pipe(PROMPTS[0], **call, **{name: value})
    with pytest.raises(
        ValueError, match="51 steps: consistency models take 1 to original_inference_steps=50"
    ):
        pipe(PROMPTS[0], num_inference_steps=51)


def test_any_model_draws_by_this_sampler_and_this_model_by_any(pipe):
    plain = tiny_pipeline()
    for model, sampler in ((plain, "lcm"), (pipe, "ddim"), (pipe, "dpmpp_2m")):
        images = model(PROMPTS[0], sampler=sampler, num_inference_steps=3, seed=1, output_type="pt").images
        assert images.isfinite().all()
        assert images.std() > 0.01
    for model in (plain, pipe):
        assert model.tableau(4, "lcm").steps.t.tolist() == [999, 759, 499, 259]


def test_a_model_of_another_scheduler_or_two_texts_keeps_its_class(pipe, tmp_path):
    """LatentConsistencyModelPipeline wants LCMScheduler, and SDXL's class is told its guidance itself."""
    other = LatentDiffusionPipeline(**pipe.components | {"scheduler": Scheduler.from_config(SCHEDULER)})
    assert other.layout.stock_class == "StableDiffusionPipeline"
    large = tiny_xl_pipeline()
    unet = UNet(replace(large.unet.config, time_cond_proj_dim=16))
    large = LatentDiffusionPipeline(**large.components | {"unet": unet, "scheduler": pipe.scheduler})
    large.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert large(PROMPTS[0], num_inference_steps=1, output_type="pt").images.isfinite().all()


def test_a_single_file_of_it_comes_back(pipe, tmp_path):
    pipe.defaults, own = Defaults(num_inference_steps=2, guidance_scale=3.0), pipe.defaults
    try:
        pipe.save_single_file(tmp_path / "few.safetensors")
        again = LatentDiffusionPipeline.from_single_file(tmp_path / "few.safetensors")
        assert again.defaults == pipe.defaults
        pictures = [each(PROMPTS[0], seed=3, output_type="pt").images for each in (pipe, again)]
        torch.testing.assert_close(*pictures, atol=1e-4, rtol=0)  # another memory layout
    finally:
        pipe.defaults = own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "apg"], "--guidance apg: this model was distilled with its guidance"),
        (["--guidance-rescale", "0.5"], "guidance_rescale=0.5: this model was distilled"),
    ],
)
def test_the_command_line_refuses_what_it_cannot_heed(pipe, tmp_path, capsys, options, message):
    from ldm import generate

    pipe.save_pretrained(tmp_path / "model")
    argv = [PROMPTS[0], "--model", str(tmp_path / "model"), "--output", str(tmp_path / "fox.png")]
    assert generate.main([*argv, *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path(tmp_path / "fox.png").exists()
    assert generate.main([*argv, "--threshold", "3"]) == 0


def test_a_worse_unet_is_refused(pipe):
    class Asked:
        worse, guidance, guidance_rescale = "FOLDER", "cfg", 0.0

    with pytest.raises(ValueError, match="--worse: this model was distilled with its guidance"):
        guiding.guided(pipe, Asked())
