"""The package as `pip install .` gives it, in an environment of its own, far from the clone.

Tests that need it share it. The environment borrows the libraries of the one that runs the tests, since downloading
several GB of them once more takes minutes. That the wheel names all it needs is tested by what its modules import.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("tiny_nbdev", "nbs", "data")
FILES = ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")


@dataclass(frozen=True)
class Plain:
    "A plain installation."

    wheel: Path  # What was installed
    sdist: Path  # What the wheel was built from
    bin: Path  # Folder of its commands
    package: Path  # Folder of the installed package

    def run(self, *command, cwd, timeout=900, **env):
        "A command of this environment: no network, no settings of ours."
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("TINY_NBDEV", "PYTHON", "MPLBACKEND"))}
        clean |= dict(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", VIRTUAL_ENV=str(self.bin.parent))
        clean |= dict(PATH=f"{self.bin}{os.pathsep}{os.environ['PATH']}", **env)
        program = self.bin / command[0]
        return subprocess.run(
            [str(program), *map(str, command[1:])], cwd=cwd, env=clean, capture_output=True, text=True, timeout=timeout
        )


def build(folder):
    "Source distribution and, from it alone, the wheel."
    source = folder / "source"  # a copy, so that nothing is written into the clone and nothing stale is found there
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    shutil.rmtree(source)


def install(folder):
    "The wheel in a new environment, which finds its own package before the borrowed libraries."
    env = folder / "env"
    bin = env / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    wheel = next((folder / "dist").glob("*.whl"))
    subprocess.run([str(bin / "pip"), "install", "-q", "--no-deps", str(wheel)], check=True, timeout=300)
    ask = [str(bin / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    (own / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")


def described(folder) -> Plain:
    "The finished installation in `folder`."
    bin = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    package = next((folder / "env").rglob("site-packages")) / "tiny_nbdev"
    dist = folder / "dist"
    return Plain(next(dist.glob("*.whl")), next(dist.glob("*.tar.gz")), bin, package)


def plain_install(tmp_path_factory) -> Plain:
    "Built once for a whole test run; pytest's other workers wait for the one that came first."
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "plain_install"
    try:
        folder.mkdir()
    except FileExistsError:
        for _ in range(1200):
            if (folder / "ready").exists():
                return described(folder)
            assert not (folder / "failed").exists(), "the package cannot be built or installed"
            time.sleep(1)
        raise AssertionError("the package was not built within 20 minutes") from None
    try:
        build(folder)
        install(folder)
        (folder / "ready").touch()
    except BaseException:
        (folder / "failed").touch()
        raise
    return described(folder)
