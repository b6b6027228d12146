"""A pipeline folder and diffusers' pipeline: what they call their parts, read from them and written for them.

A folder names the classes of diffusers and transformers, so both sides read what either wrote. The names are
compared with a table; nothing that a file names is imported.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from autoencoder.vae import AutoencoderKL
from ldm.checkpoint import DIFFUSERS_VERSION, Model, check_tensors, config_json, empty_model
from ldm.config import read_config, read_json
from ldm.unet import UNet
from text_encoder.clip import CLIPTextEncoder
from text_encoder.tokenizer import Tokenizer

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from ldm.pipeline import LatentDiffusionPipeline

ModuleT = TypeVar("ModuleT", bound=nn.Module)

PIPELINES = ("StableDiffusionPipeline", "LatentDiffusionPipeline")
# The parts of a pipeline, and what model_index.json may call each.
PARTS = {
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "scheduler": ("diffusers", None),  # Scheduler.from_config knows which
}
MODELS = ("vae", "text_encoder", "unet")  # the parts with weights
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")

# What scripts for diffusers call and this pipeline does not have, each with what to do instead.
ABSENT = {
    "enable_attention_slicing": "attention here never holds its whole matrix: leave it out",
    "enable_vae_tiling": "images are decoded whole, one at a time; to_diffusers().vae has tiling",
    "enable_freeu": "FreeU is not there; to_diffusers() has it",
    "load_ip_adapter": "image prompts are not there; to_diffusers() has them",
}


def model_index(scheduler_class: str) -> dict[str, Any]:
    """The model_index.json of a folder that we write."""
    parts = {name: [library, (names or (scheduler_class,))[0]] for name, (library, names) in PARTS.items()}
    nothing: dict[str, Any] = {name: [None, None] for name in UNUSED[:3]}
    head = {
        "_class_name": PIPELINES[0],
        "_diffusers_version": DIFFUSERS_VERSION,
        "requires_safety_checker": False,
    }
    return head | nothing | parts


def check_index(folder: Path) -> None:
    """Raises ValueError unless the folder's model_index.json names a pipeline of parts that we have."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a pipeline: it has no model_index.json")
    index = read_json(path)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{path}: the pipeline is {name!r}: expected {PIPELINES[0]}; no other code is run")
    for part, (library, names) in PARTS.items():
        match index.get(part):
            case [str(where), str(what)] if where == library and (names is None or what in names):
                continue
            case entry:
                expected = f"[{library!r}, {names[0]!r}]" if names else f"[{library!r}, a scheduler's class]"
                raise ValueError(f"{path}: {part} is {entry!r}: expected {expected}; no other code is run")
    for key, value in index.items():
        if not key.startswith("_") and key not in (*PARTS, *UNUSED) and value not in (None, [None, None]):
            raise ValueError(f"{path}: {key} is no part of a Stable Diffusion 1 or 2 pipeline")


def check_fit(vae: AutoencoderKL, text_encoder: CLIPTextEncoder, tokenizer: Tokenizer, unet: UNet) -> None:
    """Raises ValueError unless these can be parts of one model from text to image."""
    pixels, latents, words = vae.config, unet.config, text_encoder.config
    for name, one, other in (
        ("unet.in_channels and vae.latent_channels", latents.in_channels, pixels.latent_channels),
        (
            "unet.cross_attention_dim and text_encoder.hidden_size",
            latents.cross_attention_dim,
            words.hidden_size,
        ),
    ):
        if one != other:
            raise ValueError(f"{name} differ: {one} and {other}. Are these parts of one model?")
    for what, have, room in (
        ("has {} tokens, the text encoder knows {}", len(tokenizer), words.vocab_size),
        (
            "gives {} tokens a prompt, the text encoder has {} positions",
            tokenizer.max_length,
            words.max_position_embeddings,
        ),
    ):
        if have > room:
            raise ValueError(f"the tokenizer {what.format(have, room)}. Are these parts of one model?")
    if pixels.out_channels != 3:
        raise ValueError(f"vae.out_channels={pixels.out_channels}: expected 3, red, green and blue")
    if latents.num_class_embeds is not None:
        raise ValueError(
            f"unet.num_class_embeds={latents.num_class_embeds}: a pipeline from text to image has no classes"
        )


def scheduler_class(config: Mapping[str, Any]) -> str:
    """The class a scheduler_config.json names, else DDIMScheduler. Raises ValueError if it is no name."""
    name = config.get("_class_name", "DDIMScheduler")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Z]\w{0,60}Scheduler", name):
        raise ValueError(f"scheduler_config.json: {name!r} is not the class of a scheduler")
    return name


def scheduler_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration without -infinity, which JSON lacks: the default of lambda_min_clipped."""
    return {key: value for key, value in config.items() if value != -float("inf")}


def to_diffusers(pipe: LatentDiffusionPipeline) -> StableDiffusionPipeline:
    """diffusers' pipeline around the same weights, without a copy: a change in one is a change in both.

    Its scheduler and tokenizer are new objects of the same configuration. Raises ValueError for a flow.
    """
    import diffusers
    import transformers

    if pipe.scheduler.prediction == "flow":
        raise ValueError("StableDiffusionPipeline of diffusers cannot draw with a model that predicts a flow")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config_json(pipe.unet))
        vae = diffusers.AutoencoderKL.from_config(config_json(pipe.vae))
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig.from_dict(config_json(pipe.text_encoder))
        )
    for stock, ours in ((unet, pipe.unet), (vae, pipe.vae), (text, pipe.text_encoder)):
        _share(stock, ours.state_dict(keep_vars=True))
    positions = text.embeddings  # of transformers: a buffer outside its state dict
    positions.position_ids = torch.arange(
        pipe.text_encoder.config.max_position_embeddings, device=pipe.device
    )[None]
    with tempfile.TemporaryDirectory() as folder:
        pipe.tokenizer.save(folder)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    scheduler = getattr(diffusers, scheduler_class(pipe.scheduler.config)).from_config(pipe.scheduler.config)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def parts_of(stock: StableDiffusionPipeline) -> dict[str, Any]:
    """The parts of our pipeline around the weights of diffusers', without a copy.

    Raises ValueError, naming what, if one of its parts is of another kind than ours.
    """
    from ldm.scheduler import Scheduler

    for name, (_, names) in PARTS.items():
        found = type(getattr(stock, name, None)).__name__
        if names and found not in names:
            raise ValueError(f"{name} is a {found}: expected a {names[0]}")
    config: dict[str, Any] = {"_class_name": type(stock.scheduler).__name__} | dict(stock.scheduler.config)
    for key in config.pop("_use_default_values", []):  # another solver's class has its own
        config.pop(key, None)
    with tempfile.TemporaryDirectory() as folder:
        stock.tokenizer.save_pretrained(folder)
        tokenizer = Tokenizer.from_folder(folder)
    return {
        "vae": _around(AutoencoderKL, stock.vae, dict(stock.vae.config)),
        "text_encoder": _around(CLIPTextEncoder, stock.text_encoder, stock.text_encoder.config.to_dict()),
        "tokenizer": tokenizer,
        "unet": _around(UNet, stock.unet, dict(stock.unet.config)),
        "scheduler": Scheduler.from_config(config),
    }


def _share(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Makes these tensors the model's own, without a copy; what is frozen stays so."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tensors[name].requires_grad)  # assigning gives the tensor this flag
    model.load_state_dict(tensors, strict=True, assign=True)
    model.eval()


def _around(cls: type[ModuleT], stock: nn.Module, values: dict[str, Any]) -> ModuleT:
    """Our module of the stock module's configuration, sharing its tensors."""
    model_class: type[Model] = cls  # type: ignore[assignment]
    source = type(stock).__name__
    model = empty_model(cls, read_config(model_class.config_class, values, source))
    tensors = model_class.rename_keys(stock.state_dict(keep_vars=True))
    want = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_tensors(want, tensors, source, cls)
    _share(model, tensors)
    return model
