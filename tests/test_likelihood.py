"""The likelihoods are exact where the data is normal, and the posterior is that of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from ldm.diffusion.likelihood import (
    bits_by_ode,
    density,
    discretised,
    fixed_variance,
    learned_variance,
    variational_bound,
)
from ldm.diffusion.noise import step_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.solvers import ddim
from ldm.diffusion.variance import ReverseSteps
from tests.test_solvers import gaussian

SCHEDULE = NoiseSchedule.linear(T=40, beta_start=0.0025, beta_end=0.5)
STD = 0.5
X0 = 0.7 * torch.randn(3, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def bits(log_probability: Tensor) -> Tensor:
    return -log_probability.flatten(1).mean(1) / math.log(2)


def exact_variance(schedule: NoiseSchedule, std: float) -> Tensor:
    """log of var(x_{t-1} | xt) (T,) of data N(0, std**2): the posterior's, and what x0 is still unsure of."""
    steps = ReverseSteps.of(schedule)
    unsure = 1 / (1 / std**2 + (schedule.alpha / schedule.sigma) ** 2)
    posterior = steps.log_posterior.exp()
    posterior[0] = 0  # steps has no logarithm of 0 and puts the next one
    return (posterior + steps.of_x0**2 * unsure).log()


def expected_bound(reverse, schedule, x0=X0) -> Tensor:
    """The mean over the noise, exact: what is quadratic in it has its mean over 1 and -1."""
    ends = [
        variational_bound(reverse, schedule, x0, lambda t, z=z: z).total
        for z in (torch.ones_like(x0), -torch.ones_like(x0))
    ]
    return (ends[0] + ends[1]) / 2


@pytest.mark.parametrize("std", [STD, 1.0])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_bound_is_the_density_where_the_steps_are_exact(std, zero_snr):
    """With the true mean and variance, what is over is that x_T is not quite N(0, 1)."""
    schedule = SCHEDULE.zero_terminal_snr() if zero_snr else SCHEDULE
    reverse = fixed_variance(lambda xt, level: gaussian(xt, level, std), exact_variance(schedule, std))
    alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
    end, square = (
        alpha**2 * std**2 + sigma**2,
        alpha**2 * X0**2 + sigma**2,
    )  # of x_T: its variance; E of x_T**2
    over = (square - square / end - end.log()) / 2
    expected = bits(density(X0, 0 * X0, 0 * X0 + 2 * math.log(std)) - over)
    torch.testing.assert_close(expected_bound(reverse, schedule), expected, atol=1e-9, rtol=1e-9)


def test_another_variance_or_mean_costs_bits():
    """Of data with this deviation; here it is on both sides of the mean."""
    steps, exact, data = ReverseSteps.of(SCHEDULE), exact_variance(SCHEDULE, STD), STD * X0.sign()

    def cost(log_variance: Tensor, shift: float = 0.0) -> Tensor:
        reverse = fixed_variance(lambda *at: gaussian(*at, STD) + shift, log_variance)
        return (expected_bound(reverse, SCHEDULE, data) + expected_bound(reverse, SCHEDULE, -data)).mean()

    for table in (steps.log_posterior, steps.log_posterior + steps.width):
        assert cost(table) > cost(exact)
    assert cost(exact, shift=0.1) > cost(exact)


def test_a_learned_variance_that_says_beta_is_beta():
    steps, x0 = ReverseSteps.of(SCHEDULE), X0.float()
    unet = lambda xt, t, context: torch.cat([0.5 * xt, torch.ones_like(xt)], dim=1)
    learned = learned_variance(unet, torch.zeros(3, 1, 1), "x0", steps)
    fixed = fixed_variance(lambda xt, level: 0.5 * xt, steps.log_posterior + steps.width)
    noise = step_noise([1, 2, 3], x0.shape[1:])
    ours, theirs = (variational_bound(each, SCHEDULE, x0, noise) for each in (learned, fixed))
    torch.testing.assert_close(ours.total, theirs.total)
    assert ours.steps.shape == (3, 39)
    assert (ours.steps > 0).all()


@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.3), (-0.9, 0.001), (3.0, 0.2)])
def test_the_probabilities_of_all_pixels_are_one_together(mean, std):
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_probability = discretised(values, torch.tensor(mean), torch.tensor(2 * math.log(std)))
    assert log_probability.exp().sum().item() == pytest.approx(1)
    assert log_probability.isfinite().sum() > 250  # far out it has no number left
    half = 1 / 255
    inner = values[100:120]
    normal = Normal(torch.tensor(0.1, dtype=torch.float64), 0.3)
    expected = (normal.cdf(inner + half) - normal.cdf(inner - half)).log()
    torch.testing.assert_close(discretised(inner, normal.loc, 2 * normal.scale.log()), expected)


@pytest.mark.parametrize("std", [0.3, 1.0])
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.scaled_linear(),
        NoiseSchedule.scaled_linear().zero_terminal_snr(),
        NoiseSchedule.rectified_flow(),
    ],
)
def test_the_density_by_the_ode_is_exact_for_normal_data(schedule, std):
    """The flow only stretches: x at the cleanest level is N(0, r**2), with r the deviations' ratio."""
    ratio = schedule.ratio[(schedule.ratio > 0) & schedule.ratio.isfinite()]
    deviation = ((std**2 + ratio**2) / (1 + ratio**2)).sqrt()
    stretch = deviation[0] / deviation[-1]
    found = bits_by_ode(lambda *at: gaussian(*at, std), schedule, X0, X0.sign(), count=60)
    expected = bits(density(X0, 0 * X0, 0 * X0 + 2 * stretch.log()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_posterior_is_ddpms_step():
    """Ho et al. 2020, eq. 6 and 7, for every step but the last, in the table of the solver and in that of
    the bound."""
    tableau, steps = ddim(SCHEDULE.timesteps(40), eta=1.0), ReverseSteps.of(SCHEDULE)
    alpha_bar = SCHEDULE.alpha.flip(0) ** 2
    before, beta = alpha_bar[1:], 1 - alpha_bar[:-1] / alpha_bar[1:]
    of_x0 = before.sqrt() * beta / (1 - alpha_bar[:-1])
    of_xt = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar[:-1])
    variance = (1 - before) / (1 - alpha_bar[:-1]) * beta
    torch.testing.assert_close(tableau.b[:-1, 0], of_x0)
    torch.testing.assert_close(tableau.a[:-1], of_xt)
    torch.testing.assert_close(tableau.c[:-1] ** 2, variance)
    torch.testing.assert_close(steps.of_x0.flip(0)[:-1], of_x0)
    torch.testing.assert_close(steps.log_posterior.flip(0)[:-1], variance.log())


def test_a_schedule_from_the_data_has_no_bound():
    flow = NoiseSchedule.rectified_flow(10)
    with pytest.raises(ValueError, match="begins at sigma = 0 has no bound: use bits_by_ode"):
        variational_bound(fixed_variance(gaussian, torch.zeros(11)), flow, X0, lambda t: X0)
