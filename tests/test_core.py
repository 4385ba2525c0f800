"The rooms everything stands on: errors, seeds, files, provenance, device, measures, plots, run folders."

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from tiny_nbdev.core import (
    atomic_path,
    file_sha256,
    git_commit,
    load_json,
    load_tensors,
    machine,
    progress,
    quiet_libraries,
    randn_images,
    rng_for,
    save_json,
    save_tensors,
    seed_for,
    user_cache,
    versions,
)
from tiny_nbdev.device import autocast, compute_dtype, device_of, keep_memory, pick_device
from tiny_nbdev.errors import InputError
from tiny_nbdev.measure import clock, mean_ci, peak_memory, psnr, show_number
from tiny_nbdev.plots import image_grid, plot_curves, plot_intervals, set_style, show_images, style
from tiny_nbdev.run_folder import RunDir, check_out, clear_temporary, existing_parent, run_lock


def test_the_error_is_a_value_error_that_says_its_sentence():
    assert issubclass(InputError, ValueError) and str(InputError("a.jpg is empty; delete it.")).endswith("delete it.")


def test_seeds_depend_on_names_and_their_kinds():
    assert len({seed_for(s, c, i) for s in range(3) for c in ("cat", "dog") for i in range(50)}) == 300
    assert seed_for("1", 2) != seed_for(1, 2) and seed_for("ab", "c") != seed_for("a", "bc")
    assert all(0 <= seed_for(i) < 2**63 for i in range(99))
    assert torch.equal(torch.rand(3, generator=rng_for(0, "x")), torch.rand(3, generator=rng_for(0, "x")))


def test_seeds_are_the_same_on_every_machine():
    assert seed_for(0, "cat", 3) == 5499714142987864425


def test_every_image_has_noise_of_its_own():
    a, b = randn_images((4, 8, 8), [1, 2, 3]), randn_images((4, 8, 8), [3, 9])
    assert torch.equal(a[2], b[0]) and not torch.equal(a[0], a[1]) and a.shape == (3, 4, 8, 8)
    assert randn_images((4, 8, 8), []).shape == (0, 4, 8, 8)


def test_a_file_is_whole_or_absent(tmp_path):
    f = tmp_path / "deep" / "a.txt"
    with atomic_path(f) as p:
        p.write_text("first")
    with pytest.raises(KeyboardInterrupt), atomic_path(f) as p:
        p.write_text("half a sec")
        raise KeyboardInterrupt
    assert f.read_text() == "first" and [q.name for q in f.parent.iterdir()] == ["a.txt"]


def test_tensors_come_back_with_their_settings(tmp_path):
    file = tmp_path / "w.safetensors"
    save_tensors({"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}, file, {"alpha": 0.5, "classes": ["é"]})
    t, m = load_tensors(file)
    assert t["w"].shape == (2, 3) and t["n"].item() == 3 and m == {"alpha": 0.5, "classes": ["é"]}
    assert file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    if os.name == "posix":
        mask = os.umask(0o022)
        os.umask(mask)
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, "others may read it as they may read any new file"
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors at all")
    for bad in ("bad.safetensors", "absent.safetensors"):
        with pytest.raises(InputError, match=bad):
            load_tensors(tmp_path / bad)


def test_a_refused_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "s.json"
    save_json({"path": tmp_path, "k": (1, 2)}, file)
    assert load_json(file) == {"path": str(tmp_path), "k": [1, 2]}
    with pytest.raises(ValueError):
        save_json({"x": float("nan")}, file)
    assert load_json(file)["k"] == [1, 2]
    file.write_text("{")
    with pytest.raises(InputError, match="s.json is not valid JSON"):
        load_json(file)


def test_a_copy_without_history_says_its_commit(tmp_path):
    real = git_commit()
    with mock.patch.dict(os.environ, TINY_NBDEV_COMMIT="0123456789ab"):
        assert git_commit(tmp_path) == "0123456789ab" and git_commit() == (real or "0123456789ab"), (
            "a clone knows better"
        )
    with mock.patch.dict(os.environ, TINY_NBDEV_COMMIT=""):
        assert git_commit(tmp_path) is None
    assert "cores" in machine() and {"tiny_nbdev", "python", "torch"} <= set(versions())


def test_progress_passes_everything_on():
    assert list(progress([1, 2], "demo", leave=False)) == [1, 2]


def test_libraries_are_quiet_inside_the_block_only():
    from transformers.utils import logging

    before = logging.get_verbosity()
    with pytest.raises(ZeroDivisionError), quiet_libraries():
        assert logging.get_verbosity() == logging.ERROR
        raise ZeroDivisionError
    assert logging.get_verbosity() == before


def test_where_caches_lie(monkeypatch):
    monkeypatch.setenv("TINY_NBDEV_CACHE", "/data/cache")
    assert user_cache() == Path("/data/cache")
    monkeypatch.setenv("TINY_NBDEV_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    monkeypatch.setattr(sys, "platform", "linux")
    assert user_cache() == Path("/c/tiny_nbdev") or os.name == "nt"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert user_cache().parts[-3:] == ("Library", "Caches", "tiny_nbdev")


def test_devices():
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match="'toaster' cannot be used here.*--device cpu"):
        pick_device("toaster")
    assert device_of(torch.nn.Linear(1, 1)).type == "cpu" and device_of(torch.nn.Identity()).type == "cpu"


def test_number_formats():
    assert compute_dtype("cpu", "fp32") == torch.float32 and compute_dtype("cpu", "bf16") == torch.bfloat16
    assert compute_dtype("cpu") in (torch.float32, torch.bfloat16) and compute_dtype("mps") == torch.float32
    with pytest.raises(ValueError, match="fp8"):
        compute_dtype("cpu", "fp8")
    net = torch.nn.Linear(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast("cpu", precision):
            assert net(torch.ones(1, 2)).dtype == dtype


def test_memory_can_be_kept_and_given_back():
    assert keep_memory() in (True, False) and keep_memory(False) in (True, False)


def test_psnr():
    x = torch.full((2, 3, 4, 4), 0.5)
    torch.testing.assert_close(psnr(x, x + 0.1), torch.full((2,), 20.0), atol=1e-4, rtol=0)


def test_intervals():
    m, h = mean_ci([0.5, 0.7])
    assert abs(m - 0.6) < 1e-12 and abs(h - 12.706 * 0.1) < 1e-3 and mean_ci([0.5]) == (0.5, float("inf"))
    with pytest.raises(ValueError, match="shape"):
        mean_ci([])


def test_numbers_as_a_person_reads_them():
    seconds = {0.12: "0.1 s", 135: "2 min 15 s", 600: "10 min", 7200: "2.0 h"}
    for value, words in seconds.items():
        assert show_number(value, "seconds") == words
    assert show_number(0.8736, "percent") == "87.4 %" and show_number(None, "percent") == "–"
    assert show_number(460e3, "bytes") == "460 kB" and show_number(12, "bytes") == "12 bytes"
    assert show_number(1.234, "ms") == "1.23 ms" and show_number(12.3, "ms") == "12 ms"
    assert show_number(12345, "count") == "12,345" and show_number("x") == "x"


def test_time_and_memory():
    calls = []
    assert 0 <= clock(lambda: calls.append(1), repeats=3) < 1 and len(calls) == 4
    assert peak_memory() is None or peak_memory() > 10_000_000


def test_a_grid_of_images():
    assert image_grid(torch.zeros(5, 3, 4, 4), 3).shape == (3, 9, 14)
    assert image_grid(torch.zeros(5, 3, 4, 4), 3)[:, -1, -1].tolist() == [1, 1, 1], "what is empty is white"


def test_figures():
    import matplotlib.pyplot as plt

    before = dict(plt.rcParams)
    with style():
        assert plt.rcParams["font.size"] == 8
    assert len(show_images(torch.zeros(3, 3, 4, 4), titles="abc", n_col=2, rows=["x", "y"]).axes) == 4
    rows = [("a", 0.8, 0.01), ("b", 0.7, float("inf"))]
    ax = plot_intervals(rows, reference={"published": 0.75}).axes[0]
    assert [t.get_text() for t in ax.texts] == ["80.0 ± 1.0", "70.0", "published: 75.0"]
    ax = plot_curves({"a": [1, 2, 3], "b": ([0, 1], [2, 2], [0.1, 0.2])}, "x", "y", xlim=(0, 5))
    assert len(ax.lines) == 2 and ax.get_xlim() == (0, 5) and len(ax.collections) == 1
    plt.close("all")
    assert dict(plt.rcParams) == before, "other people's figures stay as they are"
    with plt.rc_context():
        set_style()
        assert plt.rcParams["figure.dpi"] < 75


def test_a_run_goes_on_where_it_ended(tmp_path):
    settings = {"seed": 0, "alpha": 1.0, "classes": ("a", "b")}
    run = RunDir(tmp_path / "run", settings)
    with run.stage("invert") as info:
        info["loss"] = 0.25
    with pytest.raises(KeyboardInterrupt), run.stage("sample"):
        raise KeyboardInterrupt
    again = RunDir(tmp_path / "run", settings)
    assert again.done("invert") and not again.done("sample") and again.stages["invert"]["loss"] == 0.25
    assert {"schema", "settings", "versions", "commit", "machine", "started"} <= set(again.record)
    with pytest.raises(InputError, match="seed was 0 and is now 1") as e:
        RunDir(tmp_path / "run", {**settings, "seed": 1})
    assert "alpha" not in str(e.value)


def test_a_run_of_an_earlier_version_is_refused(tmp_path):
    save_json({"settings": {"seed": 0}, "stages": {}}, tmp_path / "run.json")
    for call in (lambda: RunDir(tmp_path, {"seed": 0}), lambda: check_out(tmp_path)):
        with pytest.raises(InputError, match="was started by an earlier version of tiny_nbdev; finish it there or"):
            call()


def test_somebodys_folder_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").touch()
    for call in (lambda: RunDir(tmp_path, {}), lambda: check_out(tmp_path)):
        with pytest.raises(InputError, match="not empty"):
            call()
    with pytest.raises(InputError, match="is a file"):
        check_out(tmp_path / "thesis.tex")
    assert existing_parent(tmp_path / "a" / "b") == tmp_path


HOLDER = """
import sys,time
from tiny_nbdev.run_folder import run_lock
with run_lock(sys.argv[1]):
    print('held', flush=True); time.sleep(60)
"""


def test_one_writer_at_a_time(tmp_path):
    run = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="in use"), run_lock(run):
        pass
    other.kill()
    other.wait()
    with run_lock(run):
        (run / ".a.png.123.tmp").touch()
        (run / "a.png").touch()
        clear_temporary(run)
    assert [p.name for p in run.iterdir()] == ["a.png"], "no lock file is left"
    (run / "a.png").unlink()
    (run / ".run.json.77.tmp").touch()
    check_out(run)
    check_out(run / "new")
