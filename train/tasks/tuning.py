"""Training that begins with a finished model: what LoRA, DreamBooth, textual inversion and inpainting share.

Where the model's weights stay as they are, what learns is a small module; the model it works on is called by
it, moves with it, and is no part of it. So checkpoints, averages and optimizer hold what learns alone, and a
hash says which model it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from torch import Tensor, nn

from ldm.diffusion.scheduler import Scheduler
from ldm.files.config import read_config, read_json
from ldm.formats.parts import DEFAULTS
from ldm.formats.stock import SD, read_index
from ldm.model.unet import UNetConfig
from ldm.recipes.options import Defaults
from train.batches.cache import CachedConfig, cached_latents
from train.batches.latents import Latents, autoencoder_folder
from train.config import config_fields
from train.fit.checkpoint import weights_sha256
from train.fit.loop import cpu_only
from train.fit.shards import wants_shards
from train.fit.state import FitConfig
from train.tasks.denoising import Diffusion, ObjectiveConfig
from train.tasks.diffusion import DiffusionRecipe, LatentDiffusion
from train.tasks.models import named_folder
from train.tasks.text import TextConfig


@dataclass(frozen=True, kw_only=True)
class FurtherRecipe(CachedConfig):
    """Training that begins with a finished model."""

    model: str = "bundled"  # folder or hub id of a pipeline; bundled: the one that comes with this package
    gradient_checkpointing: bool = False  # of the UNet: much less memory for a third more time
    weight: str | None = None  # of the loss, by the noise level: a name in WEIGHTS; null: what suits the rest
    timestep_shift: float = 1.0  # of the timesteps drawn; below 1: less noise, which small latents want
    caption_dropout: float = 0.0  # of the samples get the empty prompt, which guidance compares with
    mask_weight: float = 1.0  # of an error within a figure or an opaque pixel; around them it weighs 1
    prompts: tuple[str, ...] = ()  # of the pictures drawn while training; none: captions of the data


@dataclass(frozen=True, kw_only=True)
class TuningRecipe(FurtherRecipe):
    """Training of something small beside a model that stays as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if wants_shards(PartialState(cpu=cpu_only()).distributed_type):
            raise ValueError(
                "weights in shards are for what learns, and here that is small: leave out --use_fsdp, and "
                "use accelerate launch --multi_gpu for several ranks"
            )


def model_folder(recipe: FurtherRecipe) -> Path:
    """The folder of the model. Raises ValueError if it is none, or not of Stable Diffusion's kind."""
    folder = named_folder(recipe.model)
    layout, _ = read_index(folder)
    if layout is not SD:
        raise ValueError(
            f"model={recipe.model!r} is a {layout.stock_class}: only {SD.stock_class} is trained"
        )
    return folder


def read_scheduler(folder: Path) -> Scheduler:
    return Scheduler.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))


def whole_recipe(recipe: FurtherRecipe, folder: Path) -> DiffusionRecipe:
    """The recipe that would train the whole model further: its parts, and what it predicts."""
    scheduler, defaults = read_scheduler(folder), folder / DEFAULTS
    objective = ObjectiveConfig(
        prediction=scheduler.prediction,
        zero_terminal_snr=float(scheduler.schedule.alpha[-1]) == 0.0,
        weight=recipe.weight,
        timestep_shift=recipe.timestep_shift,
        caption_dropout=recipe.caption_dropout,
        mask_weight=recipe.mask_weight,
    )
    return DiffusionRecipe(
        **{name: getattr(recipe, name) for name in config_fields(FitConfig)},
        autoencoder=str(folder),
        latents=recipe.latents,
        data=recipe.data,
        text_encoder=TextConfig(path=str(folder), train=False),
        unet=read_config(UNetConfig, read_json(folder / "unet/config.json"), folder / "unet/config.json"),
        start=str(folder),
        gradient_checkpointing=recipe.gradient_checkpointing,
        objective=objective,
        prompts=recipe.prompts,
        sampling=read_config(Defaults, read_json(defaults), defaults) if defaults.exists() else Defaults(),
    )


def latents_of(recipe: FurtherRecipe, folder: Path) -> Latents:
    """Those of the recipe's pictures by the autoencoder of the model in `folder`: see cached_latents."""
    return cached_latents(recipe, autoencoder_folder(folder), recipe.mask_weight != 1)


class Tuned(nn.Module):
    """What learns, by name: the module in training. `model`, which computes the loss with it, is no part."""

    def __init__(
        self, model: Diffusion, parts: Mapping[str, nn.Module], rates: Mapping[str, float] | None = None
    ) -> None:
        """rates: of learning of a part in that of the recipe, by its name; 1 where there is none."""
        super().__init__()
        self.outside = (model.requires_grad_(False).eval(),)  # a tuple, in which torch looks for no module
        self.RATES = dict(rates or {})
        for name, part in parts.items():
            self.add_module(name, part)

    @property
    def model(self) -> Diffusion:
        return self.outside[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tuned:
        """The model goes along to every device and memory layout."""
        self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,) and further values to log; batch: as Diffusion takes it."""
        return self.model(**batch)


class Tuning(LatentDiffusion):
    """The task of training something beside the UNet and the text encoder of a model."""

    def __init__(self, recipe: TuningRecipe, folder: Path, latents: Latents) -> None:
        super().__init__(
            whole_recipe(recipe, folder), autoencoder_folder(folder), latents, read_scheduler(folder)
        )
        self.facts = {**self.facts, "model": weights_sha256(self.unet.state_dict())}

    def loss_model(self, through_text: bool) -> Diffusion:
        """The frozen model and its loss. through_text: gradients pass the text encoder, too."""
        return Diffusion(self.unet, self.text_encoder, self.scheduler, self.recipe.objective, through_text)
