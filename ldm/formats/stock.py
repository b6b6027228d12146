"""A pipeline folder and diffusers' pipeline: what they call their parts, read from them and written for them.

A folder names the classes of diffusers and transformers, so both sides read what either wrote. The names are
compared with a table; nothing that a file names is imported.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import DIFFUSERS_VERSION, Model, check_tensors, config_json, empty_model
from ldm.files.config import read_config, read_json
from ldm.model.unet import UNet
from text_encoder.clip import CLIPTextEncoder, ProjectedTextEncoder
from text_encoder.tokenizer import Tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ldm.drawing.base import Drawing
    from ldm.drawing.texts import OneText, TwoTexts

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# The parts that have weights, by their names in a pipeline.
CLASSES: dict[str, type[nn.Module]] = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextEncoder,
    "text_encoder_2": ProjectedTextEncoder,
    "unet": UNet,
}
TOKENIZER = ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"))
UNUSED = (
    *("safety_checker", "feature_extractor", "image_encoder"),
    *("requires_safety_checker", "add_watermarker"),
)


class Layout(NamedTuple):
    """A kind of pipeline: its class in diffusers, its parts, and what model_index.json may call each."""

    stock_class: str
    parts: Mapping[str, tuple[str, tuple[str, ...] | None]]
    settings: Mapping[str, type]  # arguments of our pipeline that are no parts, and what they are
    unused: Mapping[str, Any]  # what else diffusers' class takes, and we have not

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(name for name in CLASSES if name in self.parts)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(name for name in self.parts if name.startswith("tokenizer"))

    @property
    def schedulers(self) -> tuple[str, ...]:
        return tuple(name for name in self.parts if name.endswith("scheduler"))


SD = Layout(
    "StableDiffusionPipeline",
    {
        "vae": ("diffusers", ("AutoencoderKL",)),
        "text_encoder": ("transformers", ("CLIPTextModel",)),
        "tokenizer": TOKENIZER,
        "unet": ("diffusers", ("UNet2DConditionModel",)),
        "scheduler": ("diffusers", None),  # Scheduler.from_config knows which
    },
    {},
    {
        "requires_safety_checker": False,
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    },
)
SDXL = Layout(
    "StableDiffusionXLPipeline",
    {
        **SD.parts,
        "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
        "tokenizer_2": TOKENIZER,
    },
    {"force_zeros_for_empty_prompt": bool},
    {"add_watermarker": False, "feature_extractor": None, "image_encoder": None},
)
UPSCALER = Layout(
    "StableDiffusionUpscalePipeline",
    {**SD.parts, "low_res_scheduler": ("diffusers", None)},
    {"max_noise_level": int},
    {"safety_checker": None, "feature_extractor": None, "watermarker": None},
)
EMPTY: Mapping[str, Any] = {}
# The class of the same parts with a UNet that sees a mask, by that without.
WITH_MASK = {
    SD.stock_class: "StableDiffusionInpaintPipeline",
    SDXL.stock_class: "StableDiffusionXLInpaintPipeline",
}


def for_masks(layout: Layout) -> Layout:
    """The kind of pipeline with these parts and a UNet that sees a mask."""
    return layout._replace(stock_class=WITH_MASK[layout.stock_class])


# The same of a UNet that was distilled with its guidance into few steps; for SDXL it is one class.
FEW_STEPS = SD._replace(stock_class="LatentConsistencyModelPipeline")


# What our pipelines read, by the class that a model_index.json names.
LAYOUTS = {each.stock_class: each for kind in (SD, SDXL) for each in (kind, for_masks(kind))}
LAYOUTS[FEW_STEPS.stock_class] = FEW_STEPS
LAYOUTS["LatentDiffusionPipeline"] = SD
UPSCALERS = {UPSCALER.stock_class: UPSCALER}
READERS = dict.fromkeys(LAYOUTS, "LatentDiffusionPipeline") | dict.fromkeys(
    UPSCALERS, "LatentUpscalePipeline"
)
MODELS = SD.models

# What scripts for diffusers call and this pipeline does not have, each with what to do instead.
ABSENT = {
    "enable_attention_slicing": "attention here never holds its whole matrix: leave it out",
    "enable_freeu": "FreeU is not there; to_diffusers() has it",
    "load_ip_adapter": "image prompts are not there; to_diffusers() has them",
}


def model_index(
    layout: Layout, schedulers: Mapping[str, str], settings: Mapping[str, Any] = EMPTY
) -> dict[str, Any]:
    """The model_index.json of a folder that we write.

    schedulers: the class of each by its name. settings: as of the layout.
    """
    return {
        "_class_name": layout.stock_class,
        "_diffusers_version": DIFFUSERS_VERSION,
        **settings,
        **{name: [None, None] if value is None else value for name, value in layout.unused.items()},
        **{
            name: [library, names[0] if names else schedulers[name]]
            for name, (library, names) in layout.parts.items()
        },
    }


def read_index(folder: Path, layouts: Mapping[str, Layout] = LAYOUTS) -> tuple[Layout, dict[str, Any]]:
    """What the folder's model_index.json says that it holds, and the settings beside.

    Raises ValueError unless it names a pipeline of one of these layouts.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a pipeline: it has no model_index.json")
    index = read_json(path)
    name = index.get("_class_name")
    layout = layouts.get(name) if isinstance(name, str) else None
    if layout is None:
        hint = "no other code is run"
        if index.get("requires_aesthetics_score"):
            hint = "SDXL's refiner is not there, its base model draws without"
        elif isinstance(name, str) and name in READERS:
            hint = f"{READERS[name]} reads it"
        known = " or ".join(dict.fromkeys(each.stock_class for each in layouts.values()))
        raise ValueError(f"{path}: the pipeline is {name!r}: expected {known}; {hint}")
    for part, (library, names) in layout.parts.items():
        match index.get(part):
            case [str(where), str(what)] if where == library and (names is None or what in names):
                continue
            case entry:
                expected = f"[{library!r}, {names[0]!r}]" if names else f"[{library!r}, a scheduler's class]"
                raise ValueError(f"{path}: {part} is {entry!r}: expected {expected}; no other code is run")
    for key, value in index.items():
        ours = (*layout.parts, *layout.settings, *UNUSED)
        if not key.startswith("_") and key not in ours and value not in (None, False, [None, None]):
            raise ValueError(f"{path}: {key} is no part of a {layout.stock_class}")
    settings = {key: index[key] for key in layout.settings if index.get(key) is not None}
    for key, value in settings.items():
        if type(value) is not layout.settings[key]:  # true is an int, too
            expected = "true or false" if layout.settings[key] is bool else "a whole number"
            raise ValueError(f"{path}: {key}={value!r}: expected {expected}")
    return layout, settings


def sees_a_mask(unet: UNet, vae: AutoencoderKL) -> bool:
    """Whether the UNet was trained for inpainting: it sees the latents, a mask and the masked picture's."""
    return unet.config.in_channels == 2 * vae.config.latent_channels + 1


def check_fit(vae: AutoencoderKL, texts: OneText | TwoTexts, unet: UNet) -> None:
    """Raises ValueError unless these can be parts of one model from text to image, or for inpainting."""
    check_parts(vae, texts, unet, 1 + vae.config.latent_channels if sees_a_mask(unet, vae) else 0)


def check_parts(vae: AutoencoderKL, texts: OneText | TwoTexts, unet: UNet, shown: int = 0) -> None:
    """Raises ValueError unless these can be parts of one model. shown: channels beside the latents."""
    pixels, latents, readers = vae.config, unet.config, texts.readers
    width = sum(encoder.config.hidden_size for _, encoder in readers.values())
    hidden = " + ".join(f"{name}.hidden_size" for name in readers)
    for name, one, other in (
        (
            "unet.in_channels and vae.latent_channels" + (f" + {shown}" if shown else ""),
            latents.in_channels,
            pixels.latent_channels + shown,
        ),
        (f"unet.cross_attention_dim and {hidden}", latents.cross_attention_dim, width),
        (
            "the pooled channels that unet takes and the text encoders give",
            latents.pooled_channels,
            texts.pooled_channels,
        ),
    ):
        if one != other:
            raise ValueError(f"{name} differ: {one} and {other}. Are these parts of one model?")
    for tokenizer, encoder in readers.values():
        words = encoder.config
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


def scheduler_class(config: Mapping[str, Any]) -> str:
    """The class a scheduler_config.json names, else DDIMScheduler. Raises ValueError if it is no name."""
    name = config.get("_class_name", "DDIMScheduler")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Z]\w{0,60}Scheduler", name):
        raise ValueError(f"scheduler_config.json: {name!r} is not the class of a scheduler")
    return name


def scheduler_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration without -infinity, which JSON lacks: the default of lambda_min_clipped."""
    return {key: value for key, value in config.items() if value != -float("inf")}


def to_diffusers(pipe: Drawing) -> Any:
    """diffusers' pipeline around the same weights, without a copy: a change in one is a change in both.

    Its schedulers and tokenizers are new objects of the same configuration. Raises ValueError for a flow, and
    for a model from text to image that has classes.
    """
    if pipe.scheduler.prediction == "flow":
        raise ValueError("StableDiffusionPipeline of diffusers cannot draw with a model that predicts a flow")
    if pipe.layout is not UPSCALER and pipe.unet.config.num_class_embeds is not None:
        raise ValueError(
            "StableDiffusionPipeline of diffusers is told no classes: its UNet2DConditionModel reads the unet"
        )
    import diffusers
    import transformers

    layout: Layout = pipe.layout
    parts: dict[str, Any] = {}
    for name in layout.models:
        ours, library = (
            getattr(pipe, name),
            diffusers if layout.parts[name][0] == "diffusers" else transformers,
        )
        parts[name] = _stock_model(getattr(library, ours.stock_class), ours)
    for name in layout.tokenizers:
        with tempfile.TemporaryDirectory() as folder:
            getattr(pipe, name).save(folder)
            parts[name] = transformers.CLIPTokenizer.from_pretrained(folder)
    for name in layout.schedulers:
        config = getattr(pipe, name).config
        parts[name] = getattr(diffusers, scheduler_class(config)).from_config(config)
    settings = {name: getattr(pipe, name) for name in layout.settings}
    return getattr(diffusers, layout.stock_class)(**parts, **settings, **layout.unused)


def _stock_model(cls: Any, ours: nn.Module) -> nn.Module:
    """The stock class around our module's weights."""
    config, tensors = config_json(ours), ours.state_dict(keep_vars=True)
    with torch.device("meta"):
        if cls.__name__.startswith("CLIP"):
            model = cls(cls.config_class.from_dict(config))
        else:
            model = cls.from_config(config)
    if tensors.keys() != model.state_dict().keys():  # transformers 5: a model within that with the projection
        tensors = ours.save_keys(tensors)  # type: ignore[operator]
    _share(model, tensors)
    for part in model.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:  # the positions of transformers, outside its state dict
                setattr(
                    part, name, torch.arange(buffer.shape[-1], device=next(ours.parameters()).device)[None]
                )
    return model


def parts_of(stock: DiffusionPipeline, layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """The arguments of our pipeline around the weights of diffusers', without a copy.

    layouts: of which it has the largest whose parts are all there.
    Raises ValueError, naming what, if one of its parts is of another kind than ours.
    """
    from ldm.diffusion.scheduler import Scheduler

    whole = (each for each in layouts.values() if all(hasattr(stock, name) for name in each.parts))
    layout = max(whole, key=lambda each: len(each.parts), default=next(iter(layouts.values())))
    for name, (_, names) in layout.parts.items():
        found = type(getattr(stock, name, None)).__name__
        if found not in names if names else found == "NoneType":
            raise ValueError(f"{name} is a {found}: expected a {names[0] if names else 'scheduler'}")
    parts: dict[str, Any] = {name: stock.config[name] for name in layout.settings}
    for name in layout.schedulers:
        scheduler = getattr(stock, name)
        config: dict[str, Any] = {"_class_name": type(scheduler).__name__} | dict(scheduler.config)
        for key in config.pop("_use_default_values", []):  # another solver's class has its own
            config.pop(key, None)
        parts[name] = Scheduler.from_config(config)
    for name in layout.models:
        model = getattr(stock, name)
        values = dict(model.config) if layout.parts[name][0] == "diffusers" else model.config.to_dict()
        parts[name] = _around(CLASSES[name], model, values)
    for name in layout.tokenizers:
        with tempfile.TemporaryDirectory() as folder:
            getattr(stock, name).save_pretrained(folder)
            parts[name] = Tokenizer.from_folder(folder)
    return parts


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
