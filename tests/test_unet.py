"""The UNet against diffusers' UNet2DConditionModel on the same weights, and what it promises beside."""

import copy
import math

import pytest
import torch
from torch import nn

from ldm.files.checkpoint import save_model
from ldm.files.config import read_config
from ldm.model.attention import CrossAttention, SelfAttention
from ldm.model.blocks import ScaleShiftResnet, TimeResnet, timestep_embedding
from ldm.model.context import Context
from ldm.model.unet import UNet, UNetConfig

CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
TINY = CROSS | {
    "in_channels": 5,
    "out_channels": 3,
    "block_out_channels": (16, 24, 40),
    "norm_num_groups": 8,
    "cross_attention_dim": 20,
    "attention_head_dim": 4,
}
ODD = TINY | {  # every per-level option, and every small one, off its default
    "attention_head_dim": [2, 4, 8],
    "layers_per_block": [1, 2, 3],
    "transformer_layers_per_block": [1, 2, 1],
    "only_cross_attention": [True, True, False],
    "use_linear_projection": True,
    "num_class_embeds": 7,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "norm_eps": 1e-3,
    "block_out_channels": (24, 16, 40),
}
POOLED = TINY | {"addition_embed_type": "text", "addition_embed_type_num_heads": 5}
ADM = TINY | {  # Dhariwal & Nichol's options, as far as the field has names for them
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
    "mid_block_type": "UNetMidBlock2D",
    "num_class_embeds": 7,
    "out_channels": 10,  # learned variance
}
ADM_CROSS = TINY | {
    "down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": [4, 8, 2],
    "resnet_time_scale_shift": "scale_shift",
    "mid_block_type": None,
}
SDXL_TINY = TINY | {  # the first level looks at no text, the last one often
    "attention_head_dim": [2, 3, 5],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 12,
}
GUIDED = TINY | {"time_cond_proj_dim": 33}  # odd, which pads the sines
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": CROSS["down_block_types"],
    "up_block_types": CROSS["up_block_types"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "upcast_attention": None,
}
X4_UPSCALER = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "only_cross_attention": (True, True, True, False),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "num_class_embeds": 1000,
}


def tiny(**changes):
    return UNet(UNetConfig(**(TINY | changes)))


def pair(arguments):
    """diffusers' UNet with random weights, and ours with the same tensors: one copy of them in memory."""
    from diffusers import UNet2DConditionModel as Reference

    reference = Reference(**arguments)
    with torch.device("meta"):
        ours = UNet(read_config(UNetConfig, reference.config, "config.json"))
    ours.load_state_dict(reference.state_dict(), assign=True)
    return ours, reference


def inputs(config, size, batch=3):
    """xt, t (each sample its own), context, and class labels where there are classes."""
    xt = torch.randn(batch, config.in_channels, *size)
    t = torch.tensor([999, 0, 500])[:batch]
    context = torch.randn(batch, 6, config.cross_attention_dim)
    labels = torch.arange(1, batch + 1) if config.num_class_embeds else None
    return xt, t, context, labels


def told(config, context):
    """What ours and diffusers' UNet take beside the time: the same text, and with it what SDXL is told."""
    if config.time_cond_proj_dim is not None:
        from diffusers import LatentConsistencyModelPipeline as Stock

        w = torch.tensor([0.0, 1.5, 3.25])[: len(context)]
        waves = Stock.get_guidance_scale_embedding(None, w, config.time_cond_proj_dim)
        return Context(context).guided(w + 1), {"timestep_cond": waves}
    if config.addition_embed_type != "text_time":
        return context, {}
    pooled = torch.randn(len(context), config.pooled_channels)
    sizes = torch.randint(2048, (len(context), 6))
    more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    return Context(context, pooled, sizes), more


def error(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def gradients_of(loss, model, xt, context):
    """By name; the context has none where no level looks at it."""
    tensors = {"xt": xt, "context": context} | dict(model.named_parameters())
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {name: each for name, each in zip(tensors, found, strict=True) if each is not None}


REAL = [
    pytest.param(SD15, id="sd15", marks=pytest.mark.slow),
    pytest.param(SD21, id="sd21", marks=pytest.mark.slow),
    pytest.param(X4_UPSCALER, id="x4-upscaler", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        pytest.param(TINY, [(8, 12), (9, 7)], id="tiny"),
        pytest.param(ODD, [(8, 12), (13, 16)], id="odd"),
        pytest.param(POOLED, [(8, 12)], id="pooled-text"),
        pytest.param(GUIDED, [(8, 12)], id="guided"),
        pytest.param(SDXL_TINY, [(8, 12), (9, 7)], id="sdxl-tiny"),
        pytest.param(ADM, [(8, 12)], id="adm"),  # diffusers' resnet upsampling cannot do odd sizes
        pytest.param(ADM_CROSS, [(8, 12)], id="adm-cross"),
        *[pytest.param(*each.values, [(8, 16), (9, 6)], id=each.id, marks=each.marks) for each in REAL],
    ],
)
def test_matches_diffusers(arguments, sizes):
    """Same keys (strict), output, gradients of the inputs and of every parameter below a million numbers."""
    ours, reference = pair(arguments)
    for model in (ours, reference):  # the gradients of a real UNet would fill the memory
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.numel() < 1e6)
    for size in sizes:
        xt, t, context, labels = inputs(ours.config, size, batch=2 if ours.config.sample_size else 3)
        xt, context = xt.requires_grad_(), context.requires_grad_()
        text, more = told(ours.config, context)
        prediction = ours(xt, t, text, labels)
        expected = reference(xt, t, context, class_labels=labels, **more).sample
        assert prediction.shape == expected.shape
        assert error(prediction, expected) < 1e-5

    gradients, targets = (
        gradients_of((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), model, xt, context)
        for out, model in ((prediction, ours), (expected, reference))
    )
    assert gradients.keys() == targets.keys()
    for name, target in targets.items():
        if not name.endswith(
            ("to_k.bias", "k_proj.bias")
        ):  # softmax ignores what all keys share: rounding is all they get
            assert error(gradients[name], target) < 1e-4, name


@pytest.mark.parametrize(
    ("arguments", "channels_a_head", "millions"),
    [
        pytest.param(SD15, {40, 80, 160}, 859, id="sd15"),
        pytest.param(SD21, {64}, 865, id="sd21"),
        pytest.param(X4_UPSCALER, {64, 128}, 473, id="x4-upscaler"),
        pytest.param(SDXL, {64}, 2567, id="sdxl"),
    ],
)
def test_heads_are_what_the_checkpoints_mean(arguments, channels_a_head, millions):
    """attention_head_dim is the number of heads: 8 in SD 1.5, 5 to 20 of 64 channels in SD 2.1."""
    with torch.device("meta"):
        unet = UNet(UNetConfig(**arguments))
    layers = [module for module in unet.modules() if isinstance(module, CrossAttention)]
    assert {layer.to_q.out_features // layer.heads for layer in layers} == channels_a_head
    assert sum(parameter.numel() for parameter in unet.parameters()) // 1_000_000 == millions


def test_options_are_parts():
    """A configuration shows in what the UNet is made of."""
    plain, adm, odd = tiny(), UNet(UNetConfig(**ADM)), UNet(UNetConfig(**ODD))
    assert not any(isinstance(m, ScaleShiftResnet) for m in plain.modules())
    assert all(isinstance(m, ScaleShiftResnet) for m in adm.modules() if isinstance(m, TimeResnet))
    assert isinstance(adm.down_blocks[0].downsamplers[0], TimeResnet)
    firsts = [block.attentions[0].transformer_blocks[0].attn1 for block in odd.down_blocks[1:]]
    assert [isinstance(first, SelfAttention) for first in firsts] == [False, True]
    assert not any(isinstance(m, nn.Dropout) for m in plain.modules())
    assert sum(isinstance(m, nn.Dropout) for m in tiny(dropout=0.1).modules()) == sum(
        isinstance(m, TimeResnet) for m in plain.modules()
    )


@pytest.mark.parametrize("arguments", [TINY, ADM], ids=["tiny", "adm"])
def test_any_size(arguments):
    unet = UNet(UNetConfig(**arguments)).eval()
    for size in [(4, 4), (5, 7), (9, 14), (11, 6)]:
        xt, t, context, labels = inputs(unet.config, size)
        assert unet(xt, t, context, labels).shape == (3, unet.config.out_channels, *size)


def test_an_image_does_not_depend_on_its_batch():
    unet = tiny().eval()
    xt, t, context, _ = inputs(unet.config, (8, 12))
    together = unet(xt, t, context)
    for i in range(3):
        alone = unet(xt[i : i + 1], t[i : i + 1], context[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)
    assert not torch.equal(unet(xt, t.flip(0), context), together)


def test_timestep_embedding():
    t = torch.tensor([0.0, 0.5, 999.0])
    for odd in (0, 1):
        embedding = timestep_embedding(t, 12 + odd, cos_first=True, freq_shift=0)
        assert embedding.shape == (3, 12 + odd)
        cos, sin = embedding[:, :6], embedding[:, 6:12]
        torch.testing.assert_close(cos**2 + sin**2, torch.ones(3, 6))
        assert (embedding[:, 12:] == 0).all()
    assert embedding[1, 0].item() == pytest.approx(math.cos(0.5))
    assert cos[1, 5].item() == pytest.approx(math.cos(0.5 * 10000 ** (-5 / 6)))
    flipped = timestep_embedding(t, 12, cos_first=False, freq_shift=0)
    assert torch.equal(flipped, torch.cat([sin, cos], dim=1))
    shifted = timestep_embedding(t, 12, cos_first=True, freq_shift=1)  # the last frequency is 1/10000
    assert shifted[2, 5].item() == pytest.approx(math.cos(0.0999))


def saved_bytes(unet, xt, t, context):
    """The gradients of a step, and how much the forward pass kept for them."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = unet(xt, t, context).square().mean()
        kept = sum(sizes.values())
    loss.backward()
    return [parameter.grad for parameter in unet.parameters()], kept


@pytest.mark.slow
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_gradient_checkpointing(drop):
    """Less is kept, no bit of the gradients changes, and a copy of the UNet is checkpointed on its own."""
    unet = tiny(dropout=drop).train()
    original = copy.deepcopy(unet)
    unet.enable_gradient_checkpointing()
    twin = copy.deepcopy(unet)
    del unet
    xt, t, context, _ = inputs(original.config, (16, 16))
    torch.manual_seed(1)
    expected, all_of_it = saved_bytes(original, xt, t, context)
    torch.manual_seed(1)
    gradients, kept = saved_bytes(twin, xt, t, context)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert kept < 0.6 * all_of_it
    assert twin.state_dict().keys() == original.state_dict().keys()


@pytest.mark.parametrize("linear", [False, True])
def test_channels_last_is_kept(linear):
    """The same result, and every resnet and transformer hands its layout on: no copies in between."""
    unet = tiny(use_linear_projection=linear).eval()
    xt, t, context, _ = inputs(unet.config, (8, 12))
    expected = unet(xt, t, context)
    unet.to(memory_format=torch.channels_last)
    layouts = []
    for module in unet.modules():
        if isinstance(module, TimeResnet | nn.Conv2d):
            module.register_forward_hook(
                lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    prediction = unet(xt.to(memory_format=torch.channels_last), t, context)
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)
    assert all(layouts)


def test_bfloat16_weights_answer_in_the_type_of_xt():
    unet = tiny().to(torch.bfloat16)
    xt, t, context, _ = inputs(unet.config, (4, 6))
    assert unet(xt, t, context).dtype == torch.float32


def test_classes_are_asked_for():
    xt, t, context, labels = inputs(UNetConfig(**ODD), (4, 6))
    with pytest.raises(ValueError, match="7 classes: pass class_labels"):
        UNet(UNetConfig(**ODD))(xt, t, context)
    with pytest.raises(ValueError, match="this UNet has no classes"):
        tiny()(xt, t, context, labels)


def test_diffusers_reads_the_unet_of_a_model_of_classes(tmp_path):
    """Also what a call tells it: a Context with labels, and one without a class."""
    from diffusers import UNet2DConditionModel as Reference

    ours = tiny(num_class_embeds=4).eval()
    save_model(ours, tmp_path)
    reference = Reference.from_pretrained(tmp_path).eval()
    xt, t, text, _ = inputs(ours.config, (4, 6), batch=2)
    wish, nothing = torch.tensor([2, 0]), torch.tensor([3, 3])
    with torch.no_grad():
        both = ours(xt, t, Context.of(Context(text, labels=nothing), Context(text, labels=wish)))
        for answer, labels in zip(both.chunk(2), (nothing, wish), strict=True):
            assert error(answer, reference(xt, t, text, class_labels=labels).sample) < 1e-5


def test_what_sdxl_is_told_is_asked_for():
    unet = UNet(UNetConfig(**SDXL_TINY))
    xt, t, context, _ = inputs(unet.config, (8, 6))
    for text in (None, context, Context(context), Context(context, torch.randn(3, 12))):
        with pytest.raises(
            ValueError, match=r"told the whole text and sizes .*: pass a ldm\.model\.context\.Context"
        ):
            unet(xt, t, text)


def test_the_guidance_is_asked_for_and_is_each_rows_own():
    unet = UNet(UNetConfig(**GUIDED)).eval()
    xt, t, context, _ = inputs(unet.config, (8, 6))
    for text in (None, context, Context(context)):
        with pytest.raises(ValueError, match=r"distilled with its guidance .*Context with guidance_scale"):
            unet(xt, t, text)
    scales = torch.tensor([1.0, 4.0, 2.5])
    apart = unet(xt, t, Context(context).guided(scales))
    for row, scale in enumerate(scales.tolist()):
        alike = unet(xt, t, Context(context).guided(scale))
        torch.testing.assert_close(alike[row], apart[row], atol=1e-5, rtol=0)
        assert (alike - apart).abs().amax((1, 2, 3)).gt(1e-4).sum() == 2
    with pytest.raises(ValueError, match="guidance_scale has 2 rows and xt has 3"):
        unet(xt, t, Context(context, guidance_scale=scales[:2]))
    both = unet(xt, t, Context.of(*[Context(context).guided(scales)] * 2))
    torch.testing.assert_close(both, torch.cat([apart, apart]), atol=1e-5, rtol=0)


def test_attention_backend():
    unet = UNet(UNetConfig(**ADM_CROSS))
    unet.set_attention_backend("sdpa")
    assert {m.backend for m in unet.modules() if hasattr(m, "backend")} == {"sdpa"}
    with pytest.raises(ValueError, match="needs a CUDA device"):
        unet.set_attention_backend("xformers")
    assert {m.backend for m in unet.modules() if hasattr(m, "backend")} == {"sdpa"}


@pytest.mark.parametrize("key", UNetConfig.NEUTRAL)
def test_unsupported_options_are_refused_by_name(key):
    with pytest.raises(ValueError, match=f"{key}=.*not supported"):
        read_config(UNetConfig, TINY | {key: "something else"}, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types.*3 levels"),
        ({"layers_per_block": [2, 2]}, "layers_per_block.*3 levels"),
        ({"up_block_types": ("KUpBlock2D",) * 3}, "up_block_types: 'KUpBlock2D'.*CrossAttnUpBlock2D"),
        ({"mid_block_type": "UNetMidBlock3D"}, "mid_block_type: 'UNetMidBlock3D'"),
        ({"resnet_time_scale_shift": "spatial"}, "'spatial' is not one of default, scale_shift"),
        ({"act_fn": "gelu"}, "act_fn: 'gelu'"),
        ({"cross_attention_dim": (20, 20, 20)}, "cross_attention_dim.*one number"),
        ({"addition_time_embed_dim": 8}, "addition_time_embed_dim=8 .* only with addition_embed_type"),
        (
            {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 60},
            "addition_time_embed_dim=None and projection_class_embeddings_input_dim=60: expected",
        ),
        ({"block_out_channels": (16, 20, 40)}, "20 is not a multiple of norm_num_groups=8"),
        ({"time_cond_proj_dim": 2}, "time_cond_proj_dim=2: expected 4 or more; 256 is usual"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**(TINY | changes))


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="attention_head_dim=7: 24 channels"):
        tiny(attention_head_dim=7)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_the_same(checkpointing):
    """Same names, same loss and gradients for two shapes, and drawing is as it was, bit for bit."""
    from tests.test_fit import UNET

    plain, compiled = UNet(UNET), UNet(UNET)
    compiled.load_state_dict(plain.state_dict())
    names = set(compiled.state_dict())
    if checkpointing:
        compiled.enable_gradient_checkpointing()
    compiled.compile_blocks(shapes=2, backend="aot_eager")  # all of it but the C++, which takes minutes
    assert set(compiled.state_dict()) == names
    for shape in ((2, 4, 8, 6), (2, 4, 4, 8)):
        xt, context = torch.randn(shape), torch.randn(2, 3, 24)
        for unet in (plain, compiled):
            unet.zero_grad()
            unet(xt, torch.tensor([3, 700]), context).square().mean().backward()
        for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(
                q.grad, p.grad, atol=1e-5, rtol=1e-3, msg=lambda text, n=name: f"{n} {text}"
            )
    with torch.no_grad():
        drawn = [unet.eval()(xt, torch.tensor([3, 700]), context) for unet in (plain, compiled)]
    assert torch.equal(*drawn)
