"The whole test run: style, every notebook, then pytest over the installed package. `python tests/run.py`"

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def step(name, *command, **env):
    print(f"== {name}", flush=True)
    start = time.time()
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}).returncode
    print(
        f"== {name}: {'passed' if code == 0 else f'FAILED with exit code {code}'} in {time.time() - start:.0f} s",
        flush=True,
    )
    return code


def main():
    bin = Path(sys.executable).parent
    # one thread per worker: two notebooks side by side use two cores better than one notebook with two threads
    threads = dict(
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        MPLBACKEND="agg",
        OMP_WAIT_POLICY="PASSIVE",
        TQDM_DISABLE="1",
    )
    workers = str(min(4, os.cpu_count() or 1))
    ruff = [sys.executable, "-m", "ruff"]
    codes = [
        step("style", *ruff, "check", "nbs", "tests", "tiny_nbdev"),
        step("format", *ruff, "format", "--check", "nbs", "tests"),
        step("notebooks", str(bin / "nbdev_test"), "--n_workers", workers, "--timing", **threads),
        step(
            "pytest",
            sys.executable,
            "-m",
            "pytest",
            "tests",
            "-q",
            "--durations=8",
            "-n",
            workers,
            "--dist",
            "worksteal",
            **threads,
        ),
    ]
    sys.exit(next((c for c in codes if c), 0))


if __name__ == "__main__":
    main()
