"""Where and how the models of a pipeline compute: device, dtype, kernels, offloading for little memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoencoder.vae import AutoencoderKL
from ldm.drawing import inputs
from ldm.model.unet import UNet

# A context, or decorator, within which a model computes on the pipeline's device.
Present = Callable[[nn.Module], "contextlib._GeneratorContextManager[None]"]


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it: CUDA from Ampere on and CPUs with AMX; else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if amx else torch.float32


def accelerator(device: str | torch.device | None) -> torch.device:
    """The device by its name; without one the fastest accelerator. Raises ValueError if it is not here."""
    fastest = inputs.devices()[0]
    if device is None and fastest == "cpu":
        raise ValueError("no accelerator: this machine has a CPU alone, which holds the models anyway")
    return inputs.check_device(fastest if device is None else device)


# Offloading


@contextlib.contextmanager
def stay(model: nn.Module) -> Iterator[None]:
    """Models compute where they are."""
    yield


class OneAtATime:
    """Models move in when they are called, and out when the next one is; threads take turns."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.turn = device, threading.RLock()
        self.inside: nn.Module | None = None

    @contextlib.contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        with self.turn:
            if self.inside is not model:
                if self.inside is not None:
                    self.inside.to("cpu")
                self.inside = None  # also where there is no memory for the next one
                self.inside = model.to(self.device)
            yield


class Lending(TorchFunctionMode):
    """Where parameters stay on the CPU, and each operation gets a copy of its own on the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":  # a look at a parameter's dtype needs no copy
            args, kwargs = self._lend(args), {name: self._lend(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _lend(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._lend, value))
        return value.to(self.device) if isinstance(value, nn.Parameter) else value


def lender(device: torch.device) -> Present:
    """The context of Lending, for whatever model."""

    @contextlib.contextmanager
    def lent(model: nn.Module) -> Iterator[None]:
        with Lending(device):
            yield

    return lent


class Movable:
    """Models that compute on one device, move there together or when they are needed, and may be sped up."""

    models: tuple[nn.Module, ...]  # every one that computes
    unet: UNet
    vae: AutoencoderKL
    _dtype_by_device = False  # from_pretrained chose the dtype: .to(device) chooses again
    _host: torch.device | None = None  # of offloaded models: where they compute
    _present: Present = staticmethod(stay)
    optimized = False  # see optimize
    quantization: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the models compute; offloaded ones are there for that time only."""
        return self._host or next(self.unet.parameters()).device

    @property
    def offloaded(self) -> bool:
        """Whether models are moved for each use."""
        return self._host is not None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def to(
        self,
        *places: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> Self:
        """Moves all models in place, as diffusers: to("cuda"), to(torch.float16), to("cuda", torch.float16).

        Where from_pretrained chose the dtype, a move to another kind of device chooses it anew. A move to a
        device ends offloading.
        """
        for place in places:
            if isinstance(place, torch.dtype):
                dtype = place
            else:
                device = place
        target = inputs.check_device(device) if device is not None else None
        self._dtype_by_device &= dtype is None
        if self._dtype_by_device:
            dtype = default_dtype(target or self.device)
        if target is not None:
            self._host, self._present = None, stay
        for model in self.models:
            own = next(model.parameters())
            model.to(device=target or own.device, dtype=dtype or own.dtype)
            if memory_format is not None:
                model.to(memory_format=memory_format)  # type: ignore[call-overload]
        return self

    def optimize(self, *, quantize: str | None = None) -> Self:
        """Switches on what is faster here and costs some seconds first; pictures differ by rounding alone.

        On a CPU, in float32: kernels in C++ that g++ compiles once for this machine; in bfloat16, where the
        CPU has AMX, one for attention. The process keeps the memory that it has used, for the next picture.
        On an accelerator: torch.compile, anew for every size and batch.
        quantize: "int8", or "fp8" on a GPU, for the linear maps of the UNet's transformers: faster still, but
        pictures differ a little. Weights that are changed later need it again.
        Raises ValueError, which says why and what to do, where it cannot be had.
        """
        from ldm.drawing.optimize import optimize  # only who asks for it needs it

        optimize(self, quantize)  # type: ignore[arg-type]
        self.optimized, self.quantization = True, quantize
        return self

    def enable_xformers_memory_efficient_attention(self) -> None:
        """The UNet's attention by xformers alone. Raises ValueError, which says why, where it cannot run."""
        self.unet.set_attention_backend("xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """The UNet's attention by xformers on CUDA where it can run, else torch's own: as from the start."""
        self.unet.set_attention_backend("auto")

    def enable_vae_tiling(self) -> None:
        """Pictures go through the autoencoder in strips, whatever their size: less memory, the same picture.

        That is, but for rounding. Without being asked, those of more than 1024x1024 pixels do.
        """
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Pictures go through the autoencoder whole, whatever their size."""
        self.vae.disable_tiling()

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Models wait on the CPU, and the one that computes is on the device: memory for the largest alone.

        device: the fastest accelerator if left out; gpu_id: a CUDA device by its number, as in diffusers.
        The pictures are the same. Raises ValueError if there is no such accelerator.
        """
        self._offload(OneAtATime, device if gpu_id is None else f"cuda:{gpu_id}")

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Weights stay on the CPU, each layer's are copied for its use: least memory, and much slower.

        device, gpu_id and what is raised: as of enable_model_cpu_offload.
        """
        self._offload(lender, device if gpu_id is None else f"cuda:{gpu_id}")

    def _offload(self, make: Callable[[torch.device], Present], device: str | torch.device | None) -> None:
        """Moves all models to the CPU, in the dtype that suits the device they will compute on."""
        host, by_device = accelerator(device), self._dtype_by_device
        self.to("cpu", *([default_dtype(host)] if by_device else []))
        self._dtype_by_device, self._host, self._present = by_device, host, make(host)
