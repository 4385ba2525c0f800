"""The wheel, built and installed far from the clone, does the demo with the weights it carries.

Its environment borrows the libraries of the one that runs the tests, since downloading several GB of them once more takes minutes;
that the wheel names all it needs is tested by what its modules import."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
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


def imported(source):
    "Top-level names that a module cannot be loaded without: imports outside of functions."

    def walk(node):
        for n in ast.iter_child_nodes(node):
            if isinstance(n, ast.Import):
                yield from (a.name.partition(".")[0] for a in n.names)
            elif isinstance(n, ast.ImportFrom) and not n.level:
                yield n.module.partition(".")[0]
            elif not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from walk(n)

    return set(walk(ast.parse(source)))


def test_wheel_names_what_it_imports(wheel):
    plain = lambda name: re.sub("[-_.]+", "-", name).lower()
    with zipfile.ZipFile(wheel) as z:
        meta = Parser().parsestr(z.read(next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))).decode())
        names = set().union(*(imported(z.read(n).decode()) for n in z.namelist() if n.endswith(".py")))
    required = {plain(re.match(r"[\w.-]+", r)[0]) for r in meta.get_all("Requires-Dist") if "extra ==" not in r}
    assert {"torch", "diffusers", "timm", "safetensors"} <= required
    whose = packages_distributions()
    missing = {
        n: whose.get(n, ["?"])
        for n in names - set(sys.stdlib_module_names) - {"tiny_nbdev"}
        if not required & {plain(d) for d in whose.get(n, [n])}
    }
    assert not missing, f"imported, and named in no requirement of the wheel: {missing}"
    assert imported(
        "import a.b\ntry: from c import d\nexcept ImportError: pass\ndef f(): import e\nfrom . import g"
    ) == {"a", "c"}


@pytest.mark.slow
def test_demo_from_the_wheel_alone(wheel, tmp_path):
    bin = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    subprocess.run([str(bin / "pip"), "install", "-q", "--no-deps", str(wheel)], check=True, timeout=300)
    own = Path(
        subprocess.run(
            [str(bin / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    (own / "borrowed.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
    )  # after its own folder, so the wheel's package comes first
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TINY_NBDEV", "PYTHONPATH"))} | {
        "HF_HUB_OFFLINE": "1"
    }
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = subprocess.run(
        [str(bin / "python"), "-c", "import tiny_nbdev; print(tiny_nbdev.__file__)"],
        cwd=elsewhere,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert Path(where.strip()).is_relative_to(own), where
    done = subprocess.run(
        [
            str(bin / "tiny-nbdev"),
            "demo",
            "--out",
            "run",
            "--profile",
            "smoke",
            "--per-class",
            "6",
            "--steps",
            "20",
            "--token-steps",
            "10",
            "--sampling-steps",
            "6",
        ],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    m = json.loads((elsewhere / "run/metrics.json").read_text())
    assert m["teacher_accuracy"] > 0.5, "the embedded teacher knows strokes; chance is 0.2"
    assert len(list((elsewhere / "run/synthetic").rglob("*.png"))) == 30
    first = next((elsewhere / "run/photos").rglob("*.png"))
    asked = subprocess.run(
        [str(bin / "tiny-nbdev"), "predict", "run/model.onnx", str(first)],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0 and json.loads(asked.stdout)["label"].startswith("digit")
    assert subprocess.run([str(bin / "tiny-nbdev"), "doctor"], cwd=elsewhere, env=env).returncode == 0
