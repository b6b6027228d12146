"""The text on its way through the UNet: where it meets the latents, and what is made of it once in a run.

Guidance asks for the same latents with several texts. Until a layer first looks at the text their answers are
the same rows, so they are computed once, and repeated where a tensor of more rows joins them. No layer is
told: the shapes say it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def repeated(x: Tensor, like: Tensor | Context) -> Tensor:
    """x with the rows of `like`: (B, ...) -> (k * B, ...), its B rows k times over, as cat([x, x]) for k = 2.

    x as it is where `like` has no more rows. The memory layout is kept, which Tensor.repeat does not do.
    """
    times = len(like) // len(x)
    return torch.cat([x] * times) if times > 1 else x


class Context:
    """What the UNet is told in a sampling run, and what layers made of it: the same in every step.

    embeddings: (B, N, D), of the tokens. SDXL is told more: pooled (B, P), of each text as a whole, and sizes
    (B, 6) in pixels, the original's height and width, the crop's top and left, the target's height and width.
    A UNet with classes is told labels, (B,) int64, and one that was distilled with its guidance the
    guidance_scale, (B,) float32, 1 for none.
    A run makes its own and hands it to the UNet in the place of the embeddings, so that the UNet keeps no
    state. It is not for two threads, nor for two UNets.
    """

    def __init__(
        self,
        embeddings: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        labels: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> None:
        self.embeddings, self.pooled, self.sizes, self.labels = embeddings, pooled, sizes, labels
        self.guidance_scale = guidance_scale
        self._made: dict[nn.Module, Any] = {}

    @classmethod
    def of(cls, *texts: Tensor | Context) -> Context:
        """A new one of the rows of these, one after the other. It holds what all of them hold."""
        each = [(text, *[None] * 4) if isinstance(text, Tensor) else text.tensors for text in texts]
        return cls(*(_rows(parts) for parts in zip(*each, strict=True)))  # type: ignore[arg-type]

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        return self.embeddings, self.pooled, self.sizes, self.labels, self.guidance_scale

    def each(self, change: Callable[[Tensor], Tensor]) -> Context:
        """A new one of these tensors, changed."""
        return Context(*(part if part is None else change(part) for part in self.tensors))  # type: ignore[arg-type]

    def guided(self, scale: float | Tensor) -> Context:
        """A new one of these tensors that tells this guidance_scale: of all rows, or (B,)."""
        rows = torch.as_tensor(scale, dtype=torch.float32, device=self.embeddings.device).expand(len(self))
        return Context(*self.tensors[:-1], rows)

    def __len__(self) -> int:
        return len(self.embeddings)

    def to(self, dtype: torch.dtype) -> Context:
        """Itself, with embeddings of this type from now on."""
        if self.embeddings.dtype != dtype:
            self.embeddings, self._made = self.embeddings.to(dtype), {}
        return self

    def once(self, layer: nn.Module, make: Callable[[Tensor], T]) -> T:
        """make(embeddings), computed at this layer's first call and remembered.

        Where gradients are recorded it is computed at every call: each has a graph of its own.
        """
        if torch.is_grad_enabled():
            return make(self.embeddings)
        if layer not in self._made:
            self._made[layer] = make(self.embeddings)
        return self._made[layer]

    def look(self, layer: Any, q: Tensor, k: Tensor) -> None:
        """Told what an attention layer compares. Who wants to see it takes its place."""


def _rows(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """The rows of all parts, where there are all."""
    given = [part for part in parts if part is not None]
    return torch.cat(given) if len(given) == len(parts) else None


# (xt, t, context) -> the UNet's answer: (B, C, h, w), (B,) and (k * B, N, D) to (k * B, C, h, w)
Predict = Callable[[Tensor, Tensor, Tensor | Context], Tensor]


def of_text(context: Tensor | Context, layer: nn.Module, make: Callable[[Tensor], T]) -> T:
    """What a layer makes of the text: anew of embeddings (B, N, D), once in a run of its Context."""
    return context.once(layer, make) if isinstance(context, Context) else make(context)


def looked(context: Tensor | Context | None, layer: nn.Module, q: Tensor, k: Tensor) -> None:
    """Tells a run's Context what this layer compares: q (k * B, pixels, C) with k (k * B, M, C)."""
    if isinstance(context, Context):
        context.look(layer, q, k)
