"""torch.compile of the parts of a model, for training alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class CompiledInTraining:
    """The forward of one module: compiled in training, for one shape at a time, and as it was in use.

    It is compiled at its first call, so a copy of the module, made before, has a forward of its own.
    """

    def __init__(self, module: nn.Module, backend: str) -> None:
        self.module, self.plain, self.backend = module, module.forward, backend
        self.fast: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self.module.training:
            return self.plain(*args, **options)
        if self.fast is None:
            self.fast = torch.compile(self.plain, dynamic=False, backend=self.backend)
        return self.fast(*args, **options)


def compile_in_training(modules: Sequence[nn.Module], shapes: int, backend: str) -> None:
    """Replaces forward on each of these objects; shapes: that each will meet."""
    import torch._dynamo.config as limits  # seconds

    # Modules of a class share its code, and past the limit, without a word, nothing more is compiled.
    needed = len(modules) * (shapes + 1)
    limits.recompile_limit = max(limits.recompile_limit, needed)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, needed)
    for module in modules:
        module.forward = CompiledInTraining(module, backend)
