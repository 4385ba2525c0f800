"Every remedy in a message is true: nothing sound is deleted, and whoever follows one is not contradicted by the next."

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPT, photo, without_rights

from tiny_nbdev.core import load_json, load_tensors, save_json
from tiny_nbdev.data.archives import Archive
from tiny_nbdev.data.benchmarks import load_benchmark
from tiny_nbdev.errors import InputError
from tiny_nbdev.predict import find_images, predict_files
from tiny_nbdev.run.cli import main
from tiny_nbdev.run_folder import check_out, check_outside, run_lock

QUICK = ["--preset", "smoke", "--generator", "none", "--base", "none", "--device", "cpu"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")


def two_classes(root, first=0):
    for c in range(2):
        for i in range(2):
            photo(root / ("cat", "dog")[c] / f"{i}.png", first + 10 * c + i)
    return root


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "Photos with something to pass over."
    root = two_classes(tmp_path_factory.mktemp("given") / "photos")
    (root / "cat" / "IMG_1.JXL").touch()
    (root / "dog" / "@eaDir").mkdir()
    return root


@pytest.fixture(scope="module")
def whole(stand_in, given, tmp_path_factory):
    "A run that has ended, and what it printed."
    out = tmp_path_factory.mktemp("whole") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["specialize", str(given), "--out", str(out), *QUICK]) == 0
    return out, printed.getvalue()


@pytest.fixture
def run(whole, tmp_path):
    "A copy of it, to be spoilt."
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


@pytest.fixture
def said(capsys):
    "Run a command that has to fail; its one sentence."

    def call(*args):
        assert main([str(a) for a in args]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("Error: "), lines
        return lines[0].removeprefix("Error: ")

    return call


# ---- a run and its folder


def test_the_plan_names_what_is_passed_over(whole, given):
    out, printed = whole
    plan = printed[printed.index("left out") :]
    assert f"1 hidden or system file or folder in {given}: dog/@eaDir." in plan
    assert "1 file of a type that is not read (.jxl)" in plan and "cat/IMG_1.JXL" in plan
    assert printed.count("IMG_1.JXL") == 1, "once"
    assert len(load_json(out / "metrics.json")["skipped"]) == 2 and "IMG_1.JXL" in (out / "report.html").read_text()


@pytest.mark.parametrize("content", ["", "{", '{"schema": 1', "[]", "null", '{"schema": 1}', "\0\0\0\0"])
def test_cut_run_json(content, run, given, said):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "run.json"}
    (run / "run.json").write_text(content)
    sentence = said("specialize", given, "--out", run, *QUICK)
    assert "run.json is damaged, so this run cannot go on; choose a new folder for --out" in sentence
    assert before == {p: p.read_bytes() for p in before}


def test_files_that_a_run_makes_anew(run, given, capsys):
    for name in ("metrics.json", "history.json"):  # what the message says is true: deleted, they are made again
        (run / name).write_text("{")
        with pytest.raises(InputError, match=f"{name} is not valid JSON .*if this program made it, delete it and run"):
            load_json(run / name)
        (run / name).unlink()
        assert main(["specialize", str(given), "--out", str(run), *QUICK]) == 0 and load_json(run / name)


def test_out_inside_the_photos(stand_in, tmp_path, said):
    p, q = two_classes(tmp_path / "p"), two_classes(tmp_path / "q", 100)
    for where in (p, p / "runs" / "a", q / "run"):
        sentence = said("specialize", p, "--queries", q, "--out", where, *QUICK)
        assert f"{where} lies inside the folder of {'queries' if where.parent == q else 'photos'} " in sentence
        assert "choose a folder outside of it for --out" in sentence
    assert not (p / "runs").exists() and not (q / "run").exists()
    base = ["--preset", "smoke", "--generator", "none", "--device", "cpu", "--base", q]
    assert "base images" in said("specialize", p, "--out", q / "run", *base)
    assert "images of the data set" in said("evaluate", "--dataset", p, "--out", p / "results", *QUICK)
    (tmp_path / "other").symlink_to(p)
    with pytest.raises(InputError, match="lies inside"):
        check_outside(tmp_path / "other" / "run", photos=p)
    check_outside(tmp_path / "run", photos=p, queries=None)


@linux
def test_names_that_libraries_cannot_write_to(stand_in, given, run, tmp_path, said):
    latin = tmp_path / os.fsdecode("café".encode("cp1252"))
    assert said("specialize", given, "--out", latin, *QUICK) == (
        rf"{tmp_path}/caf\xe9 is no text in UTF-8; give --out another name."
    )
    assert "give --out another name" in said("evaluate", "--dataset", given, "--out", latin, *QUICK)
    assert not latin.exists()
    with pytest.raises(InputError, match=r"cannot be used \(File name too long\); choose another place"):
        check_out(tmp_path / ("x" * 300))
    # photos may lie in such a folder, and a model may be moved there
    (latin / "cat").mkdir(parents=True)
    shutil.copytree(given / "dog", latin / os.fsdecode(b"\xff"))
    shutil.copy(given / "cat" / "0.png", latin / "cat" / os.fsdecode(b"\xe9\n.png"))
    assert main(["specialize", str(latin), "--out", str(tmp_path / "odd"), *QUICK]) == 0
    assert load_json(tmp_path / "odd" / "run.json")["sources"]["photos"] == str(latin), "as the file system has it"
    assert load_json(tmp_path / "odd" / "metrics.json")["classes"] == ["cat", "ÿ"]
    assert "name in another encoding" in (tmp_path / "odd" / "report.html").read_text(encoding="utf-8")
    moved = latin.parent / os.fsdecode(b"run\xe9")
    run.rename(moved)
    assert len(list(predict_files(moved, [latin]))) == 3


def test_names_are_shown_safely(stand_in, tmp_path, capsys):
    two_classes(tmp_path / "p")
    for i in range(2):
        photo(tmp_path / "p" / "\x1b[2Jtwo\nlines" / f"{i}.png", 50 + i)
    assert main(["specialize", str(tmp_path / "p"), "--out", str(tmp_path / "r"), "--plan", *QUICK]) == 0
    out = capsys.readouterr().out
    assert r"\x1b[2Jtwo\nlines (2)" in out and "\x1b" not in out


# ---- predict


def test_predict_a_run_and_folders(run, given, capsys):
    files = sorted(map(str, given.rglob("*.png")))
    assert main(["predict", str(run / "model.onnx"), *files]) == 0
    by_name = capsys.readouterr()
    assert main(["predict", str(run), str(given)]) == 0
    by_folder = capsys.readouterr()
    assert [json.loads(s)["file"] for s in by_folder.out.splitlines()] == files and by_folder.out == by_name.out
    sentences, table = by_folder.err.split("\n\n")
    assert [s.split(":")[0] for s in sentences.splitlines()] == ["Left out"] * 2 and "IMG_1.JXL" in sentences
    assert by_name.err.strip() == table.strip() and table.startswith("Accuracy ")
    done = subprocess.run([sys.executable, "-m", "tiny_nbdev.predict", run, given], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == by_folder.out and done.stderr == by_folder.err


def test_predict_goes_on_after_a_folder_that_cannot_be_used(run, given, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "1.jxl").touch()
    args = [tmp_path / "empty", tmp_path / "gone", tmp_path / "phone", given / "cat" / "0.png"]
    assert main(["predict", *map(str, (run, *args))]) == 2
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    assert len(shown.err.split("\n\nAccuracy ")[0].splitlines()) == 3
    assert "empty holds no images; give an image, or another folder." in shown.err
    assert "gone does not exist" in shown.err and "only 1 file of a type that is not read (.jxl)" in shown.err


def test_predict_with_a_folder_that_is_no_run(run, given, tmp_path, said):
    assert "photos is a folder without a model.onnx; give the folder of a run" in said("predict", given, given)
    (run / "model.onnx").unlink()
    assert "has no model.onnx yet; give the command that started it again" in said("predict", run, given)
    assert find_images("no such file.png") == (["no such file.png"], [])


def test_a_name_that_begins_with_a_dash(run, given, tmp_path):
    shutil.copy(given / "cat" / "0.png", tmp_path / "-x.png")
    for args in (["--", "-x.png"], ["./-x.png"], ["."]):
        done = subprocess.run([SCRIPT, "predict", run, *args], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and json.loads(done.stdout)["file"].endswith("-x.png"), done.stderr


def test_a_reader_that_leaves(run, given):
    "As `tiny-nbdev predict … | head -1`."
    many = [given] * 200  # more lines than a pipe holds
    p = subprocess.Popen([SCRIPT, "predict", run, *many], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert json.loads(p.stdout.readline())
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait() == 141 and "Traceback" not in err and "Exception ignored" not in err, err


def test_two_processes_on_one_folder(run, given, said):
    code = "import sys,time\nfrom tiny_nbdev.run_folder import run_lock\n"
    code += "with run_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, run], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    try:
        assert "is in use by another tiny-nbdev process; wait" in said("specialize", given, "--out", run, *QUICK)
    finally:
        other.kill()
        other.wait()
    with run_lock(run):  # nothing is left behind that has to be removed
        pass


# ---- files of others


@pytest.mark.parametrize(
    "content,words",
    [
        (b"<!DOCTYPE html><html>404</html>", "page of a web server"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"", "0 bytes"),
        (b"404: Not Found", "get it again from its source, or, if this program made it, delete it"),
        (b"\xff\xfe\0", "get it again from its source"),
        (b"[" * 100_000, "get it again from its source"),
    ],
)
def test_what_a_failed_download_leaves(content, words, tmp_path):
    for name, load in (("config.json", load_json), ("model.safetensors", load_tensors)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words) as e:
            load(tmp_path / name)
        assert str(e.value).startswith(f"{tmp_path / name} ") and len(str(e.value)) < 400


def test_json_keeps_names_that_are_no_text(tmp_path):
    save_json({"a": "caf\udce9", "b": "犬"}, tmp_path / "a.json")
    assert (
        load_json(tmp_path / "a.json") == {"a": "caf\udce9", "b": "犬"}
        and "犬".encode() in (tmp_path / "a.json").read_bytes()
    )


@linux
def test_stray_files_in_a_data_set(tmp_path):
    where = tmp_path / "mini-imagenet"
    for i, name in enumerate(("n01930112", "n01981276")):
        photo(where / "test" / name / "1.jpg", i)
    (where / "test.csv:Zone.Identifier").write_text("[ZoneTransfer]\r\nZoneId=3\r\n")
    (where / "readme").symlink_to("/nowhere/readme")
    (where / "test" / "n01930112" / "back\\slash.txt").write_text("x")
    os.mkfifo(where / "pipe")
    names = Archive(where).names
    assert names == ("test/n01930112/1.jpg", "test/n01930112/back\\slash.txt", "test/n01981276/1.jpg")
    with pytest.raises(InputError, match="18 of 20 classes are missing"):  # its true fault
        load_benchmark("mini-imagenet", "test", tmp_path)


def test_a_data_set_without_permission(open_place):
    photo(open_place / "d" / "train" / "1.jpg", 1)
    with without_rights(open_place / "d" / "train"), pytest.raises(InputError) as e:
        Archive(open_place / "d")
    assert str(e.value) == f"{open_place / 'd' / 'train'} cannot be opened; change its permissions."
