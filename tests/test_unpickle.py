"""Pickles: weights come out, whatever else is in them does nothing, and what names code is refused."""

import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from ldm.convert import main
from ldm.formats.unpickle import read_pickle, unpickle
from ldm.pipeline import LatentDiffusionPipeline
from tests.tiny import tiny_pipeline


class Payload:
    """What a hostile file does: it names a function and its arguments."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def lightning_callback() -> type:
    """The class that the trainer of SD 1 left in its files, under its name, as it was then."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    made = type("ModelCheckpoint", (), {"__module__": name, "__qualname__": "ModelCheckpoint"})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        sys.modules[part] = types.ModuleType(part)
    sys.modules[name].ModelCheckpoint = made
    return made


@pytest.fixture
def checkpoint(tmp_path):
    """A .ckpt as a trainer of 2022 wrote it, and its tensors."""
    before = set(sys.modules)
    shared = torch.randn(3, 4)
    state = {"a": shared, "b": shared.T, "c": torch.ones((), dtype=torch.float16), "note": 7}
    kind = lightning_callback()
    torch.save({"state_dict": state, "callbacks": {kind: {"best": kind()}}, "epoch": 3}, tmp_path / "a.ckpt")
    for name in set(sys.modules) - before:
        del sys.modules[name]
    return tmp_path / "a.ckpt", {name: value for name, value in state.items() if name != "note"}


def test_weights_come_out_and_nothing_else(checkpoint):
    path, state = checkpoint
    found = read_pickle(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert "pytorch_lightning" not in sys.modules


def test_code_is_refused_and_not_run(tmp_path):
    for name, save in (
        ("zip.ckpt", torch.save),
        ("plain.ckpt", lambda what, path: path.write_bytes(pickle.dumps(what, protocol=2))),
    ):
        save({"state_dict": {"a": torch.zeros(1)}, "evil": Payload(tmp_path / "ran")}, tmp_path / name)
        with pytest.raises(ValueError, match="more than weights, which could run code"):
            read_pickle(tmp_path / name)
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "zip.ckpt").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"more than weights|no whole file"):
        read_pickle(tmp_path / "half.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="no tensors by name"):
        read_pickle(tmp_path / "list.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow  # four processes that import torch
def test_the_process_that_reads(checkpoint, tmp_path, capsys):
    path, state = checkpoint
    unpickle(path, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state.items())
    torch.save({"a": torch.zeros(1), "evil": Payload(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil.ckpt is refused: it holds more than weights"):
        unpickle(tmp_path / "evil.ckpt", tmp_path / "evil.safetensors")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "evil.safetensors").exists()
    # and the command line: a pickle of a whole pipeline
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "config")
    pipe.save_single_file(tmp_path / "whole.safetensors")
    torch.save({"state_dict": load_file(tmp_path / "whole.safetensors")}, tmp_path / "whole.ckpt")
    arguments = [str(tmp_path / "whole.ckpt"), str(tmp_path / "out"), "--config", str(tmp_path / "config")]
    assert main(arguments) == 2
    assert main([*arguments, "--allow-pickle"]) == 0, capsys.readouterr().err
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_the_process_that_reads_is_confined(tmp_path):
    """What would run in it could neither write nor start anything."""
    import subprocess

    code = f"""
import sys, pathlib
from ldm.formats import unpickle
unpickle.leave_network()
here = {str(__file__)!r}
unpickle.confine(pathlib.Path(here))
import os, socket, subprocess
written = {str(tmp_path / "x")!r}
for act in (
    lambda: open(written, "w"),
    lambda: os.open(written, os.O_CREAT),
    lambda: os.system("true"),
    lambda: subprocess.run(["true"]),
    lambda: socket.socket(),
    lambda: os.fork(),
    lambda: os.remove(here),
):
    try:
        act()
    except PermissionError:
        print("refused")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["refused"] * 7
    assert not (tmp_path / "x").exists()
