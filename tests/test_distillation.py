"""Consistency distillation: laws of the loss, a student that starts as its teacher, resumes, and learns."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.consistency import consistency_loss, ddim_step, pseudo_huber
from ldm.diffusion.guidance import classifier_free, conditional
from ldm.diffusion.noise import start_noise, step_noise
from ldm.diffusion.sample import sample
from ldm.diffusion.schedule import Level, Timesteps
from ldm.diffusion.scheduler import Scheduler
from ldm.diffusion.solvers import consistency, ddim
from ldm.files.config import read_json
from ldm.model.context import Context
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.options import Defaults
from tests.test_fit import OPTIM, losses, state, stop_at
from tests.test_solvers import end_of_the_ode, gaussian
from tests.test_train_scripts import plans_and_trains
from tests.tiny import CAPTIONS, tiny_pipeline
from train import train_consistency
from train.batches.latents import Latents
from train.batches.plan import Plan
from train.data.sources import DataConfig
from train.fit.loop import fit
from train.tasks.consistency import Consistency, ConsistencyRecipe
from train.tasks.tuning import latents_of

DATA = DataConfig(source="shapes", size=16, length=12)
MODEL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline(**MODEL)
    pipe.defaults = Defaults(num_inference_steps=25, guidance_scale=2.5)
    nn.init.normal_(pipe.unet.conv_out.weight, std=0.05)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory, model) -> Latents:
    return latents_of(recipe_of(tmp_path_factory.mktemp("run"), model), model)


def recipe_of(output: Path, model: Path, **options: Any) -> ConsistencyRecipe:
    base = ConsistencyRecipe(
        output=str(output), model=str(model), steps=6, batch_size=2, optim=OPTIM, data=DATA, mask_weight=2.0
    )
    scales = {"min_guidance_scale": 1.0, "max_guidance_scale": 4.0}
    return replace(base, **{"sample_every": 0, "precision": "fp32", **scales, **options})


def grid(count: int, zero_snr: bool = True) -> Timesteps:
    """The steps of a teacher over T = 1000 levels."""
    return Scheduler.default("v", zero_snr).distilled(count).timesteps(count)


# Laws of the loss


@pytest.mark.parametrize("zero_snr", [True, False])
def test_the_teachers_step_is_a_row_of_ddims_table(zero_snr):
    """Also from alpha = 0, and to the data, where it is x0 itself."""
    steps = grid(50, zero_snr)
    table, index = ddim(steps), torch.arange(50)
    x0, xt = torch.randn(2, 50, 4, 5, 7, dtype=torch.float64)
    here, there = (steps.at(index + after, like=xt) for after in (0, 1))
    assert (float(here.alpha[0]) == 0) is zero_snr
    a, b = (part.view(-1, 1, 1, 1) for part in (table.a, table.b[:, 0]))
    found = ddim_step(x0, xt, here, there)
    torch.testing.assert_close(found, a * xt + b * x0)
    assert torch.equal(found[-1], x0[-1])
    assert here.t.tolist() == steps.t.tolist()


def of_all_levels(steps: Timesteps, teacher: Callable[[Level], Any], **options: float) -> Tensor:
    """The loss of the exact consistency function at each step, on Gaussian data."""
    x0 = 3 + 0.5 * torch.randn(len(steps), 2, 8, 9, dtype=torch.float64)
    index = torch.arange(len(steps))
    here, there = (steps.at(index + after, like=x0) for after in (0, 1))
    xt = here.alpha * x0 + here.sigma * torch.randn_like(x0)
    return consistency_loss(end_of_the_ode, end_of_the_ode, teacher(there), xt, here, there, **options)


def test_a_consistency_function_has_no_loss_where_the_solver_is_exact():
    def exact(there: Level) -> Callable[[Tensor, Level], Tensor]:
        """The x0 by which DDIM's step follows the ODE all the way."""

        def answer(xt: Tensor, here: Level) -> Tensor:
            std, then = ((0.25 * level.alpha**2 + level.sigma**2).sqrt() for level in (here, there))
            closer = 3 * there.alpha + (xt - 3 * here.alpha) * then / std
            ratio = there.sigma / here.sigma
            return (closer - ratio * xt) / (there.alpha - ratio * here.alpha)

        return answer

    assert of_all_levels(grid(50), exact, c=0.0).max() < 1e-12
    assert of_all_levels(grid(50), lambda _: partial(gaussian, mean=3.0), c=0.0).max() > 1e-3


def test_the_loss_of_a_consistency_function_falls_with_the_square_of_the_step():
    """DDIM is of order 1, so a step of it misses by h**2; from alpha = 0 the first is infinite in log_snr."""

    def loss(count: int) -> float:
        steps = grid(count)
        losses = of_all_levels(steps, lambda _: partial(gaussian, mean=3.0), c=0.0)
        return losses[count // 2].item()  # at the same t in all grids, within a step

    ratios = [loss(count) / loss(2 * count) for count in (50, 100, 250)]
    assert all(3 < ratio < 5 for ratio in ratios), ratios


def test_the_boundary_gradients_and_area_weights():
    steps, index = grid(50), torch.tensor([49, 10])
    x0, scale = torch.randn(2, 4, 5, 7), torch.ones(1, requires_grad=True)
    here, there = (steps.at(index + after, like=x0) for after in (0, 1))
    xt = here.alpha * x0 + here.sigma * torch.randn_like(x0)
    asked: list[Level] = []

    def answer(value: Tensor) -> Callable[[Tensor, Level], Tensor]:
        def denoise(xt: Tensor, level: Level) -> Tensor:
            asked.append(level)
            return value * scale

        return denoise

    teacher, target, student = torch.randn(3, 2, 4, 5, 7)
    loss = consistency_loss(answer(student), answer(target), answer(teacher), xt, here, there)
    loss.sum().backward()
    assert [level is here for level in asked] == [True, False, True]
    expected = pseudo_huber(student - torch.stack([teacher[0], target[1]]))
    torch.testing.assert_close(loss.detach(), expected)  # at the last step it is the teacher's x0 alone
    alone = scale.detach().clone().requires_grad_()
    pseudo_huber(alone * student - torch.stack([teacher[0], target[1]])).sum().backward()
    torch.testing.assert_close(scale.grad, alone.grad)
    area = torch.zeros(2, 1, 5, 7)
    area[:, :, 2, 3] = 1
    some = consistency_loss(answer(student), answer(target), answer(teacher), xt, here, there, area)
    place = (student - torch.stack([teacher[0], target[1]]))[:, :, 2:3, 3:4]
    torch.testing.assert_close(some.detach(), pseudo_huber(place), rtol=1e-4, atol=1e-5)


def test_pseudo_huber_is_the_papers_over_the_root_of_d():
    error, d = torch.randn(3, 4, 5, 7, dtype=torch.float64), 4 * 5 * 7
    c = 0.00054 * math.sqrt(d)
    theirs = (error.flatten(1).square().sum(1) + c**2).sqrt() - c
    torch.testing.assert_close(pseudo_huber(error), theirs / math.sqrt(d))
    tiny = torch.zeros(1, 2, requires_grad=True)
    pseudo_huber(tiny).sum().backward()
    assert torch.equal(tiny.grad, torch.zeros(1, 2))  # smooth where nothing is wrong


class Residual(nn.Module):
    """The teacher, plus what a small network of (x, log_snr) adds, which begins as nothing."""

    def __init__(self, teacher: Callable[[Tensor, Level], Tensor]) -> None:
        super().__init__()
        self.teacher = teacher
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, xt: Tensor, level: Level) -> Tensor:
        alpha, sigma = (torch.as_tensor(part).to(xt).expand_as(xt) for part in (level.alpha, level.sigma))
        return self.teacher(xt, level) + self.net(torch.stack([xt, alpha, sigma], -1)).squeeze(-1) * sigma


def two_peaks(xt: Tensor, level: Level) -> Tensor:
    """E[x0 | xt] of data of two equal peaks at -1 and 1, of deviation 0.2."""
    variance = level.alpha**2 * 0.04 + level.sigma**2
    side = (level.alpha * xt / variance).tanh()  # the mean of the peaks that xt may be of
    return side + level.alpha * 0.04 / variance * (xt - level.alpha * side)


def test_a_student_learns_where_the_teacher_ends():
    """The mean answer lies between the peaks, so one step of the teacher does too; the student's does not."""
    steps, noise = grid(50), torch.randn(256, 1, 1, 1)
    fresh = step_noise(list(range(256)), (1, 1, 1))
    end = sample(two_peaks, noise, ddim(steps), fresh)
    student = Residual(two_peaks)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)

    def errors() -> tuple[float, float]:
        """From the teacher's end in a step; and in two, after which it may be the other peak, from a peak."""
        one, two = (
            sample(student, noise, consistency(Scheduler.default().timesteps(count, "lcm")), fresh)
            for count in (1, 2)
        )
        return (one - end).square().mean().sqrt().item(), (two.abs() - 1).square().mean().sqrt().item()

    before = errors()
    for _ in range(300):
        x0 = torch.randint(2, (256, 1, 1, 1)) * 2.0 - 1 + 0.2 * torch.randn(256, 1, 1, 1)
        index = torch.randint(50, (256,))
        here, there = (steps.at(index + after, like=x0) for after in (0, 1))
        xt = here.alpha * x0 + here.sigma * torch.randn_like(x0)
        optimizer.zero_grad()
        consistency_loss(student, student, two_peaks, xt, here, there).mean().backward()
        optimizer.step()
    after = errors()
    assert before[0] > 0.9
    assert after[0] < 0.6 * before[0], (before, after)
    assert after[1] < 0.85 * before[1], (before, after)


# The task


def test_the_student_starts_as_the_teacher_without_guidance(tmp_path, model, cache):
    task = Consistency(recipe_of(tmp_path, model), model, cache)
    teacher = task.module.model.unet
    xt, t, text = torch.randn(3, 4, 8, 6), torch.tensor([999, 500, 19]), torch.randn(3, 16, 24)
    with torch.no_grad():
        plain = teacher(xt, t, text)
        for student in (task.unet, task.module.average):
            answer = student(xt, t, Context(text).guided(torch.tensor([1.0, 2.0, 9.0])))
            assert torch.equal(answer, plain)
    assert task.unet.config.time_cond_proj_dim == 256
    assert {name.split(".")[0] for name in task.module.state_dict()} == {"unet", "average"}
    trained = {name.split(".")[0] for name, p in task.module.named_parameters() if p.requires_grad}
    assert trained == {"unet"}
    assert task.scheduler.config["_class_name"] == "LCMScheduler"
    assert task.recipe.sampling == Defaults(num_inference_steps=4, guidance_scale=2.5, sampler="lcm")


def test_the_loss_is_that_of_the_formula(tmp_path, model, cache):
    """Of the batch as it comes, level by level and row by row, and the levels cover the teacher's steps."""
    task = Consistency(recipe_of(tmp_path, model, mask_weight=1.0, batch_size=50), model, cache)
    nn.init.normal_(task.unet.time_embedding.cond_proj.weight, std=0.1)
    batch = task.batch(Plan(task.buckets, 50, 0).batch(3))
    assert sorted(batch["index"].tolist()) == list(range(50))
    assert 1 <= batch["guidance_scale"].min() < 1.5
    assert 3.5 < batch["guidance_scale"].max() <= 4
    pipe, table = LatentDiffusionPipeline.from_pretrained(model), ddim(task.steps)
    with torch.no_grad():
        losses, _ = task.module.eval()(**batch)
        uncond = pipe.text_encoder(batch["empty"])
        for row in range(0, 50, 7):
            index, scale = int(batch["index"][row]), float(batch["guidance_scale"][row])
            x0, noise = batch["x0"][[row]], batch["noise"][[row]]
            levels = [*task.steps, Level(0.0, 1.0, 0.0)]
            here, there = levels[index : index + 2]
            xt, text = here.alpha * x0 + here.sigma * noise, pipe.text_encoder(batch["tokens"][[row]])
            answer = classifier_free(pipe.unet, text, uncond, scale, "v")(xt, here)
            closer = float(table.a[index]) * xt + float(table.b[index]) * answer
            told = Context(text).guided(scale)
            wanted = conditional(task.module.average, told, "v")(closer, there) if there.sigma else closer
            error = conditional(task.unet, told, "v")(xt, here) - wanted
            torch.testing.assert_close(losses[row], pseudo_huber(error)[0], rtol=1e-3, atol=1e-5)


def test_the_average_follows_each_update_once(tmp_path, model, cache):
    task = Consistency(recipe_of(tmp_path, model, target_decay=0.75), model, cache)
    module, first = task.module, task.unet.conv_in.bias.detach().clone()
    module.follow(0)
    assert torch.equal(module.average.conv_in.bias, first)
    with torch.no_grad():
        task.unet.conv_in.bias += 1
    for _ in range(3):  # parts of one batch
        module.follow(1)
    torch.testing.assert_close(module.average.conv_in.bias, first + 0.25)
    itself = Consistency(recipe_of(tmp_path, model, target_decay=0.0), model, cache)
    assert itself.module.average is None
    batch = itself.batch(Plan(itself.buckets, 2, 0).batch(0))
    loss, _ = itself.module(**batch)
    loss.mean().backward()
    assert itself.unet.conv_in.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in itself.module.model.parameters())


@pytest.mark.slow
def test_a_run_in_pieces_is_the_run_and_another_range_is_refused(tmp_path, model, cache):
    def run(folder: str, stop_after: int = 0, **options: Any) -> None:
        recipe = recipe_of(tmp_path / folder, model, validation_samples=2, validate_every=3, **options)
        task = Consistency(recipe, model, cache)
        stop_at(task, stop_after)
        assert fit(task, recipe).step == (stop_after or recipe.steps)

    run("whole")
    run("halves", stop_after=4)
    run("halves")
    assert state(tmp_path / "halves", 6) == state(tmp_path / "whole", 6)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    last = losses(tmp_path / "whole")[-1]
    assert {"validation/loss", "validation/error_in_1", "validation/error_in_4"} <= last.keys()
    run("parts", micro_batch=1, gradient_checkpointing=True)  # the same batch in more parts, computed twice
    one, other = (losses(tmp_path / name)[4]["loss"] for name in ("whole", "parts"))
    assert one == pytest.approx(other, rel=1e-3)
    with pytest.raises(ValueError, match=r"(?s)is of another run.*guidance_scales"):
        run("whole", max_guidance_scale=5.0)


@pytest.mark.slow
def test_distilling_brings_a_step_nearer_to_the_teacher(tmp_path, model, cache):
    """By the averaged weights of the run, against the student that it began with, which heeds no guidance."""
    options = {"steps": 60, "batch_size": 8, "validation_samples": 4, "validate_every": 60}
    options |= {"original_inference_steps": 10, "target_decay": 0.5, "ema_decay": 0.9}
    recipe = recipe_of(tmp_path / "run", model, **options)
    task = Consistency(recipe, model, cache)
    before = task.validate(Plan(task.buckets, 8, 0, held_out=4).validation)
    assert fit(task, recipe).step == 60
    after = losses(tmp_path / "run")[-1]
    assert after["validation/error_in_1"] < 0.8 * before["error_in_1"], (before, after)


@pytest.mark.slow
def test_stock_diffusers_reads_the_folder_and_draws_the_same(tmp_path, model, cache, monkeypatch):
    from diffusers import LatentConsistencyModelPipeline
    from diffusers.schedulers import scheduling_lcm

    task = Consistency(recipe_of(tmp_path, model), model, cache)
    nn.init.normal_(task.unet.time_embedding.cond_proj.weight, std=0.1)  # as if it had learnt
    task.export(tmp_path / "model")
    assert read_json(tmp_path / "model/generation.json")["sampler"] == "lcm"
    assert read_json(tmp_path / "model/generation.json")["num_inference_steps"] == 4
    assert json.loads((tmp_path / "model/unet/config.json").read_text())["time_cond_proj_dim"] == 256
    stock, draws = LatentConsistencyModelPipeline.from_pretrained(tmp_path / "model"), itertools.count()
    stock.set_progress_bar_config(disable=True)
    noise = step_noise([0, 1], (4, 8, 12))
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: noise(next(draws)))
    call: dict[str, Any] = {"output_type": "latent", "height": 16, "width": 24}
    latents = start_noise([0, 1], (4, 8, 12))
    theirs = stock(CAPTIONS[:2], latents=latents, guidance_scale=2.5, **call).images
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path / "model")(CAPTIONS[:2], seed=0, **call).images
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_guidance_scale": 0.5}, "guidance_scale=0.5: expected"),
        (
            {"min_guidance_scale": 5.0},
            "min_guidance_scale=5.0 and max_guidance_scale=4.0: expected the first",
        ),
        ({"target_decay": 1.0}, "target_decay=1.0: expected 0 .* or a number below 1"),
        ({"weight": "snr"}, "weight='snr' is not one of none, min_snr"),
    ],
)
def test_what_a_recipe_cannot_be(tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(tmp_path, model, **options)


def test_what_is_not_distilled(tmp_path, model, cache):
    with pytest.raises(ValueError, match="original_inference_steps=30: expected a divisor"):
        Consistency(recipe_of(tmp_path, model, original_inference_steps=30), model, cache)
    path = model / "scheduler/scheduler_config.json"
    kept = path.read_text()
    path.write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000})
    )
    try:
        with pytest.raises(ValueError, match="predicts a flow: only models of v"):
            Consistency(recipe_of(tmp_path, model), model, cache)
    finally:
        path.write_text(kept)
    student = Consistency(recipe_of(tmp_path, model), model, cache)
    student.export(tmp_path / "few")
    with pytest.raises(ValueError, match="is a LatentConsistencyModelPipeline: only StableDiffusionPipeline"):
        train_consistency.main(["--model", str(tmp_path / "few"), "--output", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=r"unet\.time_cond_proj_dim=256: a UNet that is told its guidance"):
        replace(student.recipe, unet=student.unet.config)


@pytest.mark.slow
def test_the_command_trains_and_plans(tmp_path, model, capsys):
    argv = (
        f"--model {model} --output {tmp_path / 'run'} --steps 2 --batch-size 2 --optim.warmup-steps 1".split()
    )
    argv += ["--data.source", "shapes", "--data.size", "16", "--data.length", "8", "--precision", "fp32"]
    argv += ["--sample-every", "2", "--validation-samples", "2", "--max-guidance-scale", "3"]
    plans_and_trains(train_consistency.main, argv, "student", capsys)
    assert len(list((tmp_path / "run/samples").iterdir())) == 1
