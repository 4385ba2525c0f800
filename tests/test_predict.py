"Predictions without torch: one sentence for whatever is wrong, one JSON line for each image."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from PIL import Image

import tiny_nbdev
from tiny_nbdev.classify.export import export_onnx
from tiny_nbdev.classify.students import create_student
from tiny_nbdev.errors import InputError
from tiny_nbdev.predict import main, predict_files, read_pixels

NAMES = ("cat", "dog", "grüner Fisch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    export_onnx(create_student("conv4", 3).eval(), d / "model.onnx", NAMES)
    rng = np.random.default_rng(0)
    for name, shape in {"wide.png": (40, 150, 3), "grey.png": (50, 20)}.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(d / name)
    (d / "text.jpg").write_text("dear diary")
    (d / "empty.png").touch()
    (d / "bad.onnx").write_bytes(b"nonsense")
    other = '<ir_version: 8, opset_import: ["" : 18]> g (float[n] x) => (float[n] y) { y = Abs (x) }'
    onnx.save(onnx.parser.parse_model(other), d / "other.onnx")
    return d


@pytest.mark.parametrize(
    "model,image,words",
    [
        ("model.onnx", "text.jpg", "text.jpg is not an image"),
        ("model.onnx", "empty.png", "0 bytes"),
        ("model.onnx", "absent.png", "does not exist"),
        ("none.onnx", "wide.png", "model.onnx of a run"),
        ("bad.onnx", "wide.png", "not a model"),
        ("other.onnx", "wide.png", "not a classifier of tiny_nbdev"),
    ],
)
def test_mistakes(folder, model, image, words):
    with pytest.raises(InputError, match=words) as e:
        list(predict_files(folder / model, [folder / image]))
    assert (image if model == "model.onnx" else model) in str(e.value) and len(str(e.value).splitlines()) == 1


def test_large_photos_are_halved(tmp_path):
    Image.new("RGB", (5000, 4200)).save(tmp_path / "photo.png")
    assert read_pixels(tmp_path / "photo.png").shape == (2100, 2500, 3)


def test_command(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["model.onnx", "wide.png", "grey.png"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == ["wide.png", "grey.png"]
    assert tuple(lines[0]["probabilities"]) == NAMES and lines[0]["label"] in NAMES
    assert main(["model.onnx", "wide.png", "text.jpg"]) == 2
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1 and shown.err.strip().endswith("convert it to PNG or JPEG.")
    assert main(["model.onnx"]) == 2 and "Usage" in capsys.readouterr().err


def test_module_runs_without_torch(folder):
    env = os.environ | dict(PYTHONPATH=str(Path(tiny_nbdev.__file__).parents[1]), PYTHONIOENCODING="utf-8")
    run = lambda *a: subprocess.run([sys.executable, *a], cwd=folder, env=env, capture_output=True, text=True)
    done = run("-m", "tiny_nbdev.predict", "model.onnx", "wide.png")
    assert done.returncode == 0 and json.loads(done.stdout)["label"] in NAMES
    code = "import sys; from tiny_nbdev.predict import main; main(['model.onnx', 'wide.png']); print(*sys.modules)"
    loaded = {*run("-c", code).stdout.splitlines()[-1].split()}
    assert "onnxruntime" in loaded and not loaded & {"torch", "torchvision", "timm", "tqdm", "scipy", "matplotlib"}
