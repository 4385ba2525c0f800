"Diffusion models of others: what is wrong with their folders is found before anything is learned from them."

import json
import shutil

import pytest
import torch
from conftest import SMOKE
from safetensors.torch import load_file, save_file

from tiny_nbdev.diffusion.model import LatentDiffusion, load_diffusion
from tiny_nbdev.diffusion.pipeline import load_pipeline
from tiny_nbdev.diffusion.tiny import make_tiny_pipeline
from tiny_nbdev.diffusion.tokenizer import write_clip_tokenizer
from tiny_nbdev.errors import InputError
from tiny_nbdev.models.bundle import get_bundle, read_config

UNET, VAE, TEXT = (
    f"{part}/{name}.safetensors"
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    )
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def edit(file, **changes):
    "Settings of a configuration; None takes one away."
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def weights(file, change):
    "A file of weights with some tensors changed; None takes one away."
    tensors = load_file(file)
    new = {k: change(k, v) for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in new.items() if v is not None}, file, {"format": "pt"})


def add(file, **tensors):
    save_file(load_file(file) | tensors, file, {"format": "pt"})


def cut(file, n):
    file.write_bytes(file.read_bytes()[:n])


PAGE, POINTER = b"\n<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"

# What is wrong with files is said at once, before photos are looked at
AT_ONCE = {
    "no tokenizer": (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer holds no vocabulary"),
    "no merges": (lambda d: (d / "tokenizer/merges.txt").unlink(), "merges.txt is missing"),
    "empty merges": (lambda d: (d / "tokenizer/merges.txt").write_bytes(b""), "merges.txt is empty"),
    "no scheduler": (lambda d: shutil.rmtree(d / "scheduler"), "scheduler_config.json is missing"),
    "no unet": (lambda d: shutil.rmtree(d / "unet"), "unet/config.json is missing"),
    "cut text encoder": (lambda d: cut(d / TEXT, 20000), "text_encoder/model.safetensors is cut"),
    "empty UNet": (lambda d: cut(d / UNET, 0), f"{UNET} is empty (0 bytes)"),
    "pointer": (lambda d: (d / VAE).write_bytes(POINTER), f"{VAE} is a Git LFS pointer"),
    "page as weights": (lambda d: (d / UNET).write_bytes(PAGE), f"{UNET} is a page of a web server"),
    "page as configuration": (
        lambda d: (d / "vae/config.json").write_bytes(PAGE),
        "vae/config.json is a page of a web",
    ),
    "page as vocabulary": (lambda d: (d / "tokenizer/vocab.json").write_bytes(PAGE), "vocab.json is a page of a web"),
    "answer of a server": (lambda d: (d / "unet/config.json").write_text("404: Not Found"), "it begins with '404: Not"),
    "no text": (lambda d: (d / "unet/config.json").write_bytes(b"\xff\xfe\x00"), "unet/config.json is not valid JSON"),
    "a list": (lambda d: (d / "vae/config.json").write_text("[]"), "vae/config.json holds no settings"),
    "deep": (lambda d: (d / "model_index.json").write_text("[" * 10**5), "model_index.json is not valid JSON"),
    "pickle alone": (lambda d: (d / UNET).rename((d / UNET).with_suffix(".bin")), "is a pickle, which can run any"),
    "variant alone": (
        lambda d: (d / TEXT).rename((d / TEXT).with_name("model.fp16.safetensors")),
        "model.fp16.safetensors is there; rename or copy that file to model.safetensors",
    ),
    "another kind": (
        lambda d: edit(d / "model_index.json", unet=None, _class_name="FluxPipeline"),
        "FluxPipeline without",
    ),
    "no size": (lambda d: edit(d / "unet/config.json", sample_size=None), "does not say sample_size"),
    "no channels": (lambda d: edit(d / "vae/config.json", block_out_channels=None), "does not say block_out_channels"),
}

# What only shows when parts are loaded and tried
LOADED = {
    "another width": (
        lambda d: edit(d / "unet/config.json", cross_attention_dim=48),
        "where config.json asks for (16, 48)",
    ),
    "a tensor gone": (
        lambda d: weights(d / UNET, lambda k, v: None if k == "conv_out.weight" else v),
        "unet lacks 1 tensor such as conv_out.weight",
    ),
    "a tensor too many": (
        lambda d: add(d / VAE, odd=torch.ones(3)),
        "beyond what config.json asks for, 1 tensor such as odd",
    ),
    "text encoder too deep": (
        lambda d: edit(d / "text_encoder/config.json", num_hidden_layers=1),
        "text_encoder has, beyond what config.json asks for, 16 tensors such as encoder.layers.1",
    ),
    "other vocabulary": (
        lambda d: write_clip_tokenizer(
            d / "tokenizer", [f"w{chr(97 + i)}" for i in range(26)] * 3 + ["extraordinary"] * 2
        ),
        "tokens and a text encoder of",
    ),
    "few words": (lambda d: write_clip_tokenizer(d / "tokenizer", []), "tokenizer of 514 tokens"),
    "merges of another": (lambda d: cut_merges(d / "tokenizer/merges.txt"), "takes words of its vocabulary apart"),
    "merges cut in a line": (lambda d: cut(d / "tokenizer/merges.txt", 100), "tokenizer"),
    "text encoder deaf": (
        lambda d: weights(d / TEXT, lambda k, v: v * 0 if "token_embedding" in k else v),
        "text encoder that answers every prompt alike",
    ),
    "UNet deaf": (
        lambda d: weights(d / UNET, lambda k, v: v * 0 if "attn2.to_out" in k else v),
        "UNet that answers every prompt alike",
    ),
    "no numbers": (
        lambda d: weights(d / UNET, lambda k, v: v * float("nan") if k == "conv_in.weight" else v),
        "a UNet whose answers are not finite",
    ),
    "no numbers in the autoencoder": (
        lambda d: weights(d / VAE, lambda k, v: v * float("inf") if k == "decoder.conv_out.weight" else v),
        "an autoencoder whose answers are not finite",
    ),
    "no such class": (lambda d: edit(d / "model_index.json", unet=["my_code", "Net"]), "no unet that diffusers"),
    "another prediction": (
        lambda d: edit(d / "scheduler/scheduler_config.json", prediction_type="sample"),
        "predicts 'sample'",
    ),
}


def cut_merges(file):
    "Whole lines, as after a copy that stopped."
    file.write_text("\n".join(file.read_text().splitlines()[:8]) + "\n")


def sentence(call):
    with pytest.raises(InputError) as e:
        call()
    assert "\n" not in str(e.value) and "delete" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("what", AT_ONCE)
def test_said_at_once(stand_in, folder, what):
    change, words = AT_ONCE[what]
    change(folder)
    said = sentence(lambda: get_bundle(folder))
    assert words in said and str(folder) in said
    if "does not say" not in words:
        assert words in sentence(lambda: LatentDiffusion.load(folder))


@pytest.mark.parametrize("what", LOADED)
def test_said_when_loaded(stand_in, folder, what):
    change, words = LOADED[what]
    change(folder)
    said = sentence(lambda: load_diffusion(get_bundle(folder)))
    assert words in said and folder.name in said


def test_text_encoder_of_another_model(sound, folder, tmp_path):
    shutil.rmtree(folder / "text_encoder")
    other = make_tiny_pipeline(tmp_path / "other", width=32)
    shutil.copytree(other / "text_encoder", folder / "text_encoder")
    assert "reads prompts of width 32 and a text encoder that writes 64" in sentence(lambda: load_pipeline(folder))
    pipe, wide = load_pipeline(sound), load_pipeline(other)
    pipe.text_encoder = wide.text_encoder  # in memory, too
    assert "width 32" in sentence(lambda: LatentDiffusion.from_pipeline(pipe))


def test_what_does_not_matter_is_let_through(sound, folder):
    want = LatentDiffusion.load(sound)
    (folder / "readme.json").symlink_to("/nowhere/readme.json")
    (folder / "unet" / "config.json:Zone.Identifier").write_text("[ZoneTransfer]\nZoneId=3\n")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(POINTER)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    # the text encoder in the file of all of CLIP, with positions as older versions store them
    add(folder / TEXT, **{"logit_scale": torch.ones(1), "text_model.embeddings.position_ids": torch.arange(16)[None]})
    bundle = get_bundle(folder)
    model = load_diffusion(bundle)
    assert model.fingerprint() == want.fingerprint() and bundle.record(["diffusion"])
    half = lambda k, v: v.half() if v.is_floating_point() else v
    weights(folder / UNET, half)
    assert LatentDiffusion.load(folder).dtype == torch.float32, "files in half precision are widened"


def test_weights_in_several_files(sound, folder):
    tensors = load_file(folder / UNET)
    names = sorted(tensors)
    parts = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_file({k: tensors[k] for k in part}, folder / "unet" / file, {"format": "pt"})
    (folder / UNET).unlink()
    index = dict(metadata={}, weight_map={k: f for f, part in parts.items() for k in part})
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert LatentDiffusion.load(folder).fingerprint() == LatentDiffusion.load(sound).fingerprint()
    (folder / "unet" / next(iter(parts))).unlink()
    assert "00001-of-00002.safetensors is missing" in sentence(lambda: get_bundle(folder))


def test_loading_draws_no_random_numbers_that_others_see(sound):
    torch.manual_seed(0)
    LatentDiffusion.load(sound)
    first = torch.rand(1)
    torch.manual_seed(0)
    LatentDiffusion.load(sound)
    assert torch.equal(first, torch.rand(1))


def test_the_command_says_so_before_it_learns(stand_in, folder, photos, tmp_path, capsys):
    from tiny_nbdev.run.cli import main

    shutil.rmtree(folder / "tokenizer")
    args = ["specialize", str(photos), "--out", str(tmp_path / "run"), "--bundle", str(folder), *SMOKE]
    for more in ([], ["--plan"]):
        assert main([*args, *more]) == 2
        said = capsys.readouterr()
        assert "tokenizer holds no vocabulary" in said.err and len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_configurations(tmp_path):
    file = tmp_path / "config.json"
    assert "is missing" in sentence(lambda: read_config(file))
    file.write_text('{"a": 1}')
    assert read_config(file) == dict(a=1)
    file.write_text('{"a": 1')
    assert "not valid JSON (it begins with '{\"a\": 1')" in sentence(lambda: read_config(file))
