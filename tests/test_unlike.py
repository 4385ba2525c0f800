"The score for images unlike all classes: it tells strangers apart, and is absent where it would be wrong."

import json

import pytest
import torch
from PIL import Image

from tiny_nbdev.classify.backbones import load_backbone
from tiny_nbdev.classify.export import export_onnx, quantize_onnx
from tiny_nbdev.classify.students import Classifier
from tiny_nbdev.classify.unlike import BaseStatistics, Unlike, fit_unlike, unit_features, unlike_or_why
from tiny_nbdev.data.samples import load_symbols
from tiny_nbdev.errors import InputError
from tiny_nbdev.models.bundle import get_bundle
from tiny_nbdev.onnx_session import onnx_session
from tiny_nbdev.predict import Predictor
from tiny_nbdev.run.report import report_html

NAMES = ("airplane", "anchor", "umbrella")


@pytest.fixture(scope="module")
def photos():
    return load_symbols(NAMES, 4, size=64)


@pytest.fixture(scope="module")
def student():
    bundle = get_bundle("photos")
    torch.manual_seed(0)
    return Classifier(load_backbone(bundle.path("students/conv4")), len(NAMES), tta_flip=True).eval()


@pytest.fixture(scope="module")
def statistics():
    bundle = get_bundle("photos")
    return BaseStatistics.load(bundle.folder / bundle.students["conv4"]["unlike"])


def test_shipped_statistics_are_small_and_belong_to_their_students():
    bundle, size = get_bundle("photos"), 0
    for name in ("conv4", "conv4_84", "lite_student"):
        path = bundle.students[name]["unlike"]
        size += bundle.files[path]["bytes"]
        assert path in bundle.record([f"students/{name}"])
        assert BaseStatistics.load(bundle.folder / path).suits(load_backbone(bundle.path(f"students/{name}")))
    assert size < 1e6


def test_strangers_are_told_apart(statistics):
    torch.manual_seed(0)
    own = statistics.strangers.view(64, 10, -1)[:5]  # ten images each of five base classes, projected
    back = torch.linalg.pinv(statistics.project.float() * statistics.scale)
    features, labels = own.flatten(0, 1) @ back + statistics.mean, torch.arange(5).repeat_interleave(10)
    torch.testing.assert_close(statistics(features), own.flatten(0, 1), rtol=1e-3, atol=1e-2)
    first = torch.arange(50) % 10 < 5
    score, record = fit_unlike(statistics, features[first], labels[first], 5)
    a, b = score(features[~first]), score(statistics.strangers[50:] @ back + statistics.mean)
    assert a.min() >= 0 and b.max() <= 1 and a.mean() + 0.2 < b.mean()
    assert record["n_photos"] == 25 and 0 <= record["false_alarm"] < 0.5 < record["found"] <= 1
    assert 0 < record["found_alike"] <= 1


def test_a_class_of_one_photo_and_two_classes(student, photos, statistics):
    two = photos.subset([0, 1, 2, 4])
    two = type(photos)(two.images, two.labels, NAMES[:2])
    score, record = unlike_or_why(student, two, statistics)
    assert score is None or record["n_photos"] == 3
    _, record = unlike_or_why(student, photos.subset([0, 1, 4, 8]), statistics)
    assert "n_photos" not in record or record["n_photos"] == 2


def test_more_photos_of_a_class_narrow_it(statistics):
    torch.manual_seed(0)
    x = statistics.mean + 0.01 * torch.randn(8, len(statistics.mean))
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])
    score = Unlike(statistics, x, labels, 2)
    assert (score.square[0] <= score.square[1]).all() and (score.square[0] < score.square[1]).any()


def test_a_score_that_tells_nothing_is_none(statistics):
    z = torch.zeros(4, len(statistics.spread))
    z[0, 0], z[1, 0], z[2, 1], z[3, 1] = 20, -20, 20, -20  # the photos of a class lie opposite to each other
    features = z @ torch.linalg.pinv(statistics.project.float() * statistics.scale) + statistics.mean
    assert fit_unlike(statistics, features, torch.tensor([0, 0, 1, 1]), 2) == (None, {})


def test_a_trained_backbone_has_no_score(student, photos, statistics):
    import copy

    other = copy.deepcopy(student)
    next(other.backbone.parameters()).data[0] += 1e-3
    score, record = unlike_or_why(other, photos, statistics)
    assert score is None and "were trained" in record["words"]


def test_the_second_output(student, photos, statistics, tmp_path):
    score, record = unlike_or_why(student, photos, statistics)
    export_onnx(student, tmp_path / "plain.onnx", NAMES)
    assert export_onnx(student, tmp_path / "m.onnx", NAMES, dict(unlike=record), photos, unlike=score) < 1e-4
    Image.fromarray(photos.images[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    old, new = (Predictor(tmp_path / f).predict_file(tmp_path / "photo.png") for f in ("plain.onnx", "m.onnx"))
    assert "unlike" not in old and set(new) == {*old, "unlike"} and old["label"] == new["label"]
    want = float(score(unit_features(student, photos.subset([0])))[0])
    assert abs(new["unlike"] - want) < 1e-3
    session = onnx_session(tmp_path / "m.onnx")
    assert [(o.name, o.type) for o in session.get_outputs()][1] == ("unlike", "tensor(float)")
    assert json.loads(session.get_modelmeta().custom_metadata_map["unlike"]) == record
    small = quantize_onnx(tmp_path / "m.onnx", tmp_path / "8.onnx", photos)
    eight = Predictor(tmp_path / "8.onnx").predict_file(tmp_path / "photo.png")
    assert 0 <= eight["unlike"] <= 1 and small["bytes"] < (tmp_path / "m.onnx").stat().st_size
    student.normalize_features = False
    with pytest.raises(ValueError, match="unit length"):
        export_onnx(student, tmp_path / "no.onnx", NAMES, unlike=score)
    student.normalize_features = True


def test_other_files_are_refused(statistics, tmp_path):
    from tiny_nbdev.core import save_tensors

    save_tensors(dict(mean=statistics.mean), tmp_path / "x.safetensors", dict(kind="feature map"))
    with pytest.raises(InputError, match="no statistics of base images"):
        BaseStatistics.load(tmp_path / "x.safetensors")


def test_the_report_says_it(photos):
    metrics = dict(student="conv4", student_accuracy=None)
    assert "Images of something else" not in report_html("t", photos, None, metrics)
    none = report_html("t", photos, None, metrics | dict(unlike=dict(words="no score for images: <b>")))
    assert "No score for images: &lt;b&gt;." in none and "hint" not in none
    some = metrics | dict(unlike=dict(words="unlike is 0.5", false_alarm=0.16))
    assert "unlike is 0.5. It misses things" in report_html("t", photos, None, some)
