"""FSDP2: weights in shards train as copies do, and their checkpoints are those of any other run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType

from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.options import Defaults
from tests.test_fit import autoencoder, diffusion_recipe, latents, losses, state, stop_at
from tests.test_train_scripts import run
from train.fit.checkpoint import load_checkpoint
from train.fit.loop import fit, warn_of_one_rank
from train.fit.shards import sharding, wants_shards, warn_of_wrapping
from train.tasks.diffusion import LatentDiffusion

__all__ = ["autoencoder"]  # a fixture

LAUNCH = ("-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no")
SHARDS = ("--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--dynamo_backend", "no")

RANKS = """
import json, os, sys
from pathlib import Path
sys.modules["torchvision"] = None
from tests.test_shards import train
for name, stop_after, shards in json.loads(sys.argv[2]):
    os.environ["ACCELERATE_USE_FSDP"] = str(shards)
    train(Path(sys.argv[1]), name, stop_after if os.environ["RANK"] == "1" else 0)
"""


def train(folder: Path, name: str, stop_after: int = 0) -> None:
    """Goes on with a run of 8 steps on what ranks there are; stop_after: SIGTERM comes in this step."""
    recipe = diffusion_recipe(
        folder / name,
        steps=8,
        micro_batch=1,
        ema_widths=(0.1,),
        validation_samples=3,
        validate_every=3,  # in the midst of steps that are not written yet
        sample_every=4,
        sampling=Defaults(num_inference_steps=2),
        channels_last=False,  # shards have rows: the same kernels as copies, so that only sums differ
    )
    task = LatentDiffusion(recipe, folder / "autoencoder", latents())
    stop_at(task, stop_after)
    fit(task, recipe)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    groups = load_checkpoint(folder / "checkpoints/step-00000008").tensors
    return {f"{stem}/{name}": value for stem, group in groups.items() for name, value in group.items()}


@pytest.mark.slow
def test_shards_train_as_copies_do_and_resume_bit_for_bit(tmp_path, autoencoder):
    """As two ranks with copies, to rounding; 8 steps are 3 and 5, also if one plain rank makes either."""
    (tmp_path / "ranks.py").write_text(RANKS)
    train(tmp_path, "from one rank", stop_after=3)
    todo = [("copies", 0, False), ("shards", 0, True), ("halves", 3, True), ("halves", 0, True)]
    todo += [("from one rank", 0, True), ("to one rank", 3, True)]
    run(sys.executable, *LAUNCH, *SHARDS, tmp_path / "ranks.py", tmp_path, json.dumps(todo))
    train(tmp_path, "to one rank")
    assert state(tmp_path / "halves", 8) == state(tmp_path / "shards", 8)
    assert losses(tmp_path / "halves") == losses(tmp_path / "shards")
    copies = tensors(tmp_path / "copies")
    for name in ("shards", "from one rank", "to one rank"):
        for line, other in zip(losses(tmp_path / name), losses(tmp_path / "copies"), strict=True):
            assert line == pytest.approx(other, rel=1e-4), name
        found = tensors(tmp_path / name)
        assert found.keys() == copies.keys()
        for key, value in found.items():
            if (
                "k_proj.bias" not in key
            ):  # it has no effect (Adam makes steps of its gradient's rounding errors)
                torch.testing.assert_close(value, copies[key], atol=2e-5, rtol=1e-3, msg=f"{name}: {key}")
    drawn = [
        LatentDiffusionPipeline.from_pretrained(tmp_path / name / "model")("a fox", seed=0, output_type="np")
        for name in ("copies", "shards")
    ]
    torch.testing.assert_close(*(torch.from_numpy(d.images) for d in drawn), atol=0.02, rtol=0)


def test_what_cuts_weights_otherwise_is_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"configured for DEEPSPEED, which cuts .* --use_fsdp --fsdp_version 2"
    ):
        sharding(DistributedType.DEEPSPEED, "adamw")
    for kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        assert sharding(kind, "muon") is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not wants_shards(DistributedType.NO)
    with pytest.raises(ValueError, match=r"fsdp_version=1: expected accelerate launch --fsdp_version 2"):
        sharding(DistributedType.MULTI_CPU, "adamw")
    monkeypatch.setenv("FSDP_VERSION", "2")
    plugin = sharding(DistributedType.FSDP, "adamw")
    assert plugin is not None
    assert plugin.reshard_after_forward is True
    for optimizer in ("muon", "adamw8bit"):
        with pytest.raises(ValueError, match=f"optim.optimizer={optimizer} works on whole matrices"):
            sharding(DistributedType.MULTI_CPU, optimizer)
    for name in ("OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING"):
        with monkeypatch.context() as one:
            one.setenv(f"FSDP_{name}", "true")
            with pytest.raises(ValueError, match=f"fsdp_{name.lower()}.*=True is not done here"):
                sharding(DistributedType.MULTI_CPU, "adamw")


def test_blocks_that_the_launcher_names_have_no_effect_and_that_is_told(monkeypatch, caplog):
    """accelerate config asks for them, so they are no error."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    warn_of_wrapping(None)
    for policy in ("NO_WRAP", "TRANSFORMER_BASED_WRAP"):
        assert not caplog.text
        monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", policy)
        warn_of_wrapping(sharding(DistributedType.MULTI_CPU, "adamw"))
    assert "fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP has no effect: the blocks are always" in caplog.text


def test_one_process_in_place_of_two_is_told(monkeypatch, caplog):
    """`accelerate launch --cpu --num_processes 2` sets the address to meet at, and starts one process."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("RANK", raising=False)
    warn_of_one_rank(1)
    assert "write --multi_gpu in place of --cpu" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "0")
    warn_of_one_rank(1)
    warn_of_one_rank(2)
    assert not caplog.text
