"The wheel, built and installed in an empty environment far from the clone, does the demo with the weights it carries."
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_carries_the_weights(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sums = json.loads((ROOT / "tiny_nbdev/weights/embedded/SHA256SUMS.json").read_text())
    for name in [*sums, "SHA256SUMS.json"]:
        assert f"tiny_nbdev/weights/embedded/{name}" in names
    for file in [*(ROOT / "tiny_nbdev/lists").glob("*.json"), *(ROOT / "tiny_nbdev/recipes").glob("*.json")]:
        assert file.relative_to(ROOT).as_posix() in names
    assert "tiny_nbdev/lists/cifar_fs_test_5way5shot.json" in names
    assert not [n for n in names if n.startswith(("tests/", "nbs/"))]


@pytest.mark.slow
def test_demo_from_the_wheel_alone(wheel, tmp_path):
    bin = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    subprocess.run([str(bin / "pip"), "install", "-q", str(wheel)], check=True, timeout=1500)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TINY_NBDEV", "PYTHONPATH"))} | {"HF_HUB_OFFLINE": "1"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run([str(bin / "tiny-nbdev"), "demo", "--out", "run", "--profile", "smoke", "--per-class", "6", "--steps", "20", "--token-steps", "10", "--sampling-steps", "6"],
                          cwd=elsewhere, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    m = json.loads((elsewhere / "run/metrics.json").read_text())
    assert m["teacher_accuracy"] > 0.5, "the embedded teacher knows strokes; chance is 0.2"
    assert len(list((elsewhere / "run/synthetic").rglob("*.png"))) == 30
    first = next((elsewhere / "run/photos").rglob("*.png"))
    asked = subprocess.run([str(bin / "tiny-nbdev"), "predict", "run/model.onnx", str(first)], cwd=elsewhere, env=env, capture_output=True, text=True)
    assert asked.returncode == 0 and json.loads(asked.stdout)["label"].startswith("digit")
    assert subprocess.run([str(bin / "tiny-nbdev"), "doctor"], cwd=elsewhere, env=env).returncode == 0
