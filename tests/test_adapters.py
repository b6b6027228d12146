"""Adapters: the deltas of PEFT, the pictures of stock diffusers, and weights that come back bit for bit."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.adapters import deltas, names
from ldm.adapters.applied import Applied, adaptable
from ldm.adapters.deltas import Layer
from ldm.adapters.files import Adapter, read_adapter, write_adapter
from ldm.drawing.optimize import quantize_maps
from ldm.model.quantized import MAPS, quantize
from ldm.model.unet import UNet, UNetConfig
from ldm.pipeline import LatentDiffusionPipeline
from tests.tiny import tiny_pipeline

PROMPT = "a red fox in snow"
ODD = {"height": 24, "width": 40, "num_inference_steps": 2, "output_type": "pt"}
Q, FC = (
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "text_encoder.encoder.layers.1.mlp.fc1",
)
CONV, POINT = "unet.down_blocks.0.resnets.0.conv1", "unet.up_blocks.0.resnets.0.conv_shortcut"
NAMES = {"unet": ["conv_in", "to_q", "conv1", "conv_shortcut"]}


class Toy(nn.Module):
    """A layer of each shape that adapters know."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.conv_in = nn.Linear(12, 8), nn.Linear(6, 6, bias=False)
        self.conv1, self.conv_shortcut = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x


def picture(pipe: LatentDiffusionPipeline) -> Tensor:
    return pipe(PROMPT, seed=3, sampler="ddim", **ODD).images


def weights(pipe: LatentDiffusionPipeline) -> dict[str, Tensor]:
    return {**pipe.unet.state_dict(), **pipe.text_encoder.state_dict()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def draw(*shape: int) -> Tensor:
    return torch.randn(shape) / 8


def lora(pipe: LatentDiffusionPipeline, path: str, r: int, scale: float = 1.0) -> Layer:
    weight = pipe._applied.layers[path].weight
    up = draw(len(weight), r, *[1] * (weight.ndim - 2))
    return Layer("lora", {"down": draw(r, *weight.shape[1:]), "up": up}, scale)


def example(pipe: LatentDiffusionPipeline, *paths: str) -> Adapter:
    """Ranks that differ by layer, scales that are not 1."""
    chosen = paths or (Q, FC, CONV, POINT)
    return Adapter({path: lora(pipe, path, 2 + i, 0.5 + i / 4) for i, path in enumerate(chosen)})


@pytest.fixture(scope="module")
def base() -> LatentDiffusionPipeline:
    """Not to be changed."""
    return tiny_pipeline()


@pytest.fixture
def pipe() -> LatentDiffusionPipeline:
    return tiny_pipeline()


# What each kind adds


def configurations() -> dict[str, object]:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    every = {"target_modules": list(NAMES["unet"])}
    fresh, raw = {"init_weights": False, "alpha": 3, **every}, {"init_lora_weights": False, **every}
    return {
        "lora": LoraConfig(r=4, lora_alpha=6, **raw),
        "patterns": LoraConfig(r=4, rank_pattern={"^to_q": 3}, alpha_pattern={"conv1": 5}, **raw),
        "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, **raw),
        "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, **raw),
        "loha": LoHaConfig(r=4, **fresh),
        "loha of cores": LoHaConfig(r=4, use_effective_conv2d=True, **fresh),
        "lokr": LoKrConfig(r=2, **fresh),
        "lokr of cores": LoKrConfig(r=2, use_effective_conv2d=True, decompose_factor=2, **fresh),
        "lokr of products": LoKrConfig(r=1, decompose_both=True, **fresh),
    }


@pytest.mark.slow
def test_every_kind_is_that_of_peft(tmp_path):
    """Its own files and its own merged weights; and the same again in the spellings that we write."""
    from peft import get_peft_model

    for name, config in configurations().items():
        toy = Toy()
        ours = Applied({"unet": toy})
        theirs = get_peft_model(Toy(), config)
        theirs.base_model.model.load_state_dict(toy.state_dict(), strict=False)
        for layer in NAMES["unet"]:
            theirs.get_submodule(f"base_model.model.{layer}").base_layer.load_state_dict(
                toy.get_submodule(layer).state_dict()
            )
        for key, value in theirs.named_parameters():
            if "magnitude" in key:
                value.data = 1 + torch.rand_like(value)
        theirs.save_pretrained(tmp_path / name)
        before = {key: value.clone() for key, value in toy.state_dict().items()}
        merged = theirs.merge_and_unload().state_dict()
        adapter = read_adapter(tmp_path / name, ours.index)
        ours.add("one", adapter)
        for key, value in merged.items():
            torch.testing.assert_close(
                toy.state_dict()[key], value, atol=1e-5, rtol=1e-5, msg=f"{name}: {key}"
            )
        assert not same(before, toy.state_dict())
        ours.delete(["one"])
        assert same(before, toy.state_dict())
        read = name == "lokr" or adapter.layers["unet.to_q"].kind == "lora"  # by diffusers, the first
        for spelling in SPELLINGS if read else SPELLINGS[1:]:
            path = tmp_path / spelling / name / "adapter_model.safetensors"
            write_adapter(adapter, path, spelling)
            again = read_adapter(path, ours.index)
            for key, layer in adapter.layers.items():
                weight = toy.get_submodule(key.removeprefix("unet.")).weight
                torch.testing.assert_close(
                    again.layers[key].delta(weight), layer.delta(weight), atol=1e-6, rtol=0
                )


SPELLINGS = ("diffusers", "kohya", "peft")


def test_a_convolution_with_its_core_is_three_convolutions():
    """LoCon, by what it computes: down to r channels, the core, and up."""
    down, mid, up, x = draw(3, 5, 1, 1), draw(3, 3, 3, 3), draw(7, 3, 1, 1), torch.randn(2, 5, 6, 9)
    whole = F.conv2d(x, deltas.lora(down, up, mid).reshape(7, 5, 3, 3))
    torch.testing.assert_close(whole, F.conv2d(F.conv2d(F.conv2d(x, down), mid), up))
    wide, pointwise = draw(3, 5, 3, 3), draw(7, 3, 1, 1)
    whole = F.conv2d(x, deltas.lora(wide, pointwise).reshape(7, 5, 3, 3))
    torch.testing.assert_close(whole, F.conv2d(F.conv2d(x, wide), pointwise))


def test_a_kronecker_product_acts_on_each_factor():
    """kron(a, b) (x outer y) = (a x) outer (b y), also of factors that are products or have a core."""
    a, b, square, x, y = draw(2, 3), draw(4, 5), torch.randn(3, 3), draw(3), draw(5)
    product = {"w1_a": a @ torch.linalg.inv(square), "w1_b": square, "w2": b}
    for factors in ({"w1": a, "w2": b}, product):
        both = deltas.lokr(**factors) @ torch.outer(x, y).flatten()
        torch.testing.assert_close(both.reshape(2, 4), torch.outer(a @ x, b @ y), atol=1e-5, rtol=1e-4)
    core, outward, inward = draw(2, 2, 1, 1), draw(2, 4), draw(2, 5)
    whole = outward.T @ core[:, :, 0, 0] @ inward
    cored = deltas.lokr(w1=a, w2_a=outward, w2_b=inward, t2=core)
    torch.testing.assert_close(cored[..., 0, 0], torch.kron(a, whole))
    cored = deltas.loha(outward, inward, outward, inward, core, core)
    torch.testing.assert_close(cored[..., 0, 0], deltas.loha(whole, torch.eye(5), whole, torch.eye(5)))


def test_dora_gives_every_output_or_input_its_norm():
    weight, delta = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)
    for shape, others in (((5, 1, 1, 1), (1, 2, 3)), ((1, 3, 1, 1), (0, 2, 3))):
        magnitude = 1 + torch.rand(shape)
        changed = weight + deltas.dora(weight, delta, magnitude)
        norms = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        torch.testing.assert_close(norms, magnitude)


def test_a_core_is_written_for_readers_without_cores(tmp_path):
    factors = {"down": draw(3, 4, 1, 1), "mid": draw(3, 3, 3, 3), "up": draw(8, 3, 1, 1)}
    adapter = Adapter({"unet.conv1": Layer("lora", factors)})
    write_adapter(adapter, tmp_path / "a.safetensors")
    assert not any("mid" in key for key in load_file(tmp_path / "a.safetensors"))
    again, weight = read_adapter(tmp_path / "a.safetensors", names.lookup(NAMES, 1)), torch.zeros(8, 4, 3, 3)
    torch.testing.assert_close(
        again.layers["unet.conv1"].delta(weight), adapter.layers["unet.conv1"].delta(weight)
    )


# Names


def test_every_layer_of_stable_diffusion_has_one_flat_name():
    """kohya's and CompVis' names of the whole UNet of SD 1 are told apart; some known pairs."""
    with torch.device("meta"):
        unet = UNet(UNetConfig(cross_attention_dim=768))
    index = names.lookup({"unet": adaptable(unet)}, 2)
    for theirs, ours in {
        "input_blocks_2_1_transformer_blocks_0_ff_net_0_proj": (
            "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj"
        ),
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_8_0_skip_connection": None,
        "input_blocks_7_0_skip_connection": "down_blocks.2.resnets.0.conv_shortcut",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks_11_1_proj_out": "up_blocks.3.attentions.2.proj_out",
        "time_embed_2": "time_embedding.linear_2",
        "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0": (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
        ),
    }.items():
        assert index.get(f"lora_unet_{theirs}") == (ours and f"unet.{ours}")
    flat = {
        ours
        for theirs, ours in index.items()
        if theirs.startswith(("lora_unet_in", "lora_unet_mid", "lora_unet_out", "lora_unet_time"))
    }
    assert flat == {
        f"unet.{name}" for name in adaptable(unet)
    } - {  # conv_in and so on have CompVis names too
        name for name in index.values() if name not in flat
    }
    assert len(flat) == len(adaptable(unet))


# The same pictures as diffusers


@pytest.fixture(scope="module")
def stock_files(tmp_path_factory) -> list[Path]:
    """Two LoRAs that stock diffusers writes: with PEFT's configuration in it, and without any alpha."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    files, raw = [], {"init_lora_weights": False}
    config = {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"conv1": 3},
        "target_modules": ["to_q", "to_v", "conv1"],
    }
    for number in range(2):
        twin = tiny_pipeline().to_diffusers()
        twin.unet.add_adapter(LoraConfig(**config, **raw))
        layers = {"unet_lora_layers": get_peft_model_state_dict(twin.unet)}
        if number:
            twin.text_encoder.add_adapter(
                LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "fc1"], **raw)
            )
            state = get_peft_model_state_dict(twin.text_encoder)
            layers["text_encoder_lora_layers"] = convert_state_dict_to_diffusers(state)
        else:
            layers["unet_lora_adapter_metadata"] = config
        folder = tmp_path_factory.mktemp("stock")
        StableDiffusionPipeline.save_lora_weights(folder, **layers)
        files.append(folder)
    return files


@pytest.fixture(scope="module")
def stock():
    """Stock diffusers' pipeline of the tiny model, quiet."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    twin = tiny_pipeline().to_diffusers()
    twin.set_progress_bar_config(disable=True)
    return twin


def theirs(stock) -> Tensor:
    return stock(PROMPT, generator=torch.Generator().manual_seed(3), **ODD).images


@pytest.mark.slow
def test_pictures_are_those_of_stock_diffusers(pipe, stock, stock_files):
    plain = picture(pipe)
    for name, file in zip("ab", stock_files):
        stock.load_lora_weights(file, adapter_name=name)
        pipe.load_lora_weights(file, adapter_name=name)
    assert pipe.get_active_adapters() == stock.get_active_adapters() == ["b"]
    assert pipe.get_list_adapters() == stock.get_list_adapters()
    for chosen, weight in ((["a"], 1.0), (["b"], 0.5), (["a", "b"], [0.5, -0.75])):
        stock.set_adapters(chosen, weight)
        pipe.set_adapters(chosen, weight)
        drawn = picture(pipe)
        torch.testing.assert_close(drawn, theirs(stock), atol=1e-4, rtol=0)
        assert (drawn - plain).abs().max() > 0.05
    stock.unload_lora_weights()
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), plain)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["diffusers", "diffusers, DoRA", "kohya"])
def test_stock_diffusers_reads_what_we_write(pipe, stock, tmp_path, spelling):
    """In kohya's with one alpha for all: diffusers 0.42 drops those that differ by layer, with a warning."""
    spelling, _, kind = spelling.partition(", ")
    kinds: tuple[str, ...] = (".to_q", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc2")
    kinds += (".conv1", "_shortcut") if spelling == "diffusers" else ()
    chosen = [name for name in pipe._applied.layers if name.endswith(kinds)]
    layers = {path: lora(pipe, path, 2 + i % 3, 3 / (2 + i % 3)) for i, path in enumerate(chosen)}
    if spelling == "diffusers":
        layers = dict(example(pipe, *chosen).layers)
    for path, layer in list(layers.items()) if kind else ():
        weight = pipe._applied.layers[path].weight.detach()
        norms = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
        layers[path] = replace(layer, magnitude=1.3 * norms)
    pipe._applied.add("ours", Adapter(layers))
    path = pipe.save_lora_weights(tmp_path, spelling=spelling)
    stock.load_lora_weights(path)
    torch.testing.assert_close(picture(pipe), theirs(stock), atol=1e-4, rtol=0)
    stock.unload_lora_weights()
    drawn = picture(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(path)
    torch.testing.assert_close(picture(pipe), drawn, atol=1e-6, rtol=0)


# In and out of the weights


def test_what_is_unloaded_was_never_there(pipe):
    before, plain = {name: value.clone() for name, value in weights(pipe).items()}, picture(pipe)
    parameters = list(pipe.unet.parameters())
    pipe._applied.add("a", example(pipe))
    pipe._applied.add("b", example(pipe, Q))
    pipe.set_adapters(["a", "b"], [0.3, {"unet": 2.0}])
    assert not same(before, weights(pipe))
    pipe.disable_lora()
    assert same(before, weights(pipe))
    pipe.enable_lora()
    assert not same(before, weights(pipe))
    pipe.delete_adapters("a")
    assert pipe.get_active_adapters() == ["b"]
    pipe.unload_lora_weights()
    assert same(before, weights(pipe))
    assert all(one is other for one, other in zip(parameters, pipe.unet.parameters(), strict=True))
    assert torch.equal(picture(pipe), plain)
    assert pipe.get_list_adapters() == {}


def test_a_fused_adapter_stays(pipe):
    before = {name: value.clone() for name, value in weights(pipe).items()}
    pipe._applied.add("a", example(pipe))
    pipe.set_adapters("a", 0.5)
    pipe.fuse_lora(lora_scale=0.5)
    fused = {name: value.clone() for name, value in weights(pipe).items()}
    weight, layer = before[Q.removeprefix("unet.") + ".weight"], pipe._applied.state.adapters["a"].layers[Q]
    torch.testing.assert_close(
        fused[Q.removeprefix("unet.") + ".weight"], weight + 0.25 * layer.delta(weight)
    )
    pipe.disable_lora()
    assert same(fused, weights(pipe))
    pipe.unfuse_lora()
    assert same(before, weights(pipe))
    pipe.enable_lora()
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    assert same(fused, weights(pipe))
    with pytest.raises(ValueError, match="no adapter is fused"):
        pipe.unfuse_lora()


def test_a_moved_pipeline_gives_its_own_weights_back(pipe):
    """The originals follow what took their place, also into another type."""
    other = tiny_pipeline().to(torch.bfloat16)
    pipe._applied.add("a", example(pipe))
    pipe.to(torch.bfloat16)
    pipe.set_adapters("a", 0.5)
    assert pipe._applied.layers[Q].weight.dtype == torch.bfloat16
    pipe.unload_lora_weights()
    assert same(weights(other), weights(pipe))


def test_a_half_precision_file_is_computed_in_float32(pipe, tmp_path):
    down, up, weight = draw(2, 32).half(), draw(32, 2).half(), pipe._applied.layers[Q].weight.clone()
    spelled = Q.replace(".", "_").replace("unet_", "lora_unet_", 1)
    save_file(
        {f"{spelled}.lora_down.weight": down, f"{spelled}.lora_up.weight": up}, tmp_path / "half.safetensors"
    )
    pipe.load_lora_weights(tmp_path / "half.safetensors")  # without alpha: scale 1
    assert torch.equal(pipe._applied.layers[Q].weight, weight + up.float() @ down.float())


def test_the_text_encoder_alone(pipe):
    unet = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    plain = pipe.encode_prompts([PROMPT])
    pipe._applied.add("words", example(pipe, FC))
    assert pipe.get_list_adapters() == {"text_encoder": ["words"]}
    assert same(unet, pipe.unet.state_dict())
    assert not torch.equal(pipe.encode_prompts([PROMPT]), plain)


def test_memory_layout_stays(pipe):
    pipe.to(memory_format=torch.channels_last)
    strides = pipe._applied.layers[CONV].weight.stride()
    pipe._applied.add("a", example(pipe))
    assert pipe._applied.layers[CONV].weight.stride() == strides


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_anew(pipe):
    from torch._dynamo.testing import CompileCounter

    counter, x = CompileCounter(), torch.randn(2, 5, 32)
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].ff
    block.compile(backend=counter)
    path = Q.replace("attn1.to_q", "ff.net.2")
    with torch.no_grad():
        plain = block(x)
        pipe._applied.add("a", example(pipe, path))
        torch.testing.assert_close(block(x), type(block).forward(block, x))
        assert not torch.equal(block(x), plain)
        pipe.unload_lora_weights()
        assert torch.equal(block(x), plain)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_native_kernels_see_the_weights_of_today(pipe):
    """Whatever they keep of a weight is not older than the adapter in it."""
    adapter, other = example(pipe), tiny_pipeline()
    try:
        pipe.optimize()
    except ValueError as error:
        pytest.skip(str(error))
    plain = picture(pipe)
    for each in (pipe, other):
        each._applied.add("a", adapter)
    torch.testing.assert_close(picture(pipe), picture(other), atol=2e-3, rtol=0)
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), plain)


def test_an_adapter_after_whole_numbers_is_in_them(pipe):
    """On a CPU: the picture is that of a pipeline that had the adapter before."""
    adapter, other = example(pipe), tiny_pipeline()
    other._applied.add("a", adapter)
    try:
        pipe.optimize(quantize="int8")
    except ValueError as error:
        pytest.skip(str(error))
    other.optimize(quantize="int8")
    plain = picture(pipe)
    pipe._applied.add("a", adapter)
    assert torch.equal(picture(pipe), picture(other))
    assert not torch.equal(picture(pipe), plain)
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), plain)


@pytest.mark.parametrize("kind", MAPS)
@torch.no_grad()
def test_an_adapter_after_8_bits_of_an_accelerator_is_in_them(pipe, kind):
    quantize_maps(pipe.unet, kind)
    layer, x = pipe._applied.layers[Q], draw(40, 32)
    plain = layer(x)
    pipe._applied.add("a", example(pipe, Q))
    twin = nn.Linear(32, 32, bias=False)
    twin.weight = layer.weight
    assert quantize(twin, kind)
    assert torch.equal(layer(x), twin(x))
    assert not torch.equal(layer(x), plain)
    pipe.disable_lora()
    assert torch.equal(layer(x), plain)


# What cannot be


def plain_file(**tensors: Tensor) -> dict[str, Tensor]:
    spelled = Q + ".lora_"
    return {f"{spelled}A.weight": draw(2, 32), f"{spelled}B.weight": draw(32, 2)} | tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "is empty"),
        (plain_file(x=draw(1)), "1 tensors that no adapter known here has, the first x"),
        ({"lora_te2_text_model_x.lora_down.weight": draw(1, 2)}, "looks made for SDXL"),
        (
            {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": draw(1, 2)},
            "looks made for Flux",
        ),
        ({f"{Q}.lora_A.weight": draw(2, 32)}, "expected, for one kind of adapter, all of its factors"),
        (
            {f"{Q}.lora_A.weight": draw(0, 32), f"{Q}.lora_B.weight": draw(32, 0)},
            "is empty: get the file again",
        ),
        (plain_file(**{f"{Q}.alpha": draw(2)}), "expected one number"),
        (plain_file(**{f"{Q}.alpha": torch.tensor(torch.nan)}), "not finite"),
        (plain_file(**{f"{Q}.lora_B.weight": torch.zeros(32, 2)}), "changes nothing"),
        (plain_file(**{f"{Q}.lora_A.weight": draw(2, 40)}), r"do not fit the weight \(32, 32\)"),
        (
            {
                f"{Q.replace('attn1.to_q', 'attn2.to_k')}.lora_A.weight": draw(2, 1024),
                f"{Q.replace('attn1.to_q', 'attn2.to_k')}.lora_B.weight": draw(32, 2),
            },
            "looks made for Stable Diffusion 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(pipe, tensors, message):
    before = weights(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tensors)
    assert same(before, weights(pipe))
    assert pipe.get_list_adapters() == {}


def test_errors_say_what_to_do(pipe, tmp_path):
    pipe._applied.add("a", example(pipe))
    for call, message in (
        (lambda: pipe.set_adapters("b"), "no adapter 'b': loaded are a"),
        (lambda: pipe.set_adapters(["a"], [1.0, 2.0]), "1 adapters and 2 weights"),
        (lambda: pipe.set_adapters(["a", "a"]), "named twice"),
        (lambda: pipe.set_adapters("a", float("nan")), "expected a number"),
        (lambda: pipe.set_adapters("a", {"vae": 1.0}), "the weights of a are for vae"),
        (lambda: pipe._applied.add("a", example(pipe)), "is taken"),
        (lambda: pipe.save_lora_weights(tmp_path, spelling="peft"), "PEFT's files are for one model"),
        (lambda: pipe.save_lora_weights(tmp_path, spelling="nai"), "expected one of diffusers, kohya, peft"),
        (lambda: pipe.load_lora_weights(tmp_path), "holds no .safetensors"),
        (lambda: pipe.load_lora_weights(tmp_path / "a.ckpt"), "is a pickle"),
        (lambda: pipe.load_lora_weights("a/b"), "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    pipe.unet.load_state_dict(dict(pipe.unet.state_dict()), assign=True)
    with pytest.raises(ValueError, match="was replaced after an adapter was put into it"):
        pipe.unload_lora_weights()


def test_a_regular_expression_of_a_file_is_not_run(tmp_path):
    config = {"r": 2, "lora_alpha": 2, "alpha_pattern": {"(a+)+b": 3}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"to_q.lora_A.weight": draw(2, 12), "to_q.lora_B.weight": draw(8, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has the regular expression"):
        read_adapter(tmp_path, names.lookup(NAMES, 1))
