"""The two sides of a bench of generation, with the same weights: our pipeline and diffusers'.

Each answers "unet", one call of the UNet on the two halves of guidance, or "picture", whole pictures by DDIM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernels import tell_profiler
from bench.models import PROMPT
from bench.rows import Settings, Unavailable
from ldm.diffusion.sample import Denoiser, sample
from ldm.diffusion.schedule import Level, to_x0
from ldm.drawing.inputs import first_noise
from ldm.model.context import Context
from ldm.pipeline import LatentDiffusionPipeline

SCALE = 7.5  # of guidance
T = 501  # timestep of a single UNet call


class Graphed:
    """A function of tensors as one CUDA graph, called with other contents of the same shapes."""

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        """Raises Unavailable where there is no CUDA."""
        if not inputs[0].is_cuda:
            raise Unavailable("needs CUDA")
        self.inputs = [each.clone() for each in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose and allocate outside the capture
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The next call writes over what this one returns."""
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.output


class Inputs:
    """Of a UNet call with guidance, two texts for each xt: the same for every side, drawn on the CPU."""

    def __init__(self, batch: int, channels: int, pixels: int, width: int) -> None:
        """batch: pictures. channels: of the latents. width: of the context."""
        rng = torch.Generator().manual_seed(batch)
        self.xt = torch.randn(batch, channels, pixels // 8, pixels // 8, generator=rng)
        self.context = torch.randn(2 * batch, 77, width, generator=rng)


class Ours:
    """Our pipeline."""

    def __init__(self, settings: Settings, *, dtype: torch.dtype | None = None, backend: str = "") -> None:
        """dtype: None is what from_pretrained and .to(device) choose. backend: of attention, "" as it is."""
        self.settings, self.device = settings, torch.device(settings.device)
        self.pipe = LatentDiffusionPipeline.from_pretrained(settings.folder, dtype=dtype).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.contexts: dict[int, Context] = {}
        if backend:
            try:
                self.pipe.unet.set_attention_backend(backend)
            except ValueError as error:
                raise Unavailable(str(error)) from None

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """xt, t, context as the pipeline gives them to the UNet."""
        unet = self.pipe.unet
        given = Inputs(batch, unet.config.in_channels, self.settings.pixels, unet.config.cross_attention_dim)
        xt = given.xt.to(self.device).contiguous(memory_format=torch.channels_last)
        t = torch.full((batch,), float(T), device=self.device)
        return xt, t, given.context.to(self.device, unet.dtype)

    @torch.no_grad()
    def call(self, what: str, batch: int) -> Tensor:
        return self.unet(batch) if what == "unet" else self.picture(batch)

    def unet(self, batch: int) -> Tensor:
        """As in a run: what layers make of the text is there after the first call."""
        xt, t, context = self.inputs(batch)
        return self.pipe.unet(xt, t, self.contexts.setdefault(batch, Context(context)))

    def picture(self, batch: int) -> Tensor:
        """(B, 3, H, W) in [0, 1]; picture i has seed i."""
        return self.pipe(
            PROMPT,
            self.settings.pixels,
            self.settings.pixels,
            self.settings.steps,
            guidance_scale=SCALE,
            num_images_per_prompt=batch,
            seed=0,
            sampler="ddim",
            output_type="pt",
        ).images


class OursOptimized(Ours):
    """With everything that pipe.optimize() knows for this machine."""

    def __init__(
        self, settings: Settings, *, dtype: torch.dtype | None = None, quantize: str | None = None
    ) -> None:
        super().__init__(settings, dtype=dtype)
        try:
            self.pipe.optimize(quantize=quantize)
        except ValueError as error:
            raise Unavailable(str(error)) from None
        tell_profiler()


class OursCompiled(Ours):
    """The UNet by torch.compile, anew for each shape. mode: torch.compile's."""

    def __init__(self, settings: Settings, *, mode: str, dtype: torch.dtype | None = None) -> None:
        super().__init__(settings, dtype=dtype)
        compile_whole(self.pipe.unet, mode, self.device)


class OursGraphed(Ours):
    """A step's denoising, from xt to x0, as one CUDA graph: UNet, guidance and to_x0.

    The solver's sum of xt and x0 stays outside, so that every sampler can use it. mode: the UNet is compiled
    before, "" is not.
    """

    def __init__(self, settings: Settings, *, mode: str = "") -> None:
        super().__init__(settings)
        if self.device.type != "cuda":
            raise Unavailable("needs CUDA")
        if mode:
            compile_whole(self.pipe.unet, mode, self.device)
        self.calls: dict[int, Graphed] = {}
        self.denoisers: dict[int, Denoiser] = {}

    def unet(self, batch: int) -> Tensor:
        inputs = self.inputs(batch)
        if batch not in self.calls:
            self.calls[batch] = Graphed(self.pipe.unet, *inputs)
        return self.calls[batch](*inputs)

    def picture(self, batch: int) -> Tensor:
        unet, pixels = self.pipe.unet.config, self.settings.pixels
        if batch not in self.denoisers:
            self.denoisers[batch] = self.denoiser(batch)
        shape = (unet.in_channels, pixels // 8, pixels // 8)
        xt, noise, _ = first_noise(batch, shape, 0, None, None)
        tableau = self.pipe.tableau(self.settings.steps, "ddim")
        return self.pipe.decode(sample(self.denoisers[batch], xt.to(self.device), tableau, noise))

    def denoiser(self, batch: int) -> Denoiser:
        """(xt, level) -> x0 by replaying a graph, whose level is a tensor and no constant of it."""
        kind = self.pipe.scheduler.prediction
        context = self.pipe.encode_prompts([PROMPT] * batch)
        both = torch.cat([self.pipe.encode_prompts([""] * batch), context])

        def step(xt: Tensor, level: Tensor) -> Tensor:
            t, alpha, sigma = level
            xt = xt.contiguous(memory_format=torch.channels_last)
            prediction = self.pipe.unet(xt, t.expand(len(xt)), both).float()
            without, with_text = prediction.chunk(2)
            return to_x0(without.lerp(with_text, SCALE), xt, Level(t, alpha, sigma), kind)

        shape = (batch, self.pipe.unet.config.in_channels, *(2 * [self.settings.pixels // 8]))
        like = torch.zeros(shape, device=self.device)
        graphed = Graphed(step, like, torch.ones(3, device=self.device))
        return lambda xt, level: graphed(xt, torch.tensor(level, dtype=torch.float32)).clone()


class Theirs:
    """diffusers' pipeline."""

    def __init__(
        self, settings: Settings, *, dtype: torch.dtype | None = None, channels_last: bool = False
    ) -> None:
        """dtype: None is as it comes, float32."""
        from diffusers import StableDiffusionPipeline

        self.settings, self.device = settings, torch.device(settings.device)
        self.pipe = StableDiffusionPipeline.from_pretrained(
            settings.folder, dtype=dtype or torch.float32, safety_checker=None
        ).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        if channels_last:
            self.pipe.unet.to(memory_format=torch.channels_last)
            self.pipe.vae.to(memory_format=torch.channels_last)

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """xt, t, context as the pipeline gives them to the UNet."""
        unet = self.pipe.unet
        given = Inputs(batch, unet.config.in_channels, self.settings.pixels, unet.config.cross_attention_dim)
        place = {"device": self.device, "dtype": unet.dtype}
        twice = given.xt.repeat(2, 1, 1, 1).to(**place)
        return twice, torch.tensor(T, device=self.device), given.context.to(**place)

    @torch.no_grad()
    def call(self, what: str, batch: int) -> Tensor:
        return self.unet(batch) if what == "unet" else self.picture(batch)

    def unet(self, batch: int) -> Tensor:
        return self.pipe.unet(*self.inputs(batch), return_dict=False)[0]

    def picture(self, batch: int) -> Tensor:
        """(B, 3, H, W) in [0, 1]; picture i has seed i."""
        return self.pipe(
            PROMPT,
            self.settings.pixels,
            self.settings.pixels,
            self.settings.steps,
            guidance_scale=SCALE,
            num_images_per_prompt=batch,
            generator=[torch.Generator().manual_seed(index) for index in range(batch)],
            output_type="pt",
        ).images


class TheirsCompiled(Theirs):
    """channels_last, the UNet by torch.compile. mode: torch.compile's."""

    def __init__(self, settings: Settings, *, mode: str, dtype: torch.dtype | None = None) -> None:
        super().__init__(settings, dtype=dtype, channels_last=True)
        compile_whole(self.pipe.unet, mode, self.device)


class TheirsFastest(Theirs):
    """What its documentation knows for a GPU: bf16, one matrix for q, k and v, UNet and decoder compiled."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, dtype=torch.bfloat16, channels_last=True)
        self.pipe.fuse_qkv_projections()
        compile_whole(self.pipe.unet, "max-autotune", self.device)
        self.pipe.vae.decode = torch.compile(self.pipe.vae.decode, mode="max-autotune", fullgraph=True)


class TheirsFrozen(TheirsCompiled):
    """Compiled with the weights as constants, which inductor then lays out for the CPU's kernels."""

    def __init__(self, settings: Settings, *, dtype: torch.dtype | None = None) -> None:
        import torch._inductor.config as inductor

        inductor.freezing = True
        super().__init__(settings, mode="default", dtype=dtype)
        self.pipe.unet.requires_grad_(False)


def compile_whole(unet: torch.nn.Module, mode: str, device: torch.device) -> None:
    """In place, without a break in its graph, for one shape at a time."""
    if device.type != "cuda" and mode != "default":
        raise Unavailable("needs CUDA")
    unet.compile(mode=mode, fullgraph=True, dynamic=False)
