"""The fault drill: what befalls long work is made here on purpose, and nothing may be lost. `--kills 20` kills each
generator's work at twenty random moments in place of one; `--slow-faults` adds what waits for minutes."""

import io
import json
import os
import random
import re
import signal
import subprocess
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, SMOKE
from test_generators import CONFIGS, LATENT, NAMES

import tiny_nbdev
from tiny_nbdev import core
from tiny_nbdev.classify.backbones import load_backbone
from tiny_nbdev.classify.batches import Source
from tiny_nbdev.classify.clip import load_clip
from tiny_nbdev.classify.clip_students import OpenClipConfig, open_clip_weights
from tiny_nbdev.classify.distill import DistillRecipe, distill
from tiny_nbdev.classify.export import export_onnx, load_classifier
from tiny_nbdev.classify.probe import FeatureMap
from tiny_nbdev.classify.students import create_student
from tiny_nbdev.core import file_sha256, load_tensors, rng_for, save_tensors
from tiny_nbdev.data.archives import Archive
from tiny_nbdev.data.images import ImageSet, resize
from tiny_nbdev.data.loaders import load_digit_images
from tiny_nbdev.data.training import TrainConfig, Trainer
from tiny_nbdev.diffusion import memory
from tiny_nbdev.diffusion.adapters import load_lora
from tiny_nbdev.diffusion.prior import load_prior
from tiny_nbdev.diffusion.tiny import make_tiny_pipeline
from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate import protocol
from tiny_nbdev.evaluate.protocol import run_episodes
from tiny_nbdev.generate.base import Specialization
from tiny_nbdev.onnx_session import onnx_session
from tiny_nbdev.predict import Predictor
from tiny_nbdev.run import drill
from tiny_nbdev.run.cli import main
from tiny_nbdev.run.drawn import SyntheticImages
from tiny_nbdev.run.drill import Work, broken, child, images_in, malicious, processes
from tiny_nbdev.run.specialize import output_hashes, specialize


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return str(make_tiny_pipeline(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def slow_faults(request):
    if not request.config.getoption("--slow-faults"):
        pytest.skip("waits for minutes; give --slow-faults")


# ---- what every person can try


@pytest.mark.parametrize("name", drill.FAULTS)
def test_drill(name, tmp_path, pipeline, drilled):
    found = drilled[name]
    assert found[2], found


@pytest.fixture(scope="module")
def drilled():
    return {row[0]: row for row in drill.drill()}


def test_a_fault_is_told_and_the_code_says_so(monkeypatch, capsys):
    def no_disk(place):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(drill, "FAULTS", {"a broken disk": no_disk})
    assert main(["doctor", "--drill"]) == 1
    assert re.search(r"NO +a broken disk +OSError: .*Input/output error", capsys.readouterr().out)


# ---- kills at random moments


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments(name, request, pipeline, tmp_path):
    n, work = int(request.config.getoption("--kills")), Work(pipeline, name, json.dumps(CONFIGS[name]), 2)
    start = time.monotonic()
    whole = work.do(tmp_path / "whole")
    lasts, chance = time.monotonic() - start, random.Random(f"kills of {name}")
    for k in range(n):
        out = tmp_path / f"run-{k}"
        with child(work, out, processes()) as p:
            end = time.monotonic() + 60
            while p.is_alive() and not out.exists() and time.monotonic() < end:
                time.sleep(0.002)  # until it begins
            p.join(chance.uniform(0, lasts))
            p.kill()
            p.join()
        had = images_in(out)
        assert work.do(out) == whole, f"killed after {had} images"
        assert not list(out.rglob("*.tmp"))


# ---- full disk


def test_each_file_of_a_run_meets_a_full_disk_once(stand_in, photos, tmp_path, monkeypatch):
    how = dict(preset="smoke", device="cpu", int8=True, say=lambda *_: None)
    specialize(photos, tmp_path / "whole", **how)
    met, replace_file = [], core.os.replace

    def full_once(source, target):
        kind = re.sub(r"\d+", "0", Path(target).name)
        if kind not in met and tmp_path / "run" in Path(target).parents:
            met.append(kind)
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(core.os, "replace", full_once)
    for _ in range(40):
        try:
            specialize(photos, tmp_path / "run", **how)
            break
        except InputError as e:
            assert "No space left" in str(e) and met[-1].strip("0") in re.sub(r"\d+", "0", str(e)), e
            assert not list((tmp_path / "run").rglob("*.tmp"))
    wanted = {"run.json", "0.png", "model.onnx", "model.int8.onnx".replace("8", "0"), "report.html", "metrics.json"}
    wanted |= {"specialization.safetensors", "model.safetensors", "history.json", "experiment.json", "try.html"}
    assert wanted <= set(met), met
    assert output_hashes(tmp_path / "run") == output_hashes(tmp_path / "whole")


def test_every_writer_is_atomic():
    "A file is written whole or not at all: only within `atomic_path`, or into a folder of temporary files."
    allowed = {"diffusion/tokenizer.py": 1}  # writes a new model's folder, which is not a result
    root = Path(tiny_nbdev.__file__).parent
    for file in sorted(root.rglob("*.py")):
        text = file.read_text()
        writes = re.findall(r"(?:(\w+)\.write_(?:text|bytes)\(|open\((\w+), \"w)", text)
        bare = [a or b for a, b in writes if (a or b) != "tmp"]
        name = file.relative_to(root).as_posix()
        assert len(bare) <= allowed.get(name, 0) or name == "run/drill.py", (name, bare)


# ---- not a number


def two_sources():
    images = load_digit_images([5, 6]).subset([0, 1, 2, 200, 201, 202])
    return [Source("support", images, None, 6, 1.0)]


def test_a_gradient_that_is_not_a_number_is_not_kept(tmp_path):
    student, file = create_student("conv4", 2, 32), tmp_path / "state.safetensors"
    student.head.weight.register_hook(lambda g: g * float("nan"))
    recipe = DistillRecipe(steps=1, batch_size=6, precision="fp32")
    with pytest.raises(InputError, match="weights are not finite after step 1; lower the learning rate"):
        distill(student, two_sources(), recipe, resume_path=file)
    assert not file.exists()
    student = create_student("conv4", 2, 32)
    student.head.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="The loss became nan at step 1"):
        distill(student, two_sources(), replace(recipe, head_init="random"), resume_path=file)
    assert not file.exists()


def test_a_trainer_keeps_no_such_weights(tmp_path):
    net, file = torch.nn.Linear(2, 1), tmp_path / "t.safetensors"
    net.weight.register_hook(lambda g: g * float("nan"))
    loss = lambda m, step, rng: m(torch.ones(4, 2)).square().mean()
    with pytest.raises(InputError, match="weights are not finite after step 1, so they are not kept"):
        Trainer(net, TrainConfig(n_steps=1, batch_size=4, lr=0.1, bf16=False), file).fit(loss)
    assert not file.exists()


@pytest.mark.parametrize("name", LATENT)
def test_latents_that_are_not_numbers_give_no_image(name, pipeline, tmp_path):
    work = Work(pipeline, name, json.dumps(CONFIGS[name]), 1)
    generator = work.make(lambda m: broken(m, lambda x, n: x * float("nan"), ("noise_pred", "noise_from", "decode")))
    with pytest.raises(InputError, match="finite"):
        work.do(tmp_path / "run", generator)
    assert not images_in(tmp_path / "run")
    assert work.do(tmp_path / "run") == work.do(tmp_path / "whole"), "nothing of it stayed"


# ---- images that teach nothing


def test_replacing_survives_a_kill(pipeline, tmp_path, monkeypatch):
    work = Work(pipeline, "class-prompt", json.dumps(CONFIGS["class-prompt"] | dict(batch_size=1)), 3)
    faulty = lambda: work.make(lambda m: broken(m, lambda x, n: x * 0 if n % 3 == 1 and n < 9 else x))
    whole = work.do(tmp_path / "whole", faulty())
    names = work.photos().classes
    found = SyntheticImages(tmp_path / "whole" / "synthetic", names).again(3)
    assert found == dict(drawn_again=3, useless=0), found

    class Killed(BaseException):
        pass

    stop = SyntheticImages._replace

    def dies(self, *args):
        stop(self, *args)
        raise Killed

    generator = faulty()
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(SyntheticImages, "_replace", dies)
        work.do(tmp_path / "run", generator)
    record = core.load_json(tmp_path / "run" / "synthetic.again.json")
    assert not record["done"] and len(record["rounds"]) == 1
    assert work.do(tmp_path / "run") == whole


def test_a_run_says_what_was_drawn_again(stand_in, photos, tmp_path, monkeypatch):
    from tiny_nbdev.diffusion.model import LatentDiffusion

    decode, calls = LatentDiffusion.decode, []

    def faulty(self, z, *args, **kwargs):
        record = tmp_path / "run" / "run.json"
        if record.exists() and '"reconstruct"' in record.read_text():  # what is decoded from here on is drawn
            calls.append(len(z))
        return decode(self, z, *args, **kwargs) * (len(calls) != 1)

    monkeypatch.setattr(LatentDiffusion, "decode", faulty)
    said = []
    changes = {"generator.config.batch_size": 3}
    m = specialize(photos, tmp_path / "run", preset="smoke", device="cpu", changes=changes, say=said.append)
    assert m["drawn_again"] >= 1 and m["useless"] == 0, m["drawn_again"]
    assert re.search(r"drawn again +\d+ images of one colour, or the same as another\n", said[-1])


# ---- little memory, other batches


@pytest.mark.parametrize("name", LATENT)
def test_batches_and_memory(name, pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_NBDEV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "_known", {})
    work, tried = Work(pipeline, name, json.dumps(CONFIGS[name]), 6), []
    work.do(tmp_path / "run")
    spec = Specialization.load(tmp_path / "run" / "specialization.safetensors")
    drawn = lambda g: ImageSet.concat(list(g.sample(spec, 6, 1))).images
    alone = drawn(work.make(batch_size=1))
    for n in (4, 16):
        torch.testing.assert_close(drawn(work.make(batch_size=n)), alone, rtol=0, atol=3e-3)

    def small(x, n):
        tried.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return x

    poor = drawn(work.make(lambda m: broken(m, small, ("noise_pred", "noise_from")), batch_size=16))
    torch.testing.assert_close(poor, alone, rtol=0, atol=3e-3)
    assert max(tried) > 3, "it ran out of memory"


# ---- processes


def wait_for(seen, process, seconds=200):
    end = time.time() + seconds
    while process.poll() is None and not seen() and time.time() < end:
        time.sleep(0.005)
    assert seen(), "it did not come that far"


def test_a_command_that_is_asked_to_end(stand_in, photos, tmp_path):
    out = tmp_path / "run"
    args = [str(SCRIPT), "specialize", str(photos), "--out", str(out), *SMOKE]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for((out / "run.json").exists, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "The same command goes on from here." in err and "Traceback" not in err, err
    assert not list(out.rglob("*.tmp"))
    how = dict(preset="smoke", device="cpu", say=lambda *_: None)
    specialize(photos, out, **how)
    specialize(photos, tmp_path / "whole", **how)
    assert output_hashes(out) == output_hashes(tmp_path / "whole")


def test_two_evaluations_on_one_folder(stand_in, tmp_path, capsys):
    from tiny_nbdev.run_folder import run_lock

    with run_lock(tmp_path / "eval" / ".conv4-none"):
        code = main(["evaluate", "--out", str(tmp_path / "eval"), "--dataset", "digits", "--episodes", "1", *SMOKE,
                     "--generator", "none"])  # fmt: skip
    assert code == 2 and "is in use by another tiny-nbdev process" in capsys.readouterr().err


class Sleepy:
    "A method; the worker of the first start stops itself, as a machine without memory might."

    def __init__(self, mark):
        self.mark = Path(mark)

    def __call__(self, indices):
        if 1 in indices and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        row = dict(accuracy=0.5, n_query=4, seconds=0.1, teacher_accuracy=0.5, before_accuracy=0.5)
        return [row for _ in indices]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system stops no processes")
def test_a_worker_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "PATIENCE", 4.0)
    run = lambda: run_episodes(Sleepy, str(tmp_path / "mark"), tmp_path / "out", "m", 4, {}, workers=2)
    with pytest.raises(InputError, match="A worker hung: .* give the same command again, which goes on"):
        run()
    done = len(protocol.read_rows(tmp_path / "out" / "m.csv"))
    assert run()["n_episodes"] == 4 and done < 4


def test_one_two_and_four_workers(tmp_path, stand_in, slow_faults):
    rows = []
    for n in (1, 2, 4):
        out = tmp_path / str(n)
        args = ["evaluate", "--out", str(out), "--dataset", "digits", "--episodes", "4", *SMOKE, "--workers", str(n)]
        env = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        done = subprocess.run([str(SCRIPT), *args], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        found = protocol.read_rows(next(out.glob("*.csv")))
        rows.append({i: (r["accuracy"], r["teacher_accuracy"]) for i, r in found.items()})
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 4


def test_a_worker_of_a_cluster_that_hangs(tmp_path, slow_faults):
    dask = pytest.importorskip("dask")
    from tiny_nbdev.run.cluster import open_cluster

    with dask.config.set({"distributed.scheduler.worker-ttl": "5s"}), open_cluster("local:2", lambda *_: None) as c:
        pid = next(iter(c.client.run(os.getpid).values()))
        timer = threading.Timer(1.0, os.kill, (pid, signal.SIGSTOP))
        timer.start()
        files = [tmp_path / f"{i}.json" for i in range(6)]
        try:
            found = dict(c.each(slowly, None, list(range(6)), tmp_path, files))
        finally:
            os.kill(pid, signal.SIGCONT)
    assert found == {i: i * i for i in range(6)}


def slowly(spec):
    return lambda i: (time.sleep(0.5), i * i)[1]


# ---- what others give us


OPENERS = {
    "tensors": (load_tensors, ".safetensors"),
    "specialization": (Specialization.load, ".safetensors"),
    "backbone": (load_backbone, ".safetensors"),
    "classifier": (load_classifier, ".safetensors"),
    "feature map": (FeatureMap.load, ".safetensors"),
    "prior": (lambda f: load_prior(f), ".safetensors"),
    "LoRA": (lambda f: load_lora(f, None), ".safetensors"),
    "predictor": (Predictor, ".onnx"),
    "open_clip weights": (lambda f: open_clip_weights(OpenClipConfig("any", str(f))), ".pt"),
    "open_clip weights with their hash": (
        lambda f: open_clip_weights(OpenClipConfig("any", str(f), sha256=file_sha256(f))),
        ".pt",
    ),
    "CLIP": (lambda f: load_clip(str(f.parent)), ".bin"),
}


@pytest.mark.parametrize("what", OPENERS)
def test_no_pickle_is_ever_opened(what, tmp_path):
    opener, suffix = OPENERS[what]
    names = {"CLIP": "pytorch_model"}
    file, mark = tmp_path / "home" / f"{names.get(what, 'model')}{suffix}", tmp_path / "acted"
    malicious(file, mark)
    if what in names:
        (file.parent / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError):
        opener(file)
    assert not mark.exists(), "it was opened, and it acted"


def test_the_pickle_would_act(tmp_path):
    import pickle

    malicious(tmp_path / "p", tmp_path / "acted")
    pickle.loads((tmp_path / "p").read_bytes())
    assert (tmp_path / "acted").is_dir(), "a test that cannot fail proves nothing"


def test_links_in_archives_lead_nowhere(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    with tarfile.open(tmp_path / "a.tar", "w") as t:
        for name, kind in (("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            i = tarfile.TarInfo(name)
            i.type, i.linkname = kind, str(tmp_path / "secret.jpg")
            t.addfile(i)
        i = tarfile.TarInfo("folder")
        i.type, i.linkname = tarfile.SYMTYPE, str(tmp_path)
        t.addfile(i)
        i = tarfile.TarInfo("folder/x.txt")
        i.size = 1
        t.addfile(i, io.BytesIO(b"x"))
    found = Archive(tmp_path / "a.tar")
    assert found.names == ("folder/x.txt",) and found.text("folder/x.txt") == "x"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        link = zipfile.ZipInfo("soft.txt")
        link.external_attr = 0o120777 << 16
        z.writestr(link, str(tmp_path / "secret.jpg"))
    assert b"secret" != dict(Archive(tmp_path / "a.zip").read(["soft.txt"]))["soft.txt"], "never followed"
    assert not (tmp_path / "x.txt").exists()


# ---- files that lose a byte


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damage_to_what_a_run_keeps(damage, pipeline, tmp_path):
    work = Work(pipeline, "textual-inversion", json.dumps(CONFIGS["textual-inversion"]), 2)
    whole = work.do(tmp_path / "run")
    file = tmp_path / "run" / "specialization.safetensors"
    image = next((tmp_path / "run" / "synthetic").rglob("*.png"))
    image.unlink()
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data if damage == "flipped" else data[:-9])
    with pytest.raises(InputError, match="specialization.safetensors .*delete it and run the command again"):
        work.do(tmp_path / "run")
    file.unlink()
    assert work.do(tmp_path / "run") == whole, "what the sentence says helps"


def test_checksums_of_all_kinds_of_tensors(tmp_path):
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {str(k): torch.ones(3, 2).to(k) for k in kinds} | {"scalar": torch.tensor(2.0), "none": torch.zeros(0, 4)}
    save_tensors(tensors, tmp_path / "a.safetensors")
    back, _ = load_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())


# ---- ONNX beside PyTorch


def test_a_thousand_images_of_odd_sizes(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        student = create_student("conv4", 5, 32).eval()
    student.head.weight.data *= 30  # differences show most where a network is neither sure nor indifferent
    export_onnx(student, tmp_path / "m.onnx", tuple("abcde"))
    session, rng, worst, seen = onnx_session(tmp_path / "m.onnx"), rng_for("a thousand"), 0.0, set()
    for k in range(1000):
        top = 300 if k % 10 == 0 else 70
        h, w = torch.randint(1, top, (2,), generator=rng).tolist()
        x = torch.randint(0, 256, (1, 3, h, w), dtype=torch.uint8, generator=rng)
        with torch.no_grad():
            want = student(resize(x / 255, 32)).softmax(1)
        got = torch.from_numpy(session.run(None, {"image": x.permute(0, 2, 3, 1).numpy()})[0])
        worst = max(worst, float((got - want).abs().max()))
        seen.add(int(got.argmax()))
        assert worst < 1e-4, (h, w, worst)
    assert len(seen) > 1, "more than one class is named"
