"""What every pipeline does, whatever it draws from: its parts read and written, the table and the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from ldm.adapters.adaptable import Adaptable
from ldm.diffusion.guidance import Guidance, choose, embedded
from ldm.diffusion.noise import Noise
from ldm.diffusion.sample import Denoiser, Step, trajectory
from ldm.diffusion.scheduler import Scheduler
from ldm.diffusion.solvers import SOLVERS, Tableau
from ldm.drawing import inputs
from ldm.drawing.autoencoding import Autoencoding
from ldm.drawing.devices import default_dtype
from ldm.drawing.prompting import Prompting
from ldm.files.hub import find_folder
from ldm.formats import stock
from ldm.formats.parts import read_parts, write_parts
from ldm.formats.single_file import SingleFiles
from ldm.recipes import options

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

log = logging.getLogger(__name__)


class Drawing(SingleFiles, Prompting, Autoencoding, Adaptable):
    """A pipeline but for its call. A call changes nothing here, so threads may share a pipeline."""

    layouts: ClassVar[Mapping[str, stock.Layout]]  # that it can have, by the names in model_index.json
    scheduler: Scheduler
    defaults: options.Defaults

    def __init__(self) -> None:
        super().__init__()
        self._progress: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        use_safetensors: bool = True,
        safety_checker: None = None,
    ) -> Self:
        """The pipeline of a folder in diffusers' layout, or of a hub id, on the CPU.

        dtype: None is bfloat16 where the hardware multiplies it, else float32. torch_dtype is its old name.
        variant: such as "fp16", for the parts that have it. The last two are for diffusers' scripts.
        Raises ValueError unless every part is whole, of a known class, and fits its configuration exactly.
        """
        if not use_safetensors:
            raise ValueError("use_safetensors=False: pickled weights can run any code and are never opened")
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype}: give one of them")
        chosen = dtype or torch_dtype
        dtype = chosen or default_dtype(torch.device("cpu"))
        pipe = cls(**read_parts(find_folder(path, variant), cls.layouts, dtype, variant))
        pipe._dtype_by_device = chosen is None
        return pipe.to(memory_format=torch.channels_last)

    @classmethod
    def from_diffusers(cls, pipe: DiffusionPipeline) -> Self:
        """This pipeline around the weights of diffusers', shared: a change in one is a change in both."""
        return cls(**stock.parts_of(pipe, cls.layouts))

    def to_diffusers(self) -> Any:
        """diffusers' pipeline around these weights, without a copy: a change in one is a change in both."""
        return stock.to_diffusers(self)

    def save_pretrained(self, folder: str | Path, variant: str | None = None) -> None:
        """Writes a folder that from_pretrained here and in diffusers reads; model_index.json comes last."""
        if self._applied.state.shares():
            log.warning("the weights are saved with the adapters that are in them")
        if self._dtype_by_device and self.dtype != torch.float32:
            log.warning("the weights are saved as %s, as they were loaded here by default", self.dtype)
        write_parts(self, Path(folder), variant)

    @property
    def layout(self) -> stock.Layout:
        """What it consists of, and what diffusers calls that."""
        raise NotImplementedError

    @property
    def stock_defaults(self) -> options.Defaults:
        """What a call uses where a folder says nothing: the values of diffusers."""
        return self.texts.defaults

    @property
    def models(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        """The parts with weights."""
        return tuple(getattr(self, name) for name in self.layout.models)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name: type(pipe)(**pipe.components) is another one of the same parts."""
        return {name: getattr(self, name) for name in (*self.layout.parts, *self.layout.settings)}

    def set_progress_bar_config(self, **config: Any) -> None:
        """Options of the tqdm bar, such as disable=True. It is shown where stderr is a terminal."""
        self._progress = config

    def enable_vae_slicing(self) -> None:
        """Nothing is left to do: images are always decoded one at a time."""

    def __getattr__(self, name: str) -> Any:
        absent = f"a {type(self).__name__} has no such attribute"
        raise AttributeError(f"{name}: {stock.ABSENT.get(name, absent)}")

    def tableau(self, steps: int | None = None, sampler: str | None = None, strength: float = 1.0) -> Tableau:
        """The table that a call with these options follows: without the first steps if strength is below 1.

        Raises ValueError if there is none.
        """
        steps = self.defaults.num_inference_steps if steps is None else steps
        sampler = sampler or self.defaults.sampler or self.scheduler.solver
        options.check_steps(steps)
        options.check_choice("sampler", sampler, SOLVERS)
        options.check_strength(strength, steps)
        return self.scheduler.tableau(steps, sampler, skip=steps - int(steps * strength))

    def _run(
        self,
        denoise: Denoiser,
        xt: Tensor,
        tableau: Tableau,
        noise: Noise,
        callback: inputs.Callback | None,
        names: Sequence[str],
    ) -> Tensor:
        """The last latents of a run. The callback hears of each step, with the tensors of these names."""
        for name in names:
            options.check_choice("callback_on_step_end_tensor_inputs", name, ("latents", "x0"))
        run = trajectory(self._present(self.unet)(denoise), xt.to(self.device).float(), tableau, noise)
        for step in self._bar(run, len(tableau.steps)):
            xt = step.xt
            if callback is not None:
                inputs.call_back(callback, self, step, tableau, names)
        return xt

    def _guide(
        self,
        scale: float | None,
        rescale: float | None,
        interval: tuple[float, float] | None,
        guidance: Guidance | None,
    ) -> tuple[float, Guidance]:
        """How far to follow the prompt, and by which guidance. Raises ValueError for what cannot be."""
        scale = self.defaults.guidance_scale if scale is None else scale
        options.check_guidance(scale, rescale or 0.0, interval)
        chosen = choose(guidance, rescale, self.defaults.guidance_rescale, interval)
        if self.unet.config.time_cond_proj_dim is None:
            return scale, chosen
        for name, value in (("guidance_rescale", rescale), ("guidance_interval", interval)):
            if value:
                raise ValueError(
                    f"{name}={value}: this model was distilled with its guidance and only takes a "
                    "guidance_scale, leave it out"
                )
        return scale, embedded(chosen)

    def _bar(self, steps: Iterable[Step], total: int) -> Iterable[Step]:
        """The steps, with a progress bar where stderr is a terminal."""
        from tqdm import tqdm  # 40 ms

        return tqdm(steps, total=total, **{"disable": None, **self._progress})
