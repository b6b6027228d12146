"""A trained classifier of noisy latents as a folder: config.json, weights, and the scheduler it learnt with.

It says nothing of other latents or another noise, so it notes what its own are, and is refused elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ldm.diffusion.classifier import Gain, NoisyClassifier, by_score, led
from ldm.diffusion.guidance import Guidance, classifier_free
from ldm.diffusion.scheduler import Scheduler
from ldm.drawing.classes import Labels, numbers_of
from ldm.files.checkpoint import (
    Undrawn,
    check_tensors,
    read_config,
    read_json,
    read_tensors,
    replacing,
    write_json,
)
from ldm.formats import stock
from ldm.model.architecture import UNetConfig

if TYPE_CHECKING:
    from autoencoder.vae import AutoencoderKLConfig
    from ldm.pipeline import LatentDiffusionPipeline

WEIGHTS = "classifier.safetensors"
KIND = "NoisyClassifier"
ADVICE = "It leads the model that it was trained for: train another by train/train_classifier.py --model"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The config.json of a classifier."""

    class_names: tuple[str, ...]  # in the order of their numbers
    scaling_factor: float  # of the latents that it reads, as in the autoencoder's config.json
    shift_factor: float | None = None
    unet: Any  # keys of a UNet's config.json, of which those on the way down count


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier, the names of its classes, and the latents and the noise that it reads."""

    model: NoisyClassifier
    class_names: tuple[str, ...]
    scaling_factor: float
    shift_factor: float | None
    scheduler: Scheduler

    @classmethod
    def of(
        cls, model: NoisyClassifier, names: tuple[str, ...], vae: AutoencoderKLConfig, scheduler: Scheduler
    ) -> TrainedClassifier:
        """Of latents of this autoencoder."""
        return cls(model, names, vae.scaling_factor, vae.shift_factor, scheduler)

    def save(self, folder: Path) -> None:
        """Writes what load_classifier reads; config.json comes last."""
        config = self.scheduler.config
        write_json(folder / "scheduler_config.json", stock.scheduler_json(config))
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        with replacing(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary)
        noted = {
            "class_names": self.class_names,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "unet": dataclasses.asdict(self.model.config),
        }
        write_json(folder / "config.json", {"_class_name": KIND, **noted})

    def check_fit(self, pipe: LatentDiffusionPipeline) -> None:
        """Raises ValueError unless the pipeline's latents and noise are those that it learnt with."""
        theirs, ours = pipe.vae.config, self.scheduler.schedule.alpha
        alpha = pipe.scheduler.schedule.alpha
        if len(ours) != len(alpha) or not torch.allclose(ours, alpha, rtol=0, atol=1e-6):
            ends = f"{len(ours)} steps to alpha {ours[-1]:.4g} and {len(alpha)} to {alpha[-1]:.4g}"
            raise ValueError(
                f"the classifier and the model differ in their noise schedules: {ends}. {ADVICE}"
            )
        for name, one, other in (
            ("latent channels", self.model.config.in_channels, theirs.latent_channels),
            ("scaling_factor of latents", self.scaling_factor, theirs.scaling_factor),
            ("shift_factor of latents", self.shift_factor or 0.0, theirs.shift_factor or 0.0),
        ):
            if not math.isclose(one, other, rel_tol=1e-6):
                raise ValueError(
                    f"the classifier and the model differ in their {name}: {one:g} and {other:g}. {ADVICE}"
                )

    def guidance(
        self,
        pipe: LatentDiffusionPipeline,
        class_labels: Labels,
        scale: float = 1.0,
        gain: Gain = by_score,
        around: Guidance = classifier_free,
    ) -> Guidance:
        """What a call of this pipeline takes as `guidance` to be led to these classes, around another one.

        class_labels: numbers or names, one for all images or one for each.
        gain: by_score, or by_mean of the call's table, pipe.tableau(steps, sampler).
        Raises ValueError for classes that it does not know, and for a pipeline that it does not fit.
        """
        self.check_fit(pipe)
        labels = torch.tensor(numbers_of(class_labels, len(self.class_names), self.class_names))
        return led(around, self.model.to(pipe.device).log_probability(labels), scale, gain)


def load_classifier(folder: str | Path) -> TrainedClassifier:
    """The classifier in a folder that train_classifier.py wrote, in float32 on the CPU.

    Raises ValueError, naming the file, unless all of it is there and fits.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    if values.get("_class_name") != KIND:
        raise ValueError(f"{path} is of a {values.get('_class_name')}: expected a {KIND}")
    config = read_config(ClassifierConfig, values, path)
    if not isinstance(config.unet, dict) or not config.class_names:
        raise ValueError(f"{path}: expected unet with the keys of a UNet, and class_names")
    with torch.device("meta"), Undrawn():
        model = NoisyClassifier(read_config(UNetConfig, config.unet, path), len(config.class_names))
    tensors = read_tensors(path.with_name(WEIGHTS))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_tensors(shapes, tensors, path.with_name(WEIGHTS), NoisyClassifier)
    model.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    model.eval().requires_grad_(False)
    scheduler = Scheduler.from_config(read_json(path.with_name("scheduler_config.json")))
    return TrainedClassifier(model, config.class_names, config.scaling_factor, config.shift_factor, scheduler)
