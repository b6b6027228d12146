"""The training scripts as commands: several ranks, started from anywhere, read by stock diffusers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import save_model
from ldm.model.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from tests.test_fit import OPTIM, ROOT, TEXT, VAE, Toy, diffusion_recipe, losses, state, toy_config
from train import train_autoencoder, train_ldm
from train.batches.cache import made_up
from train.batches.encoding import compute_latents
from train.config import to_yaml
from train.data.sources import DataConfig
from train.fit.checkpoint import load_checkpoint
from train.fit.loop import fit
from train.tasks.autoencoding import AutoencoderRecipe
from train.tasks.contrastive import ContrastiveRecipe

RANKS = """
import sys
from pathlib import Path
from tests.test_fit import Toy, toy_config
from train.command import ended
from train.fit.loop import fit
folder, stop_after, rank = Path(sys.argv[1]), int(sys.argv[2]), int(__import__("os").environ["RANK"])
task = Toy(stop_after=stop_after if rank == 1 else 0)  # only one rank is told to stop
outcome = fit(task, toy_config(folder))
(folder / f"seen-{stop_after}-{rank}").write_text(repr(task.seen))
assert ended(outcome.model, outcome.exit_code) == (75 if stop_after else 0), outcome
"""


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def plans_and_trains(main: Callable[[list[str]], int], argv: list[str], told: str, capsys: Any) -> Path:
    """What every training command does: it plans and leaves no trace, stops at its minutes, goes on and ends.

    argv names the output; told is what the plan calls what it trains. The folder of the model.
    """
    run = Path(argv[argv.index("--output") + 1])
    assert main([*argv, "--plan"]) == 0
    assert re.search(rf"{told}: 0\.\d+ M parameters trained", capsys.readouterr().out)
    assert not run.exists()
    assert main([*argv, "--max-minutes", "1e-9"]) == 75
    assert main(argv) == 0
    assert capsys.readouterr().out.strip() == str(run / "model")
    return run / "model"


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit_and_see_what_one_rank_sees(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
    )
    whole, halves, alone = tmp_path / "whole", tmp_path / "halves", Toy()
    assert run(*torchrun, whole, "0").stdout.split() == [str(whole / "model")]  # told by one rank
    assert run(*torchrun, halves, "7").stdout == ""
    run(*torchrun, halves, "0")
    assert state(halves, 20) == state(whole, 20)
    assert losses(halves) == losses(whole)
    fit(alone, toy_config(tmp_path / "alone"))
    seen = [json.loads((whole / f"seen-0-{rank}").read_text()) for rank in (0, 1)]
    shares = [alone.seen[4 * step + 2 * rank :][:2] for step in range(20) for rank in (0, 1)]
    assert [seen[i % 2][i // 2 * 2 :][:2] for i in range(40)] == shares
    sizes = [[line["size"] for line in losses(folder)] for folder in (whole, tmp_path / "alone")]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)  # the same noise; dropout differs between ranks


DIES = """
import os, signal, sys
from pathlib import Path
from tests.test_fit import Toy, toy_config
from train.fit.loop import fit

class Dying(Toy):
    def batch(self, draws):
        if draws[0].step == 8 and sys.argv[2] == os.environ["RANK"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(draws)

sys.exit(fit(Dying(), toy_config(Path(sys.argv[1]))).exit_code)
"""


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "dies.py").write_text(DIES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command.append(str(tmp_path / "dies.py"))
    dead = subprocess.run([*command, str(tmp_path / "run"), "1"], timeout=120, capture_output=True)
    assert dead.returncode not in (0, 75)
    assert [step.name for step in (tmp_path / "run/checkpoints").glob("step-????????")] == ["step-00000006"]
    run(*command, tmp_path / "run", "none")
    run(*command, tmp_path / "whole", "none")
    assert state(tmp_path / "run", 20) == state(tmp_path / "whole", 20)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


ENDS = """
import os, signal, sys, time
from pathlib import Path
from tests.test_fit import Toy, toy_config
from train.fit import checkpoint
from train.fit.loop import fit
from train.fit.stop import GRACE

class Ending(Toy):
    def batch(self, draws):
        if draws[0].step == 8 and sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if draws[0].step == 8 and sys.argv[2] == "kill in a save":
            checkpoint.fsync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        if draws[0].step == 8 and sys.argv[2] == "interrupt twice":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(GRACE + 0.5)
            os.kill(os.getpid(), signal.SIGINT)
        if draws[0].step >= 8 and sys.argv[2] == "wait":
            print("ready", flush=True)
            time.sleep(0.2)
        return super().batch(draws)

sys.exit(fit(Ending(), toy_config(Path(sys.argv[1]), steps=20)).exit_code)
"""


@pytest.fixture
def ending(tmp_path, monkeypatch):
    """The command of a process that ends in step 9 as its last argument says."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "ends.py").write_text(ENDS)
    return [str(tmp_path / "ends.py"), str(tmp_path / "run")]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("kill", -9), ("kill in a save", -9), ("interrupt twice", 130)])
def test_an_end_between_saves_loses_steps_and_nothing_else(ending, tmp_path, how, code):
    """The second Ctrl-C ends at once; then, as after kill -9, the last checkpoint is whole.

    A kill within a save leaves its half, which is neither gone on from nor kept.
    """
    assert subprocess.run([sys.executable, *ending, how]).returncode == code
    left = sorted(path.name.split("-")[1] for path in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["00000006", *(["00000012.tmp"] if how == "kill in a save" else [])]
    fit(Toy(), toy_config(tmp_path / "run"))
    fit(Toy(), toy_config(tmp_path / "whole"))
    assert state(tmp_path / "run", 20) == state(tmp_path / "whole", 20)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp-*"))


@pytest.mark.slow
def test_a_launcher_that_is_told_to_stop_takes_the_training_with_it(ending, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    process = subprocess.Popen([*launch, *ending, "wait"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    process.wait(timeout=60)
    process.stdout.read()  # ends when the training has ended too
    (newest,) = (tmp_path / "run/checkpoints").glob("step-*9")  # the step in hand was finished
    assert load_checkpoint(newest).step == 9
    fit(Toy(), toy_config(tmp_path / "run"))
    fit(Toy(), toy_config(tmp_path / "whole"))
    assert state(tmp_path / "run", 20) == state(tmp_path / "whole", 20)


@pytest.mark.slow
def test_the_scripts_run_from_anywhere_and_stock_diffusers_reads_the_result(tmp_path):
    """Autoencoder, latents, text encoder and UNet by one command that no path helps to find its packages."""
    data = DataConfig(size=16, length=6)
    stage = AutoencoderRecipe(
        output="x", steps=2, batch_size=2, model=VAE, optim=replace(OPTIM, warmup_steps=1)
    )
    stage = replace(stage, measured=2, sample_every=0)
    (tmp_path / "autoencoder.yaml").write_text(to_yaml(stage))
    recipe = diffusion_recipe(
        Path("run"), steps=2, batch_size=2, data=data, optim=replace(OPTIM, warmup_steps=1)
    )
    sampling = replace(recipe.sampling, num_inference_steps=2)
    words = replace(TEXT, path="text_encoder.yaml", train=False)
    recipe = replace(recipe, autoencoder="autoencoder.yaml", text_encoder=words, sampling=sampling)
    recipe = replace(recipe, prompts=("a red circle",))
    contrastive = ContrastiveRecipe(
        output="x", autoencoder="x", steps=2, batch_size=2, text_encoder=TEXT, optim=stage.optim
    )
    contrastive = replace(contrastive, tower=(8,), groups=4)
    (tmp_path / "text_encoder.yaml").write_text(to_yaml(contrastive))
    (tmp_path / "ldm.yaml").write_text(to_yaml(recipe))
    script = ROOT / "train/train_ldm.py"
    done = run(sys.executable, script, "--config", "ldm.yaml", "--sample-every", "2", cwd=tmp_path)
    assert done.stdout.strip() == "run/model"
    assert "2/2" in done.stderr
    again = run(
        sys.executable, "-m", "train.train_ldm", "--config", "ldm.yaml", "--sample-every", "2", cwd=tmp_path
    )
    assert "all 2 steps are done" in again.stderr
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path / "run/model")
    assert ours("a red circle", seed=0).images[0].size == (16, 16)
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "run/model", use_safetensors=True)
    assert stock("a red circle", num_inference_steps=2).images[0].size == (16, 16)


def test_the_autoencoder_script_in_process(tmp_path, capsys):
    recipe = AutoencoderRecipe(
        output=str(tmp_path / "run"), steps=2, batch_size=2, model=VAE, optim=replace(OPTIM, warmup_steps=1)
    )
    (tmp_path / "a.yaml").write_text(to_yaml(replace(recipe, data=DataConfig(size=16, length=3), measured=2)))
    argv = ["--config", str(tmp_path / "a.yaml"), "--max-minutes", "1e-9"]
    assert train_autoencoder.main(argv) == 75
    assert train_autoencoder.main(argv[:2]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run/model")


@pytest.mark.slow
def test_a_plan_tells_what_every_stage_takes_and_leaves_nothing(tmp_path, capsys):
    data, optim = DataConfig(size=16, length=6), replace(OPTIM, warmup_steps=1)
    stage = AutoencoderRecipe(output="x", steps=2, batch_size=2, model=VAE, optim=optim)
    (tmp_path / "autoencoder.yaml").write_text(to_yaml(stage))
    contrastive = ContrastiveRecipe(
        output="x",
        autoencoder="x",
        steps=4,
        batch_size=2,
        text_encoder=TEXT,
        tower=(8,),
        groups=4,
        optim=optim,
    )
    (tmp_path / "text_encoder.yaml").write_text(to_yaml(contrastive))
    recipe = diffusion_recipe(tmp_path / "run", steps=1000, batch_size=2, data=data, optim=optim)
    recipe = replace(
        recipe,
        autoencoder=str(tmp_path / "autoencoder.yaml"),
        text_encoder=replace(TEXT, path=str(tmp_path / "text_encoder.yaml"), train=False),
    )
    (tmp_path / "ldm.yaml").write_text(to_yaml(recipe))
    assert train_ldm.main(["--config", str(tmp_path / "ldm.yaml"), "--plan", "--price", "2.5"]) == 0
    told = capsys.readouterr().out
    unet = sum(p.numel() for p in UNet(recipe.unet).parameters())
    assert f"UNet: {unet / 1e6:,.2f} M parameters trained" in told
    mebibytes = {
        part: float(size) for part, size in re.findall(r"(\w+) ([0-9.]+)(?=[,\n])", told.split("UNet")[1])
    }
    assert set(mebibytes) == {"weights", "gradients", "optimizer", "averages", "activations"}
    assert [line.split(":")[0] for line in told.splitlines()[::2]][:3] == [
        "autoencoder",
        "text encoder",
        "UNet",
    ]
    assert "at 2.5 an hour and rank; nothing was written" in told
    assert not (tmp_path / "run").exists()


def test_pictures_of_no_whole_number_of_cells_are_refused_by_plan_and_run(tmp_path):
    """Before a latent is computed or a source is opened."""
    five = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    config = replace(VAE, block_out_channels=(8,) * 5, **five)  # cells of 16 pixels
    save_model(AutoencoderKL(config), tmp_path / "f16")
    data, told = DataConfig(size=40, length=2), "pictures of 40x40 are not multiples of 16 pixels"
    with pytest.raises(ValueError, match=told):
        made_up(data, config)
    with pytest.raises(ValueError, match=told):
        compute_latents(data, tmp_path / "f16", tmp_path / "latents")
    assert not (tmp_path / "latents").exists()
