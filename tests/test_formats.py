"Smaller files beside model.onnx: what they are calibrated on, what they lose, and who says so."

import importlib.util

import pytest
import torch

from tiny_nbdev.classify.export import calibration_images, onnx_accuracy, onnx_probabilities
from tiny_nbdev.core import load_json
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.data.samples import digit_task
from tiny_nbdev.errors import InputError
from tiny_nbdev.predict import Predictor
from tiny_nbdev.run.cli import main
from tiny_nbdev.run.drawn import SyntheticImages
from tiny_nbdev.run.formats import read_formats
from tiny_nbdev.run.outcome import loss_warnings
from tiny_nbdev.run.report import report_html
from tiny_nbdev.run.specialize import specialize

SMOKE = dict(preset="smoke", base="none", device="cpu", flip=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out, said = tmp_path_factory.mktemp("formats") / "run", []
    photos, queries = digit_task()
    more = dict(unlabelled=queries.subset(range(0, 30)), **SMOKE)
    test = queries.subset(range(30, 130))
    metrics = specialize(photos, out, test, formats="onnx,int8", say=said.append, **more)
    return out, metrics, said, photos, test, more


def test_what_a_run_says_of_eight_bits(finished):
    out, m, said, photos, test, _ = finished
    drawn = SyntheticImages(out / "synthetic", photos.classes).load(m["n_synthetic"] // 5)
    assert len(drawn) == m["n_synthetic"] > 0
    assert m["int8_calibrated_on"] == len(photos) + len(drawn) + 30
    assert m["int8_bytes"] == (out / "model.int8.onnx").stat().st_size < m["onnx_bytes"] / 2
    right = {f: onnx_accuracy(out / f, test) for f in ("model.onnx", "model.int8.onnx")}
    assert m["int8_accuracy"] == right["model.int8.onnx"] and (m["int8_checked_on"], m["int8_checked"]) == (
        "queries",
        100,
    )
    assert m["int8_lost_points"] == pytest.approx(100 * (right["model.onnx"] - right["model.int8.onnx"]))
    full, small = (onnx_probabilities(out / f, test).argmax(1) for f in right)
    assert m["int8_agreement"] == pytest.approx((full == small).mean()) and m["int8_latency_ms_p50"] > 0
    words = (
        f"{'gains' if m['int8_lost_points'] < 0 else 'loses'} {abs(m['int8_lost_points']):.1f} points on 100 queries"
    )
    assert f"model.int8.onnx   {m['int8_bytes'] / 1e3:.0f} kB" in said[-1].replace("KB", "kB") and words in said[-1]
    assert ("beware" in said[-1]) == (m["int8_lost_points"] > 0.5)
    assert words in (out / "report.html").read_text(encoding="utf-8")
    assert Predictor(out / "model.int8.onnx").labels == list(photos.classes)


def test_short_form_and_long_form_are_one(finished):
    out, m, _, photos, test, more = finished
    for how in (dict(int8=True), dict(formats=["int8"]), dict(formats="int8"), {}):
        said = []
        assert specialize(photos, out, test, say=said.append, **how, **more) == m
        assert "finished already" in said[0]


def test_without_queries_the_photos_are_asked(tmp_path):
    photos, _ = digit_task()
    quick = SMOKE | dict(generator="none", say=lambda *_: None)
    m = specialize(photos, tmp_path / "run", int8=True, **quick)
    assert (m["int8_checked_on"], m["int8_checked"], m["int8_calibrated_on"]) == ("photos", 25, 25)
    full, small = (onnx_accuracy(tmp_path / "run" / f, photos) for f in ("model.onnx", "model.int8.onnx"))
    assert "int8_accuracy" not in m and m["int8_lost_points"] == pytest.approx(100 * (full - small))


def test_more_than_half_a_point_is_said():
    m = dict(int8_lost_points=0.5, int8_checked=1800, int8_checked_on="queries", int8_bytes=1, int8_latency_ms_p50=1.0)
    assert loss_warnings({}) == loss_warnings(m) == loss_warnings(m | dict(int8_lost_points=-3.0)) == []
    worse = m | dict(int8_lost_points=0.56)
    (said,) = loss_warnings(worse)
    assert said.startswith("model.int8.onnx loses 0.6 points on 1,800 queries, more than half a point")
    photos = ImageSet(torch.zeros(2, 3, 8, 8), torch.arange(2), ("a", "b"))
    plain = dict(student="conv4", student_accuracy=None, seconds={})
    pages = [report_html("t", photos, None, plain | x) for x in (m, worse)]
    assert [said in p for p in pages] == [False, True] and all("0.5 points" in p or said in p for p in pages)


def test_calibration_images_are_even():
    photos = ImageSet(torch.rand(40, 3, 8, 8), torch.arange(40) % 4, tuple("abcd"))
    large = ImageSet(torch.rand(7, 3, 16, 16), torch.zeros(7, dtype=torch.long), ("base",))
    found = calibration_images([photos, None, large, photos.subset([])], most=8)
    assert [s.counts() for s in found] == [[2] * 4, [7]] and [s.size for s in found] == [(8, 8), (16, 16)]


def test_formats_that_are_refused(tmp_path, capsys, monkeypatch):
    with pytest.raises(InputError, match="'coreml' is not known; give one or more of onnx,int8,tflite"):
        read_formats("onnx,coreml")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n.startswith("litert") else find(n, *a))
    photos, _ = digit_task()
    with pytest.raises(InputError, match="needs litert_torch, which is not installed; run: pip install"):
        specialize(photos, tmp_path / "run", formats="tflite", **SMOKE)
    assert main(["specialize", "nowhere", "--out", str(tmp_path / "run"), "--format", "tflite"]) == 2
    assert "leave tflite out and convert model.onnx" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("litert_torch") is None, reason="the extra [tflite] is not installed")
def test_tflite_beside_onnx(tmp_path):
    from tiny_nbdev.classify.tflite import TflitePredictor, tflite_probabilities

    photos, queries = digit_task()
    test = queries.subset(range(100))
    quick = SMOKE | dict(generator="none", say=lambda *_: None)
    m = specialize(photos, tmp_path / "run", test, formats="tflite", **quick)
    file = tmp_path / "run" / "model.tflite"
    guess = tflite_probabilities(file, test).argmax(1)
    assert m["tflite_accuracy"] == (guess == test.labels.numpy()).mean()
    assert m["tflite_agreement"] > 0.9 and abs(m["tflite_lost_points"]) < 5
    assert m["tflite_bytes"] == file.stat().st_size < m["onnx_bytes"] / 2 and m["tflite_latency_ms_p50"] > 0
    assert load_json(f"{file}.json")["labels"] == list(photos.classes)
    data = file.read_bytes()
    file.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    with pytest.raises(InputError, match="model.tflite is damaged"):
        TflitePredictor(file)
