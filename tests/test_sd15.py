"""The bundle of full size on random weights of the same classes and layout: whole runs, killed runs, missing files, and
never a network."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
import torch
from conftest import SCRIPT, SMOKE, command, photo

pytest.importorskip("spandrel")
from stand_ins import write_sd15_stand_in

from tiny_nbdev.classify.encoders import load_encoder
from tiny_nbdev.core import load_json, load_tensors
from tiny_nbdev.diffusion.model import load_diffusion
from tiny_nbdev.models.bundle import get_bundle
from tiny_nbdev.run.cli import main
from tiny_nbdev.run.specialize import output_hashes

UNET = "diffusion/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "Whoever tries to reach anything fails the test; processes started here are told to stay offline."

    def refuse(*args, **kw):
        raise AssertionError(f"the network was asked for: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def sd15(stand_in, tmp_path_factory):
    return write_sd15_stand_in(tmp_path_factory.mktemp("sd15") / "sd15")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Two classes with 3 and 2 photos."
    root = tmp_path_factory.mktemp("two")
    for c, n in (("cat", 3), ("dog", 2)):
        for i in range(n):
            photo(root / c / f"{i}.png", ord(c[0]) * 10 + i)
    return root


def arguments(photos, out, bundle, *more):
    # ResNet12 takes longer to export than all the rest
    what = ["specialize", photos, "--out", out, "--bundle", bundle, "--student", "conv4", "--init", "random"]
    return [*map(str, what), *SMOKE, *map(str, more)]


@pytest.fixture(scope="module")
def whole(sd15, two, tmp_path_factory):
    "An unbroken run."
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(two, out, sd15)) == 0
    return out


def test_a_whole_run(whole):
    run, m = load_json(whole / "run.json"), load_json(whole / "metrics.json")
    s = run["settings"]
    assert s["bundle"] and s["teacher"]["head"] == "prototype" and s["image_size"] == 16
    assert s["teacher"]["encoders"] == ["vit_base_patch16_224.dino"] and s["weights"]["dtype"] == "torch.float32"
    assert len(s["weights"]["superres"]) == 16 and m["n_synthetic"] == 2 * 4
    tensors, meta = load_tensors(whole / "specialization.safetensors")
    assert tensors["uncond_embeddings"].shape == (4, 5, 77, 16) and tensors["tokens"].shape == (2, 16)
    assert tensors["z_0"].shape == (5, 4, 8, 8) and s["weights"]["superres"] in json.dumps(meta)
    from PIL import Image

    assert {Image.open(p).size for p in (whole / "synthetic").rglob("*.png")} == {(16, 16)}
    assert set(m["reconstruction_psnr"]) == {"autoencoder", "plain DDIM inversion", "null-text inversion"}
    kept = {k: v for k, v in s.items() if k != "bundle"}  # the bundle was named by its folder
    assert str(whole.parent) not in json.dumps(kept), "settings hold no other path"


def test_what_the_bundle_says_by_itself(sd15, stand_in):
    from tiny_nbdev.run.experiment import make_experiment

    e = make_experiment(bundle=str(sd15))
    assert (e.student.name, e.teacher.head, e.recipe.config["steps"]) == ("resnet12", "prototype", 10000)
    assert e.generator.per_class == 4000 and e.image_size == 16


def test_v_prediction(stand_in, two, tmp_path):
    v = write_sd15_stand_in(tmp_path / "v", prediction_type="v_prediction")
    assert load_diffusion(get_bundle(v)).prediction_type == "v_prediction"
    assert main(arguments(two, tmp_path / "run", v)) == 0
    e = write_sd15_stand_in(tmp_path / "e")
    a, b = (load_tensors(f)[0] for f in (v / UNET, e / UNET))
    assert all(torch.equal(a[k], b[k]) for k in a), "the same weights, read in another way"
    assert main(arguments(two, tmp_path / "other", e)) == 0
    runs = [output_hashes(tmp_path / n) for n in ("run", "other")]
    assert runs[0]["synthetic"] != runs[1]["synthetic"]


MOMENTS = {
    "while inverting": lambda out: (out / "work/tokens.safetensors").exists(),
    "while sampling": lambda out: len(list((out / "synthetic").rglob("*.png"))) >= 2,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_goes_on_and_ends_the_same(moment, whole, sd15, two, tmp_path):
    out, env = tmp_path / "run", {**os.environ, "TINY_NBDEV_SD15": str(sd15)}
    args = [str(SCRIPT), *arguments(two, out, "sd15")]  # by name this time: the folder is no part of the result
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    end = time.time() + 300
    while process.poll() is None and time.time() < end and not MOMENTS[moment](out):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    again = subprocess.run(args, capture_output=True, text=True, env=env)
    assert again.returncode == 0, again.stderr
    assert output_hashes(out).keys() == output_hashes(whole).keys()
    if (
        torch.get_num_threads() == 1 and os.environ.get("OMP_NUM_THREADS") == "1"
    ):  # otherwise sums are split in another way here and there
        assert output_hashes(out) == output_hashes(whole)
    assert not list(out.rglob("*.tmp")) and not (out / "work").exists()


def test_plan_estimates_time_memory_and_disk(sd15, two, tmp_path, capsys):
    assert main(arguments(two, tmp_path / "run", sd15, "--plan")) == 0
    said = capsys.readouterr().out
    for words in ("on sd15", "super-resolution", "enlarged", "from 16 to 64 pixels", "memory", "of weights", "disk"):
        assert words in said, said
    assert not (tmp_path / "run").exists()


def test_evaluate_takes_the_bundle(sd15, tmp_path, capsys):
    what = "evaluate --dataset digits --episodes 1 --generator tint --student conv4 --init random --base none"
    amounts = "--preset smoke --steps 2 --per-class 1 --token-steps 1 --sampling-steps 1 --device cpu"
    args = [*what.split(), *amounts.split(), "--out", str(tmp_path / "eval"), "--bundle", str(sd15)]
    args += ["--teacher", "vit_small_patch16_224.dino"]
    assert main(args) == 0
    s = load_json(tmp_path / "eval/conv4-tint.summary.json")["settings"]
    assert len(s["weights"]["superres"]) == 16 and "vit_small" in s["weights"]["teacher"][0]["file"]
    assert main([*args, "--alpha", "0.5"]) == 2 and "alpha" in capsys.readouterr().err


def test_no_download_inside_timm_or_the_hub(sd15, monkeypatch):
    import huggingface_hub
    import timm.models._builder

    def refuse(*args, **kw):
        raise AssertionError("a download")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(timm.models._builder, "load_pretrained", refuse)
    bundle = get_bundle(sd15)
    for name in ("vit_base_patch16_224.dino", "vit_small_patch16_224.dino", "vit_base_patch16_224.dino@cifar-fs"):
        assert load_encoder(name, bundle)(torch.rand(1, 3, 84, 84)).shape == (1, 24)
    assert load_diffusion(bundle).max_length == 77


FILES = (
    UNET,
    "diffusion/vae/config.json",
    "superres/Real_HAT_GAN_sharper.safetensors",
    "teacher/vit_base_patch16_224.dino.safetensors",
)


@pytest.mark.parametrize("file", FILES)
def test_what_is_missing_is_named(file, sd15, two, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "sd15"
    shutil.copytree(sd15, folder)
    (folder / file).unlink()
    monkeypatch.setenv("TINY_NBDEV_SD15", str(folder))
    assert main(arguments(two, tmp_path / "run", "sd15")) == 2
    err = capsys.readouterr().err.strip()
    assert file in err and "tiny-nbdev fetch sd15" in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "run").exists()


def test_damaged_file_is_refused(sd15, two, tmp_path, capsys):
    folder = tmp_path / "sd15"
    shutil.copytree(sd15, folder)
    with open(folder / UNET, "r+b") as f:
        f.seek(3000)
        f.write(b"\0\1\2\3")
    assert main(arguments(two, tmp_path / "run", folder)) == 2
    assert "changed" in capsys.readouterr().err


def test_other_weights_or_another_network_for_the_photos_are_refused(whole, two, stand_in, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    other = write_sd15_stand_in(tmp_path / "other", seed=1)
    assert main(arguments(two, out, other)) == 2
    err = capsys.readouterr().err
    assert "weights" in err and "was" in err


def test_finished_run_is_left_alone(whole, sd15, two, capsys):
    before = output_hashes(whole)
    assert main(arguments(two, whole, sd15)) == 0 and "finished already" in capsys.readouterr().out
    assert output_hashes(whole) == before


def test_memory_runs_out_and_the_run_goes_on(sd15, two, tmp_path, monkeypatch):
    "A device that holds one image at a time while it is encoded; the result is that of a roomy one."
    from tiny_nbdev.diffusion.memory import map_batches, remembered_batch

    monkeypatch.setenv("TINY_NBDEV_CACHE", str(tmp_path / "cache"))
    model, x = load_diffusion(get_bundle(sd15)), torch.rand(5, 3, 64, 64)

    def encode(part):
        if part.stop - part.start > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return model.encode(x[part])

    torch.testing.assert_close(map_batches(encode, 5, "encode", device="cpu"), model.encode(x))
    assert remembered_batch("encode", "cpu") == 1


def test_doctor(sd15, tmp_path, monkeypatch):
    from tiny_nbdev.run.doctor import _check_bundle

    monkeypatch.setenv("TINY_NBDEV_SD15", str(sd15))
    assert _check_bundle("sd15", "fetch it", False)[0][1] is True
    monkeypatch.setenv("TINY_NBDEV_SD15", str(tmp_path / "none"))
    assert _check_bundle("sd15", "fetch it", False)[0][1] is None


def test_fetch_without_a_network_says_so(tmp_path):
    done = command(
        "fetch",
        "sd15",
        "--to",
        tmp_path / "none",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert (
        done.returncode == 2
        and "could not be fetched" in done.stderr
        and "Traceback" not in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    ), done.stderr


def test_meta_training_of_a_vision_transformer(sd15, two, tmp_path):
    "The notebook of P>M>F on a narrow ViT; what it writes is a teacher, with its statistics."
    papermill = pytest.importorskip("papermill")
    notebook = os.path.join(os.path.dirname(__file__), "..", "nbs", "pretrain", "p5_meta.ipynb")
    if not os.path.exists(notebook):
        pytest.skip("an installation without notebooks")
    parameters = dict(model="vit_small_patch16_224.dino", lr=1e-3, n_steps=2, name="vit", out=str(tmp_path))
    parameters |= dict(model_kwargs=dict(img_size=32, embed_dim=24, depth=2, num_heads=2), statistics="mini-imagenet")
    done = str(tmp_path / "done.ipynb")
    run = (
        f"papermill.execute_notebook({notebook!r}, {done!r}, {parameters!r}, kernel_name='python3', progress_bar=False)"
    )
    code = f"import papermill; {run}"
    assert papermill
    done = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True)  # its kernel needs sockets
    assert done.returncode == 0, done.stderr[-2000:]
    backbone = load_encoder(str(tmp_path / "vit.safetensors"))
    assert backbone.image_size == 32 and abs(float(backbone.mean.flatten()[0]) - 120.396 / 255) < 1e-6
    assert load_json(tmp_path / "vit.meta.json")["settings"]["model"] == "vit_small_patch16_224.dino"
