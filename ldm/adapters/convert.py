"""An adapter from one spelling to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ldm.adapters import names
from ldm.adapters.applied import adaptable
from ldm.adapters.files import Adapter, read_adapter, write_adapter
from ldm.files.checkpoint import empty_model, read_config, read_json
from ldm.model.unet import UNet, UNetConfig
from text_encoder.clip import CLIPTextConfig, CLIPTextEncoder

LAYERS = 32  # of the deepest text encoder of the family: the names in the others are among its own


def empty_models(folder: Path | None) -> dict[str, nn.Module]:
    """The models of a pipeline's folder, without weights; without a folder some with SD 1's and 2's names.

    Raises ValueError if it is no such folder.
    """
    if folder is None:
        unet, text = UNetConfig(), CLIPTextConfig(num_hidden_layers=LAYERS)
    else:
        paths = [folder / part / "config.json" for part in ("unet", "text_encoder")]
        unet = read_config(UNetConfig, read_json(paths[0]), paths[0])
        text = read_config(CLIPTextConfig, read_json(paths[1]), paths[1])
    return {"unet": empty_model(UNet, unet), "text_encoder": empty_model(CLIPTextEncoder, text)}


def convert_adapter(
    source: str | Path, target: str | Path, spelling: str, model: str | Path | None = None
) -> Adapter:
    """Writes the adapter of source to target, as diffusers, kohya or PEFT spell it; the adapter.

    model: the folder of the model that it is for; without it the names of Stable Diffusion 1 and 2 are known.
    Raises ValueError for a file that is no adapter of the model, and for what the spelling cannot say.
    """
    models: Mapping[str, nn.Module] = empty_models(None if model is None else Path(model))
    layers = {part: adaptable(each) for part, each in models.items()}
    resnets = models["unet"].config.layers_per_block  # type: ignore[union-attr]
    index = names.lookup(layers, resnets if isinstance(resnets, int) else resnets[0])  # type: ignore
    adapter = read_adapter(source, index)
    for path, layer in adapter.layers.items() if model is not None else ():
        part, _, name = path.partition(".")
        layer.check(path, layers[part][name].weight)
    write_adapter(adapter, target, spelling)
    return adapter
