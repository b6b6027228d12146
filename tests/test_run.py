"""One command from pictures to a measured pipeline: its lines, its report, and that it can stop anywhere."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.metrics.judges import open_judge, read_asked
from tests.test_fit import OPTIM, TEXT, VAE, diffusion_recipe
from tests.test_train_scripts import run as launched
from train import run, train_ldm
from train.config import to_yaml
from train.data.scenes import SceneSource
from train.data.sources import DataConfig
from train.fit.checkpoint import load_checkpoint
from train.fit.record import loss_curve, training_seconds
from train.measure.evaluation import choose, unseen_data
from train.measure.judge import SEED_ASKED, book_of, kept_judge
from train.tasks.autoencoding import AutoencoderRecipe
from train.tasks.contrastive import ContrastiveRecipe

QUICK = ["--evaluation.pictures", "6", "--evaluation.captions", "3", "--evaluation.scenes", "64"]


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A diffusion recipe of two steps and of a stage each before it; its run is in tmp_path/run."""
    optim = replace(OPTIM, warmup_steps=1)
    first = AutoencoderRecipe(output="x", steps=2, batch_size=2, model=VAE, optim=optim, measured=2)
    (tmp_path / "autoencoder.yaml").write_text(to_yaml(replace(first, sample_every=0)))
    second = ContrastiveRecipe(
        output="x",
        autoencoder="x",
        steps=2,
        batch_size=2,
        text_encoder=TEXT,
        optim=optim,
        tower=(8,),
        groups=4,
    )
    (tmp_path / "words.yaml").write_text(to_yaml(replace(second, sample_every=0)))
    recipe = replace(
        diffusion_recipe(tmp_path / "run", steps=2, batch_size=2, optim=optim),
        data=DataConfig(size=16, length=6),
        autoencoder=str(tmp_path / "autoencoder.yaml"),
        text_encoder=replace(TEXT, path=str(tmp_path / "words.yaml"), train=False),
        prompts=("a red circle", "two blue rings at night"),
    )
    recipe = replace(recipe, sampling=replace(recipe.sampling, num_inference_steps=2))
    (tmp_path / "ldm.yaml").write_text(to_yaml(recipe))
    return tmp_path / "ldm.yaml"


@pytest.mark.slow
def test_one_command_from_pictures_to_a_report(recipes, capsys):
    """Stopped, the same command goes on; then it finds all stages done, and so does train_ldm.py."""
    folder = recipes.parent / "run"
    assert run.main([str(recipes), *QUICK, "--max-minutes", "1e-9"]) == 75
    (line,) = capsys.readouterr().out.splitlines()
    assert "stopped by max_minutes after step 0, the same command goes on" in line
    assert run.main([str(recipes), *QUICK]) == 0
    told = capsys.readouterr().out.splitlines()
    names = ["autoencoder", "latents", "text encoder", "UNet", "evaluation"]
    assert [line[:13].strip() for line in told[:-1]] == names
    assert all(" now" in line for line in told[:-1])
    assert told[-1] == f"the model is in {folder / 'model'}"
    report = (folder / "report.md").read_text()
    figures = json.loads((folder / "evaluation/figures.json").read_text())["figures"]
    assert f"PSNR {figures['fidelity']['psnr']:.2f} dB" in report
    assert "6 scenes of combinations that training never showed" in report
    assert "| UNet | 2 steps |" in report
    assert "model, on 3 captions" in report
    assert "2. two blue rings at night" in report
    for name in ("prompts", "reconstruction", "judged", "losses", "training"):
        assert (folder / f"evaluation/{name}.png").is_file()
    assert set(figures["losses"]) == {"loss", *(f"loss_t{62 + 125 * k:03d}" for k in range(8))}

    assert run.main([str(recipes), *QUICK]) == 0
    again = capsys.readouterr().out.splitlines()
    assert all("done already" in line for line in again[:-1])
    assert again[-1] == told[-1]
    assert train_ldm.main(["--config", str(recipes)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "model")
    assert (
        run.main([str(recipes), *QUICK, "--evaluation.pictures", "5"]) == 0
    )  # measured anew, nothing trained
    assert "measured now" in capsys.readouterr().out.splitlines()[4]


@pytest.mark.slow
def test_all_stages_go_on_with_new_data(recipes, capsys):
    """Those that are done stay as they are, the latents are computed anew, and the UNet learns from these."""
    asked = [*QUICK, "--data.length", "8", "--steps", "4"]
    assert run.main([str(recipes), *QUICK]) == 0
    with pytest.raises(ValueError, match="--accept-new-data"):
        run.main([str(recipes), *asked])
    capsys.readouterr()
    assert run.main([str(recipes), *asked, "--accept-new-data"]) == 0
    told = capsys.readouterr().out.splitlines()
    for line, how in zip(told, ("done already", "computed now", "done already", "trained now from step 2")):
        assert how in line
    assert "8 pictures" in told[1]
    asked = ["--config", str(recipes), *asked[len(QUICK) :]]
    assert train_ldm.main([*asked, "--accept-new-data"]) == 0


@pytest.mark.slow
def test_two_ranks_run_every_stage_and_say_each_line_once(recipes):
    """--multi_gpu is accelerate's name for a rank a process, on the CPU too; the second time all is done."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "train.run"]
    told = launched(*launch, recipes, *QUICK, "--validation-samples", "2").stdout.splitlines()
    names = ["autoencoder", "latents", "text encoder", "UNet", "evaluation"]
    assert [line[:13].strip() for line in told[:-1]] == names
    assert told[-1] == f"the model is in {recipes.parent / 'run/model'}"
    machine = load_checkpoint(recipes.parent / "run/checkpoints/step-00000002").state["machine"]
    assert machine["ranks"] == 2
    again = launched(*launch, recipes, *QUICK, "--validation-samples", "2").stdout.splitlines()
    assert all("done already" in line for line in again[:-1])


def test_what_is_measured_was_not_trained_on():
    held = choose(range(10, 40), held_out=6, count=4)
    assert len(held.indices) == 4
    assert held.what == "4 pictures held out of training"
    assert set(held.indices) <= set(choose(range(10, 40), held_out=6, count=9).indices)
    assert "that training saw" in choose(range(9), held_out=0, count=4).what
    data = DataConfig(size=16)
    other = unseen_data(data, 7)
    assert (other.split, other.length) == ("held_out", 7)
    assert other.scene_seed != data.scene_seed
    assert unseen_data(replace(data, split="held_out"), 7).split == "train"


@pytest.mark.slow
def test_a_judge_is_kept_by_its_code_and_scenes(tmp_path):
    def taught(**changes) -> dict[str, torch.Tensor]:
        data = replace(DataConfig(source="shapes", size=16), **changes)
        home = kept_judge(tmp_path, book_of(data), scenes=64, asked=5, tested=4)
        at = (home / "judge.json").stat().st_mtime_ns
        assert kept_judge(tmp_path, book_of(data), scenes=64, asked=5, tested=4) == home
        assert (home / "judge.json").stat().st_mtime_ns == at, "there already"
        return open_judge(home).network.state_dict()

    first = taught()
    assert [each.prompt for each in read_asked(tmp_path, "seen")] == [
        SceneSource(SEED_ASKED, 16).describe(index).caption for index in range(5)
    ]
    assert len(read_asked(tmp_path, "held_out")) == 5
    assert taught(subjects=("star", "ring"))["heads.subject.bias"].shape == (2,)
    for name, value in taught().items():
        assert torch.equal(value, first[name]), "taught anew it is the same"
    with pytest.raises(ValueError, match=r"data\.source='photos': a judge knows drawn scenes"):
        book_of(DataConfig(source="photos"))


def test_the_time_of_a_stage_is_that_of_all_its_steps(tmp_path):
    """By the speeds in metrics.jsonl: 2 steps at 4 samples/s and 1 at 2, of 8 samples each, are 8 seconds."""
    lines = [
        {"step": 1, "lr": 0.1},
        {"step": 2, "lr": 0.1, "samples_per_second": 4.0},
        {"step": 2, "validation/loss": 0.1},
        {"step": 3, "lr": 0.1, "samples_per_second": 2.0},
        {"step": 4, "lr": 0.1},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "l')
    assert training_seconds(tmp_path, batch_size=8) == pytest.approx(2 * 8 / 4 + 8 / 2)
    assert training_seconds(tmp_path / "nothing", batch_size=8) is None


def test_the_loss_curve_is_of_means(tmp_path):
    """Of equal parts of the training steps, whatever else is written between; no steps, no curve."""
    lines = [{"step": step, "loss": float(step), "lr": 0.1} for step in range(1, 8)]
    lines.insert(3, {"step": 3, "validation_loss": 100.0})
    lines[1]["loss"] = None
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 8,'
    )
    assert loss_curve(tmp_path, 3) == [(3.0, 2.0), (5.0, 4.5), (7.0, 6.5)]
    assert loss_curve(tmp_path) == [(float(k), float(k)) for k in (1, 3, 4, 5, 6, 7)]
    assert loss_curve(tmp_path / "nothing") == []
