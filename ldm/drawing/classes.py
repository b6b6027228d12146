"""Classes that a model draws by number or name, beside the prompt: ADM's, and those of LDM's ImageNet models.

A UNet with num_class_embeds = K + 1 knows the classes 0 to K - 1. The label K says nothing: guidance compares
with it, as with the empty prompt, and it is what a share of training sees (Ho & Salimans 2022). LDM's
ImageNet model has 1001 in the same order.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.model.context import Context
from ldm.recipes import options

Label = int | str
Labels = Label | Sequence[Label] | Tensor  # one for all images, or one for each prompt


def numbers_of(asked: Labels, count: int, names: Sequence[str], nothing: int | None = None) -> list[int]:
    """The numbers of classes that are asked for by number or by name.

    count: of classes. names: theirs, in order; empty if they have none. nothing: the number that says
    nothing, whose name is ""; None if there is none. A string of digits that is no name is a number.
    Raises ValueError, with what is known, for any other.
    """
    each = asked.tolist() if isinstance(asked, Tensor) else asked
    each = [each] if isinstance(each, int | str) else list(each)
    if not each:
        raise ValueError(
            "class labels are an empty list: expected one for all images, or one for each prompt"
        )
    return [_number(one, count, names, nothing) for one in each]


def _number(asked: object, count: int, names: Sequence[str], nothing: int | None) -> int:
    if isinstance(asked, str):
        if asked in names:
            return list(names).index(asked)
        if nothing is not None and asked == "":
            return nothing
    try:
        number = int(asked) if isinstance(asked, str) and asked.isdecimal() else operator.index(asked)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = -1
    if not isinstance(asked, bool) and (0 <= number < count or number == nothing):
        return number
    known = [f"0 to {count - 1}", *([f"{nothing}, which says nothing"] if nothing is not None else [])]
    if names:
        near = difflib.get_close_matches(str(asked), names, n=1)
        known.append(f"a name: did you mean {near[0]}?" if near else f"a name: {_some(names)}")
    raise ValueError(f"class label {asked!r} is not known: expected {', or '.join(known)}")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:30])
    return f"{shown} and {len(names) - 30} more" if len(names) > 30 else shown


def labels_for(asked: Labels | None, embeds: int | None, names: Sequence[str]) -> list[int] | None:
    """The labels that a UNet is told, of embeds = num_class_embeds; None if it has no classes.

    Raises ValueError if it has and none is asked for, if it has not and one is, or if it does not know one.
    """
    if embeds is None:
        if asked is not None:
            raise ValueError(f"class label {asked!r}: this model has no classes, leave it out")
        return None
    if asked is None:
        which = f" ({_some(names)})" if names else ""
        raise ValueError(
            f"this model draws classes: give a class label, 0 to {embeds - 2} or a name{which}, or "
            f"{embeds - 1}, which says nothing"
        )
    return numbers_of(asked, embeds - 1, names, nothing=embeds - 1)


def classed(
    context: Context, uncond: Context, labels: Sequence[int] | None, nothing: int, images: int
) -> tuple[Context, Context]:
    """Both with labels: those asked for, and nothing. As they are where labels is None.

    context, uncond: a row an image, so many images of each prompt. labels: one for all prompts or one for
    each; one prompt stands for all labels.
    Raises ValueError if there are as many labels neither as prompts nor as one.
    """
    if labels is None:
        return context, uncond
    rows, count = len(context), len(labels)
    if rows == images and count > 1:
        options.check_count(images, count)
        context, uncond = (each.each(lambda x: torch.cat([x] * count)) for each in (context, uncond))
    elif count not in (1, rows // images):
        raise ValueError(f"{count} class labels for {rows // images} prompts: give one, or one for each")
    device = context.embeddings.device
    asked = torch.tensor(labels, device=device).repeat_interleave(images if count > 1 else len(context))
    return _with(context, asked), _with(uncond, torch.full_like(asked, nothing))


def _with(told: Context, labels: Tensor) -> Context:
    return Context(told.embeddings, told.pooled, told.sizes, labels)


def check_names(names: Sequence[str], embeds: int | None) -> None:
    """Raises ValueError unless there are no names, or those of the classes of a UNet with so many embeds."""
    if names and len(names) + 1 != embeds:
        raise ValueError(
            f"{len(names)} class_names and unet.num_class_embeds={embeds}: expected one more, which "
            "says nothing. Are these parts of one model?"
        )
