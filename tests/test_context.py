"""What a run computes once: rows that no text has touched yet, and what layers make of the text."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.schedule import Level
from ldm.model.attention import CrossAttention, SelfAttention
from ldm.model.blocks import TimeResnet
from ldm.model.context import Context, repeated
from ldm.model.unet import UNet, UNetConfig
from tests.test_unet import ADM, ADM_CROSS, CROSS, ODD, POOLED, SDXL_TINY, TINY

SD15 = TINY | {  # the text at the first level
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
SD21 = SD15 | {"attention_head_dim": [2, 3, 5], "use_linear_projection": True}
UPSCALER = SD21 | CROSS | {"only_cross_attention": [True, True, False], "num_class_embeds": 7}
NO_TEXT = ADM | {"num_class_embeds": None}
EVERY = {
    "sd15": SD15,
    "sd21": SD21,
    "upscaler": UPSCALER,
    "odd": ODD,
    "pooled": POOLED,
    "sdxl": SDXL_TINY,
    "adm": ADM,
    "adm-cross": ADM_CROSS,
    "no-text": NO_TEXT,
}


def inputs(config: UNetConfig, texts: int, size: tuple[int, int] = (9, 7)) -> tuple[Tensor | None, ...]:
    """xt, t (each sample its own), so many texts for each, and class labels where there are classes."""
    xt, t = torch.randn(2, config.in_channels, *size).double(), torch.tensor([999, 20])
    context: Tensor | Context = torch.randn(texts * 2, 5, config.cross_attention_dim).double()
    if config.addition_embed_type == "text_time":
        pooled, sizes = torch.randn(texts * 2, config.pooled_channels), torch.randint(2048, (texts * 2, 6))
        context = Context(context, pooled.double(), sizes)
    return xt, t, context, torch.tensor([1, 4]) if config.num_class_embeds else None


def build(name: str) -> UNet:
    """In float64, in which other kernels for other counts of rows differ by less than any mistake."""
    return UNet(UNetConfig(**EVERY[name])).double().eval()


def as_one_batch(
    unet: UNet, xt: Tensor, t: Tensor, context: Tensor, labels: Tensor | None, texts: int
) -> Tensor:
    """The answers to the repeated batch."""
    labels = None if labels is None else labels.repeat(texts)
    return unet(xt.repeat(texts, 1, 1, 1), t.repeat(texts), context, labels)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def calls_of(unet: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> Counter[nn.Module]:
    """Counts, from now on, the rows that each module of this kind is called with."""
    rows: Counter[nn.Module] = Counter()
    for module in unet.modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(lambda m, given: rows.update({m: len(given[0])}))
    return rows


@pytest.mark.parametrize("texts", [2, 3])
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_several_texts_are_the_repeated_batch(name, texts):
    """In both memory layouts, from tensors and from a run's Context."""
    unet = build(name)
    even = unet.config.down_block_types[-1] == "ResnetDownsampleBlock2D"
    xt, t, context, labels = inputs(unet.config, texts, (8, 6) if even else (9, 7))
    expected = as_one_batch(unet, xt, t, context, labels, texts)
    run = Context.of(context)
    for text in (context, run, run):
        assert_same(unet(xt, t, text, labels), expected)
    one, other = (unet(xt, each, run, labels) for each in (t[:1], t[:1].expand(2)))
    assert_same(one, other)  # t of one row is that of all
    unet.to(memory_format=torch.channels_last)
    assert_same(unet(xt.to(memory_format=torch.channels_last), t, run, labels), expected)


@torch.no_grad()
def test_rows_are_shared_up_to_the_text():
    """The first resnet and self-attention see each sample once, and what follows sees it with every text."""
    unet = build("sd15")
    rows = calls_of(unet, (TimeResnet, SelfAttention))
    xt, t, context, _ = inputs(unet.config, 3)
    unet(xt, t, context)
    first = unet.down_blocks[0]
    shared = {first.resnets[0], first.attentions[0].transformer_blocks[0].attn1}
    assert {module: count for module, count in rows.items() if count == 2} == dict.fromkeys(shared, 2)
    assert {count for module, count in rows.items() if module not in shared} == {6}


@torch.no_grad()
def test_what_acts_from_the_start_is_met_at_the_start():
    """Pooled text, SDXL's too, and a class for each text enter with the time: nothing is left to share."""
    pooled, sdxl, classes = build("pooled"), build("sdxl"), build("adm")
    for unet in (pooled, sdxl, classes):
        rows = calls_of(unet, TimeResnet)
        xt, t, context, _ = inputs(unet.config, 2)
        labels = torch.tensor([1, 4, 0, 0]) if unet is classes else None
        assert_same(unet(xt, t, context, labels), unet(xt.repeat(2, 1, 1, 1), t.repeat(2), context, labels))
        assert set(rows.values()) == {8}  # two calls of four rows


def test_gradients_are_those_of_the_repeated_batch():
    """Also with gradient checkpointing and from a Context, which then remembers nothing."""
    unet = build("sd15")
    xt, t, context, _ = inputs(unet.config, 2)
    weights = torch.linspace(-1, 1, 4 * 3 * 9 * 7).view(4, 3, 9, 7).double()

    def gradients(answer: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((answer * weights).sum(), list(unet.parameters())))

    expected = gradients(as_one_batch(unet, xt, t, context, None, 2))
    run = Context(context)
    found = [gradients(unet(xt, t, each)) for each in (context, run)]
    unet.enable_gradient_checkpointing()
    found.append(gradients(unet(xt, t, run)))
    for each in found:
        for one, other in zip(each, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_a_run_makes_keys_and_values_once():
    """In two threads at once, each with its own text: every layer once a run, and the right answers."""
    pooling = {"addition_embed_type": "text", "addition_embed_type_num_heads": 5}
    unet = UNet(UNetConfig(**SD21 | pooling | {"in_channels": 3})).eval()
    layers = [module.to_k for module in unet.modules() if type(module) is CrossAttention]
    layers.append(unet.add_embedding.proj)
    calls: list[nn.Module] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    texts, xt = torch.randn(2, 2, 2, 5, 20), torch.randn(2, 3, 8, 6)  # texts: of each run context and uncond

    @torch.no_grad()
    def run(text: Tensor, answers: list[Tensor]) -> None:
        denoise = classifier_free(unet, *text, 4.0, "v")
        answers += [denoise(xt, Level(t, 0.6, 0.8)) for t in (900.0, 500.0, 100.0)]

    found: list[list[Tensor]] = [[], []]
    threads = [threading.Thread(target=run, args=pair) for pair in zip(texts, found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(calls) == dict.fromkeys(layers, 2)  # once in each run of three steps
    for text, answers in zip(texts, found, strict=True):
        alone: list[Tensor] = []
        run(text, alone)
        assert all(torch.equal(one, other) for one, other in zip(answers, alone, strict=True))
    assert not torch.equal(found[0][0], found[1][0])


@torch.no_grad()
def test_a_context_takes_the_type_of_the_weights():
    """What was made in another type is forgotten."""
    layer, context = CrossAttention(24, 20, heads=3), Context(torch.randn(2, 5, 20))
    k, v = layer.keys_values(torch.randn(2, 15, 24), context)
    assert layer.keys_values(torch.randn(2, 15, 24), context.to(torch.float32))[0] is k
    half = layer.to(torch.bfloat16).keys_values(k, context.to(torch.bfloat16))
    assert {each.dtype for each in half} == {context.embeddings.dtype} == {torch.bfloat16}
    torch.testing.assert_close(half[1].float(), v, atol=0.03, rtol=0.03)


def test_a_context_of_several_holds_what_all_of_them_hold():
    told = Context(torch.randn(2, 5, 6), torch.randn(2, 3), torch.ones(2, 6), torch.tensor([3, 4])).guided(
        2.5
    )
    assert told.guidance_scale.tolist() == [2.5, 2.5]
    both = Context.of(told, told.each(torch.zeros_like))
    assert [len(part) for part in both.tensors] == [4, 4, 4, 4, 4]
    assert all(torch.equal(part[:2], own) for part, own in zip(both.tensors, told.tensors, strict=True))
    assert not both.pooled[2:].any()
    text_alone = Context.of(told, torch.randn(1, 5, 6))
    assert (len(text_alone), *text_alone.tensors[1:]) == (3, None, None, None, None)


def test_repeated():
    """The order of Tensor.repeat in either layout, and x itself where there is nothing to repeat."""
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    wide = repeated(x, like=torch.empty(6, 1))
    assert torch.equal(wide, x.repeat(3, 1, 1, 1))
    assert wide.is_contiguous(memory_format=torch.channels_last)
    assert repeated(x, like=torch.empty(2)) is repeated(x, like=torch.empty(1)) is x
    assert repeated(x, like=Context(torch.empty(4, 5, 6))).shape == (4, 3, 4, 5)


@pytest.mark.parametrize("name", ["t", "context"])
def test_rows_that_do_not_fit_are_refused(name):
    unet = build("sd15")
    xt, t, context, _ = inputs(unet.config, 2)
    given = {"t": t, "context": context}
    with pytest.raises(ValueError, match=f"{name} has 3 rows and xt has 2: expected as many, or a multiple"):
        unet(xt, **given | {name: torch.cat([given[name], given[name]])[:3]})
