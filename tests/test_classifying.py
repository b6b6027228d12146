"""A classifier of noisy latents: trained, resumed, read back, refused where it does not fit, leading."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ldm import generate
from ldm.diffusion.classifier import NoisyClassifier, by_mean, led
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.scheduler import Scheduler
from ldm.drawing.classifier_folder import WEIGHTS, TrainedClassifier, load_classifier
from ldm.recipes.picture import read_recipe
from tests.test_classes import of_two
from tests.test_fit import OPTIM, losses, state, stop_at
from tests.test_generate import run
from tests.tiny import SCHEDULER, tiny_pipeline
from train.batches.plan import Draw
from train.data.sources import DataConfig
from train.fit.loop import fit
from train.tasks.classifying import ClassifierRecipe, Classifying

__all__ = ["run"]  # a fixture
RECIPE = ClassifierRecipe(
    output="run",
    steps=40,
    batch_size=8,
    widths=(8, 16),
    head=8,
    groups=4,
    dropout=0.0,
    optim=replace(OPTIM, lr=1e-2),
    precision="fp32",
    sample_every=0,
)


def untrained(names: tuple[str, ...] = ("minus", "plus"), **scheduler: object) -> TrainedClassifier:
    """As if it were trained for the tiny pipeline."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        classifier = NoisyClassifier(RECIPE.body(4), len(names)).eval()
    return TrainedClassifier(classifier, names, 0.18215, None, Scheduler.from_config(SCHEDULER | scheduler))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("classifier")
    untrained().save(path)
    return path


@pytest.mark.slow
def test_it_learns_resumes_bit_for_bit_and_says_at_which_noise_it_knows(tmp_path, model):
    def train(name: str, stop_after: int = 0) -> Classifying:
        recipe = replace(RECIPE, output=str(tmp_path / name), validation_samples=2, validate_every=40)
        task = Classifying(replace(recipe, sample_every=40), model, of_two())
        stop_at(task, stop_after)
        fit(task, task.recipe)
        return task

    task = train("whole")
    train("halves", stop_after=15)
    train("halves")
    assert state(tmp_path / "halves", 40) == state(tmp_path / "whole", 40)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    told = task.validate([range(8)])
    assert next(name for name in told if name.startswith("right_t")) == "right_t062"
    assert told["right_t062"] == 1 > told["loss"]
    assert (tmp_path / "whole/samples/step-00000040.png").exists()
    pipe, classifier = tiny_pipeline(), load_classifier(tmp_path / "whole/model")
    assert classifier.class_names == ("minus", "plus")
    call = {
        "height": 16,
        "width": 16,
        "num_inference_steps": 10,
        "output_type": "latent",
        "guidance_scale": 1,
    }
    for form in (None, by_mean):
        solver = "ddim" if form is None else "ddpm"
        gain = {} if form is None else {"gain": form(pipe.tableau(10, solver))}
        guidance = classifier.guidance(pipe, ["plus", "minus"], 20.0, **gain)
        plus, minus = pipe(["a"] * 2, seed=[3, 3], guidance=guidance, sampler=solver, **call).images
        assert plus.mean() - minus.mean() > 0.3


def test_a_folder_comes_back(folder):
    again, xt, t = load_classifier(folder), torch.randn(2, 4, 6, 5), torch.tensor([10, 900])
    assert again.class_names == ("minus", "plus")
    assert torch.equal(again.model(xt, t), untrained().model(xt, t))
    assert torch.equal(again.scheduler.schedule.alpha, untrained().scheduler.schedule.alpha)
    again.check_fit(tiny_pipeline())


def test_a_run_is_led_as_by_hand(folder):
    """Around classifier-free guidance, which keeps the call's scale; a label for all, or one for each."""
    pipe, classifier = tiny_pipeline(), load_classifier(folder)
    call = {"height": 16, "width": 16, "num_inference_steps": 3, "seed": 5, "output_type": "latent"}
    plain = pipe("a fox", guidance_scale=4.0, **call).images
    alone = pipe("a fox", guidance_scale=4.0, guidance=classifier.guidance(pipe, "plus", 0.0), **call).images
    assert torch.equal(alone, plain)
    wish = classifier.model.log_probability(torch.tensor([1]))
    by_hand = pipe("a fox", guidance_scale=4.0, guidance=led(classifier_free, wish, 5.0), **call).images
    one = classifier.guidance(pipe, 1, 5.0, around=partial(classifier_free, rescale=0.0))
    assert torch.equal(pipe("a fox", guidance_scale=4.0, guidance=one, **call).images, by_hand)
    assert not torch.equal(by_hand, plain)
    call["seed"] = [5, 5]
    both = classifier.guidance(pipe, ["minus", "plus"], 5.0)
    rows = pipe(["a fox"] * 2, guidance_scale=4.0, guidance=both, **call).images
    torch.testing.assert_close(rows[1:], by_hand, atol=1e-4, rtol=1e-4)


def test_a_classifier_of_another_model_is_refused(folder):
    pipe = tiny_pipeline()
    for changes, message in (
        ({"beta_end": 0.02}, "differ in their noise schedules: 1000 steps to alpha"),
        ({"num_train_timesteps": 500}, "noise schedules: 500 steps to alpha .* and 1000 to 0.06"),
    ):
        with pytest.raises(ValueError, match=message):
            untrained(**changes).check_fit(pipe)
    for changes, message in (
        (
            {"scaling_factor": 0.2},
            "differ in their scaling_factor of latents: 0.2 and 0.18215. It leads",
        ),
        ({"shift_factor": 0.1}, "differ in their shift_factor of latents: 0.1 and 0"),
        ({"model": NoisyClassifier(RECIPE.body(5), 2)}, "differ in their latent channels: 5 and 4"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(load_classifier(folder), **changes).guidance(pipe, 0)
    with pytest.raises(ValueError, match=r"class label 'pluss' is not known: .* did you mean plus\?"):
        load_classifier(folder).guidance(pipe, "pluss")


def test_folders_that_are_no_classifier(folder, tmp_path):
    with pytest.raises(ValueError, match=r"config.json is missing"):
        load_classifier(tmp_path)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"_class_name": "UNet2DConditionModel"}, "is of a UNet2DConditionModel: expected a NoisyClassifier"),
        ({"class_names": ["a", "b", "c"]}, WEIGHTS),
        ({"class_names": []}, "expected unet with the keys of a UNet, and class_names"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            load_classifier(tmp_path)


def test_recipes_that_cannot_be(tmp_path, model):
    for changes, message in (
        ({"data": DataConfig()}, "data.label is null: name what is to be told apart"),
        ({"attention": 3}, "attention=3: expected 0 to all 2 levels"),
        ({"head": 5}, "head=5 does not divide the 16 channels of a level"),
        ({"widths": (8, 18), "head": 9}, r"18 is not a multiple of norm_num_groups=4"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(RECIPE, **changes)
    latents = of_two()
    latents.classes = ("plus",)
    with pytest.raises(ValueError, match=r"classes \['plus'\]: there is nothing to tell apart"):
        Classifying(RECIPE, model, latents)


def test_a_batch_is_a_function_of_its_draws(model):
    task = Classifying(RECIPE, model, of_two())
    draws = [Draw(index, 3, place, 4, 0) for place, index in enumerate((0, 5, 1, 7))]
    batch, part = task.batch(draws), task.batch(draws[2:])
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    assert all(torch.equal(part[name], batch[name][2:]) for name in batch)


def test_the_command_line_leads_and_notes_it(run, folder, tmp_path):
    led_to = ("a fox", "--seed=1", f"--classifier={folder}", "--class-label=plus", "--classifier-scale=3")
    assert run("a fox", "--seed=1", "--output=plain.png")[0] == 0
    assert run(*led_to, "--output=a.png")[0] == 0
    assert (
        run(*led_to, "--guidance-scale=1", "--classifier-form=mean", "--sampler=ddpm", "--output=b.png")[0]
        == 0
    )
    recipe = read_recipe(tmp_path / "a.png")
    assert (recipe.class_label, recipe.classifier_scale, recipe.classifier_form) == ("plus", 3.0, "score")
    assert recipe.classifier[0] == str(folder / WEIGHTS)
    assert generate.main(["--from=a.png", "--output=again.png"]) == 0
    pixels = [
        (tmp_path / f"{name}.png").read_bytes().partition(b"IDAT")[2] for name in ("a", "again", "plain")
    ]
    assert pixels[0] == pixels[1] != pixels[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class-label=plus"], "class label 'plus': this model has no classes, leave it out"),
        (["--classifier=FOLDER"], "--classifier leads to a class: name it by --class-label"),
        (["--classifier-scale=2"], "--classifier-scale has no effect without --classifier: leave it out"),
        (
            ["--classifier=FOLDER", "--class-label=x"],
            "class label 'x' is not known: expected 0 to 1, or a name",
        ),
        (
            ["--classifier=FOLDER", "--class-label=0", "--classifier-scale=-1"],
            "classifier_scale=-1.0: expected",
        ),
        (
            ["--classifier=FOLDER", "--class-label=0", "--classifier-form=sum"],
            "classifier_form='sum' is unknown",
        ),
        (
            ["--classifier=FOLDER", "--class-label=0", "--classifier-form=mean", "--sampler=ddim"],
            "this solver adds no noise",
        ),
        (["--classifier=nowhere", "--class-label=0"], "no such file nowhere: --classifier takes a folder"),
    ],
)
def test_what_the_command_line_refuses(run, folder, options, message):
    status, _, error = run("a fox", *(option.replace("FOLDER", str(folder)) for option in options))
    assert status == 2
    assert message in error
