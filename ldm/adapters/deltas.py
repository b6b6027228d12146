"""What an adapter adds to a weight: a formula for each kind, of the factors that its file holds.

Every delta is float32 and has the shape of the weight, (out, in) or (out, in, k, k), or is that flattened to
(out, in * k * k). r is the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def tucker(core: Tensor, outward: Tensor, inward: Tensor) -> Tensor:
    """core x1 outward x2 inward, a tensor by its first two modes (Tucker 1966): (out, in, k, k).

    core: (r, r, k, k), output side first. outward: (r, out). inward: (r, in).
    """
    return torch.einsum("ijkl,io,jc->ockl", core, outward, inward)


def lora(down: Tensor, up: Tensor, mid: Tensor | None = None) -> Tensor:
    """up @ down (Hu et al. 2021, eq. 3); of convolutions LoCon: one to r channels, then a pointwise one.

    down: (r, in) or (r, in, k, k). up: (out, r) or (out, r, 1, 1).
    mid: (r, r, k, k) between a pointwise down and up, the Tucker form of LoCon (Yeh et al. 2024).
    """
    if mid is None:
        return up.flatten(1) @ down.flatten(1)
    return tucker(mid, up.flatten(1).T, down.flatten(1))


def loha(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, t1: Tensor | None = None, t2: Tensor | None = None
) -> Tensor:
    """(w1_a @ w1_b) * (w2_a @ w2_b), each by element (Hyeon-Woo et al. 2022, propositions 1 and 3).

    w_a: (out, r), w_b: (r, in) or (r, in * k * k). With cores t1, t2: (r, r, k, k), w_a: (r, out).
    """
    if t1 is None or t2 is None:
        return (w1_a @ w1_b) * (w2_a @ w2_b)
    return tucker(t1, w1_a, w1_b) * tucker(t2, w2_a, w2_b)


def lokr(
    w1: Tensor | None = None,
    w2: Tensor | None = None,
    w1_a: Tensor | None = None,
    w1_b: Tensor | None = None,
    w2_a: Tensor | None = None,
    w2_b: Tensor | None = None,
    t2: Tensor | None = None,
) -> Tensor:
    """kron(w1, w2) (Edalati et al. 2022; Yeh et al. 2024), each whole or a product of two.

    w1: (a, b). w2: (out / a, in / b) or (out / a, in / b, k, k).
    With a core t2: (r, r, k, k), w2_a is (r, out / a) and w2_b (r, in / b).
    """
    if w1 is None:
        assert w1_a is not None
        assert w1_b is not None
        w1 = w1_a @ w1_b
    if w2 is None:
        assert w2_a is not None
        assert w2_b is not None
        w2 = w2_a @ w2_b if t2 is None else tucker(t2, w2_a, w2_b)
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2)


def dora(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """magnitude * (weight + delta) / ||weight + delta|| - weight (Liu et al. 2024, eq. 5).

    magnitude: (out, 1, ...), with a norm for each output, or (1, in, ...), with one for each input.
    """
    changed = weight + delta
    others = [axis for axis in range(changed.ndim) if magnitude.shape[axis] == 1]
    return magnitude * changed / torch.linalg.vector_norm(changed, dim=others, keepdim=True) - weight


KINDS: dict[str, Callable[..., Tensor]] = {"lora": lora, "loha": loha, "lokr": lokr}
# Which factors a kind needs, any of these sets; what else it takes, it may lack.
NEEDS: dict[str, tuple[set[str], ...]] = {
    "lora": ({"down", "up"},),
    "loha": ({"w1_a", "w1_b", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}),
    "lokr": tuple(
        one | other
        for one in ({"w1"}, {"w1_a", "w1_b"})
        for other in ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
    ),
}
NEEDS["lora"] += ({"down", "up", "mid"},)


@dataclass(frozen=True, eq=False)
class Layer:
    """What an adapter does to one weight."""

    kind: str  # of KINDS
    factors: Mapping[str, Tensor]  # the arguments of its formula, as the file has them
    scale: float = 1.0  # alpha / r
    magnitude: Tensor | None = None  # DoRA's: (out, 1, ...) or (1, in, ...)

    @property
    def rank(self) -> int | None:
        """r; None where the factors are whole and have none."""
        for name in ("down", "w1_b", "w2_b"):
            if name in self.factors:
                return len(self.factors[name])
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to the weight, float32, of its shape. Raises RuntimeError where the shapes differ."""
        factors = {name: each.to(weight.device, torch.float32) for name, each in self.factors.items()}
        delta = self.scale * KINDS[self.kind](**factors)
        if len(delta) != len(weight):
            raise RuntimeError(f"{len(delta)} outputs, the weight has {len(weight)}")
        delta = delta.reshape(weight.shape)
        if self.magnitude is None:
            return delta
        shape = (*self.magnitude.shape[:2], *[1] * (weight.ndim - 2))
        magnitude = self.magnitude.to(weight.device, torch.float32).reshape(shape)
        return dora(weight.float(), delta, magnitude).reshape(weight.shape)

    def check(self, name: str, weight: Tensor) -> None:
        """Raises ValueError unless the delta has the shape of this weight; computes nothing."""
        shadow = Layer(
            self.kind,
            {key: each.to("meta") for key, each in self.factors.items()},
            magnitude=None if self.magnitude is None else self.magnitude.to("meta"),
        )
        try:
            shadow.delta(weight.to("meta"))
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{key} {tuple(each.shape)}" for key, each in self.factors.items())
            if self.magnitude is not None:
                shapes += f", magnitude {tuple(self.magnitude.shape)}"
            raise ValueError(
                f"{name}: {shapes} do not fit the weight {tuple(weight.shape)} of this model"
            ) from error
