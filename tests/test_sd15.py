"""The stack of full size on random weights of the same classes and layout: whole runs, killed runs, missing files, and
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
from tiny_nbdev.core import load_json, load_tensors
from tiny_nbdev.errors import InputError
from tiny_nbdev.models.bundle import check_stack, get_stack, write_sd15_stand_in
from tiny_nbdev.models.fetch import SD15_FILES
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


def arguments(photos, out, stack, *more):
    return [
        "specialize",
        str(photos),
        "--out",
        str(out),
        "--stack",
        str(stack),
        "--student",
        "conv4",
        *SMOKE,
        *map(str, more),
    ]  # ResNet12 takes longer to export than all the rest


@pytest.fixture(scope="module")
def whole(sd15, two, tmp_path_factory):
    "An unbroken run."
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(two, out, sd15)) == 0
    return out


def test_a_whole_run(whole):
    run, m = load_json(whole / "run.json"), load_json(whole / "metrics.json")
    s = run["settings"]
    assert (s["stack"], s["head"], s["teacher"], s["image_size"], s["unet"]) == (
        "sd15",
        "prototype",
        "vit_base_patch16_224.dino",
        16,
        "torch.float32",
    )
    assert len(s["super_resolution"]) == 16 and m["n_synthetic"] == 2 * 4
    assert {
        "diffusion/unet/config.json",
        "superres/Real_HAT_GAN_sharper.safetensors",
        "teacher/vit_base_patch16_224.dino.safetensors",
    } <= set(run["weights"])
    tensors, meta = load_tensors(whole / "specialization.safetensors")
    assert (
        tensors["uncond_embeddings"].shape == (4, 5, 77, 16)
        and tensors["z_0"].shape == (5, 4, 8, 8)
        and tensors["tokens"].shape == (2, 16)
    )
    assert s["super_resolution"] in json.dumps(meta)
    from PIL import Image

    assert {Image.open(p).size for p in (whole / "synthetic").rglob("*.png")} == {(16, 16)}
    assert set(m["reconstruction_psnr"]) == {"autoencoder", "plain DDIM inversion", "null-text inversion"}
    assert str(whole.parent) not in json.dumps(s), "settings hold no path"


def test_what_the_stack_says_by_itself(sd15, two):
    from tiny_nbdev.run.plan import prepare

    job = prepare(two, stack=sd15)
    assert (job.student, job.head, job.profile.steps, job.profile.per_class, job.image_size) == (
        "resnet12",
        "prototype",
        10000,
        4000,
        16,
    )
    assert sum(p.numel() for p in job.new_student().backbone.parameters()) == 7996800


def test_v_prediction(stand_in, two, tmp_path):
    v = write_sd15_stand_in(tmp_path / "v", prediction_type="v_prediction")
    assert get_stack(v).load_diffusion().prediction_type == "v_prediction"
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


def test_evaluate_takes_the_stack(sd15, tmp_path, capsys):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps(
            dict(
                teacher=dict(backbones=["vit_small_patch16_224.dino"]),
                base=dict(images="none"),
                init="random",
                distill=dict(steps=2, batch_size=10, precision="fp32"),
                generator=dict(per_class=1, token_steps=1, sampling_steps=1, inner_steps=1),
            )
        )
    )
    args = [
        "evaluate",
        "--out",
        str(tmp_path / "eval"),
        "--dataset",
        "digits",
        "--episodes",
        "1",
        "--generator",
        "tint",
        "--stack",
        str(sd15),
        "--recipe",
        str(recipe),
        "--device",
        "cpu",
        "--student",
        "conv4",
    ]
    assert main(args) == 0
    s = load_json(tmp_path / "eval/conv4-tint.summary.json")["settings"]
    assert (
        s["stack"]["name"] == "sd15"
        and len(s["stack"]["super_resolution"]) == 16
        and s["weights"]["teacher"][0]["file"] == "vit_small_patch16_224.dino"
    )
    assert main([*args, "--alpha", "0.5"]) == 2 and "alpha" in capsys.readouterr().err


def test_demo_and_evaluate_hand_the_stack_over(sd15, tmp_path, monkeypatch):
    import tiny_nbdev.run.evaluate
    import tiny_nbdev.run.specialize

    seen = []
    monkeypatch.setattr(tiny_nbdev.run.specialize, "demo", lambda out, **kw: seen.append(kw["stack"]))
    monkeypatch.setattr(
        tiny_nbdev.run.evaluate, "evaluate", lambda out, student, *a, stack: seen.append((student, stack))
    )
    for args in (
        ["demo", "--stack", str(sd15)],
        ["evaluate", "--out", "x", "--stack", str(sd15)],
        ["evaluate", "--out", "x"],
    ):
        assert main(args) == 0
    assert seen == [str(sd15), ("resnet12", str(sd15)), ("conv4", None)]


def test_no_download_inside_timm_or_the_hub(sd15, monkeypatch):
    import huggingface_hub
    import timm.models._builder

    def refuse(*args, **kw):
        raise AssertionError("a download")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(timm.models._builder, "load_pretrained", refuse)
    for teacher in (None, "vit_small_patch16_224.dino", "vit_base_patch16_224.dino@cifar-fs"):
        stack = get_stack(sd15, teacher)
        assert stack.load_teacher()(torch.rand(1, 3, 84, 84)).shape == (1, 24)
    assert stack.load_diffusion().max_length == 77


@pytest.mark.parametrize(
    "file",
    [
        UNET,
        "diffusion/vae/config.json",
        "superres/Real_HAT_GAN_sharper.safetensors",
        "teacher/vit_base_patch16_224.dino.safetensors",
    ],
)
def test_what_is_missing_is_named(file, sd15, two, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "sd15"
    shutil.copytree(sd15, folder)
    (folder / file).unlink()
    monkeypatch.setenv("TINY_NBDEV_SD15", str(folder))
    assert main(arguments(two, tmp_path / "run", "sd15")) == 2
    err, f = capsys.readouterr().err.strip(), next(f for f in SD15_FILES if f.path == file)
    assert (
        file in err
        and f.licence in err
        and f"tiny-nbdev fetch sd15 --to {folder}" in err
        and len(err.splitlines()) == 1
    )
    assert ("MB" in err or "GB" in err) == (f.size > 1e6) and not (tmp_path / "run").exists()


def test_damaged_file_is_refused(sd15, two, tmp_path, capsys):
    folder = tmp_path / "sd15"
    shutil.copytree(sd15, folder)
    with open(folder / UNET, "r+b") as f:
        f.seek(3000)
        f.write(b"\0\1\2\3")
    assert main(arguments(two, tmp_path / "run", folder)) == 2
    assert "is changed" in capsys.readouterr().err


def test_other_weights_or_another_network_for_the_photos_are_refused(whole, two, stand_in, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    other = write_sd15_stand_in(tmp_path / "other", seed=1)
    assert main(arguments(two, out, other)) == 2
    err = capsys.readouterr().err
    assert "weights was" in err and "super_resolution was" in err


def test_finished_run_is_left_alone(whole, sd15, two, capsys):
    before = output_hashes(whole)
    assert main(arguments(two, whole, sd15)) == 0 and "finished already" in capsys.readouterr().out
    assert output_hashes(whole) == before


def test_the_embedded_stack_has_no_new_settings(stand_in, two, tmp_path):
    from tiny_nbdev.run.plan import prepare

    keys = {*prepare(two, profile="smoke").settings()}
    assert not keys & {"super_resolution", "unet"} and prepare(two, profile="smoke").settings()["teacher"] == "embedded"


def test_memory_runs_out_and_the_run_goes_on(sd15, two, tmp_path, monkeypatch):
    "A device that holds one image at a time while it is encoded; the result is that of a roomy one."
    from tiny_nbdev.diffusion.memory import map_batches, remembered_batch

    monkeypatch.setenv("TINY_NBDEV_CACHE", str(tmp_path / "cache"))
    model, x = get_stack(sd15).load_diffusion(), torch.rand(5, 3, 64, 64)

    def encode(part):
        if part.stop - part.start > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return model.encode(x[part])

    torch.testing.assert_close(map_batches(encode, 5, "encode", device="cpu"), model.encode(x))
    assert remembered_batch("encode", "cpu") == 1


def test_fetch_list_and_doctor(sd15, tmp_path, capsys, monkeypatch):
    from tiny_nbdev.run.cli import _check_sd15

    assert main(["fetch", "sd15", "--list", "--to", str(tmp_path / "none")]) == 0
    listed = capsys.readouterr().out
    assert (
        all(f.path in listed for f in SD15_FILES)
        and "CreativeML OpenRAIL-M" in listed
        and not (tmp_path / "none").exists()
    )
    monkeypatch.setenv("TINY_NBDEV_SD15", str(sd15))
    assert _check_sd15()[0][1:3] == (True, f"{len(SD15_FILES)} files unchanged in {sd15}")
    monkeypatch.setenv("TINY_NBDEV_SD15", str(tmp_path / "none"))
    ((_, ok, finding, remedy),) = _check_sd15()
    assert ok is None and "not fetched" in finding and "tiny-nbdev fetch sd15" in remedy
    half = tmp_path / "half"
    shutil.copytree(sd15, half)
    (half / UNET).unlink()
    monkeypatch.setenv("TINY_NBDEV_SD15", str(half))
    assert UNET in _check_sd15()[0][2]


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


def test_every_file_is_checked(sd15):
    assert {p for p, _ in check_stack(sd15)} == {f.path for f in SD15_FILES} and all(
        s == "ok" for _, s in check_stack(sd15, fresh=True)
    )
    with pytest.raises(InputError, match="is not a model timm knows|could not be loaded"):
        get_stack(sd15, "no_such_model").load_teacher()


def test_meta_training_of_a_vision_transformer(sd15, two, tmp_path):
    "The notebook of P>M>F on a narrow ViT; what it writes is a teacher, with its statistics."
    papermill = pytest.importorskip("papermill")
    notebook = os.path.join(os.path.dirname(__file__), "..", "nbs", "pretrain", "p5_meta.ipynb")
    if not os.path.exists(notebook):
        pytest.skip("an installation without notebooks")
    code = f"""import papermill; papermill.execute_notebook({notebook!r}, {str(tmp_path / "done.ipynb")!r}, dict(model="vit_small_patch16_224.dino", lr=1e-3, n_steps=2, name="vit", out={str(tmp_path)!r},
        model_kwargs=dict(img_size=32, embed_dim=24, depth=2, num_heads=2), statistics="mini-imagenet"), kernel_name="python3", progress_bar=False)"""
    assert papermill
    done = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True)  # its kernel needs sockets
    assert done.returncode == 0, done.stderr[-2000:]
    stack = get_stack(sd15, str(tmp_path / "vit.safetensors"))
    backbone = stack.load_teacher()
    assert (
        backbone.image_size == 32
        and abs(float(backbone.mean.flatten()[0]) - 120.396 / 255) < 1e-6
        and stack.teacher_name.startswith("vit.safetensors (")
    )
    assert load_json(tmp_path / "vit.meta.json")["settings"]["model"] == "vit_small_patch16_224.dino"
