"What the tests share: random stand-in weights, a few photos, and the command line as a subprocess."

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(sys.executable).parent / "tiny-nbdev"
SMOKE = ["--preset", "smoke", "--device", "cpu"]


def pytest_addoption(parser):
    parser.addoption("--kills", default="1", help="random moments at which each generator's work is killed")
    parser.addoption("--slow-faults", action="store_true", help="also faults that take minutes")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    "Random weights in the layout of the embedded bundle: the machinery is tested, not the accuracy."
    from stand_ins import write_stand_in

    folder = write_stand_in(tmp_path_factory.mktemp("weights") / "embedded")
    os.environ["TINY_NBDEV_WEIGHTS"] = str(folder)
    data = os.environ.pop("TINY_NBDEV_DATA", None)  # reading CIFAR-FS anew in every command would only cost time
    yield folder
    del os.environ["TINY_NBDEV_WEIGHTS"]
    if data is not None:
        os.environ["TINY_NBDEV_DATA"] = data


def photo(path, seed, size=(20, 16), mode="RGB"):
    "One random picture, smooth enough to survive a JPEG."
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.BILINEAR).convert(mode).save(path)
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    "Three classes with 3, 2 and 4 photos; names with a space and an umlaut."
    root = tmp_path_factory.mktemp("photos")
    for c, (name, n) in enumerate((("red cat", 3), ("Vögel", 2), ("dog", 4))):
        for i in range(n):
            photo(root / name / f"{i}.png", 100 * c + i, (24 + 4 * i, 20))
    return root


@pytest.fixture(scope="session")
def queries(tmp_path_factory):
    root = tmp_path_factory.mktemp("queries")
    for c, name in enumerate(("red cat", "Vögel", "dog")):
        for i in range(2):
            photo(root / name / f"q{i}.png", 1000 + 100 * c + i)
    return root


def command(*args, **kw):
    "Run `tiny-nbdev` as a user would."
    kw.setdefault("timeout", 600)
    return subprocess.run([str(SCRIPT), *map(str, args)], capture_output=True, text=True, **kw)


@contextmanager
def without_rights(*closed):
    "Folders that this process may not open, also where the tests run as root."
    was = os.geteuid() if hasattr(os, "geteuid") else 1
    for p in closed:
        p.chmod(0)
    if was == 0:
        os.seteuid(65534)
    try:
        if os.access(closed[0], os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            pytest.skip("permissions do not bind here")
        yield
    finally:
        if was == 0:
            os.seteuid(0)
        for p in closed:
            p.chmod(0o755)


@pytest.fixture
def open_place():
    "A temporary folder that every user may look into."
    with tempfile.TemporaryDirectory() as d:
        os.chmod(d, 0o755)
        yield Path(d)
