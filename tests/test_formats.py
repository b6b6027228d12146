"""Single files: every name there and back, what is not needed is told, and diffusers reads what we write."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.convert import main
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.scheduler import Scheduler
from ldm.formats.keys import PARTS, UNET, ema_name, inverse, part_table, rename
from ldm.formats.kinds import INPAINT, KINDS, NOT_THESE, UPSCALE, recognise
from ldm.formats.pieces import Pieces, read_folder, write_folder
from ldm.formats.report import Report, write_reports
from ldm.formats.single_file import (
    HEADER,
    closeness,
    make_header,
    measure_prediction,
    pieces_of,
    read_single,
    write_single,
)
from ldm.formats.tensors import CLASSES, join, layout, part_shapes, split
from ldm.formats.vocabulary import SIZE, clip_tokenizer
from ldm.model.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.options import Defaults
from tests.tiny import tiny_pipeline
from text_encoder.clip import CLIPTextEncoder

PROMPT = "a red fox in snow"
SMALL = {"num_inference_steps": 2, "output_type": "pt", "height": 24, "width": 40, "seed": 3}


def wide_pipeline() -> LatentDiffusionPipeline:
    """The tiny pipeline with what SD 2 has: OpenCLIP's text encoder and linear projections."""
    pipe = tiny_pipeline()
    unet = UNet(replace(pipe.unet.config, use_linear_projection=True)).eval()
    text_encoder = CLIPTextEncoder(replace(pipe.text_encoder.config, hidden_act="gelu")).eval()
    return LatentDiffusionPipeline(**pipe.components | {"unet": unet, "text_encoder": text_encoder})


MAKERS = {"CLIP": tiny_pipeline, "OpenCLIP": wide_pipeline}
ONE = pytest.mark.parametrize("written", ["CLIP"], indirect=True)  # where it does not matter which


@pytest.fixture(scope="module", params=MAKERS)
def written(request, tmp_path_factory) -> tuple[LatentDiffusionPipeline, Path]:
    """A pipeline and the single file of it."""
    pipe = MAKERS[request.param]()
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    pipe.save_single_file(path)
    return pipe, path


def assert_same(one: LatentDiffusionPipeline, other: LatentDiffusionPipeline) -> None:
    for part in PARTS:
        state = getattr(other, part).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in getattr(one, part).state_dict().items())


# Names


@pytest.mark.parametrize("kind", ["sd1", "sd2-v", "sd2-x4"])  # the others have the same names
def test_every_name_leads_there_and_back(kind):
    configs = KINDS[kind].configs()
    for part in PARTS:
        _, table = part_table(part, configs[part])
        back = inverse(table)
        # q, k and v of OpenCLIP are one tensor: their places are the layout's
        names = [
            name for name in part_shapes(part, configs[part]) if not re.search("self_attn.[qkv]_proj", name)
        ]
        there = [rename(name, table) for name in names]
        assert len(set(there)) == len(names)
        assert [rename(name, back) for name in there] == names
    places = layout(configs)
    held = [(place.part, name) for place in places.values() for name in place.names]
    assert sorted(held) == sorted((part, name) for part in PARTS for name in part_shapes(part, configs[part]))
    averages = [ema_name(name) for name in places if name.startswith(UNET)]
    assert len(set(averages)) == len(averages)


def test_the_names_are_those_of_published_files():
    """Some of sd-v1-5's and of v2-1_768's, with their shapes; SD 1 has 1,130 tensors."""
    one, two = layout(KINDS["sd1"].configs()), layout(KINDS["sd2-v"].configs())
    assert len(one) == 1130
    unet, vae = "model.diffusion_model.", "first_stage_model."
    for places, name, shape in (
        (one, unet + "input_blocks.1.1.proj_in.weight", (320, 320, 1, 1)),
        (two, unet + "input_blocks.1.1.proj_in.weight", (320, 320)),
        (one, unet + "input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        (one, unet + "middle_block.1.transformer_blocks.0.attn2.to_v.weight", (1280, 768)),
        (one, unet + "output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        (one, unet + "output_blocks.5.2.conv.weight", (1280, 1280, 3, 3)),
        (one, unet + "output_blocks.11.0.skip_connection.weight", (320, 640, 1, 1)),
        (one, vae + "decoder.up.0.block.0.nin_shortcut.weight", (128, 256, 1, 1)),
        (one, vae + "encoder.mid.attn_1.proj_out.weight", (512, 512, 1, 1)),
        (one, "cond_stage_model.transformer.text_model.final_layer_norm.bias", (768,)),
        (two, "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight", (3072, 1024)),
        (two, "cond_stage_model.model.positional_embedding", (77, 1024)),
        (layout(KINDS["sd2-x4"].configs()), unet + "label_emb.weight", (1000, 1024)),
        (layout(KINDS["sd1-inpaint"].configs()), unet + "input_blocks.0.0.weight", (320, 9, 3, 3)),
    ):
        assert places[name].shape == shape, name


@pytest.mark.parametrize("kind", ["sd1-inpaint", "sd2-base", "sd2-v", "sd2-x4"])
def test_a_kind_is_recognised_by_its_shapes(kind):
    shapes = {name: place.shape for name, place in layout(KINDS[kind].configs()).items()}
    assert kind in recognise(shapes, "x")
    assert all(
        KINDS[name].unet.in_channels == KINDS[kind].unet.in_channels for name in recognise(shapes, "x")
    )
    assert len(recognise(shapes, "x")) == (2 if kind in ("sd2-base", "sd2-v") else 1)


@ONE
def test_what_is_not_known_is_named(written, tmp_path):
    for head, what in NOT_THESE.items():
        with pytest.raises(ValueError, match=f"x is of {what}"):
            recognise({head + "weight": (1,)}, "x")
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(written[1]), bare)
    with pytest.raises(ValueError, match=r"is no single file of a known model .*context: 24.*name a folder"):
        read_single(bare)


@pytest.mark.slow  # it imports diffusers and transformers
@pytest.mark.parametrize(
    ("kind", "counts"), [("sd1", (859_520_964, 123_060_480)), ("sd2-v", (865_910_724, 340_387_840))]
)
def test_kinds_are_those_of_diffusers(kind, counts):
    """The names of diffusers' own modules of these configurations lead there and back, too."""
    import diffusers
    import transformers

    configs = KINDS[kind].configs()
    as_json = {part: json.loads(json.dumps(vars(config))) for part, config in configs.items()}
    with torch.device("meta"):
        theirs = {
            "unet": diffusers.UNet2DConditionModel(**as_json["unet"]).state_dict(),
            "vae": diffusers.AutoencoderKL(
                **{key: value for key, value in as_json["vae"].items() if "latent_rgb" not in key}
            ).state_dict(),
            "text_encoder": transformers.CLIPTextModel(
                transformers.CLIPTextConfig(**as_json["text_encoder"])
            ).state_dict(),
        }
    held = {(place.part, name) for place in layout(configs).values() for name in place.names}
    assert held == {(part, name) for part, state in theirs.items() for name in state}
    for part, count in zip(("unet", "text_encoder"), counts, strict=True):
        assert sum(value.numel() for value in theirs[part].values()) == count
    tensors = join(theirs, configs)
    back, report = split(tensors, configs, "x", "y")
    assert report.fits
    for part, state in theirs.items():
        assert {name: value.shape for name, value in state.items()} == {
            name: value.shape for name, value in back[part].items()
        }


# Files


def test_a_single_file_comes_back(written, tmp_path):
    pipe, path = written
    loaded = LatentDiffusionPipeline.from_single_file(path, dtype=torch.float32)
    assert_same(pipe, loaded)
    torch.testing.assert_close(
        loaded(PROMPT, **SMALL).images, pipe(PROMPT, **SMALL).images, atol=1e-5, rtol=0
    )
    assert loaded.scheduler.config == pipe.scheduler.config
    with pytest.raises(ValueError, match="exists: name another"):
        pipe.save_single_file(path)


def test_tensors_are_those_of_published_files(written):
    """What another's reader does by hand: q, k and v in a row, and 1x1 convolutions."""
    pipe, path = written
    state, tensors = pipe.text_encoder.state_dict(), load_file(path)
    name = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    if name in tensors:
        rows = [state[f"encoder.layers.1.self_attn.{each}_proj.weight"] for each in "qkv"]
        assert torch.equal(tensors[name], torch.cat(rows))
    to_q = pipe.vae.state_dict()["decoder.mid_block.attentions.0.to_q.weight"]
    assert torch.equal(tensors["first_stage_model.decoder.mid.attn_1.q.weight"][:, :, 0, 0], to_q)


def test_diffusers_reads_what_we_write(written, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe, path = written
    pipe.save_pretrained(tmp_path / "config")
    stock = StableDiffusionPipeline.from_single_file(
        str(path), config=str(tmp_path / "config"), local_files_only=True
    )
    assert_same(pipe, LatentDiffusionPipeline.from_diffusers(stock))


def another_writers(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file as a training program leaves it: more notes, averages, and some spelled otherwise."""
    extra = {
        "alphas_cumprod": torch.rand(5),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        "cond_stage_model.logit_scale": torch.tensor(1.0),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
        "cond_stage_model.model.transformer.resblocks.2.ln_1.weight": torch.zeros(24),
    }
    extra |= {ema_name(name): value + 1 for name, value in tensors.items() if name.startswith(UNET)}
    renamed = {
        name.replace("transformer.text_model.", "transformer."): value for name, value in tensors.items()
    }
    for name in renamed:
        if name.endswith(("attn_1.q.weight", "attn_1.proj_out.weight")):
            renamed[name] = renamed[name].flatten(1)
    save_file(renamed | extra, path)
    return extra


@ONE
def test_what_other_programs_write(written, tmp_path, capsys):
    pipe, path = written
    pipe.save_pretrained(tmp_path / "config")
    whole = another_writers(tmp_path / "other.safetensors", load_file(path))
    pieces = read_single(tmp_path / "other.safetensors", config=tmp_path / "config")
    assert pieces.reports[0].extras.keys() == whole.keys()
    text = pieces.reports[0].sentence()
    assert "fits a model from text to image: all of its" in text
    assert "the noise schedule" in text
    loaded = {part: dict(pieces.tensors[part]) for part in PARTS}
    assert all(torch.equal(value, loaded["unet"][name]) for name, value in pipe.unet.state_dict().items())
    ema = read_single(tmp_path / "other.safetensors", config=tmp_path / "config", ema=True)
    assert torch.equal(ema.tensors["unet"]["conv_in.bias"], pipe.unet.conv_in.bias + 1)
    assert torch.equal(ema.tensors["vae"]["quant_conv.bias"], pipe.vae.quant_conv.bias)
    with pytest.raises(ValueError, match=r"no averaged weights.*leave the option ema out"):
        read_single(path, ema=True)


@ONE
def test_what_is_missing_or_unknown_is_told(written, tmp_path):
    pipe, path = written
    tensors = load_file(path)
    del tensors[UNET + "input_blocks.0.0.bias"]
    tensors[UNET + "out.2.bias"] = torch.zeros(5)
    tensors["surprise"] = torch.zeros(2)
    save_file(tensors, tmp_path / "bad.safetensors", make_header(pieces_of(pipe)))
    with pytest.raises(ValueError, match="1 missing, 1 unknown, 1 of another shape") as caught:
        read_single(tmp_path / "bad.safetensors")
    assert f"{UNET}input_blocks.0.0.bias: file -, model (32,)" in str(caught.value)
    assert "surprise: file (2,), model -" in str(caught.value)


@ONE
def test_a_report_in_a_file_has_every_name(written, tmp_path, capsys):
    want = {f"w{i}": (i,) for i in range(9)}
    report = Report.compare(want, {"w1": (1,), "w2": (3,), "x": (1,), "y": (2,)}, "a", "b", {"y": "a note"})
    assert not report.fits
    assert report.sentence().count("\n") == 3
    write_reports([report], tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())["a"]
    assert content["unused"] == {"x": [1]}
    assert content["misshapen"] == {"w2": [[3], [2]]}
    assert content["extras"] == {"y": "a note"}
    assert sorted(content["missing"]) == ["w0", *(f"w{i}" for i in range(3, 9))]
    # and of a file that is refused
    bad, config = str(tmp_path / "bad.safetensors"), str(tmp_path / "config")
    save_file({"surprise": torch.zeros(2)}, bad)
    written[0].save_pretrained(config)
    assert main([bad, "--config", config, "--report", str(tmp_path / "report.json")]) == 2
    assert f"{bad} does not fit" in capsys.readouterr().err
    content = json.loads((tmp_path / "report.json").read_text())[bad]
    assert content["unused"] == {"surprise": [2]}
    assert len(content["missing"]) == content["total"]


@ONE
@pytest.mark.parametrize("header", ["{", "[]", '{"pipeline": "os.system"}'])
def test_headers_that_are_broken(written, tmp_path, header):
    save_file(load_file(written[1]), tmp_path / "a.safetensors", {HEADER: header})
    with pytest.raises(ValueError, match=rf"header {HEADER} is not understood"):
        read_single(tmp_path / "a.safetensors")


# What they predict


def test_what_a_model_predicts_is_measured():
    noise = torch.randn(1, 4, 8, 8)
    x0 = torch.randn(1, 4, 8, 8)
    level = NoiseSchedule.scaled_linear()
    alpha, sigma = float(level.alpha[-1]), float(level.sigma[-1])
    assert closeness(noise + 0.1 * x0, noise) > 0.8
    assert abs(closeness(alpha * noise - sigma * x0, noise)) < 0.5
    bundled = pieces_of(LatentDiffusionPipeline.bundled(dtype=torch.float32))
    assert measure_prediction(bundled)[0] == "v_prediction"
    dead = tiny_pipeline()
    torch.nn.init.zeros_(dead.unet.conv_out.weight)
    torch.nn.init.zeros_(dead.unet.conv_out.bias)
    assert measure_prediction(pieces_of(dead))[0] is None


@ONE
def test_prediction_may_be_said(written):
    _, path = written
    assert read_single(path).kind.prediction == "v_prediction"
    pieces = read_single(path, prediction="epsilon")
    assert pieces.kind.prediction == "epsilon"
    assert pieces.notes[1] == "it predicts epsilon: asked for"
    with pytest.raises(ValueError, match="prediction='x0' is unknown"):
        read_single(path, prediction="x0")


# CLIP's vocabulary


def test_the_vocabulary_is_clips():
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == SIZE
    assert tokenizer([PROMPT])[0, :7].tolist() == [49406, 320, 736, 3240, 530, 2583, 49407]
    assert clip_tokenizer("!")([PROMPT])[0, 7:].tolist() == [0] * 70


# The command line


def test_a_folder_a_file_and_a_folder_again(tmp_path, capsys):
    pipe = tiny_pipeline()
    pipe.defaults = Defaults(num_inference_steps=3, guidance_scale=2.0)
    pipe.save_pretrained(tmp_path / "one")
    file, folder, half = (str(tmp_path / name) for name in ("a.safetensors", "two", "half.safetensors"))
    assert main([str(tmp_path / "one"), file]) == 0
    assert main([file, folder]) == 0
    assert main([folder, half, "--dtype", "fp16"]) == 0
    assert "all of its" in capsys.readouterr().out
    loaded = LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    assert_same(pipe, loaded)
    assert loaded.defaults == pipe.defaults
    assert {value.dtype for value in load_file(half).values()} == {torch.float16}
    assert Path(file).stat().st_size > 1.7 * Path(half).stat().st_size
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.safetensors", "half.safetensors", "one", "two"]
    report = tmp_path / "report.json"
    assert main([file, "--report", str(report)]) == 0
    assert json.loads(report.read_text())[file]["fits"]


@ONE
def test_what_transformers_4_needs(written, tmp_path):
    """It knows no other names than `text_model.`, and reads a tokenizer from these two files."""
    pieces = read_single(written[1])
    write_folder(pieces, tmp_path / "folder")
    names = load_file(tmp_path / "folder/text_encoder/model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    assert (tmp_path / "folder/tokenizer/vocab.json").is_file()
    assert (tmp_path / "folder/tokenizer/merges.txt").read_text().startswith("#version")
    index = (tmp_path / "folder/model_index.json").read_text()
    assert "Pil" not in index  # CLIPImageProcessorPil is unknown to transformers 4
    assert "Fast" not in index


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors"], "no such file none.safetensors"),
        (["{tmp}/a.ckpt"], "can hold code: --allow-pickle"),
        (["{tmp}/a.safetensors", "{tmp}/b.ckpt"], "pickles are not written"),
        (["{tmp}/a.safetensors", "--dtype", "fp16"], "no effect without TARGET"),
        (["{tmp}/a.safetensors", "--variant", "fp16"], "is of folders"),
        (["{tmp}", "--ema"], "--ema is of single files"),
        (["{tmp}/a.safetensors", "{tmp}/b"], "is not a whole safetensors file"),
        (["{tmp}/a.safetensors", "{tmp}/a.ckpt"], "not written"),
        (["{tmp}/a.safetensors", "{tmp}"], "is a folder that holds something"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, capsys, arguments, message):
    (tmp_path / "a.ckpt").write_bytes(b"x")
    (tmp_path / "a.safetensors").write_bytes(b"x")
    before = sorted(tmp_path.iterdir())
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "channels"), [(INPAINT, 9), (UPSCALE, 7)])
def test_diffusers_reads_folders_of_other_kinds(pipeline, channels, tmp_path):
    import diffusers

    tiny = pieces_of(tiny_pipeline())
    classes = 350 if pipeline == UPSCALE else None
    unet = UNet(replace(tiny.kind.unet, in_channels=channels, num_class_embeds=classes))
    low = KINDS["sd2-x4"].low_res_scheduler if pipeline == UPSCALE else None
    kind = replace(tiny.kind, pipeline=pipeline, unet=unet.config, low_res_scheduler=low)
    pieces = replace(tiny, kind=kind, tensors={**tiny.tensors, "unet": unet.state_dict()})
    write_single(pieces, tmp_path / "a.safetensors")
    write_folder(read_single(tmp_path / "a.safetensors"), tmp_path / "a")
    assert read_folder(tmp_path / "a").kind.low_res_scheduler == low
    stock = getattr(diffusers, pipeline).from_pretrained(tmp_path / "a")
    assert torch.equal(stock.unet.conv_in.weight, unet.conv_in.weight)
    if pipeline == UPSCALE:
        with pytest.raises(ValueError, match=r"load it by LatentUpscalePipeline.from_single_file"):
            LatentDiffusionPipeline.from_single_file(tmp_path / "a.safetensors")


PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
ROOMS = "autoencoder|bench|configs|docs|ldm|tests|text_encoder|train"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_the_documentation_names_is_there(page):
    """Tests, files and modules; where it names a module with a test, the test is in it."""
    root, said = page.parents[1], page.read_text()
    for module, test in re.findall(r"`(?:(test_\w+)\.)?(test_\w+)", said):
        text = "".join(path.read_text() for path in (root / "tests").glob(f"{module or 'test_*'}.py"))
        assert f"def {test}(" in text or (root / f"tests/{test}.py").is_file(), test
    for path in re.findall(rf"(?<![\w/.])(?:{ROOMS})/[\w./-]*\w", said):
        assert (root / path).exists(), path
    for module in re.findall(rf"(?:from|-m) ((?:{ROOMS})\.[\w.]+)", said):
        path = root / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), module


def test_upscaling_is_not_drawn_from_text():
    tokenizer, report = tiny_pipeline().tokenizer, Report("a.safetensors", "b", 0)
    Pieces(KINDS["sd1-inpaint"], tokenizer, {}, [report]).check_drawn()
    with pytest.raises(ValueError, match=r"a.safetensors is .* by LatentUpscalePipeline"):
        Pieces(KINDS["sd2-x4"], tokenizer, {}, [report]).check_drawn()


def test_a_single_file_draws_from_the_command_line(tmp_path, capsys):
    """The model's hash is that of the file, as AUTOMATIC1111 has it."""
    import hashlib

    from ldm.generate import main as generate
    from ldm.recipes.picture import read_recipe

    model, picture = tmp_path / "model.safetensors", tmp_path / "fox.png"
    tiny_pipeline().save_single_file(model)
    options = ["--model", str(model), "--steps", "1", "--output", str(picture), "--dtype", "fp32"]
    assert generate([PROMPT, *options]) == 0
    assert read_recipe(picture).model_hash == hashlib.sha256(model.read_bytes()).hexdigest()[:10]
    assert generate([PROMPT, *options, "--variant", "fp16", "--overwrite"]) == 2
    assert "is of folders" in capsys.readouterr().err


@pytest.mark.slow
def test_a_picture_of_real_size_is_that_of_diffusers():
    """Stable Diffusion 1.5 whole, its weights random and shared by both: about 4 GB."""
    kind = KINDS["sd1"]
    models = {part: CLASSES[part](config).eval() for part, config in kind.configs().items()}
    config = {**kind.scheduler, "_class_name": "DDIMScheduler"}
    pipe = LatentDiffusionPipeline(
        tokenizer=clip_tokenizer(kind.pad), scheduler=Scheduler.from_config(config), **models
    )
    stock = pipe.to_diffusers()
    stock.set_progress_bar_config(disable=True)
    options = {
        "negative_prompt": "two blue cats",
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "output_type": "pt",
        "height": 64,
        "width": 128,
    }
    theirs = stock(PROMPT, generator=torch.Generator().manual_seed(5), **options).images
    assert theirs.std() > 0.01  # not a grey sheet
    torch.testing.assert_close(pipe(PROMPT, seed=5, **options).images, theirs, atol=1e-4, rtol=0)
