"""A cluster: the same files as without one, also when a worker is killed, the scheduler is started again, or the
process that asks is killed; one sentence for whatever is amiss."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import SCRIPT, command
from safetensors.torch import load_file

pytest.importorskip("distributed", reason="Dask is not installed: pip install 'tiny_nbdev[cluster]'")

from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate.protocol import read_rows
from tiny_nbdev.run import cluster as room
from tiny_nbdev.run.cluster import Cluster, Place, make_terms, meet_terms, open_cluster, parse_place
from tiny_nbdev.run.evaluate import evaluate
from tiny_nbdev.run.specialize import specialize

HERE = str(Path(__file__).parent)
SILENT = dict(say=lambda *_: None)


def steps(about):
    "Units that count how often they are done; one of them may end its worker the first time."
    folder, pause, deadly = about

    def do(job):
        mark = Path(folder) / f"died-{job}"
        if job == deadly and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(Path(folder) / f"count-{job}", "a") as f:
            f.write("x")
        time.sleep(pause)
        return [job, job**2]

    return do


@pytest.fixture(scope="module")
def workers(stand_in):
    "Two processes for all tests here; random weights, so that only the machinery is tested."
    kept = {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "TQDM_DISABLE")}
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    said = []
    with open_cluster("local:2", said.append) as cluster:
        cluster.said = said
        yield cluster
    for k, v in kept.items():
        os.environ.pop(k, None) if v is None else os.environ.update({k: v})


def test_it_says_where_to_look(workers):
    assert "what they do: http://127.0.0.1:" in workers.said[0] and "/status" in workers.said[0]


def test_a_worker_that_dies_changes_nothing(workers, tmp_path):
    about, files = (str(tmp_path), 0.0, 2), [tmp_path / f"{i}.json" for i in range(5)]
    assert sorted(workers.each(steps, about, list(range(5)), tmp_path, files)) == [(i, [i, i * i]) for i in range(5)]
    assert (tmp_path / "died-2").exists() and all(f.is_file() for f in files)
    assert not list(tmp_path.glob(".*")), "neither marks nor half files stay"
    before = {p: p.read_text() for p in tmp_path.glob("count-*")}
    assert len(list(workers.each(steps, about, list(range(5)), tmp_path, files))) == 5
    assert {p: p.read_text() for p in tmp_path.glob("count-*")} == before, "what has a file is not done again"


def test_a_unit_that_ends_every_worker(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(workers.own.scheduler, "allowed_failures", 0)
    with pytest.raises(InputError, match="ended every worker that took it"):
        list(workers.each(steps, (str(tmp_path), 0.0, 7), [7], tmp_path))


def strike(workers, seen):
    "Kill a worker as soon as something is seen."

    def act():
        while not seen():
            time.sleep(0.02)
        victim = next(iter(workers.client.run(os.getpid).values()))
        os.kill(victim, signal.SIGKILL)
        struck.append(victim)

    struck = []
    threading.Thread(target=act, daemon=True).start()
    return struck


def test_evaluate_gives_the_same_rows(workers, tmp_path):
    how = dict(dataset="digits", episodes=3, generator="none", preset="smoke", device="cpu", **SILENT)
    evaluate(tmp_path / "alone", **how)
    struck = strike(workers, lambda: list((tmp_path / "many").rglob("units/*/*.json")))
    evaluate(tmp_path / "many", cluster=workers, **how)
    assert struck, "a worker was killed in the middle"
    one, many = (read_rows(next((tmp_path / n).glob("*.csv"))) for n in ("alone", "many"))
    drop = lambda rows: {i: {k: v for k, v in r.items() if k != "seconds"} for i, r in rows.items()}
    assert len(one) == 3 and drop(one) == drop(many)
    assert sorted(p.name for p in (tmp_path / "alone").iterdir()) == sorted(
        p.name for p in (tmp_path / "many").iterdir()
    )


def images(folder):
    return {p.relative_to(folder): p.read_bytes() for p in (Path(folder) / "synthetic").rglob("*.png")}


def test_adapters_and_images_are_the_same(workers, photos, tmp_path):
    "Parts of adapters, then stretches of images, each by whichever worker is free."
    amounts = {"generator.config.adapter.max_batch": 4, "generator.config.batch_size": 2}
    amounts |= {
        "generator.config.adapter.steps": 2,
        "generator.config.adapter.warmup": 1,
        "generator.config.n_steps": 2,
    }
    how = dict(generator="loft", preset="smoke", per_class=2, device="cpu", changes=amounts, **SILENT)
    specialize(photos, tmp_path / "alone", **how)
    struck = strike(workers, lambda: list((tmp_path / "many" / "work").glob("adapters_*.safetensors")))
    specialize(photos, tmp_path / "many", cluster=workers, **how)
    assert struck, "a worker was killed in the middle"
    one, many = (load_file(tmp_path / n / "specialization.safetensors") for n in ("alone", "many"))
    assert one.keys() == many.keys() and len(one["adapters"]) == 9 and all((one[k] == many[k]).all() for k in one)
    assert images(tmp_path / "alone") == images(tmp_path / "many") and len(images(tmp_path / "many")) == 6
    files = lambda n: {p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")}
    assert files("alone") == files("many")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def dask(*args):
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-m", "dask", *map(str, args)], env=env, **quiet)


def start_engine(port):
    scheduler = dask("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
    worker = dask("worker", f"tcp://127.0.0.1:{port}", "--nthreads", 1, "--no-nanny", "--no-dashboard")
    return [scheduler, worker]


def test_a_scheduler_that_starts_again_changes_nothing(tmp_path):
    port = free_port()
    running, said = start_engine(port), []
    files = [tmp_path / f"{i}.json" for i in range(8)]
    try:
        end = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < end:
            time.sleep(0.2)
        with open_cluster(f"127.0.0.1:{port}", said.append, patience=120) as cluster:
            found = {}
            for i, result in cluster.each(steps, (str(tmp_path), 0.5, None), list(range(8)), tmp_path, files):
                assert i not in found, "each result comes once"
                found[i] = result
                if len(found) == 2:
                    for p in running:
                        p.kill(), p.wait()
                    had = [f for f in files if f.is_file()]
                    running = start_engine(port)
        assert found == {i: [i, i * i] for i in range(8)}
        assert 2 <= len(had) < 8 and any("is gone" in s for s in said) and said[-1] == "cluster: connected again"
        counts = {i: len((tmp_path / f"count-{i}").read_text()) for i in range(8)}
        assert all(counts[int(f.stem)] == 1 for f in had), "what has a file is not done again"
    finally:
        for p in running:
            p.kill(), p.wait()


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children")
    own = [int(p) for p in found.read_text().split()] if found.exists() else []
    return own + [c for p in own for c in children(p)]


def test_a_killed_command_goes_on(stand_in, tmp_path):
    what = ["evaluate", "--dataset", "digits", "--episodes", 3, "--preset", "smoke", "--generator", "none"]
    what = [*map(str, what), "--device", "cpu", "--out", str(tmp_path / "out")]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([str(SCRIPT), *what, "--cluster", "local:1"], **quiet)
    rows = lambda: read_rows(next(iter((tmp_path / "out").glob("*.csv")), tmp_path / "none"))
    end = time.time() + 300
    while process.poll() is None and time.time() < end and not rows():
        time.sleep(0.01)
    own = children(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    done = rows()
    assert 1 <= len(done) < 3
    end = time.time() + 60
    while time.time() < end and any(Path(f"/proc/{p}").exists() for p in own):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{p}").exists() for p in own), "workers end with the process that asks"
    evaluate(tmp_path / "out", "digits", episodes=3, preset="smoke", generator="none", device="cpu", **SILENT)
    assert len(rows()) == 3 and all(rows()[i] == r for i, r in done.items())


@pytest.mark.parametrize("where", ["local", "local:0", "local:many", "slurm:-1", "tcp://node", "http://node:1", "ray"])
def test_what_is_no_cluster(where):
    with pytest.raises(InputError, match="is not a cluster; give local:4, slurm:20, or the address") as e:
        parse_place(where)
    assert len(str(e.value).splitlines()) == 1


def test_a_bad_address_is_one_sentence(stand_in, tmp_path):
    out = tmp_path / "out"
    what = ["evaluate", "--dataset", "digits", "--preset", "smoke", "--generator", "none", "--out", out]
    said = command(*what, "--cluster", f"127.0.0.1:{free_port()}")
    assert said.returncode == 2 and not out.exists(), said.stderr
    assert said.stderr.startswith("Error: No Dask scheduler answers at tcp://127.0.0.1:"), said.stderr
    assert len(said.stderr.strip().splitlines()) == 1, said.stderr


def test_a_scheduler_without_workers():
    port = free_port()
    scheduler = dask("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
    try:
        end = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < end:
            time.sleep(0.2)
        with pytest.raises(InputError, match="has had no worker for 1 s; start some with: dask worker tcp://"):
            Cluster(Place("address", address=f"tcp://127.0.0.1:{port}"), patience=1.0, **SILENT)
    finally:
        scheduler.kill(), scheduler.wait()


def test_workers_of_other_terms_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "VISIBLE", 0.1)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    terms = make_terms()
    with monkeypatch.context() as m, pytest.raises(InputError, match="takes 16 units at once .* --nthreads 1"):
        m.setattr(room, "_threads", lambda: 16)
        meet_terms(terms)
    with pytest.raises(InputError, match="does not see .*gone; use a disk that all machines share"):
        meet_terms(make_terms(str(tmp_path / "gone")))
    with (
        monkeypatch.context() as m,
        pytest.raises(InputError, match="has tiny_nbdev .* and not 0.0.1; install the same"),
    ):
        m.setattr(room, "versions", lambda: dict(tiny_nbdev="0.0.1", python="3.0"))
        other = make_terms()
        m.undo()
        meet_terms(other)


def test_slurm_needs_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="needs sbatch, which this machine does not have"):
        Cluster(parse_place("slurm:2"), **SILENT)


SBATCH = """#!/bin/sh
# stands in for Slurm: the script of the job runs at once, on this machine
for script; do :; done
sh "$script" >"$0.log" 2>&1 &
echo $! >>"$0.pids"
echo "Submitted batch job $!"
"""


def test_jobs_of_slurm(tmp_path, monkeypatch):
    "The script that a job would run, with a stand-in for sbatch."
    pytest.importorskip("dask_jobqueue")
    import dask.config

    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", "#!/bin/sh\nkill $@ 2>/dev/null\n")):
        (tools / name).write_text(text)
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(InputError, match=r"jobqueue.yaml does not describe a job of Slurm \(You must specify"):
        Cluster(parse_place("slurm:1"), **SILENT)
    job = {"jobqueue.slurm.cores": 4, "jobqueue.slurm.processes": 1, "jobqueue.slurm.memory": "1GB"}
    job |= {"jobqueue.slurm.interface": "lo", "jobqueue.slurm.log-directory": str(tmp_path)}
    with dask.config.set(job), open_cluster("slurm:1", lambda *_: None) as cluster:
        assert dict(cluster.each(steps, (str(tmp_path), 0.0, None), [3], tmp_path)) == {0: [3, 9]}
        assert {*cluster.client.nthreads().values()} == {1}, "one unit at a time, however many cores a job has"


def test_without_dask_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"--cluster needs Dask; install it with: pip install 'tiny_nbdev\[cluster\]'"):
        Cluster(parse_place("local:2"), **SILENT)
