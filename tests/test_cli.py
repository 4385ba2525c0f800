"Every verb of the command line as a subprocess, killed runs, and input that cannot be used."

import json
import os
import signal
import struct
import subprocess
import time
import zlib

import pytest
from conftest import SCRIPT, SMOKE, command, photo

from tiny_nbdev.run.cli import main
from tiny_nbdev.run.specialize import output_hashes


@pytest.fixture(scope="session")
def finished(stand_in, photos, queries, tmp_path_factory):
    "An unbroken run through the command line."
    out = tmp_path_factory.mktemp("run") / "whole"
    done = command("specialize", photos, "--out", out, "--queries", queries, "--compare", *SMOKE)
    assert done.returncode == 0, done.stderr
    return out, done


def test_specialize_leaves_everything(finished):
    out, done = finished
    for name in (
        "run.json",
        "specialization.safetensors",
        "model.safetensors",
        "model.onnx",
        "metrics.json",
        "try.html",
        "report.html",
    ):
        assert (out / name).stat().st_size > 0, name
    assert sorted(p.name for p in (out / "synthetic").iterdir()) == ["Vögel", "dog", "red cat"]
    assert len(list((out / "synthetic").rglob("*.png"))) == 3 * 4
    m = json.loads((out / "metrics.json").read_text())
    for key in ("teacher_accuracy", "student_accuracy", "student_accuracy_no_synthetic"):
        assert 0 <= m[key] <= 1, key
    assert m["n_query"] == 6 and m["onnx_max_abs_diff"] < 1e-4 and m["latency_ms_p50"] > 0
    assert m["onnx_bytes"] == (out / "model.onnx").stat().st_size
    assert m["try_bytes"] == (out / "try.html").stat().st_size <= 3_000_000 and m["try_max_abs_diff"] < 1e-3
    assert "try.html" in (out / "report.html").read_text() and str(out / "try.html") in done.stdout
    assert {"specialize", "sample", "distill"} <= set(m["seconds"])
    run = json.loads((out / "run.json").read_text())
    assert (
        {"settings", "versions", "commit"} <= set(run)
        and run["settings"]["seed"] == 0
        and run["settings"]["schema"] == 1
    )
    assert "red cat" in done.stdout, "the plan names the classes"


def test_report_is_self_contained(finished):
    text = (finished[0] / "report.html").read_text()
    assert text.count("data:image/png;base64,") >= 2 and "Vögel" in text
    assert 'src="http' not in text and "<link" not in text


def test_finished_run_is_left_alone(finished, photos, queries):
    out, _ = finished
    before = {
        p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.suffix in (".png", ".onnx", ".safetensors")
    }
    again = command("specialize", photos, "--out", out, "--queries", queries, "--compare", *SMOKE)
    assert again.returncode == 0 and "finished already" in again.stdout
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_changed_settings_are_refused(finished, photos, queries):
    out, _ = finished
    no = command("specialize", photos, "--out", out, "--queries", queries, "--compare", "--seed", "1", *SMOKE)
    assert no.returncode == 2 and "seed" in no.stderr and "Traceback" not in no.stderr
    assert json.loads((out / "run.json").read_text())["settings"]["seed"] == 0


MOMENTS = {
    "at the start": lambda out: (out / "run.json").exists(),
    "while inverting": lambda out: (out / "run.json").exists() and '"photos"' in (out / "run.json").read_text(),
    "after inverting": lambda out: (out / "specialization.safetensors").exists(),
    "while sampling": lambda out: len(list((out / "synthetic").rglob("*.png"))) >= 5,
    "after distilling": lambda out: (out / "model.safetensors").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_goes_on_and_ends_the_same(moment, finished, photos, queries, tmp_path):
    out = tmp_path / "run"
    args = [str(SCRIPT), "specialize", str(photos), "--out", str(out), "--queries", str(queries), "--compare", *SMOKE]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 300
    while process.poll() is None and time.time() < end and not MOMENTS[moment](out):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (out / "metrics.json").exists()
    again = subprocess.run(args, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert output_hashes(out) == output_hashes(finished[0])
    assert not [p for p in out.rglob("*.tmp")], "no half-written file stays behind"


def test_predict(finished, photos):
    files = [str(p) for p in sorted(photos.rglob("*.png"))[:3]]
    done = command("predict", finished[0] / "model.onnx", *files)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [r["file"] for r in rows] == files
    for r in rows:
        assert r["label"] in ("red cat", "Vögel", "dog") and abs(sum(r["probabilities"].values()) - 1) < 1e-4
        assert r["probability"] == max(r["probabilities"].values())


def test_predict_refuses(finished, tmp_path):
    (tmp_path / "a.jpg").write_text("not a picture")
    for args, word in (
        ((finished[0] / "model.onnx", tmp_path / "a.jpg"), "a.jpg"),
        ((tmp_path / "no.onnx", tmp_path / "a.jpg"), "no.onnx"),
    ):
        done = command("predict", *args)
        assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr


def test_demo(stand_in, tmp_path):
    done = command("demo", "digits", "--out", tmp_path / "demo", *SMOKE)
    assert done.returncode == 0, done.stderr
    m = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert m["n_query"] == 896 - 25 and m["student_accuracy_no_synthetic"] is not None
    assert "report.html" in done.stdout


def test_help_knows_every_data_set():
    done = command("evaluate", "--help")
    assert done.returncode == 0 and all(n in done.stdout for n in ("coop/dtd", "cars", "photos/aid")), done.stdout


def test_doctor(stand_in):
    done = command("doctor")
    assert done.returncode == 0 and "torch" in done.stdout, done.stdout + done.stderr


def test_doctor_names_what_is_missing(tmp_path):
    done = command("doctor", env={**os.environ, "TINY_NBDEV_WEIGHTS": str(tmp_path / "nowhere")})
    assert done.returncode == 1 and "nowhere" in done.stdout + done.stderr


@pytest.mark.parametrize("generator", ["textual-inversion", "ddim", "none"])
def test_other_generators(generator, stand_in, photos, tmp_path, capsys):
    assert main(["specialize", str(photos), "--out", str(tmp_path / "r"), "--generator", generator, *SMOKE]) == 0
    m = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert m["teacher_accuracy"] is None and m["student_accuracy"] is None
    assert (tmp_path / "r" / "synthetic").exists() == (generator != "none")


def bomb():
    "A PNG that promises 60,000 x 60,000 pixels."
    chunk = lambda k, v: struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v))
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def two_classes(root):
    for c in "ab":
        for i in range(2):
            photo(root / c / f"{i}.png", ord(c) * 10 + i)
    return root


BAD = {
    "missing folder": (lambda r: r / "nowhere", "nowhere"),
    "empty folder": (lambda r: (r / "p").mkdir() or r / "p", "no class folders"),
    "empty class": (lambda r: (two_classes(r / "p"), (r / "p/c").mkdir()) and r / "p", "no images"),
    "one class": (lambda r: photo(r / "p/a/1.png", 1).parent.parent, "one class only"),
    "zero bytes": (lambda r: (two_classes(r / "p"), (r / "p/a/z.jpg").write_bytes(b"")) and r / "p", "z.jpg"),
    "text as jpg": (lambda r: (two_classes(r / "p"), (r / "p/a/t.jpg").write_text("hello")) and r / "p", "t.jpg"),
    "cut off": (
        lambda r: (
            (two_classes(r / "p"), (r / "p/a/cut.png").write_bytes((r / "p/a/0.png").read_bytes()[:90])) and r / "p"
        ),
        "cut.png",
    ),
    "bomb": (lambda r: (two_classes(r / "p"), (r / "p/b/bomb.png").write_bytes(bomb())) and r / "p", "bomb.png"),
    "same picture in two classes": (
        lambda r: (two_classes(r / "p"), photo(r / "p/b/same.png", 970)) and r / "p",
        "same.png",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_photos(case, stand_in, tmp_path, capsys):
    make, word = BAD[case]
    out = tmp_path / "out"
    assert main(["specialize", str(make(tmp_path)), "--out", str(out), *SMOKE]) == 2
    err = capsys.readouterr().err.strip()
    assert word in err and len(err.splitlines()) == 1 and "Traceback" not in err, err
    assert not out.exists(), "nothing is begun with input that cannot be used"


def test_bad_photo_as_a_user_sees_it(stand_in, tmp_path):
    two_classes(tmp_path / "p")
    (tmp_path / "p/a/t.jpg").write_text("hello")
    done = command("specialize", tmp_path / "p", "--out", tmp_path / "out", *SMOKE)
    assert done.returncode == 2 and "t.jpg" in done.stderr and "Traceback" not in done.stderr


def test_query_that_is_a_training_photo(stand_in, tmp_path, capsys):
    two_classes(tmp_path / "p")
    two_classes(tmp_path / "q")
    assert (
        main(
            [
                "specialize",
                str(tmp_path / "p"),
                "--queries",
                str(tmp_path / "q"),
                "--out",
                str(tmp_path / "out"),
                *SMOKE,
            ]
        )
        == 2
    )
    assert "same picture" in capsys.readouterr().err


def test_skip_bad(stand_in, tmp_path, capsys):
    two_classes(tmp_path / "p")
    (tmp_path / "p/a/t.jpg").write_text("hello")
    assert (
        main(
            [
                "specialize",
                str(tmp_path / "p"),
                "--out",
                str(tmp_path / "out"),
                "--generator",
                "none",
                "--skip-bad",
                *SMOKE,
            ]
        )
        == 0
    )
    assert "t.jpg" in json.dumps(json.loads((tmp_path / "out/metrics.json").read_text())["skipped"])


def test_folder_of_somebody_else(stand_in, photos, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["specialize", str(photos), "--out", str(tmp_path), *SMOKE]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_full_disk(stand_in, photos, tmp_path, monkeypatch, capsys):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=1000))
    assert main(["specialize", str(photos), "--out", str(tmp_path / "r"), *SMOKE]) == 2
    assert "space" in capsys.readouterr().err


def test_write_to_a_full_device():
    from tiny_nbdev.core import save_json
    from tiny_nbdev.errors import InputError

    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    import tiny_nbdev.core as core

    real = core.os.fsync

    def full(fd):
        raise OSError(28, "No space left on device")

    core.os.fsync = full
    try:
        with pytest.raises(InputError, match="No space left"):
            save_json({"a": 1}, "never.json")
    finally:
        core.os.fsync = real
    assert not os.path.exists("never.json")


@pytest.mark.parametrize(
    "args,word",
    [
        (["--student", "resnet1200"], "resnet1200"),
        (["--device", "toaster"], "toaster"),
        (["--bundle", "no/such/thing/here"], "no/such/thing/here"),
    ],
)
def test_bad_choices(args, word, stand_in, photos, tmp_path, capsys):
    assert main(["specialize", str(photos), "--out", str(tmp_path / "r"), "--preset", "smoke", *args]) == 2
    assert word in capsys.readouterr().err


def test_help_is_quick_and_free_of_torch():
    import sys

    code = (
        "import sys; sys.argv = ['tiny-nbdev', '--help']\nfrom tiny_nbdev.run.cli import main\ntry: "
        "main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
