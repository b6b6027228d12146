"""Single files, `model.safetensors` with all parts of a Stable Diffusion 1 or 2, read and written.

A file that we write says in its header what it consists of, so that it comes back without recognition. Of
another's file the kind is recognised from names and shapes. What these cannot show, the kind of prediction,
is looked for in its notes, and then measured: at the noisiest level an eps model must answer with the noise.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.diffusion.scheduler import Scheduler
from ldm.drawing.devices import default_dtype
from ldm.files.checkpoint import fill_model, read_tensors
from ldm.files.config import MAX_JSON, read_config, replacing
from ldm.formats.kinds import KINDS, PREDICTIONS, Kind, recognise
from ldm.formats.pieces import TITLES, Pieces, Tick, check_absent, read_kind
from ldm.formats.stock import Layout
from ldm.formats.tensors import CLASSES, averaged, join, split, usual
from ldm.formats.vocabulary import clip_merges, clip_tokenizer, clip_vocab
from ldm.recipes import options
from text_encoder.tokenizer import Tokenizer

log = logging.getLogger(__name__)

HEADER = "ldm.formats.parts"  # the name of our note in a file's header
NOTED = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
TEXTS = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
EPS_LIKE, V_LIKE = 0.8, 0.5  # cosine of the answer and the noise: above is eps, below is v


# What a file says of itself


def read_header(path: Path) -> dict[str, str]:
    """The notes in a safetensors file's header. Raises ValueError if it has none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        raise ValueError(f"no such file {path}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); is it cut short?") from None


def tokenizer_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """The files of a tokenizer, without the vocabulary if that is CLIP's."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        own = tokenizer.vocab != clip_vocab() or tuple(tokenizer.merges) != clip_merges()
        return {name: (Path(folder) / name).read_text("utf-8") for name in (TEXTS if own else TEXTS[2:])}


def tokenizer_of(texts: Mapping[str, Any], source: Path) -> Tokenizer:
    """The tokenizer of such texts. Raises ValueError if they are of none."""
    with tempfile.TemporaryDirectory() as folder:
        if not texts.keys() & set(TEXTS[:2]):
            clip_tokenizer().save(folder)
        for name, text in texts.items():
            if name not in TEXTS or not isinstance(text, str):
                raise ValueError(f"{source}: its header has a tokenizer's file {name!r}: expected {TEXTS}")
            (Path(folder) / name).write_text(text, "utf-8")
        return Tokenizer.from_folder(folder)


def make_header(pieces: Pieces) -> dict[str, str]:
    """The notes of a file that we write: ours, and those of the field's ModelSpec that tools look for."""
    kind = pieces.kind
    ours = {
        "pipeline": kind.pipeline,
        **{part: asdict(config) for part, config in kind.configs().items()},
        "scheduler": dict(kind.scheduler),
        "low_res_scheduler": kind.low_res_scheduler and dict(kind.low_res_scheduler),
        "max_noise_level": kind.max_noise_level,
        "tokenizer": tokenizer_texts(pieces.tokenizer),
        "defaults": asdict(pieces.defaults),
    }
    wide = kind.unet.cross_attention_dim == 1024
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-v{2 if wide else 1}",
        "modelspec.prediction_type": "v" if kind.prediction == "v_prediction" else kind.prediction,
        HEADER: json.dumps(ours, allow_nan=False),
    }


def kind_of_header(text: str, path: Path) -> tuple[Kind, Tokenizer, options.Defaults]:
    """The kind, tokenizer and defaults that our note in a header describes.

    Raises ValueError if it is broken.
    """
    source = f"{path}, header {HEADER}"
    try:
        if len(text) > MAX_JSON:
            raise ValueError("it is too long")
        note = json.loads(text)
        configs = {part: read_config(cls.config_class, note[part], source) for part, cls in CLASSES.items()}
        if note["pipeline"] not in TITLES:
            raise ValueError(f"the pipeline {note['pipeline']!r} is none of {', '.join(TITLES)}")
        kind = Kind(
            title=TITLES[note["pipeline"]],
            pipeline=note["pipeline"],
            scheduler=dict(note["scheduler"]),
            low_res_scheduler=note["low_res_scheduler"],
            max_noise_level=note.get("max_noise_level"),
            **configs,
        )
        Scheduler.from_config(kind.scheduler)
        defaults = read_config(options.Defaults, note["defaults"], source)
        return kind, tokenizer_of(dict(note["tokenizer"]), path), defaults
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # or JSON of another form
        raise ValueError(f"{source} is not understood: {error}") from error


# What a model predicts


def closeness(answer: Tensor, noise: Tensor) -> float:
    """The cosine of the angle between a model's answer and the noise that it was given."""
    return F.cosine_similarity(answer.flatten(), noise.flatten(), dim=0).item()


@torch.no_grad()
def measure_prediction(pieces: Pieces) -> tuple[str | None, float]:
    """What a text-to-image model predicts, and the cosine that says so; None where that is in between.

    At the last level xt is noise alone. eps is then xt, and v nearly -x0, which knows nothing of the noise.
    """
    configs = pieces.kind.configs()
    unet, text_encoder = (
        fill_model(CLASSES[part], configs[part], pieces.tensors[part], part)
        for part in ("unet", "text_encoder")
    )
    tokens = pieces.tokenizer([""])
    noise = torch.randn(1, pieces.kind.unet.in_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([pieces.kind.scheduler["num_train_timesteps"] - 1])
    likeness = closeness(unet(noise, t, text_encoder(tokens)), noise)
    if likeness > EPS_LIKE:
        return "epsilon", likeness
    return ("v_prediction" if 0 < abs(likeness) < V_LIKE else None), likeness


def noted_prediction(header: Mapping[str, str], names: Mapping[str, Any]) -> tuple[str, str] | None:
    """What the file's notes say that it predicts, and where they do."""
    noted = NOTED.get(header.get("modelspec.prediction_type", ""))
    if noted:
        return noted, "its header says so"
    if "v_pred" in names or "model.v_pred" in names:
        return "v_prediction", "it holds the note v_pred"
    return None


# Reading and writing


def read_single(
    path: Path, *, config: Path | None = None, prediction: str | None = None, ema: bool = False
) -> Pieces:
    """The pieces of a single safetensors file; its notes say what was recognised, and why.

    config: a folder whose configurations and tokenizer are the file's, for a model that is not known.
    prediction: "epsilon" or "v_prediction", where the file does not say. ema: the averaged UNet.
    Raises ValueError for an unknown model, and with the first names unless each is needed or known.
    """
    if prediction is not None:
        options.check_choice("prediction", prediction, PREDICTIONS)
    header, tensors = read_header(path), read_tensors(path)
    shapes = {usual(name): tuple(value.shape) for name, value in tensors.items()}
    if ema:
        tensors = averaged(tensors, str(path))
    said, names, defaults = noted_prediction(header, shapes), [], options.Defaults()
    if config is not None:
        kind, tokenizer = read_kind(config), Tokenizer.from_folder(config / "tokenizer")
        said, by = None, f"the configuration in {config}"
    elif HEADER in header:
        kind, tokenizer, defaults = kind_of_header(header[HEADER], path)
        said, by = None, "its own header"
    else:
        names = recognise(shapes, str(path))
        kind, by = KINDS[names[0]], "its names and shapes"
        tokenizer = clip_tokenizer(kind.pad)
    parts, report = split(tensors, kind.configs(), str(path), kind.title)
    pieces = Pieces(kind, tokenizer, parts, [report], [], defaults)
    chosen, why = settle_prediction(pieces, prediction, said, several=len(names) > 1)
    others = [KINDS[name] for name in names if KINDS[name].prediction == chosen]
    if others:
        kind = others[0]
    elif chosen != kind.prediction:
        kind = replace(kind, scheduler={**kind.scheduler, "prediction_type": chosen})
    notes = [f"{path} is {kind.title}, by {by}", f"it predicts {chosen}: {why}"]
    notes += ["the UNet's weights are the averaged ones"] if ema else []
    return replace(pieces, kind=kind, notes=notes)


def settle_prediction(
    pieces: Pieces, asked: str | None, said: tuple[str, str] | None, *, several: bool
) -> tuple[str, str]:
    """What a model predicts, and why that is known. several: its kind exists with both.

    Raises ValueError where it has to be asked for.
    """
    usual = pieces.kind.prediction
    if asked and usual == "flow":
        raise ValueError(f"prediction={asked!r}: {pieces.reports[0].source} predicts a flow, leave it out")
    if asked:
        return asked, "asked for"
    if said:
        return said
    if not several:
        return usual, f"as {pieces.kind.title} does"
    measured, likeness = measure_prediction(pieces)
    why = f"measured: its answer to noise alone is like that noise to {likeness:.2f}, where eps is 1 and v 0"
    if measured is None:
        raise ValueError(
            f"{pieces.reports[0].source}: {why}. Say which it is by prediction: {' or '.join(PREDICTIONS)}"
        )
    return measured, why


def write_single(
    pieces: Pieces, path: Path, dtype: torch.dtype | None = None, tick: Tick = lambda: None
) -> None:
    """Writes one safetensors file that CompVis', AUTOMATIC1111's, diffusers' and our readers take.

    Whole or not at all. dtype: None is as the tensors are. Raises ValueError if something is in its place.
    """
    check_absent(path)
    tensors = join(pieces.cast(dtype, tick), pieces.kind.configs())
    with replacing(path, overwrite=False) as temporary:
        save_file(
            {name: value.contiguous() for name, value in tensors.items()}, temporary, make_header(pieces)
        )


class SingleFiles:
    """What a pipeline can do with single files."""

    layouts: ClassVar[Mapping[str, Layout]]
    _dtype_by_device: bool

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        config: str | Path | None = None,
        prediction: str | None = None,
        ema: bool = False,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """The pipeline of a single .safetensors file, as of Stable Diffusion 1 or 2, on the CPU, offline.

        config, prediction and ema: see read_single. dtype, torch_dtype: as in from_pretrained. What was
        recognised is logged, and `python -m ldm.convert FILE` prints it.
        Raises ValueError for an unknown model, unless it is whole, and if no pipeline here draws with it.
        """
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype}: give one of them")
        dtype, folder = dtype or torch_dtype, None if config is None else Path(config)
        pieces = read_single(Path(path), config=folder, prediction=prediction, ema=ema)
        for note in (*pieces.notes, pieces.reports[0].sentence()):
            log.log(logging.WARNING if "measured" in note else logging.INFO, note)
        pieces.check_drawn(cls.layouts)
        pipe = cls(**pieces.components(dtype or default_dtype(torch.device("cpu"))))
        pipe._dtype_by_device = dtype is None
        return pipe.to(memory_format=torch.channels_last)  # type: ignore[attr-defined]

    def save_single_file(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes all parts into one .safetensors; dtype None is as they are.

        Raises ValueError if the file exists.
        """
        write_single(pieces_of(self), Path(path), dtype)


def pieces_of(pipe: Any) -> Pieces:
    """The pieces of a pipeline, sharing its tensors. Raises ValueError for a kind that has no single file."""
    models = {part: getattr(pipe, part) for part in CLASSES}
    configs = {part: model.config for part, model in models.items()}
    name = pipe.layout.stock_class
    if name not in TITLES:
        raise ValueError(f"a {name} has no single file here: use save_pretrained, which writes a folder")
    low = getattr(pipe, "low_res_scheduler", None)
    kind = Kind(
        title=TITLES[name],
        pipeline=name,
        scheduler=pipe.scheduler.config,
        low_res_scheduler=low and low.config,
        max_noise_level=getattr(pipe, "max_noise_level", None),
        **configs,
    )
    tensors = {
        part: {name: value.detach().cpu() for name, value in model.state_dict().items()}
        for part, model in models.items()
    }
    return Pieces(kind, pipe.tokenizer, tensors, [], [], pipe.defaults)
