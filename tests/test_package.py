"""The package as it is installed: it imports, it has a notebook for every module, and the notebooks export to just
what is there."""

import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_nbdev

ROOT = Path(__file__).resolve().parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(tiny_nbdev.__path__, "tiny_nbdev.") if not m.ispkg]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(q.startswith((".", "_")) for q in p.parts))


def test_there_is_something_to_test():
    assert len(MODULES) >= 20 and len(NOTEBOOKS) >= 20


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name):
    importlib.import_module(name)


@pytest.mark.parametrize("file", sorted((ROOT / "tiny_nbdev").rglob("*.py")), ids=lambda p: p.name)
def test_module_has_its_notebook(file):
    if file.name in ("__init__.py", "_modidx.py"):
        return
    edit = re.search(r"File to edit: (\S+\.ipynb)", file.read_text())
    assert edit, f"{file.name} was not exported from a notebook"
    assert (file.parent / edit[1]).resolve().is_file()


def test_no_undefined_names():
    subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "F821", "--ignore", "F722", str(ROOT / "tiny_nbdev")],
        check=True,
    )


def test_export_changes_nothing(tmp_path):
    for name in ("nbs", "tiny_nbdev", "settings.ini", "setup.py", "pyproject.toml", "README.md"):
        src = ROOT / name
        skip = shutil.ignore_patterns("weights", "__pycache__", ".ipynb_checkpoints")
        shutil.copytree(src, tmp_path / name, ignore=skip) if src.is_dir() else shutil.copy(src, tmp_path / name)
    before = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / "tiny_nbdev").rglob("*.py")}
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True)
    after = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / "tiny_nbdev").rglob("*.py")}
    assert set(before) == set(after)
    assert [str(k) for k in before if before[k] != after[k]] == []


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(file):
    text = file.read_text()
    assert len(text) < 700_000, "lower the dpi or split the notebook"
    cells = json.loads(text)["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    words = ["".join(c["source"]) for c in cells] + [
        json.dumps({k: v for k, v in o.get("data", {"text": o.get("text")}).items() if not k.startswith("image/")})
        for o in outputs
    ]
    assert not re.search(r"(?<![\w.])/(work|root|home/\w+)/", " ".join(words)), "a machine path"
    if file.parent.name in ("pretrain", "tables"):
        assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1


def test_nothing_is_unpickled():
    for file in (ROOT / "tiny_nbdev").rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"pickle\.load|allow_pickle=True|weights_only=False", text), file
        for call in re.findall(r"torch\.load\([^)]*\)", text):  # tensors alone, and their hash is known or asked for
            assert "weights_only=True" in call and ("_SHA256" in text or "if not config.sha256:" in text), (file, call)


def test_prediction_needs_no_torch():
    code = "import sys, tiny_nbdev.predict; assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
