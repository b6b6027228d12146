"""Model folders: what is written comes back to the last bit, and what is not whole does not at all."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.files.checkpoint import load_model, model_hash, save_model
from ldm.files.config import read_config, replacing, write_json
from ldm.model.unet import UNet, UNetConfig
from ldm.recipes.options import Defaults
from tests.tiny import tiny_pipeline
from text_encoder.clip import CLIPTextEncoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[UNet, Path]:
    """A UNet and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("model") / "unet"
    unet = tiny_pipeline().unet
    save_model(unet, folder)
    return unet, folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of the saved UNet to be damaged."""
    return Path(shutil.copytree(original[1], tmp_path / "unet"))


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_weights(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces tensors by name, with __ for a dot; None removes one."""
    state = load_file(folder / WEIGHTS)
    for name, value in tensors.items():
        state.pop(name.replace("__", "."), None)
        if value is not None:
            state[name.replace("__", ".")] = value
    save_file(state, folder / WEIGHTS)


def test_what_is_saved_comes_back_to_the_last_bit(original):
    unet, folder = original
    loaded = load_model(UNet, folder)
    assert loaded.config == unet.config
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]
    assert len(model_hash([folder])) == 10


def test_a_loaded_model_can_be_trained_and_does_not_change_its_file(folder):
    before = (folder / WEIGHTS).read_bytes()
    unet = load_model(UNet, folder)
    with torch.no_grad():
        for parameter in unet.parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    assert (folder / WEIGHTS).read_bytes() == before


def test_dtype_and_variant(original, folder):
    save_model(copy.deepcopy(original[0]).half(), folder, variant="fp16")
    assert load_model(UNet, folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert (
        load_model(UNet, folder, variant="fp16").dtype == torch.float32
    )  # None is float32, whatever the file has
    assert model_hash([folder]) != model_hash([folder], "fp16")
    with pytest.raises(
        ValueError, match=r"no variant 'fp8'; it holds diffusion_pytorch_model\.fp16\.safetensors"
    ):
        load_model(UNet, folder, variant="fp8")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="no weights without a variant"):
        load_model(UNet, folder)


def shard(folder: Path, names: tuple[str, str] = ("one.safetensors", "two.safetensors")) -> None:
    """The weights in two files and an index."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    half = len(state) // 2
    parts = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / Path(name).name)
    index = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_shards(original, folder):
    shard(folder)
    loaded = load_model(UNet, folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in original[0].state_dict().items())
    assert len(model_hash([folder])) == 10
    (folder / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"two\.safetensors is missing"):
        load_model(UNet, folder)


def test_shards_lie_beside_their_index(folder):
    shard(folder, ("../one.safetensors", "two.safetensors"))
    with pytest.raises(ValueError, match=r"names the shard '\.\./one\.safetensors'"):
        load_model(UNet, folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"conv_in__bias": None},
            r"1 of \d+ tensors differ, 1 missing, the first\n  conv_in.bias: file -, model \(32,\)",
        ),
        ({"extra": torch.zeros(2)}, r"extra: file \(2,\), model -"),
        ({"conv_in__bias": torch.zeros(31)}, r"conv_in.bias: file \(31,\), model \(32,\)"),
        (
            {"conv_in__bias": torch.zeros(32).to(torch.float8_e4m3fn)},
            "conv_in.bias is stored as F8_E4M3, not one of",
        ),
    ],
    ids=["missing", "unexpected", "misshapen", "fp8"],
)
def test_weights_that_do_not_fit(folder, tensors, message):
    change_weights(folder, **tensors)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(UNet, folder)
    assert WEIGHTS in str(caught.value)


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_files_that_are_not_whole(folder, content):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    advice = "git lfs pull" if content and content.startswith(b"version") else "cut short"
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is not a whole safetensors file.*{advice}"):
        load_model(UNet, folder)


def test_pickles_are_refused_unopened(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(diffusion_pytorch_model\.bin\).*refused"):
        load_model(UNet, folder)
    (folder / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no weights"):
        load_model(UNet, folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample_sise": 3}, "unknown key sample_sise=3; did you mean sample_size"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported here, only None is"),
        ({"in_channels": "four"}, "in_channels='four' is not of type int"),
        ({"in_channels": True}, "in_channels=True is not of type int"),
        ({"block_out_channels": [32, "64"]}, "block_out_channels=.* is not of type"),
        ({"norm_eps": float("nan")}, "norm_eps=nan is not of type float"),
        ({"down_block_types": ["os.system", "DownBlock2D"]}, "down_block_types.*'os.system'"),
        ({"_class_name": "AutoencoderKL"}, "is of a AutoencoderKL: expected a UNet2DConditionModel"),
    ],
)
def test_configs_that_are_not_understood(folder, values, message):
    change_config(folder, **values)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(UNet, folder)
    assert "config.json" in str(caught.value)


def test_notes_in_a_config_are_passed_over(folder):
    change_config(folder, _note="anything", _attn_implementation_internal="evil/kernel", some_future_key=None)
    assert isinstance(load_model(UNet, folder), UNet)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is missing"), ("{", "not valid JSON"), ("[]", "not an object")]
)
def test_configs_that_cannot_be_read(folder, content, message):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        load_model(UNet, folder)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_model(UNet, tmp_path / "nothing")


def test_missing_keys_are_named():
    from ldm.recipes.recipe import Recipe

    with pytest.raises(ValueError, match=r"here: steps, guidance_scale, .* not given"):
        read_config(Recipe, {"prompt": "x"}, "here")
    with pytest.raises(ValueError, match="here: steps=0: expected a whole number from 1 to 1000"):
        read_config(Defaults, {"num_inference_steps": 0}, "here")


@pytest.mark.slow  # it imports diffusers
def test_config_defaults_are_those_of_diffusers():
    """A key that a config.json leaves out means what it means there."""
    import inspect

    from diffusers import AutoencoderKL as StockAutoencoder
    from diffusers import UNet2DConditionModel

    from autoencoder.vae import AutoencoderKLConfig

    for ours, theirs in ((UNetConfig, UNet2DConditionModel), (AutoencoderKLConfig, StockAutoencoder)):
        stock = {name: value.default for name, value in inspect.signature(theirs.__init__).parameters.items()}
        own = getattr(ours, "OPTIONAL", frozenset())  # keys that diffusers keeps and does not read
        for name, value in (vars(ours()) | ours.NEUTRAL).items():
            assert stock[name] == value if name not in own else value is None, name


def test_text_encoder_files_carry_the_old_prefix(tmp_path):
    encoder = tiny_pipeline().text_encoder
    save_model(encoder, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["CLIPTextModel"]
    loaded = load_model(CLIPTextEncoder, tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in encoder.state_dict().items())


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half") / 0
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(FileExistsError), replacing(path, overwrite=False) as temporary:
        temporary.write_text("other")
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]
