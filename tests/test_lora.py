"""Training adapters: nothing else moves, nothing changes at first, a run in pieces is the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ldm.adapters.files import USUAL, Adapter, spell
from ldm.pipeline import LatentDiffusionPipeline
from tests.test_fit import OPTIM, latents, losses, state, stop_at
from tests.test_train_scripts import plans_and_trains
from tests.tiny import CAPTIONS, tiny_pipeline
from train import train_lora
from train.batches.plan import Plan
from train.data.sources import DataConfig, open_source
from train.fit.loop import fit
from train.fit.optim import build_optimizer
from train.tasks.adapters import KINDS, adapters_of, factors, find_layers, grow
from train.tasks.diffusion import LatentDiffusion
from train.tasks.lora import Lora, LoraRecipe, PriorConfig
from train.tasks.prior import draw_prior
from train.tasks.tuning import whole_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


def lora_recipe(output: Path, model: Path, **options: Any) -> LoraRecipe:
    base = LoraRecipe(output=str(output), model=str(model), steps=6, batch_size=2, optim=OPTIM, rank=2)
    return replace(base, **{"sample_every": 0, "precision": "fp32", **options})


def run(recipe: LoraRecipe, stop_after: int = 0) -> Lora:
    prior = latents(count=5) if recipe.prior.prompt else None
    task = Lora(recipe, Path(recipe.model), latents(), prior)
    stop_at(task, stop_after)
    assert fit(task, recipe).step == (stop_after or recipe.steps)
    return task


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "lora"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", *SLOW])
def test_only_adapters_move_and_at_first_nothing_is_other(tmp_path, model, kind):
    """The first loss is the whole model's bit for bit; the checkpoint holds adapters and nothing else."""
    recipe = lora_recipe(tmp_path, model, adapter=kind, train_text_encoder=True, steps=4)
    whole = LatentDiffusion(whole_recipe(recipe, model), model / "vae", latents())
    before = {name: value.clone() for name, value in whole.unet.state_dict().items()}
    task = Lora(recipe, model, latents())
    task.scheduler = whole.scheduler
    expected = whole.module.eval()(**whole.batch(draws := task_draws(task)))[0]
    assert torch.equal(task.module(**task.batch(draws))[0], expected)
    fit(task, recipe)
    for name, value in task.unet.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in load_file(model / "text_encoder/model.safetensors").items():
        assert torch.equal(task.text_encoder.state_dict()[name.removeprefix("text_model.")], value)
    saved = load_file(tmp_path / "checkpoints/step-00000004/model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"unet", "text_encoder"}
    assert saved.keys() == task.module.state_dict().keys()
    assert not torch.equal(task.module(**task.batch(draws))[0], expected)


def learn_something(module: nn.Module) -> None:
    """Adapters as if they had learnt."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=rng), alpha=0.1)


def task_draws(task: Lora) -> list[Any]:
    return Plan(task.buckets, 2, 0).batch(0)


@pytest.mark.slow
def test_a_run_in_pieces_is_the_run(tmp_path, model):
    """Bit for bit, with dropout and a rate of its own for the text encoder; and another base is refused."""
    options = {"adapter": "dora", "dropout": 0.3, "train_text_encoder": True, "text_encoder_lr": 1e-3}
    run(lora_recipe(tmp_path / "whole", model, **options))
    run(lora_recipe(tmp_path / "halves", model, **options), stop_after=4)
    run(lora_recipe(tmp_path / "halves", model, **options))
    assert state(tmp_path / "halves", 6) == state(tmp_path / "whole", 6)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"(?s)is of another run.*  model: \w+ then, \w+ now"):
        run(lora_recipe(tmp_path / "whole", tmp_path / "other", **options))
    with pytest.raises(ValueError, match=r"(?s)is of another run.*adapter: .*'rank': 2.*'rank': 3"):
        run(lora_recipe(tmp_path / "whole", model, **options, rank=3))


def test_the_text_encoder_has_its_own_rate(tmp_path, model):
    recipe = lora_recipe(tmp_path, model, train_text_encoder=True, text_encoder_lr=OPTIM.lr / 4)
    task = Lora(recipe, model, latents())
    groups = build_optimizer(task.module, recipe.optim).param_groups
    times = {id(p): group.get("times", 1.0) for group in groups for p in group["params"]}
    assert {times[id(p)] for p in task.trees["unet"].parameters()} == {1.0}
    assert {times[id(p)] for p in task.trees["text_encoder"].parameters()} == {0.25}
    assert len(times) == len(list(task.module.parameters()))


@pytest.mark.slow
def test_prior_preservation_is_the_sum_of_two_means(tmp_path, model):
    """mean(instance) + weight * mean(class), each as a run without the other has it; by a plan of its own."""
    prior = PriorConfig(prompt="a red fox", weight=0.5)
    recipe = lora_recipe(tmp_path, model, prior=prior, batch_size=4, micro_batch=2, steps=4)
    task = Lora(recipe, model, latents(), latents(count=5))
    plan = Plan(task.buckets, 4, 0, micro_batch=2)
    batch = task.batch(plan.batch(3))
    parts = [task.batch(plan.micro(3, number, 0)) for number in (0, 1)]
    for name, value in batch.items():  # rows 0 to 3 are of the data, 4 to 7 of the class
        halves = [part[name] for part in parts]
        assert torch.equal(value, torch.cat([half[:2] for half in halves] + [half[2:] for half in halves]))
    loss, others = task.module(**batch)
    first, second = ({name: value[rows] for name, value in batch.items()} for rows in (slice(4), slice(4, 8)))
    alone = [task.module.model(**part)[0].mean() for part in (first, second)]
    torch.testing.assert_close(loss.mean(), alone[0] + 0.5 * alone[1])
    torch.testing.assert_close(others["prior"].mean(), alone[1])
    assert loss.shape == (4,)
    run(recipe)
    assert {"instance", "prior"} <= losses(tmp_path)[0].keys()


@pytest.mark.slow
def test_pictures_of_the_class_come_back_as_they_were(tmp_path, model):
    recipe = lora_recipe(tmp_path, model, prior=PriorConfig(prompt="a red fox", pictures=3))
    recipe = replace(recipe, data=DataConfig(size=16))
    draw_prior(recipe, model, tmp_path / "prior")
    bytes_of = lambda: {path.name: path.read_bytes() for path in (tmp_path / "prior").glob("*.png")}
    drawn = bytes_of()
    (tmp_path / "prior/00001.png").unlink()
    draw_prior(recipe, model, tmp_path / "prior")
    assert bytes_of() == drawn
    assert len(set(drawn.values())) == 3
    with pytest.raises(
        ValueError, match=r"holds pictures of another class: .*a red fox.*a cat.*choose another"
    ):
        draw_prior(replace(recipe, prior=PriorConfig(prompt="a cat")), model, tmp_path / "prior")
    data = DataConfig(source=str(tmp_path / "prior"), size=16, caption="a red fox")
    source = open_source(data)
    assert source[2][1] == {"text": ["a red fox"]}
    assert source.description != open_source(replace(data, caption="a cat")).description


def drawn(pipe: LatentDiffusionPipeline) -> torch.Tensor:
    options: dict[str, Any] = {"height": 16, "width": 8, "num_inference_steps": 2, "output_type": "pt"}
    return pipe(CAPTIONS[0], seed=0, **options).images


def test_a_picture_by_the_file_is_the_picture_by_the_module(tmp_path, model):
    """Every kind, on linear layers and convolutions, and a LoKr whose second factor is whole."""
    pipe = LatentDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    before = drawn(pipe)
    cases: list[dict[str, Any]] = [{"adapter": kind, "train_text_encoder": True} for kind in KINDS]
    cases += [
        {"adapter": "dora", "spelling": "kohya"},
        {"adapter": "lokr", "spelling": "diffusers", "rank": 8},
    ]
    for options in cases:
        recipe = lora_recipe(tmp_path, model, alpha=3.0, targets=("to_q", "to_out.0", "conv1"), **options)
        task = Lora(recipe, model, latents())
        learn_something(task.module.eval())
        task.export(tmp_path)
        pipe.load_lora_weights(tmp_path)
        by_file = drawn(pipe)
        torch.testing.assert_close(by_file, drawn(task.pipeline()), atol=2e-5, rtol=0, msg=str(options))
        assert (by_file - before).abs().max() > 1e-2, options
        pipe.unload_lora_weights()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "spelling"), [("locon", "kohya"), ("dora", None), ("lokr", "diffusers")])
def test_stock_diffusers_reads_the_file_and_draws_the_same(tmp_path, model, kind, spelling):
    options: dict[str, Any] = {"train_text_encoder": True}
    if kind == "lokr":  # whole and not; diffusers reads none for a text encoder
        options = {"rank": 4, "targets": ("to_q", "conv1", "time_emb_proj")}
    recipe = lora_recipe(tmp_path, model, adapter=kind, spelling=spelling, alpha=3.0, **options)
    task = Lora(recipe, model, latents())
    learn_something(task.module)
    task.export(tmp_path)
    stock = LatentDiffusionPipeline.from_pretrained(model, dtype=torch.float32).to_diffusers()
    if kind == "lokr":
        stock.unet.load_lora_adapter(tmp_path, weight_name=USUAL[0], prefix="unet")
    else:
        stock.load_lora_weights(tmp_path)
    call: dict[str, Any] = {"height": 16, "width": 8, "num_inference_steps": 3, "guidance_scale": 3.0}
    call["latents"] = torch.randn(1, 4, 8, 4)
    ours, before = (
        each(CAPTIONS[0], **call, output_type="np").images for each in (task.pipeline(), tiny_pipeline())
    )
    theirs = stock(CAPTIONS[0], **call, output_type="np").images
    torch.testing.assert_close(ours, torch.from_numpy(theirs).numpy(), atol=1e-4, rtol=0)
    assert abs(ours - before).max() > 1e-2


def test_the_file_says_what_it_is(tmp_path, model):
    """Names, rank and alpha in peft's words; in kohya's a whole LoKr is scaled, the lengths are columns."""
    Lora(lora_recipe(tmp_path, model, alpha=4.0, train_text_encoder=True), model, latents()).export(tmp_path)
    with safe_open(tmp_path / USUAL[0], framework="pt") as file:
        notes, names = json.loads(file.metadata()["lora_adapter_metadata"]), set(file.keys())
    assert notes["unet.r"] == 2
    assert notes["text_encoder.lora_alpha"] == 4
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight" in names
    assert "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight" in names
    layers = {"attn.to_q": nn.Linear(6, 8), "conv": nn.Conv2d(4, 6, 3)}
    for kind in KINDS:
        tree = grow(layers, kind, 2, 3.0, 0.0, 0)
        learn_something(tree)
        found = {f"unet.{name}": adapter.learned() for name, adapter in adapters_of(tree).items()}
        tensors = spell(Adapter(found), "kohya")[0]
        assert {name.split(".")[0] for name in tensors} == {"lora_unet_attn_to_q", "lora_unet_conv"}
        assert tensors["lora_unet_conv.alpha"] == (1 if kind == "lokr" else 3)
        if kind == "lokr":
            assert torch.equal(tensors["lora_unet_conv.lokr_w2"], 1.5 * found["unet.conv"].factors["w2"])
    assert tensors["lora_unet_conv.dora_scale"].shape == (6, 1, 1, 1)


def test_the_sides_of_a_kronecker_product():
    assert [factors(size) for size in (128, 127, 36, 1)] == [(8, 16), (1, 127), (6, 6), (1, 1)]
    adapters = adapters_of(grow({"a": nn.Linear(128, 96), "b": nn.Linear(128, 96)}, "lokr", 2, 2.0, 0.0, 0))
    assert adapters["a"].delta().shape == (96, 128)
    assert not torch.equal(adapters["a"].lokr_w1, adapters["b"].lokr_w1)  # each name has its own draws


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "lorra"}, r"adapter='lorra' is not one of lora, locon, loha, lokr, dora"),
        ({"rank": 0}, r"rank=0: expected 1 or more"),
        ({"dropout": 1.0}, r"dropout=1.0: a fraction"),
        ({"text_encoder_lr": 1e-4}, r"text_encoder_lr=0.0001 has no effect without train_text_encoder"),
        ({"adapter": "loha", "spelling": "diffusers"}, r"diffusers reads no loha, use kohya"),
        (
            {"adapter": "lokr", "spelling": "diffusers", "train_text_encoder": True},
            r"diffusers reads no lokr of a text encoder",
        ),
    ],
)
def test_what_a_recipe_refuses(tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        lora_recipe(tmp_path, model, **options)


def test_a_target_that_is_nowhere_is_named(model):
    unet = tiny_pipeline().unet
    with pytest.raises(ValueError, match=r"targets=x: no layer's name ends in 'to_w'; they end in .*to_q"):
        find_layers(unet, ("to_q", "to_w"), "targets=x")


@pytest.mark.slow
def test_the_command_trains_and_plans(tmp_path, model, capsys):
    """From drawn scenes and drawn pictures of the class to the file, and what it will take before."""
    argv = (
        f"--model {model} --output {tmp_path / 'run'} --steps 2 --batch-size 2 --optim.warmup-steps 1".split()
    )
    argv += ["--data.size", "16", "--data.length", "4", "--data.caption", "red", "--prior.prompt", "fox"]
    argv += ["--prior.pictures", "2"]
    argv += ["--sample-every", "2", "--prompts", "fox", "--validation-samples", "1", "--precision", "fp32"]
    made = plans_and_trains(train_lora.main, argv, "adapters", capsys)
    assert [path.name for path in made.iterdir()] == [USUAL[0]]
