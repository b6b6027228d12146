"""Classifier guidance is Bayes' rule on a mixture of normals, and a small classifier learns to lead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.classifier import NoisyClassifier, by_mean, by_score, classifier_guided, noisy_logits
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.noise import step_noise
from ldm.diffusion.sample import sample, trajectory
from ldm.diffusion.schedule import Level, NoiseSchedule
from ldm.diffusion.solvers import ddim
from ldm.model.context import Context
from ldm.model.unet import UNetConfig
from tests.test_solvers import gaussian

SCHEDULE = NoiseSchedule.scaled_linear()
MEANS, STD, SHAPE = (-1.0, 0.6), 0.5, (3, 2, 3, 5)
LABELS = torch.tensor([0, 1, 1])


def log_joint(xt: Tensor, level: Level) -> Tensor:
    """log p(xt, y) and a constant, (B, 2), of two normals of all numbers alike."""
    variance = level.alpha**2 * STD**2 + level.sigma**2
    each = [((xt - level.alpha * mean) ** 2).flatten(1).sum(1) for mean in MEANS]
    return -torch.stack(each, dim=1) / (2 * variance)


def told(xt: Tensor, level: Level) -> Tensor:
    return log_joint(xt, level).log_softmax(1)[torch.arange(len(xt)), LABELS]


def unconditional(xt: Tensor, level: Level) -> Tensor:
    """E[x0 | xt] of the mixture: those of its parts, by how probable they are."""
    share = log_joint(xt, level).softmax(1)
    return sum(share[:, y].view(-1, 1, 1, 1) * gaussian(xt, level, STD, MEANS[y]) for y in (0, 1))


def of_labels(xt: Tensor, level: Level) -> Tensor:
    return gaussian(xt, level, STD, torch.tensor(MEANS, dtype=xt.dtype)[LABELS].view(-1, 1, 1, 1))


@pytest.mark.parametrize("t", [1, 300, 700, 999])
def test_the_score_form_is_bayes_rule(t):
    """Scale 1 makes the conditional model of the unconditional one, and 0 changes nothing."""
    level = Level(float(t), SCHEDULE.alpha[t].item(), SCHEDULE.sigma[t].item())
    xt = torch.randn(SHAPE, dtype=torch.float64)
    guided = [classifier_guided(unconditional, told, scale)(xt, level) for scale in (0.0, 1.0)]
    torch.testing.assert_close(guided[0], unconditional(xt, level))
    torch.testing.assert_close(guided[1], of_labels(xt, level))


def test_the_mean_form_moves_a_step_by_its_variance():
    """Algorithm 1; towards smaller steps it is the score form."""
    differ = []
    for count in (20, 500):
        tableau = ddim(SCHEDULE.timesteps(count), eta=1.0)
        xt, noise = torch.randn(SHAPE, dtype=torch.float64), step_noise([1, 2, 3], SHAPE[1:])
        level, gain = next(iter(tableau.steps)), by_mean(tableau)
        plain, guided = (
            next(trajectory(denoise, xt, tableau, noise)).xt
            for denoise in (unconditional, classifier_guided(unconditional, told, 2.0, gain))
        )
        x = xt.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(told(x, level).sum(), x)
        torch.testing.assert_close(guided - plain, 2 * tableau.c[0] ** 2 * gradient)
        middle = list(tableau.steps)[count // 2]
        differ.append(abs(gain(middle) / by_score(middle) - 1))
    assert differ[1] < differ[0] / 10


@pytest.mark.parametrize("form", ["score", "mean"])
def test_a_run_ends_in_the_class_it_is_led_to(form):
    tableau = ddim(SCHEDULE.timesteps(25), eta=1.0)
    gain = by_score if form == "score" else by_mean(tableau)
    x0 = sample(
        classifier_guided(unconditional, told, 1.0, gain),
        torch.randn(SHAPE, dtype=torch.float64),
        tableau,
        step_noise([1, 2, 3], SHAPE[1:]),
    )
    assert (log_joint(x0, Level(0.0, 1.0, 1e-3)).argmax(1) == LABELS).all()


def test_it_goes_around_classifier_free_guidance():
    """On x0 both add up."""
    level = Level(500.0, SCHEDULE.alpha[500].item(), SCHEDULE.sigma[500].item())
    unet = lambda xt, t, context: context.embeddings.mean((1, 2)).view(-1, 1, 1, 1) * xt.repeat(2, 1, 1, 1)
    xt, context = torch.randn(SHAPE), Context(torch.ones(3, 2, 4))
    free = classifier_free(unet, context, context.each(torch.zeros_like), 3.0, "v")
    both = classifier_guided(free, told, 1.5)(xt, level)
    alone = classifier_guided(lambda xt, level: 0 * xt, told, 1.5)(xt, level)
    torch.testing.assert_close(both, free(xt, level) + alone)


def tiny(**changes: object) -> NoisyClassifier:
    settings = {
        "in_channels": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    return NoisyClassifier(UNetConfig(**settings | changes), classes=2)


@pytest.mark.slow
def test_a_small_classifier_learns_and_leads():
    torch.manual_seed(0)
    classifier = tiny()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(40):
        labels = torch.randint(2, (32,))
        x0 = torch.tensor(MEANS)[labels].view(-1, 1, 1, 1) + STD * torch.randn(32, *SHAPE[1:])
        t, noise = torch.randint(1000, (32,)), torch.randn_like(x0)
        loss = F.cross_entropy(noisy_logits(classifier, SCHEDULE, x0, noise, t), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # of log 2 at the beginning; at the noisiest levels nobody knows
    denoise = classifier_guided(unconditional, classifier.log_probability(LABELS), 3.0)
    x0 = sample(denoise, torch.randn(SHAPE), ddim(SCHEDULE.timesteps(10)), lambda i: None)
    assert (log_joint(x0, Level(0.0, 1.0, 1e-3)).argmax(1) == LABELS).all()


def test_a_classifier_takes_any_size():
    assert tiny()(torch.randn(3, 2, 7, 4), torch.tensor([0, 10, 999])).shape == (3, 2)


def test_what_cannot_lead_is_refused():
    with pytest.raises(ValueError, match="adds no noise, by which guidance of the mean weighs: use by_score"):
        by_mean(ddim(SCHEDULE.timesteps(5)))
    with pytest.raises(ValueError, match="a classifier has no text, use AttnDownBlock2D"):
        tiny(mid_block_type="UNetMidBlock2DCrossAttn")
    two = tiny().log_probability(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 class labels for 3 images: give one, or one for each"):
        two(torch.zeros(3, 2, 4, 4), Level(0.0, 1.0, 0.0))
