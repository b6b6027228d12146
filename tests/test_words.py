"""Learned words: those of stock diffusers, and a text encoder and tokenizer that come back bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm import generate
from ldm.adapters import __main__ as command
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.noted import file_hash
from ldm.recipes.picture import read_recipe
from tests.tiny import tiny_pipeline

WIDTH = 24
PROMPT = "a <Fox> in snow, <fox>"


@pytest.fixture
def pipe() -> LatentDiffusionPipeline:
    return tiny_pipeline()


def vectors(count: int) -> Tensor:
    return torch.randn(count, WIDTH)


@pytest.mark.slow
def test_words_are_those_of_stock_diffusers(pipe, tmp_path):
    """Tokens and context of words of one vector and of three, in diffusers' own files."""
    stock = pipe.to_diffusers()
    for name, count in (("<fox>", 3), ("<sea>", 1)):
        save_file({name: vectors(count)}, tmp_path / "learned_embeds.safetensors")
        stock.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
        pipe.load_textual_inversion(tmp_path)
    written = stock.maybe_convert_prompt("a <fox> in snow, <sea>", stock.tokenizer)
    theirs = stock.tokenizer(
        [written], padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    ours = pipe.tokenizer(["a <fox> in snow, <sea>"])
    assert ours.tolist() == theirs.input_ids.tolist()
    context = stock.text_encoder(theirs.input_ids).last_hidden_state
    torch.testing.assert_close(pipe.encode_prompts(["a <fox> in snow, <sea>"]), context, atol=1e-5, rtol=1e-5)


def test_what_is_unloaded_was_never_there(pipe):
    tokenizer, table = pipe.tokenizer, pipe.text_encoder.embeddings.token_embedding.weight
    config, before, plain = pipe.text_encoder.config, table.clone(), pipe.encode_prompts([PROMPT])
    pipe.load_textual_inversion({"<fox>": vectors(2)})
    pipe.load_textual_inversion(vectors(1), token="sea-style")
    assert len(pipe.text_encoder.embeddings.token_embedding.weight) == len(tokenizer) + 3
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)
    assert not torch.equal(pipe.encode_prompts([PROMPT]), plain)
    pipe.encode_prompts([PROMPT], clip_skip=1)
    pipe.unload_textual_inversion("<fox>")
    kept = pipe.encode_prompts(["sea-style"])
    pipe.unload_textual_inversion()
    assert (pipe.tokenizer, pipe.text_encoder.config) == (tokenizer, config)
    assert pipe.text_encoder.embeddings.token_embedding.weight is table
    assert torch.equal(table, before)
    assert torch.equal(pipe.encode_prompts([PROMPT]), plain)
    assert not torch.equal(pipe.encode_prompts(["sea-style"]), kept)


def test_a_prompt_is_cut_where_it_was_written(pipe):
    pipe.load_textual_inversion({"<fox>": vectors(6)})
    assert pipe.tokenizer.lengths(["<fox> <fox>"]) == [12]
    assert pipe.tokenizer.cut("a <fox> <fox> in Snow") == "Snow"  # 14 fit
    assert pipe.tokenizer(["<fox>"])[0, 1:7].tolist() == [
        pipe.tokenizer.token_id(name) for name in ("<fox>", *(f"<fox>_{i}" for i in range(1, 6)))
    ]


def test_a_saved_pipeline_keeps_its_words(pipe, tmp_path):
    pipe.load_textual_inversion({"<fox>": vectors(2)})
    pipe.save_pretrained(tmp_path)
    again = LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again.encode_prompts([PROMPT]), pipe.encode_prompts([PROMPT]))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({"<fox>": torch.ones(2, 768)}, {}, "as Stable Diffusion 1"),
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, {}, "looks made for SDXL"),
        ({"<fox>": torch.full((2, WIDTH), torch.nan)}, {}, "not finite"),
        ({"a</w>": torch.ones(1, WIDTH)}, {}, "a name that no token has yet"),
        ({"<a>": torch.ones(1, WIDTH), "<b>": torch.ones(1, WIDTH)}, {"token": "c"}, "holds 2 words"),
        (torch.ones(1, WIDTH), {}, "give token"),
        ({}, {}, "holds no word"),
        ({"<fox>": torch.ones(1, 2, WIDTH)}, {}, "expected vectors"),
        ("fox.pt", {}, "is a pickle"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(pipe, source, options, message):
    tokenizer, table = pipe.tokenizer, pipe.text_encoder.embeddings.token_embedding.weight
    with pytest.raises(ValueError, match=message):
        pipe.load_textual_inversion(source, **options)
    assert pipe.tokenizer is tokenizer
    assert pipe.text_encoder.embeddings.token_embedding.weight is table
    pipe.load_textual_inversion({"<fox>": vectors(2)})
    for call in (
        lambda: pipe.load_textual_inversion({"<fox>": vectors(1)}),
        lambda: pipe.unload_textual_inversion("x"),
    ):
        with pytest.raises(ValueError, match=r"is loaded already|no learned word 'x': loaded are <fox>"):
            call()


# The command lines


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model, a LoRA in kohya's spelling, a word in AUTOMATIC1111's and a picture by them."""
    folder = tmp_path_factory.mktemp("made")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "model")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 64), f"{name}.lora_B.weight": torch.randn(64, 2)}
    pipe.load_lora_weights(tensors)
    pipe.save_lora_weights(folder, weight_name="style.safetensors", spelling="kohya")
    save_file({"emb_params": torch.randn(2, WIDTH)}, folder / "foxy.safetensors")
    assert (
        draw(folder, "--lora", f"{folder}/style.safetensors:0.5", "--embedding", f"{folder}/foxy.safetensors")
        == 0
    )
    return folder


def draw(folder: Path, *options: str, output: str = "one.png") -> int:
    model = [
        "a foxy in snow",
        "--model",
        str(folder / "model"),
        "--steps",
        "1",
        "--dtype",
        "fp32",
        "--seed",
        "3",
    ]
    return generate.main([*model, *options, "--output", str(folder / output)])


@pytest.mark.slow
def test_a_picture_names_its_adapters_and_repeats(made, capsys, monkeypatch):
    recipe, style = read_recipe(made / "one.png"), made / "style.safetensors"
    assert recipe.loras == ((str(style), 0.5, file_hash(style)),)
    assert recipe.embeddings == ((str(made / "foxy.safetensors"), file_hash(made / "foxy.safetensors")),)
    assert f'Lora hashes: "style: {file_hash(style)}", TI hashes: "foxy: ' in recipe.parameters()
    pixels = lambda name: read_pixels(made / name)
    again = ["--from", str(made / "one.png")]
    assert generate.main([*again, "--output", str(made / "two.png")]) == 0
    assert pixels("two.png") == pixels("one.png")
    assert draw(made, output="plain.png") == 0
    assert pixels("plain.png") != pixels("one.png")
    away = made / "away"
    away.mkdir()
    style.rename(away / "style.safetensors")
    assert generate.main([*again, "--output", str(made / "three.png")]) == 2
    assert f"style.safetensors of hash {recipe.loras[0][2]}: no such file" in capsys.readouterr().err
    monkeypatch.chdir(away)  # by its name, here
    assert generate.main([*again, "--output", str(made / "three.png")]) == 0
    assert pixels("three.png") == pixels("one.png")
    (away / "style.safetensors").rename(style)


def read_pixels(path: Path) -> bytes:
    from PIL import Image

    return Image.open(path).tobytes()


def test_an_adapter_of_another_model_is_an_error_of_one_line(made, capsys, tmp_path):
    path = tmp_path / "xl.safetensors"
    save_file({"lora_te2_text_model_x.lora_down.weight": torch.ones(1, 2)}, path)
    assert draw(made, "--lora", str(path), output="none.png") == 2
    assert "looks made for SDXL" in capsys.readouterr().err
    assert not (made / "none.png").exists()


def test_the_command_converts_there_and_back(made, tmp_path, capsys):
    kohya, model = made / "style.safetensors", ["--model", str(made / "model")]
    peft = tmp_path / "peft" / "adapter_model.safetensors"
    assert command.main([str(kohya), str(peft), "--spelling", "peft", *model]) == 0
    assert capsys.readouterr().out == f"{peft}: 1 layers (lora) of unet\n"
    assert json.loads((peft.parent / "adapter_config.json").read_text())["peft_type"] == "LORA"
    back = tmp_path / "back.safetensors"
    assert command.main([str(peft.parent), str(back), "--spelling", "kohya", *model]) == 0
    assert file_hash(back) == file_hash(kohya)
    assert command.main([str(kohya), str(tmp_path / "no.bin"), "--spelling", "peft", *model]) == 2
    assert "is written as a .safetensors" in capsys.readouterr().err
