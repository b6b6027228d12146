"""Guidance is a function of the model's answers; interval and rescale do what the papers say."""

import math
from functools import partial

import pytest
import torch

from ldm.diffusion.guidance import (
    apg,
    autoguidance,
    choose,
    classifier_free,
    conditional,
    thresholded,
    within,
)
from ldm.diffusion.schedule import Level, NoiseSchedule
from ldm.model.context import Context

SCHEDULE = NoiseSchedule.scaled_linear()
CONTEXT, UNCOND = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))


def level_at(t: float, schedule: NoiseSchedule = SCHEDULE) -> Level:
    return Level(t, schedule.alpha[int(t)].item(), schedule.sigma[int(t)].item())


class Unet:
    """Answers with a map of xt that its context shifts, and remembers how many answers were asked for."""

    def __init__(self, dtype=torch.float32):
        self.batches, self.dtype = [], dtype

    def __call__(self, xt, t, context):
        assert t.shape == (len(xt),)
        self.batches.append(len(context))
        told = context.embeddings.mean((1, 2)).view(-1, len(xt), 1, 1, 1)  # a text for each xt, or two
        shift = told * torch.linspace(-3, 5, xt.shape[-1])
        return (0.5 * xt + shift + 0.001 * t.view(-1, 1, 1, 1)).flatten(0, 1).to(self.dtype)


@pytest.fixture
def xt():
    return torch.randn(3, 4, 5, 7)


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_scale_one_is_no_guidance(kind, xt):
    unet = Unet()
    guided = classifier_free(unet, CONTEXT, UNCOND, 1.0, kind, rescale=0.7)(xt, level_at(500))
    assert torch.equal(guided, conditional(unet, CONTEXT, kind)(xt, level_at(500)))
    assert unet.batches == [3, 3]


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
@pytest.mark.parametrize("scale", [0.0, 0.4, 3.0, 7.5])
def test_guidance_extrapolates_the_answers(kind, scale, xt):
    unet, level = Unet(), level_at(300)
    x0 = classifier_free(unet, CONTEXT, UNCOND, scale, kind)(xt, level)
    assert unet.batches == [6]
    with_text, without = (conditional(unet, c, kind)(xt, level) for c in (CONTEXT, UNCOND))
    torch.testing.assert_close(x0, without + scale * (with_text - without), atol=2e-5, rtol=1e-5)


def test_same_context_is_no_guidance(xt):
    x0 = classifier_free(Unet(), CONTEXT, CONTEXT, 7.5, "v")(xt, level_at(300))
    torch.testing.assert_close(x0, conditional(Unet(), CONTEXT, "v")(xt, level_at(300)))


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_is_that_of_lin_et_al(rescale, xt):
    """Equations 15 and 16, on the prediction, with the deviation over each image."""
    with_text, without = (Unet()(xt, torch.full((3,), 300.0), Context(c)) for c in (CONTEXT, UNCOND))
    guided = without + 7.5 * (with_text - without)
    ratio = with_text.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    expected = rescale * guided * ratio + (1 - rescale) * guided
    x0 = classifier_free(Unet(), CONTEXT, UNCOND, 7.5, "x0", rescale=rescale)(xt, level_at(300))
    torch.testing.assert_close(x0, expected)
    if rescale == 1:
        torch.testing.assert_close(x0.std((1, 2, 3)), with_text.std((1, 2, 3)))


def test_interval_guides_inside_only(xt):
    """The levels outside cost one call of the plain batch, zero SNR among them."""
    unet = Unet()
    denoise = within(classifier_free, -1.69, 1.27)(unet, CONTEXT, UNCOND, 4.0, "v")
    everywhere = classifier_free(Unet(), CONTEXT, UNCOND, 4.0, "v")
    inside = []
    zero_snr = SCHEDULE.zero_terminal_snr()
    for t in range(0, 1000, 111):
        level = level_at(t, zero_snr)
        log_snr = math.log(level.alpha / level.sigma) if level.alpha else -math.inf
        inside.append(-1.69 <= log_snr <= 1.27)
        expected = everywhere if inside[-1] else conditional(Unet(), CONTEXT, "v")
        assert torch.equal(denoise(xt, level), expected(xt, level))
    assert unet.batches == [6 if within else 3 for within in inside]
    assert True in inside
    assert inside[0] is inside[-1] is False


def test_answers_are_float32_and_an_image_does_not_depend_on_its_batch(xt):
    denoise = classifier_free(Unet(torch.bfloat16), CONTEXT, UNCOND, 4.0, "v", rescale=0.5)
    x0 = denoise(xt, level_at(300))
    assert x0.dtype == torch.float32
    alone = classifier_free(Unet(torch.bfloat16), CONTEXT[1:2], UNCOND[1:2], 4.0, "v", rescale=0.5)
    torch.testing.assert_close(alone(xt[1:2], level_at(300)), x0[1:2])


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match=r"rescale=1.5: expected 0 \(none\) to 1 \(full\)"):
        classifier_free(Unet(), CONTEXT, UNCOND, 4.0, "v", rescale=1.5)
    with pytest.raises(ValueError, match=r"interval \(2.0, -1.0\) is empty"):
        within(classifier_free, 2.0, -1.0)
    with pytest.raises(ValueError, match=r"limit=3.0, quantile=1.5: expected above 0"):
        thresholded(classifier_free, 3.0, quantile=1.5)
    with pytest.raises(ValueError, match=r"guidance_rescale=0.7 beside guidance: it is an option"):
        choose(apg, 0.7, 0.0, None)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        conditional(Unet(), CONTEXT, "eps")(torch.zeros(3, 4, 5, 7), Level(999.0, 0.0, 1.0))


MAKERS = [
    partial(classifier_free, rescale=0.7),
    partial(apg, norm=1.0),
    partial(autoguidance, worse=lambda *told: -Unet()(*told)),
    within(apg, -9.0, 9.0),
    thresholded(classifier_free, 1e9),
]


@pytest.mark.parametrize("guidance", MAKERS)
@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_scale_one_is_no_guidance_of_any_kind(guidance, kind, xt):
    level = level_at(400)
    plain = conditional(Unet(), CONTEXT, kind)(xt, level)
    torch.testing.assert_close(guidance(Unet(), CONTEXT, UNCOND, 1.0, kind)(xt, level), plain)
    assert not torch.allclose(guidance(Unet(), CONTEXT, UNCOND, 3.0, kind)(xt, level), plain, atol=1e-2)


def run(guidance, xt, kind="eps", scale=5.0):
    """The answers of three calls of one run, each for another xt."""
    denoise = guidance(Unet(), CONTEXT, UNCOND, scale, kind)
    return [denoise(xt + shift, level_at(t)) for shift, t in ((0.0, 700), (0.5, 400), (1.0, 100))]


def test_apg_that_changes_nothing_is_classifier_free(xt):
    plain = partial(apg, eta=1.0, momentum=0.0, norm=math.inf)
    for ours, theirs in zip(run(plain, xt), run(classifier_free, xt), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_apg_moves_across_the_conditional_answer_and_no_further_than_norm(xt):
    for eta, norm in ((0.0, math.inf), (0.0, 2.0), (0.5, 2.0)):
        guided = run(partial(apg, eta=eta, norm=norm), xt)
        for x0, plain in zip(guided, run(apg, xt, scale=1.0), strict=True):
            change, plain = (x0 - plain).flatten(1) / 4, plain.flatten(1)
            cosine = torch.cosine_similarity(change, plain, dim=1)
            assert (cosine.abs() < 1e-3).all() == (eta == 0)
            assert (change.norm(dim=1) <= norm * 1.001).all()


def test_autoguidance_leads_away_from_the_worse_model(xt):
    worse, level = Unet(), level_at(500)
    worse.__class__ = type(
        "Worse", (Unet,), {"__call__": lambda self, *told: 0.5 * Unet.__call__(self, *told)}
    )
    x0 = autoguidance(Unet(), CONTEXT, UNCOND, 2.0, "v", worse=worse)(xt, level)
    good, bad = (conditional(unet, CONTEXT, "v")(xt, level) for unet in (Unet(), worse))
    torch.testing.assert_close(x0, 2 * good - bad)
    assert worse.batches == [3, 3]


def test_thresholding_keeps_what_is_within(xt):
    level, plain = level_at(500), conditional(Unet(), CONTEXT, "x0")
    sizes = plain(xt, level).abs().amax((0, 2, 3))
    kept = thresholded(classifier_free, sizes.max().item())(Unet(), CONTEXT, UNCOND, 1.0, "x0")(xt, level)
    assert torch.equal(kept, plain(xt, level))
    mean, std = torch.tensor([1.0, 0.0, -2.0, 0.5]), torch.tensor([1.0, 2.0, 0.5, 1.0])
    strong = thresholded(classifier_free, 1.5, 0.9, mean, std)(Unet(), CONTEXT, UNCOND, 9.0, "x0")(xt, level)
    white = (strong - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    assert white.abs().max() == pytest.approx(1.5, rel=1e-5)
