"Fetching sd15 from a folder that plays the Hub, and what its bundle is then; never a network."

import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("spandrel")
from safetensors.torch import load_file
from stand_ins import write_sd15_stand_in

import tiny_nbdev.models.fetch as fetching
from tiny_nbdev.core import load_json, save_json
from tiny_nbdev.errors import InputError
from tiny_nbdev.models.bundle import MANIFEST, check_bundle, get_bundle
from tiny_nbdev.models.fetch import (
    convert_weights,
    fetch_bundle,
    file_digest,
    list_bundle,
    published_files,
    published_manifest,
)

UNET, HAT = "diffusion/unet/diffusion_pytorch_model.safetensors", "superres/Real_HAT_GAN_sharper.safetensors"
TEACHERS = ("vit_base_patch16_224.dino", "vit_small_patch16_224.dino")
FILES = published_files("sd15")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    "Whoever tries to reach anything fails the test."

    def refuse(*args, **kw):
        raise AssertionError(f"the network was asked for: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TINY_NBDEV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TINY_NBDEV_SD15", raising=False)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "The stand-in, with HAT as `.pth` as it is published."
    folder = write_sd15_stand_in(tmp_path_factory.mktemp("published") / "sd15")
    torch.save(dict(params_ema=load_file(folder / HAT)), (folder / HAT).with_suffix(".pth"))
    return folder


@pytest.fixture
def sd15(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "sd15"))


class Hub:
    "Gives files of a folder; repositories in `broken` cannot be reached."

    def __init__(self, folder, monkeypatch):
        self.folder, self.calls, self.broken, self.said = folder, [], set(), []
        self.listed = tuple(map(self.as_listed, FILES))
        monkeypatch.setattr(fetching, "published_files", lambda manifest: self.listed)

    def file(self, repo, file):
        if "HAT" in file:
            return self.folder / "superres" / file
        if repo.startswith("timm/"):
            return self.folder / "teacher" / f"{repo.split('/')[1]}.safetensors"
        return self.folder / "diffusion" / file

    def as_listed(self, f):
        "A published file with the size and the hash of the stand-in's."
        path = self.file(*f.sources[0][:2])
        digest = file_digest(path, f.digest.split(":")[0]) if f.digest else ""
        return replace(f, size=path.stat().st_size, exact=True, digest=digest)

    def download(self, repo, file, revision, folder):
        self.calls.append((repo, file))
        if repo in self.broken:
            raise OSError("no network here")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(self.file(repo, file), folder / file))

    def ask(self, repo, file, revision):
        return file_digest(self.file(repo, file))

    def fetch(self, to, ask=None):
        self.calls.clear()
        self.said.clear()
        return fetch_bundle("sd15", to, self.download, ask or self.ask, self.said.append)


@pytest.fixture
def hub(published, monkeypatch):
    return Hub(published, monkeypatch)


def test_published_files_of_sd15():
    assert len(FILES) == 15 and {f.licence for f in FILES} == {"CreativeML OpenRAIL-M", "Apache 2.0"}
    assert {len(f.digest) for f in FILES} == {len("git:") + 40, len("sha256:") + 64, 0}
    assert [f.path for f in FILES if not f.digest] == ["teacher/vit_small_patch16_224.dino.safetensors"]
    assert {len(f.sources) for f in FILES} == {1, 2, 3} and all(f.sources[0][2] for f in FILES), (
        "a pinned revision each"
    )
    hat = next(f for f in FILES if f.path == HAT)
    assert hat.sources[0][1] == "Real_HAT_GAN_sharper.pth" and hat.size == 170277017
    with pytest.raises(InputError, match="'embedded' is no bundle that can be fetched; choose sd15"):
        published_manifest("embedded")


def test_list_says_what_would_come(tmp_path, published):
    text = list_bundle("sd15", tmp_path / "none")
    assert text.count("\n") == len(FILES) + 1 and "4.9 GB to fetch" in text and "not known" in text
    assert all(f.path in text for f in FILES) and not (tmp_path / "none").exists()
    assert "0.0 kB to fetch" in list_bundle("sd15", published)


def test_the_stand_in_has_the_texts_of_the_published_files(published):
    digests = {f.path: f.digest for f in FILES}
    for name in ("diffusion/model_index.json", "diffusion/scheduler/scheduler_config.json"):
        assert file_digest(published / name, "git") == digests[name]


def test_everything_is_fetched_and_nothing_twice(hub, published, tmp_path):
    new = hub.fetch(tmp_path / "fetched")
    said = "\n".join(hub.said)
    assert len(hub.calls) == len(FILES) and not (new / ".fetch").exists()
    assert "no hash was published; it is what the Hub itself gives" in said and "hash as published" in said
    assert {s for _, s in check_bundle(new, fresh=True)} == {"ok"} and get_bundle(new).name == "sd15"
    assert get_bundle(new).image_size == 84, "as published, not as the stand-in has it"
    assert load_file(new / HAT).keys() == load_file(published / HAT).keys(), "HAT was converted"
    save_json(load_json(new / MANIFEST) | dict(batch_hints=dict(sampling=4)), new / MANIFEST)
    hub.fetch(new)
    assert not hub.calls and "nothing to fetch" in hub.said[0]
    assert get_bundle(new).batch_hints == dict(sampling=4), "what the user changed stays"


def test_by_default_it_lies_where_get_bundle_looks(hub, tmp_path, monkeypatch):
    assert hub.fetch(None) == tmp_path / "cache" / "sd15" == get_bundle("sd15").folder
    assert hub.said[-1] == "The bundle sd15 is complete; use it with --bundle sd15."
    hub.fetch(tmp_path / "other")
    assert hub.said[-1].endswith(f"use it with --bundle {tmp_path / 'other'}.")
    assert get_bundle(tmp_path / "other").fingerprint == get_bundle("sd15").fingerprint


def test_what_is_wrong_is_fetched_again(hub, tmp_path):
    new = hub.fetch(tmp_path / "fetched")
    (new / "diffusion/vae/config.json").write_text("{}")
    (new / "diffusion/unet/config.json").unlink()
    hub.fetch(new)
    assert [f for _, f in hub.calls] == ["unet/config.json", "vae/config.json"] and get_bundle(new).check(fresh=True)


def test_what_was_put_there_by_hand_is_taken(hub, published, tmp_path):
    hand = tmp_path / "by_hand"
    shutil.copytree(published / "diffusion", hand / "diffusion")
    (hand / "superres").mkdir()
    shutil.copyfile((published / HAT).with_suffix(".pth"), (hand / HAT).with_suffix(".pth"))
    hub.fetch(hand)
    assert {r for r, _ in hub.calls} == {f"timm/{t}" for t in TEACHERS} and (hand / HAT).is_file()


def test_the_manifest_of_another_layout_is_replaced_without_a_download(hub, tmp_path):
    new = hub.fetch(tmp_path / "fetched")
    save_json(dict(files=load_json(new / MANIFEST)["files"]), new / "stack.json")
    (new / MANIFEST).unlink()
    with pytest.raises(InputError, match="has stack.json of another version"):
        get_bundle(new)
    hub.fetch(new)
    assert not hub.calls and get_bundle(new).check() and not (new / "stack.json").exists()


def test_another_source_helps_out_and_what_cannot_be_had_is_said(hub, tmp_path):
    hub.broken.add("stable-diffusion-v1-5/stable-diffusion-v1-5")
    hub.fetch(tmp_path / "mirror")
    assert ("benjamin-paine/stable-diffusion-v1-5", "model_index.json") in hub.calls
    hub.broken.update({"benjamin-paine/stable-diffusion-v1-5", "botp/stable-diffusion-v1-5"})
    with pytest.raises(InputError) as e:
        hub.fetch(tmp_path / "offline")
    text = str(e.value)
    assert "model_index.json (0.5 kB) could not be fetched" in text and "no network here" in text and "by hand" in text


def test_a_file_with_another_hash_is_not_installed(hub, tmp_path):
    hub.listed = (replace(hub.listed[1], digest="git:" + "0" * 40),)
    with pytest.raises(InputError, match="its hash is git:"):
        hub.fetch(tmp_path / "wrong")
    assert not (tmp_path / "wrong" / hub.listed[0].path).exists()


def test_without_a_published_hash_the_hubs_own_counts(hub, tmp_path):
    with pytest.raises(InputError, match="vit_small.* its hash is"):
        hub.fetch(tmp_path / "swapped", lambda *a: "sha256:" + "0" * 64)
    hub.fetch(tmp_path / "silent", lambda *a: "")
    assert "no hash was published and the Hub gives none; not checked" in "\n".join(hub.said)


def test_a_full_disk_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda p: type("Usage", (), dict(free=1000)))
    with pytest.raises(InputError, match="the disk has 1.0 kB left"):
        hub.fetch(tmp_path / "full")
    assert not hub.calls
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="cannot be made"):
        hub.fetch(tmp_path / "file" / "sd15")


def test_a_pickle_is_opened_only_if_it_is_the_published_file(published, tmp_path):
    pth = (published / HAT).with_suffix(".pth")
    with pytest.raises(InputError, match="is not the published file .* so it is not opened"):
        convert_weights(pth, tmp_path / "no.safetensors", "0" * 64)
    made = convert_weights(pth, tmp_path / "hat.safetensors", file_digest(pth).removeprefix("sha256:"))
    a, b = load_file(made), load_file(published / HAT)
    assert all(torch.equal(a[k], b[k]) for k in b) and not (tmp_path / "no.safetensors").exists()


# The bundle


def test_what_the_bundle_says(published):
    b = get_bundle(published)
    assert (b.name, b.preset, b.image_size, b.crop_pad, b.diffusion["half"]) == ("sd15", "paper", 16, 8, True)
    assert b.experiment == dict(
        student=dict(name="resnet12"), teacher=dict(encoders=["vit_base_patch16_224.dino"], head="prototype")
    )
    assert b.students == {} and set(b.encoders) == {
        t + s for t in TEACHERS for s in ("", "@cifar-fs", "@mini-imagenet")
    }
    assert {p for p, _ in check_bundle(published)} == {f.path for f in FILES} == set(b.files)
    small, base = (b.record([f"encoders/{t}"]) for t in reversed(TEACHERS))
    assert set(small) == {"teacher/vit_small_patch16_224.dino.safetensors"} and small != base


def test_diffusion_of_the_bundle(published, tmp_path):
    from tiny_nbdev.diffusion.model import load_diffusion

    m = load_diffusion(get_bundle(published))
    assert (m.name, m.image_size, m.latent_shape, m.max_length) == ("sd15", 64, (4, 8, 8), 77)
    assert (m.prediction_type, m.dtype) == ("epsilon", torch.float32)
    assert m.vae.config.scaling_factor == 0.18215 and m.vae.encoder.mid_block.attentions
    assert [type(b).__name__ for b in m.unet.down_blocks] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert m.unet.config.block_out_channels[-1] == 16 and abs(float(m.alphas_cumprod[999]) - 0.00466010) < 1e-7
    v = write_sd15_stand_in(tmp_path / "v", prediction_type="v_prediction")
    assert load_diffusion(get_bundle(v)).prediction_type == "v_prediction"
    a, b = (load_file(f / UNET) for f in (v, published))
    assert all(torch.equal(a[k], b[k]) for k in a), "the same weights, read in another way"


def test_super_resolution_of_the_bundle(published):
    from tiny_nbdev.data.images import ImageSet
    from tiny_nbdev.diffusion.superres import load_superres

    b = get_bundle(published)
    enlarge = load_superres(b, b.diffusion["image_size"])
    photos = ImageSet(torch.rand(1, 3, 16, 16), torch.tensor([0]), ("a",))
    assert enlarge.net is None, "loaded when the first photo comes"
    assert enlarge(photos).size == (64, 64) and len(enlarge.fingerprint) == 16


def test_encoders_of_the_bundle(published):
    from tiny_nbdev.classify.backbones import load_timm_backbone

    def load(name):
        e = get_bundle(published).encoders[name]
        assert e["kind"] == "timm"
        return load_timm_backbone(get_bundle(published).path(e), e["model"], e["statistics"], **e["kwargs"])

    plain, mini = load(TEACHERS[0]), load(f"{TEACHERS[0]}@mini-imagenet")
    assert plain(torch.rand(1, 3, 84, 84)).shape == (1, 24) and plain.image_size == 224
    assert abs(float(plain.mean.flatten()[0]) - 0.485) < 1e-6
    assert abs(float(mini.mean.flatten()[0]) - 120.396 / 255) < 1e-6


@pytest.mark.parametrize("file", [UNET, "diffusion/vae/config.json", HAT, f"teacher/{TEACHERS[0]}.safetensors"])
def test_what_is_missing_is_named(file, sd15):
    (sd15 / file).unlink()
    part = {"diffusion": "diffusion", "superres": "superres"}.get(file.split("/")[0], f"encoders/{TEACHERS[0]}")
    with pytest.raises(InputError) as e:
        get_bundle(sd15).check([part])
    text, f = str(e.value), next(f for f in FILES if f.path == file)
    assert file in text and f.licence in text and f"tiny-nbdev fetch sd15 --to {sd15}" in text and "\n" not in text
    assert ("MB" in text or "GB" in text) == (f.size > 1e6) and "more files" not in text
    assert get_bundle(sd15).check([f"encoders/{TEACHERS[1]}"]), "only what is used is asked for"


def test_a_folder_without_anything_says_what_to_fetch(tmp_path, monkeypatch):
    with pytest.raises(InputError) as e:
        get_bundle("sd15")
    text = str(e.value)
    assert "model_index.json" in text and "CreativeML OpenRAIL-M" in text and "14 more files (4.9 GB together)" in text
    assert text.endswith("with: tiny-nbdev fetch sd15")
    monkeypatch.setenv("TINY_NBDEV_SD15", str(tmp_path / "nowhere"))
    monkeypatch.setenv("TINY_NBDEV_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=f"tiny-nbdev fetch sd15 --to {tmp_path / 'nowhere'}"):
        get_bundle("sd15")


def test_a_damaged_file_is_refused(sd15):
    assert get_bundle(sd15).check()
    with open(sd15 / UNET, "r+b") as f:
        f.seek(3000)
        f.write(b"\0\1\2\3")
    assert dict(check_bundle(sd15))[UNET] == "changed", "same size, other content"
    with pytest.raises(InputError, match=f"{UNET} is changed: .* delete it and fetch what is missing with"):
        get_bundle(sd15).check()
