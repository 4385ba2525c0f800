"Predictions without torch: one sentence for whatever is wrong, one JSON line for each image."

import csv
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
from tiny_nbdev.predict import (
    Predictor,
    confusion,
    confusion_text,
    folder_class,
    main,
    predict_files,
    read_pixels,
)

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


def write(path, seed=0):
    "A picture."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def read_csv(path):
    "Rows of a table as dicts."
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_table_keeps_its_rows(folder, tmp_path, capsys):
    write(tmp_path / "in" / "a,b.png")
    (tmp_path / "in" / "m.png").write_text("no picture")
    write(tmp_path / "in" / "z.png", 1)
    (tmp_path / "t.csv").write_text("older")
    assert main([str(folder / "model.onnx"), str(tmp_path / "in"), "--csv", str(tmp_path / "t.csv")]) == 2
    shown, rows = capsys.readouterr(), read_csv(tmp_path / "t.csv")
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [Path(r["file"]).name for r in rows] == ["a,b.png", "z.png"] and list(rows[0])[3:] == list(NAMES)
    for row, line in zip(rows, lines, strict=True):
        assert row["label"] == line["label"] and float(row["probability"]) == line["probability"]
        assert {n: float(row[n]) for n in NAMES} == line["probabilities"]
    assert len(shown.err.splitlines()) == 1 and "m.png" in shown.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "t.csv"]


def test_table_when_somebody_stops_it(folder, tmp_path, monkeypatch):
    for i in range(3):
        write(tmp_path / f"{i}.png", i)
    plain, seen = Predictor.predict_file, []

    def stopped(self, path):
        assert not (tmp_path / "t.csv").exists(), "it takes its name at the end"
        seen.append(path)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return plain(self, path)

    monkeypatch.setattr(Predictor, "predict_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(
            [str(folder / "model.onnx"), *(str(tmp_path / f"{i}.png") for i in range(3)), "--csv", f"{tmp_path}/t.csv"]
        )
    assert [Path(r["file"]).name for r in read_csv(tmp_path / "t.csv")] == ["0.png", "1.png"]


@pytest.mark.parametrize(
    "name,words",
    [
        ("wide.png", "does not end in .csv"),
        ("model.onnx", "does not end in .csv"),
        ("photo.csv", "would overwrite what is read"),
        ("link.csv", "would overwrite what is read"),
        ("dir.csv", "is a folder"),
        ("absent/t.csv", "could not be written"),
    ],
)
def test_table_overwrites_nothing_else(folder, tmp_path, name, words, capsys):
    for f in ("wide.png", "model.onnx"):
        (tmp_path / f).write_bytes((folder / f).read_bytes())
    (tmp_path / "photo.csv").write_bytes((folder / "wide.png").read_bytes())
    (tmp_path / "link.csv").symlink_to(tmp_path / "model.onnx")
    (tmp_path / "dir.csv").mkdir()
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    given = [str(tmp_path / f) for f in ("model.onnx", "wide.png", "photo.csv")]
    assert main([*given, "--csv", str(tmp_path / name)]) == 2
    shown = capsys.readouterr()
    assert not shown.out and words in shown.err and len(shown.err.splitlines()) == 1
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_table_on_a_full_disk(folder, tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    os.symlink("/dev/full", tmp_path / f".t.csv.{os.getpid()}.tmp")
    assert main([str(folder / "model.onnx"), str(folder / "wide.png"), "--csv", str(tmp_path / "t.csv")]) == 2
    assert "t.csv could not be written (No space left on device)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_confusion_on_the_console(folder, tmp_path, capsys):
    for i, place in enumerate(("cat", "cat/tail", "dog", "other", "Dog")):
        write(tmp_path / "in" / place / f"{i}.png", i)
    assert main([str(folder / "model.onnx"), str(tmp_path / "in")]) == 0
    shown = capsys.readouterr()
    answers = [json.loads(line) for line in shown.out.splitlines()]
    truth = [folder_class(a["file"], NAMES, tmp_path / "in") for a in answers]
    assert sorted(map(str, truth)) == ["None", "None", "cat", "cat", "dog"]
    counts = confusion(truth, [a["label"] for a in answers], NAMES)
    assert counts.sum(1).tolist() == [2, 1, 0] and counts.dtype == np.int64
    right = sum(t == a["label"] for t, a in zip(truth, answers))
    assert np.trace(counts) == right and f"Accuracy {right / 3:.1%} ({right} of 3 images)" in shown.err
    assert "Not counted: 2 images, since the folders 'Dog', 'other' carry no class name of the model." in shown.err
    assert main([str(folder / "model.onnx"), str(tmp_path / "in" / "other")]) == 0
    assert "Accuracy" not in capsys.readouterr().err, "nothing to compare with, nothing said"


def test_confusion_by_hand():
    counts = confusion(["a", "a", None, "b", "c"], ["a", "b", "c", "b", "a"], "abc")
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    text = confusion_text(counts, "abc").splitlines()
    assert text[0] == "Accuracy 50.0% (2 of 4 images)"
    assert [line.split() for line in text[2:]] == [
        ["a", "2", "50%", "1", "1", "0"],
        ["b", "1", "100%", "0", "1", "0"],
        ["c", "1", "0%", "1", "0", "0"],
    ]
    few = confusion_text(counts, "abc", most=2).splitlines()
    assert [line.split()[3:] for line in few[2:]] == [["b", "(1)"], ["-"], ["a", "(1)"]]
    with pytest.raises(ValueError):
        confusion(["a"], [], "abc")


def test_module_runs_without_torch(folder):
    env = os.environ | dict(PYTHONPATH=str(Path(tiny_nbdev.__file__).parents[1]), PYTHONIOENCODING="utf-8")
    run = lambda *a: subprocess.run([sys.executable, *a], cwd=folder, env=env, capture_output=True, text=True)
    done = run("-m", "tiny_nbdev.predict", "model.onnx", "wide.png")
    assert done.returncode == 0 and json.loads(done.stdout)["label"] in NAMES
    code = "import sys; from tiny_nbdev.predict import main; main(['model.onnx', 'wide.png']); print(*sys.modules)"
    loaded = {*run("-c", code).stdout.splitlines()[-1].split()}
    assert "onnxruntime" in loaded and not loaded & {"torch", "torchvision", "timm", "tqdm", "scipy", "matplotlib"}
