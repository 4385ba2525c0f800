"Classifiers as files: what is written can be read again, equals torch, and leaves no traces anywhere else."

import copy
import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from closed import run_closed

from tiny_nbdev import __version__
from tiny_nbdev.classify.backbones import load_backbone, save_backbone
from tiny_nbdev.classify.export import (
    export_onnx,
    latency_ms,
    load_classifier,
    quantize_onnx,
    resize_model,
    save_classifier,
    tensors_sha256,
)
from tiny_nbdev.classify.students import Backbone, Classifier, create_student
from tiny_nbdev.core import load_tensors, rng_for, save_tensors
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.errors import InputError
from tiny_nbdev.onnx_session import is_whole, onnx_session
from tiny_nbdev.predict import Predictor

NAMES = ("five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return create_student("conv4", 5).eval()


@pytest.fixture(scope="module")
def images():
    pixels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=rng_for("images"))
    return ImageSet(pixels, torch.arange(10) % 5, NAMES)


@pytest.mark.parametrize(
    "name,settings",
    [
        ("conv4", dict(normalize_features=False)),
        ("resnet12", dict(widths=(8, 8, 8, 16), mean=(0.4, 0.5, 0.6))),
        ("resnet10t", {}),
    ],
)
def test_stored_classifier_is_the_same(name, settings, tmp_path):
    path, x = tmp_path / "model.safetensors", torch.rand(3, 3, 40, 32, generator=rng_for("x"))
    c = create_student(name, 5, **settings).eval()
    c.tta_flip = c.tta_shift = name == "conv4"
    widths = {k: v for k, v in settings.items() if k == "widths"}
    save_classifier(c, path, NAMES, name, info={"why": "test"}, **widths)
    back, meta = load_classifier(path)
    assert torch.equal(back(x), c(x)) and not back.training
    assert tuple(meta["classes"]) == NAMES and meta["info"] == {"why": "test"}
    assert (back.tta_flip, back.tta_shift) == (meta["tta_flip"], meta["tta_shift"]) == (c.tta_flip, c.tta_shift)


def test_classifier_of_a_stored_backbone(tmp_path):
    narrow = create_student("resnet12", 5, widths=(8, 8, 8, 16))
    with pytest.raises(InputError, match="instead of"):
        save_classifier(narrow, tmp_path / "m.safetensors", NAMES, "resnet12")
    save_backbone(narrow.backbone, tmp_path / "b.safetensors", "resnet12", widths=(8, 8, 8, 16))
    c = Classifier(load_backbone(tmp_path / "b.safetensors"), 5)
    save_classifier(c, tmp_path / "m.safetensors", NAMES, "resnet12")
    load_classifier(tmp_path / "m.safetensors")


def test_files_that_are_not_what_was_saved(student, tmp_path):
    path = tmp_path / "model.safetensors"
    save_classifier(student, path, NAMES, "conv4")
    good, header = load_tensors(path)
    save_tensors({k: v + 1 if k == "head.bias" else v for k, v in good.items()}, path, header)
    with pytest.raises(InputError, match="not those that were saved"):
        load_classifier(path)
    some = {k: v for k, v in good.items() if k != "head.bias"}
    save_tensors(some, path, header | dict(sha256=tensors_sha256(some)))
    with pytest.raises(InputError, match="missing: head.bias"):
        load_classifier(path)
    save_tensors(good, path, {"kind": "backbone"})
    with pytest.raises(InputError, match="holds no classifier"):
        load_classifier(path)
    save_tensors(good, path, {k: v for k, v in header.items() if not k.startswith("tta")})
    with pytest.raises(InputError, match="does not say tta_flip, tta_shift"):
        load_classifier(path)
    with pytest.raises(ValueError, match="3 class names for 5 logits"):
        save_classifier(student, path, NAMES[:3], "conv4")


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (8, 8), (28, 40), (33, 31), (100, 60), (1200, 1600)])
def test_resize_equals_torch(size):
    a = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=rng_for(2, *size, 3))
    for side in (32, 84):
        model = resize_model(side)
        onnx.checker.check_model(model, full_check=True)
        got = onnx_session(model.SerializeToString()).run(None, {"image": a.numpy()})[0]
        pixels = a.permute(0, 3, 1, 2) / 255
        want = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True).numpy()
        assert got.shape == want.shape and abs(got - want).max() < 2e-6


def test_the_file_and_what_it_says(student, images, tmp_path):
    file = tmp_path / "conv4.onnx"
    assert export_onnx(student, file, NAMES, info=dict(student="conv4"), images=images) < 1e-4
    session = onnx_session(file)
    (i,), (o,) = session.get_inputs(), session.get_outputs()
    assert (i.name, i.type, i.shape) == ("image", "tensor(uint8)", ["n", "H", "W", 3])
    assert (o.name, o.type, o.shape[1]) == ("probabilities", "tensor(float)", 5)
    assert [(v.domain, v.version) for v in onnx.load(file).opset_import] == [("", 18)]
    meta = session.get_modelmeta().custom_metadata_map
    assert json.loads(meta["labels"]) == list(NAMES) and meta["image_size"] == "32"
    assert meta["version"] == __version__ and meta["student"] == "conv4"
    a = torch.randint(0, 256, (4, 37, 91, 3), dtype=torch.uint8, generator=rng_for("a")).numpy()
    p = session.run(None, {"image": a})[0]
    assert p.shape == (4, 5) and abs(p.sum(1) - 1).max() < 1e-5
    assert np.allclose(p[2:3], session.run(None, {"image": a[2:3]})[0], atol=1e-6)
    written = file.read_bytes()
    assert not [w for w in (b".py", b"/site-packages", b"tiny_nbdev.classify") if w in written]
    export_onnx(student, tmp_path / "again.onnx", NAMES, info=dict(student="conv4"))
    assert (tmp_path / "again.onnx").read_bytes() == written, "the same network, the same file"
    assert 0 < latency_ms(file, 20) < 500


def test_where_the_network_is_sure(student, images, tmp_path):
    sure = copy.deepcopy(student)
    sure.head.weight.data *= 300  # differences of logits show most here
    assert sure(images.floats()).softmax(1).max() > 0.95
    assert export_onnx(sure, tmp_path / "sure.onnx", NAMES, images=images) < 1e-4


def test_augmented_views_are_in_the_graph(student, images, tmp_path):
    six = copy.deepcopy(student)
    six.tta_flip = six.tta_shift = True
    assert export_onnx(six, tmp_path / "six.onnx", NAMES, images=images) < 1e-4
    one = onnx_session(tmp_path / "six.onnx").run(None, {"image": images.images.permute(0, 2, 3, 1).numpy()})[0]
    assert abs(one - six(images.floats()).softmax(1).detach().numpy()).max() < 1e-4
    assert abs(one - student(images.floats()).softmax(1).detach().numpy()).max() > 1e-4


def test_nothing_is_written_that_is_wrong(student, tmp_path):
    with pytest.raises(RuntimeError, match="no.onnx was not written"):
        export_onnx(student, tmp_path / "no.onnx", NAMES, tolerance=0.0)
    with pytest.raises(ValueError, match="2 class names"):
        export_onnx(student, tmp_path / "no.onnx", NAMES[:2])
    assert not list(tmp_path.iterdir())


class Frozen(nn.Module):
    "Leaves torch on its way, so that the older exporter takes its result for a constant."

    num_features = 3

    def forward_features(self, x):
        return torch.from_numpy(x.detach().numpy().copy())

    def forward_head(self, x, pre_logits):
        return x.mean((2, 3))


def test_exporters(student, tmp_path, monkeypatch):
    plain = torch.onnx.export

    def refuse_dynamo(*args, dynamo, **kw):
        if dynamo:
            raise TypeError("no such exporter")
        return plain(*args, dynamo=False, **kw)

    def broken(*args, **kw):
        raise RuntimeError("operator aten::mystery is unknown")

    monkeypatch.setattr(torch.onnx, "export", refuse_dynamo)
    try:
        assert export_onnx(student, tmp_path / "old.onnx", NAMES) < 1e-4
    except InputError as e:  # a future torch has only one exporter
        assert "no such exporter" in str(e)
    for exporter, c, why in (
        (broken, student, "aten::mystery"),
        (refuse_dynamo, Classifier(Backbone(Frozen()), 5), "no such exporter"),
    ):
        monkeypatch.setattr(torch.onnx, "export", exporter)
        with pytest.raises(InputError, match="cannot be written as ONNX") as e:
            export_onnx(c, tmp_path / "no.onnx", NAMES)
        assert why in str(e.value) and torch.__version__ in str(e.value)
    assert not (tmp_path / "no.onnx").exists()


def test_eight_bits(student, images, tmp_path):
    export_onnx(student, tmp_path / "m.onnx", NAMES)
    small = quantize_onnx(tmp_path / "m.onnx", tmp_path / "8.onnx", images)
    assert small["bytes"] == (tmp_path / "8.onnx").stat().st_size < 0.5 * (tmp_path / "m.onnx").stat().st_size
    meta = onnx_session(tmp_path / "8.onnx").get_modelmeta().custom_metadata_map
    assert meta["quantized"] == "int8" and json.loads(meta["labels"]) == list(NAMES)


@pytest.fixture(scope="module")
def sealed(student, images, tmp_path_factory):
    d = tmp_path_factory.mktemp("sealed")
    export_onnx(student, d / "model.onnx", NAMES)
    quantize_onnx(d / "model.onnx", d / "model.int8.onnx", images)
    return d


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
def test_flipped_bytes_are_noticed(sealed, name, tmp_path):
    data, bad = (sealed / name).read_bytes(), tmp_path / "bad.onnx"
    ends = [*range(200), *range(len(data) - 100, len(data))]  # the remark, the labels and the seal itself
    for i in [*ends, *np.linspace(200, len(data) - 101, 300).astype(int)]:  # and what lies between, mostly weights
        assert is_whole(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :]) is False, i
    for i in (0, 40, len(data) // 3, len(data) // 2, len(data) - 300, len(data) - 70, len(data) - 1):
        bad.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
        with pytest.raises(InputError, match="bad.onnx is damaged") as e:
            Predictor(bad)
        assert len(str(e.value).splitlines()) == 1
    for n in (1, 76, len(data) // 2):
        bad.write_bytes(data[:-n])
        with pytest.raises(InputError, match="bad.onnx is damaged"):
            onnx_session(bad)
    with pytest.raises(InputError, match="The model is damaged"):
        onnx_session(data + b"more")


def test_files_without_a_seal_are_read(sealed, images, tmp_path):
    model = onnx.load(sealed / "model.onnx")
    onnx.save(model, tmp_path / "again.onnx")
    assert is_whole((tmp_path / "again.onnx").read_bytes()), "written again by onnx, it is the same file"
    model.doc_string = ""
    del model.metadata_props[-1]
    onnx.save(model, tmp_path / "old.onnx")
    assert is_whole((tmp_path / "old.onnx").read_bytes()) is None
    a = np.zeros((1, 9, 9, 3), np.uint8)
    assert (Predictor(tmp_path / "old.onnx")(a) == Predictor(sealed / "model.onnx")(a)).all()
    small = quantize_onnx(tmp_path / "old.onnx", tmp_path / "8.onnx", images)
    assert small["bytes"] > 0 and is_whole((tmp_path / "8.onnx").read_bytes())


WORK = """
import numpy as np, torch
from PIL import Image
from tiny_nbdev.classify.export import export_onnx, latency_ms, quantize_onnx, save_classifier
from tiny_nbdev.classify.students import create_student
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.predict import predict_files

torch.manual_seed(0)
c, names = create_student("conv4", 2).eval(), ("a", "b")
images = ImageSet(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4) % 2, names)
save_classifier(c, out / "model.safetensors", names, "conv4")
export_onnx(c, out / "model.onnx", names, images=images)
quantize_onnx(out / "model.onnx", out / "int8.onnx", images)
latency_ms(out / "model.onnx", 3)
Image.fromarray(images.images[0].permute(1, 2, 0).numpy()).save(out / "photo.png")
assert len(list(predict_files(out / "model.onnx", [out / "photo.png"]))) == 1
"""


def alone(tmp_path, home):
    "Export and predict in a process of its own, without sockets and with `home` as its home folder."
    out = run_closed(WORK, tmp_path, home)
    assert sorted(p.name for p in out.iterdir()) == ["int8.onnx", "model.onnx", "model.safetensors", "photo.png"]


def test_nothing_is_written_elsewhere_and_no_socket_is_opened(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    alone(tmp_path, home)
    assert not list(home.iterdir())


def test_home_that_cannot_be_written(tmp_path):
    home = tmp_path / "home"
    home.write_text("a file where a folder should be: nobody can write below it, not even root")
    alone(tmp_path, home)
