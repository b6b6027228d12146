"""Networks whose features pictures are compared by. Their weights are files of the user; nothing is fetched.

An extractor has a name, the SHA-256 of its weights, the side of the squares it sees and how they are scaled.
Only the file that the FID is defined by makes figures of that name: others carry the extractor in theirs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.diffusion.noise import generator
from ldm.files.checkpoint import Undrawn, model_hash
from ldm.files.config import read_json
from ldm.metrics.inception import SIDE, InceptionV3
from ldm.metrics.weights import open_weights, sha256

FID = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # pt_inception-2015-12-05
IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # mean and deviation of [0, 255]: of DINOv2
CLIP = (122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)  # of CLIP
WIDTHS = (16, 32, 64, 64)  # channels of the layers of random-conv
ASKED = re.compile(r"(?P<name>[a-z0-9-]+)(=(?P<path>.+?))?(@(?P<digest>[0-9a-fA-F]{8,64}))?")


class Features(NamedTuple):
    """Of a batch of pictures."""

    pooled: Tensor  # (B, D)
    spatial: Tensor | None = None  # (B, S): of sFID
    probabilities: Tensor | None = None  # (B, K): of the Inception Score


class Extractor(Protocol):
    """What measures ask of a network."""

    name: str
    digest: str  # SHA-256 of the weights, or the start of it, in hex
    side: int  # pixels of the squares it sees
    filter: str  # that pictures are scaled by, see folders.FILTERS

    def __call__(self, pixels: Tensor) -> Features:
        """pixels: (B, 3, side, side) float32 in [0, 255]."""
        ...


def label(figure: str, extractor: Extractor) -> str:
    """What a figure is called that this extractor made: FID of the FID's own weights alone.

    figure: such as FD, sFD, KD, IS or precision.
    """
    if extractor.name == "inception" and extractor.digest == FID:
        return {"FD": "FID", "sFD": "sFID", "KD": "KID"}.get(figure, figure)
    mark = "" if extractor.name == RandomConv.name else f"-{extractor.digest[:8]}"
    return f"{figure}-{extractor.name}{mark}"


def standard(pixels: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """pixels (B, 3, H, W) less a mean, over a deviation, channel by channel."""
    column = lambda values: torch.tensor(values, device=pixels.device).view(3, 1, 1)
    return (pixels - column(mean)) / column(deviation)


class RandomConv:
    """Convolutions that were never trained, drawn from a fixed seed: means of every layer over the picture.

    They see colours and textures, no meaning. For tests and first looks where there are no weights.
    """

    name, filter = "random-conv", "bicubic"
    side = 64

    def __init__(self, device: torch.device) -> None:
        inside, self.layers = 3, list[Tensor]()
        for number, width in enumerate(WIDTHS):
            draw = torch.randn(width, inside, 3, 3, generator=generator("random-conv", number))
            self.layers.append((draw * (2 / (9 * inside)) ** 0.5).to(device))  # He et al. 2015, eq. 10
            inside = width
        told = hashlib.sha256(b"".join(layer.cpu().numpy().tobytes() for layer in self.layers))
        self.digest = told.hexdigest()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        h, means = pixels.to(self.layers[0].device) / 127.5 - 1, []
        for layer in self.layers:
            h = torch.conv2d(h, layer, stride=2, padding=1).relu()
            means.append(h.mean((2, 3)))
        return Features(torch.cat(means, 1), h[:, :7].flatten(1))


class Inception:
    """InceptionV3 with the weights of a file that has the names of the FID's PyTorch port."""

    name, side = "inception", SIDE

    def __init__(self, path: Path, device: torch.device) -> None:
        """Raises ValueError unless the file is there and holds just that network."""
        tensors = {name: value.float() for name, value in open_weights(str(path)).items()}
        with torch.device("meta"), Undrawn():
            self.model = InceptionV3()
        wanted = self.model.state_dict()
        for name in wanted.keys() - tensors.keys():
            if name.endswith("num_batches_tracked"):  # older files lack it, and nothing reads it here
                tensors[name] = torch.zeros(())
        odd = sorted(wanted.keys() ^ tensors.keys())
        odd += [name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape]
        if odd:
            raise ValueError(
                f"{path} differs from the FID's InceptionV3 in {len(odd)} tensors, the first {odd[0]}: "
                "expected pt_inception-2015-12-05-6726825d.pth of pytorch-fid or torch-fidelity"
            )
        self.model.load_state_dict(tensors, assign=True)
        self.model.requires_grad_(False).eval().to(device)
        self.digest, self.filter, self.device = sha256(path), "bicubic", device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        return Features(*self.model(pixels.to(self.device)))


def read_whole(model_class: Any, folder: Path) -> Any:
    """A model of transformers from a folder, with all of its weights and none drawn anew.

    Raises ValueError otherwise.
    """
    from transformers.utils import logging as told

    before = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()  # its report is our error
    told.disable_progress_bar()
    try:
        model, loaded = model_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder} is not a {model_class.__name__} in safetensors: {reason}") from None
    finally:
        told.set_verbosity(before[0])
        if before[1]:
            told.enable_progress_bar()
    if lacks := sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]])):
        raise ValueError(f"{folder} lacks {len(lacks)} of {model_class.__name__}'s weights: {lacks[0]} ...")
    return model.eval()


class Dino:
    """DINOv2's class token, normed (Oquab et al. 2024): of FD-DINOv2 (Stein et al. 2023), at 224 pixels."""

    name, side, filter = "dinov2", 224, "bicubic"

    def __init__(self, folder: Path, device: torch.device) -> None:
        """folder: of a Dinov2Model. Raises ValueError unless it is whole."""
        check_kind(folder, "dinov2")
        from transformers import Dinov2Model

        self.model = read_whole(Dinov2Model, folder).to(device)
        self.digest, self.device = model_hash([folder]), device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        return Features(self.model(standard(pixels.to(self.device), *IMAGENET)).pooler_output)


class Clip:
    """CLIP's picture embeddings (Radford et al. 2021): of CMMD and, with its text half, of the CLIP score."""

    name = "clip"

    def __init__(self, folder: Path, device: torch.device) -> None:
        """folder: of a CLIPModel or a CLIPVisionModelWithProjection. Raises ValueError unless it is whole."""
        kind = check_kind(folder, "clip", "clip_vision_model")
        from transformers import CLIPModel, CLIPVisionModelWithProjection

        self.model = read_whole(CLIPModel if kind == "clip" else CLIPVisionModelWithProjection, folder).to(
            device
        )
        tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        self.text = self.model.text_model if kind == "clip" and tokenizer else None
        self.side: int = self.model.vision_model.config.image_size
        self.folder, self.digest, self.device = folder, model_hash([folder]), device
        self.filter = "bicubic"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        seen = self.model.vision_model(pixel_values=standard(pixels.to(self.device), *CLIP))
        return Features(self.model.visual_projection(seen.pooler_output))

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """(B, D) of texts, cut to what CLIP reads. Raises ValueError without a text half."""
        if self.text is None:
            raise ValueError(f"{self.folder} has no text half of CLIP and tokenizer: expected a CLIPModel's")
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
        length = self.text.config.max_position_embeddings
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        read = self.text(**tokens.to(self.device))
        return self.model.text_projection(read.pooler_output).cpu()


def check_kind(folder: Path, *kinds: str) -> str:
    """The model_type of a folder of transformers. Raises ValueError if it is none of these."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in kinds:
        raise ValueError(f"{folder} holds a model of type {kind!r}: expected {' or '.join(kinds)}")
    return kind


MAKERS: dict[str, Callable[[Path, torch.device], Extractor]] = {
    "inception": Inception,
    "dinov2": Dino,
    "clip": Clip,
}


def find_extractor(asked: str, device: torch.device, scaling: str | None = None) -> Extractor:
    """The extractor by NAME, NAME=PATH or NAME=PATH@SHA256, on a device.

    scaling: the filter in place of the extractor's own. SHA256: 8 of its digits or more, which are checked.
    Raises ValueError for an unknown name, for weights that are not there or are others.
    """
    parts = ASKED.fullmatch(asked)
    name = parts["name"] if parts else asked
    if name not in (RandomConv.name, *MAKERS):
        raise ValueError(
            f"extractor={asked!r}: expected {RandomConv.name}, or one of {', '.join(MAKERS)} with its "
            "weights, such as inception=pt_inception-2015-12-05-6726825d.pth"
        )
    assert parts is not None
    path, digest = parts["path"], (parts["digest"] or "").lower()
    if name == RandomConv.name:
        if path or digest:
            raise ValueError(f"extractor={asked!r}: {name} is drawn from a seed and takes no weights")
        extractor: Extractor = RandomConv(device)
    else:
        if not path:
            raise ValueError(f"extractor={asked!r} has no weights: give {name}=PATH; nothing is fetched")
        extractor = MAKERS[name](Path(path), device)
        shared = min(len(digest), len(extractor.digest))
        if extractor.digest[:shared] != digest[:shared]:
            raise ValueError(f"{path} has the SHA-256 {extractor.digest}: expected {digest}. Get it again")
    if scaling is not None:
        extractor.filter = scaling
    return extractor
