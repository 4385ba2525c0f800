"One manifest per set of models: what it says, what is refused, and what is hashed."

import json
import os
import shutil

import pytest
from stand_ins import write_stand_in

import tiny_nbdev.models.bundle as bundles
from tiny_nbdev.classify.encoders import encoders
from tiny_nbdev.core import load_json, save_json
from tiny_nbdev.errors import InputError
from tiny_nbdev.models.bundle import (
    MANIFEST,
    Bundle,
    bundle_folder,
    check_bundle,
    crop_padding,
    get_bundle,
    published_bundles,
    read_manifest,
    shipped_folder,
    write_bundle,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_NBDEV_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    return write_stand_in(tmp_path_factory.mktemp("random") / "embedded")


@pytest.fixture
def own(tmp_path):
    "A bundle of three small files, none of them a model; enough for everything but loading."
    folder = tmp_path / "own"
    for name in ("diffusion/model_index.json", "diffusion/unet/weights.safetensors", "net.safetensors", "net.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    write_bundle(folder, manifest())
    return folder


def manifest(**changes):
    return {
        **dict(
            name="own",
            diffusion=dict(path="diffusion", image_size=64),
            encoders=dict(net=dict(path="net.safetensors", kind="backbone")),
            licences=dict(diffusion="CC0"),
        ),
        **changes,
    }


def damage(file, at=2):
    with open(file, "r+b") as f:
        f.seek(at)
        f.write(b"\0\1")


@pytest.mark.parametrize("name", published_bundles())
def test_published_manifests(name):
    b = read_manifest(shipped_folder(name) / MANIFEST)
    assert b.name == name and b.title and b.parts() and b.preset in ("fast", "paper", "photos")
    assert b.crop_pad == crop_padding(b.image_size)
    teacher, student = b.experiment["teacher"], b.experiment["student"]
    assert set(teacher["encoders"]) <= {*b.encoders, *encoders} and student["name"]
    files = {f for part in b.parts() for f in b.files if f.startswith(b.part(part)["path"].split(".")[0])}
    assert files == set(b.files) - {"PROVENANCE.json"}, "every file belongs to a part"
    firsts = {p.split("/")[0].split(".")[0] for p in b.files} - {"PROVENANCE"}
    assert firsts <= set(b.licences), "every file has a licence"


def test_the_shipped_bundle_is_whole(monkeypatch):
    monkeypatch.delenv("TINY_NBDEV_WEIGHTS", raising=False)
    b = get_bundle()
    assert b.folder == shipped_folder() and b.check(fresh=True) is b
    there = {p.relative_to(b.folder).as_posix() for p in b.folder.rglob("*") if p.is_file()}
    assert there - {"README.md"} == {*b.files, MANIFEST}, "every file is listed, and every listed file is there"
    assert not [p for p in b.record() if "PROVENANCE" in p], "how models were trained is no part of what they are"
    assert (b.image_size, b.crop_pad, b.preset, list(b.students)) == (32, 4, "fast", ["conv4"])
    assert b.experiment["teacher"] == dict(encoders=["teacher"], early_weight=0.5, head="logistic")
    assert len(b.base_classes) == len(set(b.base_classes)) > 60


def test_one_place_says_where_the_files_lie(random, tmp_path, monkeypatch):
    from tiny_nbdev.diffusion.model import embedded_folder

    monkeypatch.setenv("TINY_NBDEV_WEIGHTS", str(random))
    assert bundle_folder() == get_bundle().folder == random and embedded_folder() == random / "diffusion"
    monkeypatch.setenv("TINY_NBDEV_WEIGHTS", str(tmp_path / "nowhere"))
    assert embedded_folder() is None
    with pytest.raises(InputError, match="nowhere.*is missing.*correct or unset TINY_NBDEV_WEIGHTS"):
        get_bundle()
    monkeypatch.delenv("TINY_NBDEV_SD15", raising=False)
    assert bundle_folder("sd15") == tmp_path / "cache" / "sd15"
    monkeypatch.setenv("TINY_NBDEV_SD15", "~/models")
    assert bundle_folder("sd15") == type(tmp_path).home() / "models"


def test_models_of_the_stand_in_load(random):
    import torch

    from tiny_nbdev.classify.backbones import load_backbone
    from tiny_nbdev.diffusion.model import load_diffusion

    b, x = get_bundle(random), torch.rand(2, 3, 32, 32)
    model = load_diffusion(b)
    assert model.image_size == 32 and model.decode(model.encode(x)).shape == x.shape
    assert load_backbone(b.path(b.encoders["teacher"]))(x).shape == (2, 32)
    assert load_backbone(b.path("students/conv4")).image_size == b.students["conv4"]["image_size"]
    damaged = b.path("diffusion") / "unet/config.json"
    text = damaged.read_text()
    damaged.write_text(text + " ")
    with pytest.raises(InputError, match="unet/config.json is changed"):
        load_diffusion(b)
    damaged.write_text(text)


def test_a_file_is_hashed_once_and_again_when_it_changed(own, monkeypatch):
    get_bundle(own).check()
    with monkeypatch.context() as m:
        m.setattr(bundles, "file_sha256", lambda f: pytest.fail(f"{f} was hashed again"))
        get_bundle(own).check()
        assert get_bundle(own).fingerprint == get_bundle(own).fingerprint
    damage(own / "net.json")
    assert dict(check_bundle(own))["net.json"] == "changed", "same size, other content"
    hashed = []
    real = bundles.file_sha256
    monkeypatch.setattr(bundles, "file_sha256", lambda f: hashed.append(f) or real(f))
    check_bundle(own, fresh=True)
    assert len(hashed) == 4


def test_a_cache_that_cannot_be_written_costs_time_only(own, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TINY_NBDEV_CACHE", str(tmp_path / "file"))
    assert get_bundle(own).check() and not list(own.rglob(".*"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/checked.json").write_text("{half")
    monkeypatch.setenv("TINY_NBDEV_CACHE", str(tmp_path / "damaged"))
    assert get_bundle(own).check() and load_json(tmp_path / "damaged/checked.json")


def test_what_is_remembered_of_files_that_are_gone_is_forgotten(own, tmp_path):
    get_bundle(own).check()
    shutil.rmtree(own)
    (tmp_path / "one").write_text("1")
    bundles.file_record(tmp_path / "one")
    assert list(load_json(tmp_path / "cache/checked.json")) == [str((tmp_path / "one").resolve())]


def test_only_the_parts_that_are_used_are_asked_for(own):
    (own / "net.safetensors").unlink()
    b = get_bundle(own)
    assert b.check(["diffusion"]) and set(b.record(["diffusion"])) == {p for p in b.files if p.startswith("diffusion/")}
    with pytest.raises(InputError, match=r"net.safetensors is missing \(0.0 kB\); copy the bundle again"):
        b.check(["encoders/net"])
    assert set(b.record(["encoders/net"])) == {"net.json", "net.safetensors"}, (
        "the JSON beside a backbone belongs to it"
    )


def test_messages_name_file_size_licence_and_remedy(own):
    shutil.rmtree(own / "diffusion")
    with pytest.raises(InputError) as e:
        get_bundle(own).check()
    text = str(e.value)
    assert "diffusion/model_index.json is missing (0.0 kB, CC0), and 1 more files" in text and "\n" not in text
    with pytest.raises(InputError, match="has no students/conv4; it has diffusion, encoders/net"):
        get_bundle(own).path("students/conv4")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(encodres={}), "did you mean 'encoders'"),
        (dict(image_size="32"), "image_size of .* is '32'"),
        (dict(diffusion=dict(path="/etc", image_size=32)), "a path inside the bundle's folder"),
        (dict(diffusion=dict(path="../elsewhere", image_size=32)), "a path inside the bundle's folder"),
        (dict(encoders=dict(net={})), "encoders/net the path None"),
        (dict(students=dict(net=dict(path="net.safetensors"))), "students/net no image_size"),
        (dict(superres=dict(path="none.safetensors")), "none.safetensors does not exist"),
    ],
)
def test_what_a_manifest_must_not_say(own, changes, words):
    before = (own / MANIFEST).read_text()
    with pytest.raises(InputError, match=words):
        write_bundle(own, manifest(**changes))
    assert (own / MANIFEST).read_text() == before


def test_a_manifest_lists_nothing_outside_of_its_folder(own):
    save_json(load_json(own / MANIFEST) | dict(files={"../x": dict(bytes=1, sha256="0")}), own / MANIFEST)
    with pytest.raises(InputError, match="lists '../x'; give paths inside"):
        get_bundle(own)


def test_a_part_without_listed_files_must_at_least_be_there(own):
    save_json(load_json(own / MANIFEST) | dict(files={}), own / MANIFEST)
    assert get_bundle(own).check()
    (own / "net.safetensors").unlink()
    with pytest.raises(InputError, match="net.safetensors is missing; copy the bundle again"):
        get_bundle(own).check()


def test_a_package_without_its_manifest(monkeypatch, tmp_path):
    monkeypatch.delenv("TINY_NBDEV_WEIGHTS", raising=False)
    monkeypatch.setattr(bundles.tiny_nbdev, "__file__", str(tmp_path / "tiny_nbdev/__init__.py"))
    with pytest.raises(InputError, match="weights/embedded/bundle.json is missing; install the package again"):
        get_bundle()


def test_manifests_of_another_schema(own):
    save_json(load_json(own / MANIFEST) | dict(schema=2), own / MANIFEST)
    with pytest.raises(InputError, match="schema 2, and this version reads 1"):
        get_bundle(own)
    (own / MANIFEST).write_text("{half")
    with pytest.raises(InputError, match="not valid JSON"):
        get_bundle(own)


def test_folders_of_another_layout(tmp_path, monkeypatch):
    (tmp_path / "stack.json").write_text("{}")
    with pytest.raises(InputError, match=f"has stack.json .* tiny-nbdev fetch sd15 --to {tmp_path}"):
        get_bundle(tmp_path)
    (tmp_path / "stack.json").rename(tmp_path / "SHA256SUMS.json")
    monkeypatch.setenv("TINY_NBDEV_WEIGHTS", str(tmp_path))
    with pytest.raises(InputError, match="has SHA256SUMS.json .* p4_pack.ipynb"):
        get_bundle()


def test_a_users_own_students(own):
    from tiny_nbdev.classify.backbones import save_backbone
    from tiny_nbdev.classify.students import create_backbone

    before = get_bundle(own).fingerprint
    save_backbone(create_backbone("conv4", 64), own / "students/conv4.safetensors", "conv4")
    b = get_bundle(own)
    assert b.students == dict(conv4=dict(path="students/conv4.safetensors", image_size=64))
    assert b.check().fingerprint != before and "students/conv4.safetensors" in b.record(["students/conv4"])
    (own / "students/noise.safetensors").write_bytes(b"noise")
    with pytest.raises(InputError, match="noise.safetensors is no backbone"):
        get_bundle(own)


def test_another_diffusion_model(random, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_NBDEV_WEIGHTS", str(random))
    embedded, other = get_bundle(), get_bundle(random / "diffusion")
    assert other.path("diffusion") == (random / "diffusion").resolve() and other.diffusion["image_size"] == 32
    assert other.path("encoders/teacher") == embedded.path("encoders/teacher") and other.students == embedded.students
    assert (other.preset, other.base_classes, other.superres) == ("paper", (), None)
    assert other.experiment == embedded.experiment and other.fingerprint != embedded.fingerprint
    hub = get_bundle("somebody/diffusion")
    assert (hub.path("diffusion"), hub.image_size, hub.crop_pad) == ("somebody/diffusion", 512, 49)
    assert hub.check().fingerprint != other.fingerprint
    with pytest.raises(InputError, match="neither an existing folder nor a hub id"):
        get_bundle("./no/such")
    with pytest.raises(InputError, match="neither bundle.json nor model_index.json"):
        get_bundle(tmp_path)
    assert get_bundle(other) is other


def test_a_manifest_is_read_as_it_was_written(own):
    b = get_bundle(own)
    assert (
        isinstance(b, Bundle) and b == get_bundle(str(own)) and json.loads((own / MANIFEST).read_text())["schema"] == 1
    )
    again = write_bundle(own, {k: v for k, v in load_json(own / MANIFEST).items() if k != "files"})
    assert again == b and again.fingerprint == b.fingerprint
    assert not [name for name in os.listdir(own) if name.endswith(".tmp")]
