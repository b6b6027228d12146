"""Checkpoints of training: complete or not there, verified, rotated, without pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from train.fit import checkpoint
from train.fit.checkpoint import clean, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint


def save(folder: Path, step: int) -> Path:
    weight = torch.full((3, 2, 1, 1), float(step)).contiguous(memory_format=torch.channels_last)
    return save_checkpoint(
        folder, step, {"model": {"weight": weight}, "ema": {"weight": weight}}, {"updates": 1}
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    path = save(tmp_path, 12)
    assert names(tmp_path) == ["step-00000012"]
    assert names(path) == ["ema.safetensors", "manifest.json", "model.safetensors", "trainer.json"]
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.state["updates"]) == (12, 1)
    assert torch.equal(loaded.tensors["model"]["weight"], torch.full((3, 2, 1, 1), 12.0))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path / "model.safetensors"), "model.safetensors has another sha256"),
        (lambda path: (path / "ema.safetensors").write_bytes(b"half"), "ema.safetensors has 4 bytes"),
        (lambda path: (path / "ema.safetensors").unlink(), "ema.safetensors is missing"),
        (lambda path: (path / "manifest.json").unlink(), "no complete checkpoint"),
        (lambda path: (path / "manifest.json").write_text("{"), "is damaged"),
        (lambda path: (path / "manifest.json").write_text("[]"), "is damaged"),
    ],
)
def test_damage_is_skipped_by_auto_and_refused_by_name(tmp_path, caplog, damage, message):
    good, bad = save(tmp_path, 5), save(tmp_path, 10)
    damage(bad)
    found = find_checkpoint(tmp_path, "auto")
    assert found is not None
    assert found.path == good
    assert message in caplog.text
    assert str(bad) in caplog.text
    with pytest.raises(ValueError, match=message):
        find_checkpoint(tmp_path, str(bad))


def test_what_to_resume_from(tmp_path):
    assert find_checkpoint(tmp_path / "absent", "auto") is None
    path = save(tmp_path, 5)
    (tmp_path / "step-00000007.tmp-1").mkdir()  # a kill in the middle of a save
    assert find_checkpoint(tmp_path, "auto").path == path
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        find_checkpoint(tmp_path, "none")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "typo"))
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact"):
        find_checkpoint(tmp_path, "auto")


def test_rotation_keeps_the_newest_and_removes_what_a_kill_left(tmp_path):
    for step in (1, 2, 3, 9):
        save(tmp_path, step)
    (tmp_path / "step-00000002.tmp-77").mkdir()
    clean(tmp_path, keep_last=2, step=3)  # 9 is of before the run was set back to 3
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    clean(tmp_path, keep_last=1, step=3)
    assert names(tmp_path) == ["step-00000003"]


def test_full_disk_leaves_older_checkpoints_and_nothing_else(tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("I/O error: No space left on device")

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_saving_a_step_again_replaces_a_damaged_one(tmp_path):
    path = save(tmp_path, 4)
    (path / "model.safetensors").unlink()
    save(tmp_path, 4)
    assert load_checkpoint(path).step == 4
    assert list_checkpoints(tmp_path) == [path]


def test_manifest_covers_every_file(tmp_path):
    path = save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted([*manifest, "manifest.json"]) == names(path)
    assert all(name.endswith((".safetensors", ".json")) for name in manifest)
