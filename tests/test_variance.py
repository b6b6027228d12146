"""The learned variance is the paper's, and a run with it is that of diffusers."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.diffusion.guidance import classifier_free, conditional
from ldm.diffusion.sample import trajectory
from ldm.diffusion.schedule import NoiseSchedule, to_x0
from ldm.diffusion.scheduler import Scheduler
from ldm.diffusion.variance import LearnedVariance, ReverseSteps
from ldm.model.context import Context, repeated
from tests.test_scheduler import KINDS, config_of, draw, toy_unet

SCHEDULE = NoiseSchedule.scaled_linear()
STEPS = ReverseSteps.of(SCHEDULE)
T_OF_BATCH = torch.tensor([0, 1, 500, 999])


def both(xt: Tensor, t: Tensor, context: Context) -> Tensor:
    """A prediction and v, which also lies outside [-1, 1]; both hear the context."""
    told, xt = context.embeddings.mean((1, 2)).view(-1, 1, 1, 1), repeated(xt, like=context)
    return torch.cat([toy_unet(xt, t) + 0.1 * told, 1.5 * torch.sin(3 * xt + told)], dim=1)


def learned(**settings: object) -> dict:
    return config_of("ddpm", variance_type="learned_range", **settings)


@pytest.mark.parametrize("v", [-1.0, 0.3, 1.0])
def test_the_range_is_that_of_diffusers(v):
    """For every step of the whole schedule; at t = 0 theirs has the logarithm of 1e-20 for that of 0."""
    from diffusers import DDPMScheduler

    reference = DDPMScheduler.from_config(learned(prediction_type="epsilon"))
    theirs = [reference._get_variance(t, predicted_variance=torch.tensor(v)).item() for t in range(1, 1000)]
    ours = STEPS.log_posterior + STEPS.width * (v + 1) / 2
    torch.testing.assert_close(ours[1:], torch.tensor(theirs, dtype=torch.float64), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("eps", {}), ("v", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True})],
)
def test_a_run_is_that_of_diffusers(kind, settings, guided, monkeypatch):
    """Up to its last step, where ours ends at the data."""
    from diffusers import DDPMScheduler

    config = learned(prediction_type=KINDS[kind], **settings)
    reference, count = DDPMScheduler.from_config(config), 12
    reference.alphas_cumprod = Scheduler.from_config(config).schedule.alpha ** 2
    reference.set_timesteps(count)
    module, calls = importlib.import_module(type(reference).__module__), iter(range(count))
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: draw(next(calls)))
    context, uncond, xt = torch.ones(len(draw(-1)), 2, 3), torch.zeros(len(draw(-1)), 2, 3), draw(-1)
    theirs = []
    for t in reference.timesteps:
        prediction, v = both(xt, t, Context(context)).chunk(2, dim=1)
        if guided:
            prediction = both(xt, t, Context(uncond)).chunk(2, dim=1)[0].lerp(prediction, 2.0)
        xt = reference.step(torch.cat([prediction, v], dim=1), t, xt).prev_sample.float()
        theirs.append(xt)
    scheduler = Scheduler.from_config(config)
    unet, tableau = LearnedVariance(both), scheduler.tableau(count)
    denoise = conditional(unet, context, kind)
    if guided:
        denoise = classifier_free(unet, context, uncond, 2.0, kind)
    ours = [step.xt for step in trajectory(denoise, draw(-1), tableau, unet.louder(draw, tableau.steps))]
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(mine, other, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(ours[3], [s.xt for s in trajectory(denoise, draw(-1), tableau, draw)][3])


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_the_bound_is_a_divergence_of_two_normals(kind):
    """Its steps are q(x_{t-1} | xt, x0) by Bayes' rule, and only v learns from it."""
    x0, noise, v = torch.randn(3, 4, 3, 5, 7)
    level = SCHEDULE.at(T_OF_BATCH, like=x0)
    xt = level.alpha * x0 + level.sigma * noise
    answer = torch.randn_like(x0).requires_grad_()
    v.requires_grad_()
    unet = LearnedVariance(lambda *_: torch.cat([answer, v], dim=1))
    unet(xt, T_OF_BATCH, noise)
    bits = unet.bound(STEPS, x0, kind, T_OF_BATCH)
    for i, t in enumerate(T_OF_BATCH.tolist()):
        one = [each[i] if torch.is_tensor(each) else each for each in level]
        told = to_x0(answer[i], xt[i], type(level)(*one), kind).double()
        alpha, before = SCHEDULE.alpha[t], SCHEDULE.alpha[t - 1] if t else torch.tensor(1.0)
        kept = (alpha / before) ** 2  # of the variance, from x_{t-1} to xt
        precision = kept / (1 - kept) + 1 / (1 - before**2) if t else torch.inf
        mean = lambda x, a=alpha, b=before, k=kept, p=precision, n=i: (
            (k.sqrt() / (1 - k) * xt[n] + b / (1 - b**2) * x) / p
        )
        w = (v[i].double() + 1) / 2
        if t:
            sd = (w * (1 - kept).log() - (1 - w) * precision.log()).exp().sqrt()
            true, model = Normal(mean(x0[i].double()), precision**-0.5), Normal(mean(told), sd)
            expected = kl_divergence(true, model).mean() / math.log(2)
        else:
            sd = (w * (1 - kept).log() + (1 - w) * STEPS.log_posterior[1]).exp().sqrt()
            expected = -Normal(told, sd).log_prob(x0[i].double()).mean() / math.log(2)
        assert bits[i].item() == pytest.approx(expected.item(), rel=2e-3)
    bits.sum().backward()
    assert not answer.grad.any()
    assert (v.grad != 0).all()


@pytest.mark.parametrize(("spread", "best"), [(0.0, -1.0), (1.0, 1.0)])
def test_the_bound_is_least_at_the_true_variance(spread, best):
    """The posterior's where x0 is known, beta where x0 is N(0, 1) and its best guess alpha xt."""
    x0 = spread * torch.randn(64, 1, 16, 16)
    t = torch.full((64,), 100)
    level = SCHEDULE.at(t, like=x0)
    xt = level.alpha * x0 + level.sigma * torch.randn_like(x0)
    bits = []
    for v in (-1.2, -1.0, -0.8, 0.8, 1.0, 1.2):
        answer = torch.cat([spread * level.alpha * xt, torch.full_like(xt, v)], dim=1)
        unet = LearnedVariance(lambda *_, answer=answer: answer)
        unet(xt, t, xt)
        bits.append((unet.bound(STEPS, x0, "x0", t).mean().item(), v))
    assert min(bits)[1] == best


def test_the_noisiest_level_may_be_pure_noise():
    steps = ReverseSteps.of(SCHEDULE.zero_terminal_snr())
    assert all(table.isfinite().all() for table in (steps.log_posterior, steps.width, steps.of_x0))
    assert (steps.log_posterior + steps.width)[-1].item() == pytest.approx(0)  # beta = 1
