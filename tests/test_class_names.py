"""Class names in place of photos: what is read, what can learn from them, and what the run leaves."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import command
from safetensors.torch import load_file
from stand_ins import make_prior_pipeline

from tiny_nbdev.classify.clip import has_sentence_encoder, load_clip
from tiny_nbdev.classify.linear_probes import LinearLayer, tune_layer
from tiny_nbdev.classify.probes import Known, ProbeSettings
from tiny_nbdev.core import load_json, rng_for
from tiny_nbdev.data.class_names import class_names, classes_without_photos, read_task
from tiny_nbdev.data.folders import read_folder
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate.gate import Gate
from tiny_nbdev.onnx_session import onnx_session
from tiny_nbdev.run.specialize import prepare, specialize

reads_names = pytest.mark.skipif(not has_sentence_encoder(), reason="the sentence encoder is not installed")
quiet = dict(say=lambda *_: None, device="cpu")


@pytest.fixture
def some_empty(photos, tmp_path):
    "The three classes, and an empty folder of a fourth."
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "oak tree").mkdir()
    return tmp_path / "photos"


@pytest.mark.parametrize(
    "given, names",
    [("cup, soup spoon", ("cup", "soup spoon")), (["tea, iced", "Brûlée"], ("tea, iced", "Brûlée")), (("a",), ("a",))],
)
def test_names_as_people_give_them(given, names):
    assert class_names(given) == names


def test_names_in_a_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeff# table\r\ncup\r\n\r\n  soup spoon \r\n".encode())
    assert class_names(str(file)) == class_names(file) == ("cup", "soup spoon")
    file.write_bytes(b"\xff\xfe\x00")
    for wrong, words in (
        (file, "no text in UTF-8"),
        (tmp_path / "none.txt", "check the path"),
        ("cup,dog,cup", "names 'cup' twice"),
        (" ,", "no class name"),
        ([], "no class name"),
    ):
        with pytest.raises(InputError, match=words):
            class_names(wrong)


def test_an_empty_folder_is_an_error_unless_names_are_enough(some_empty):
    with pytest.raises(InputError, match="oak tree holds no images; add some or remove the folder"):
        read_folder(some_empty, 16)
    s, said = read_folder(some_empty, 16, from_names=True)
    assert (s.classes, s.counts(), said) == (("Vögel", "dog", "oak tree", "red cat"), [2, 4, 0, 3], [])
    assert classes_without_photos(some_empty) == ("oak tree",)
    whole = read_folder(some_empty.parent / "photos", 16, from_names=True)[0]
    assert torch.equal(whole.of_class(3).images, s.of_class(3).images)
    (some_empty / "oak tree" / "1.jxl").touch()  # somebody put something there
    with pytest.raises(InputError, match="only 1 file of a type that is not read"):
        read_folder(some_empty, 16, from_names=True)


def test_photos_and_names_are_one_task(some_empty):
    s, _ = read_task(some_empty, 16, classes="elm,dog", from_names=True)
    assert (s.classes, s.counts()) == (("Vögel", "dog", "oak tree", "red cat", "elm"), [2, 4, 0, 3, 0])
    for name in ("Vögel", "dog", "red cat"):
        shutil.rmtree(some_empty / name)
        (some_empty / name).mkdir()
    s, _ = read_task(some_empty, 16, from_names=True)
    assert (len(s), s.n_classes, s.size, s.labels.dtype) == (0, 4, (16, 16), torch.int64)
    with pytest.raises(InputError, match="a classifier needs at least two"):
        read_task(None, 16, classes="cup")
    with pytest.raises(InputError, match="neither photos nor class names"):
        read_task(None, 16)


def test_a_class_without_a_photo_keeps_its_name():
    "It is no wrong answer for the photos of other classes."
    g, y = rng_for("directions"), torch.arange(30) % 3
    text, centres = (F.normalize(torch.randn(n, 16, generator=g), dim=1) for n in (4, 3))
    f = F.normalize(centres[y] + 0.1 * torch.randn(30, 16, generator=g), dim=1)
    layer, settings = LinearLayer(text, torch.zeros(4), 20.0), ProbeSettings(1e-2, 50, 256, 0.01)
    tune_layer(layer, Known(f, y), settings)
    moved = F.cosine_similarity(layer.weight, text)
    assert moved[3] > 1 - 1e-6 and (moved[:3] < 0.999).all() and layer.bias[3] == 0
    assert (layer(f)[:, :3].argmax(1) == y).all()


@reads_names
def test_the_teacher_takes_classes_without_photos(photos):
    runner, inputs = prepare(photos, classes="oak tree", device="cpu")
    assert inputs.support.counts() == [2, 4, 3, 0] and runner.experiment.teacher.head == "clip-linear"
    teacher, clip = runner.fit_teacher(inputs.support, 0), load_clip("embedded")
    name = clip.names(["oak tree"])[0]
    weight = dict(teacher.head.named_parameters())["head.weight"]
    assert F.cosine_similarity(weight[3], name, 0) > 1 - 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small pipeline that reads image tokens, and beside it a prior for the same encoder and sentences."
    return make_prior_pipeline(tmp_path_factory.mktemp("reads_images"))


def how(folder, **more):
    changes = {"generator.diffusion": str(folder), "generator.config.prior": str(folder / "prior.safetensors")}
    changes |= {"generator.config.n_steps": 2, "recipe.config.steps": 2, "recipe.config.batch_size": 6}
    changes |= {"recipe.config.n_views": 1, "generator.config.precision": "fp32"}
    return dict(generator="sidclip", per_class=2, changes=changes | more, **quiet)


@reads_names
def test_names_alone_become_a_classifier(folder, queries, tmp_path):
    said, names = [], "red cat,Vögel,dog"
    more = dict(classes=names, int8=True, compare=True) | how(folder, **{"generator.gate": -1.0})
    m = specialize(None, tmp_path / "run", queries, **more | dict(say=said.append))
    assert "none; 3 class names: red cat, Vögel, dog" in said[0] and "open at" not in said[0]
    assert (m["n_photo"], m["n_synthetic"], m["n_query"]) == (0, 6, 6)
    assert m["classes_without_photos"] == m["classes"] == ["red cat", "Vögel", "dog"]
    assert m["gate"]["photos"] is False and m["gate"]["left_out"] is None and len(m["gate"]["classes"]) == 3
    assert m["onnx_max_abs_diff"] < 1e-4 and m["int8_bytes"] < m["onnx_bytes"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "3 class names, without any photo, became conv4_clip, with the help of 6" in report
    assert "By class: red cat " in report and "are asked for" not in report
    meta = onnx_session(tmp_path / "run" / "model.onnx").get_modelmeta().custom_metadata_map
    assert meta["labels"] == '["red cat", "Vögel", "dog"]'
    again = specialize(None, tmp_path / "run", queries, **more)
    assert again == m
    # the teacher is the zero-shot CLIP, and the second student the zero-shot student
    plain = specialize(None, tmp_path / "plain", queries, classes=names, **quiet)
    assert plain["teacher_accuracy"] == m["teacher_accuracy"]
    assert plain["student_accuracy"] == m["student_accuracy_no_synthetic"] and plain["n_synthetic"] == 0


@reads_names
def test_a_shut_gate_leaves_the_names(folder, tmp_path):
    names = dict(classes="red cat,dog")
    specialize(None, tmp_path / "shut", **names, **how(folder, **{"generator.gate": 1.1}))
    specialize(None, tmp_path / "plain", **names, **quiet)
    shut, plain = (load_file(tmp_path / run / "model.safetensors") for run in ("shut", "plain"))
    assert all(torch.equal(shut[k], v) for k, v in plain.items())
    m = load_json(tmp_path / "shut" / "metrics.json")
    assert m["gate"]["open"] is False and "110% are asked for" in m["gate_words"]
    learned = specialize(None, tmp_path / "open", **names, **how(folder, **{"generator.gate": -1.0}))
    assert learned["gate"]["open"] is True
    opened = load_file(tmp_path / "open" / "model.safetensors")
    assert not all(torch.equal(opened[k], v) for k, v in plain.items())


@reads_names
def test_some_classes_have_photos_and_some_do_not(folder, some_empty, tmp_path):
    m = specialize(some_empty, tmp_path / "run", **how(folder, **{"generator.gate": 1e-9}))
    assert (m["n_photo"], m["n_synthetic"], m["classes_without_photos"]) == (9, 8, ["oak tree"])
    spec = load_file(tmp_path / "run" / "specialization.safetensors")
    assert spec["features"].shape == (9, 1280) and spec["labels"].bincount(minlength=4).tolist() == [2, 4, 0, 3]
    assert 0 <= m["gate"]["left_out"] <= 1 and m["gate"]["photos"] is True
    assert "9 photos of 3 classes and 1 class name became" in (tmp_path / "run" / "report.html").read_text()


@reads_names
def test_unlabelled_photos_help_names(photos, tmp_path):
    changes = {"recipe.config.steps": 2, "recipe.config.batch_size": 6}
    m = specialize(None, tmp_path / "run", classes="red cat,dog", unlabelled=photos, changes=changes, **quiet)
    assert (m["n_photo"], m["n_unlabelled"]) == (0, 9)


@reads_names
def test_what_needs_photos_says_so(some_empty, tmp_path):
    for choices, words in (
        (dict(generator="tint"), "oak tree holds no images; add some or remove the folder"),
        (dict(), "oak tree holds no images; add some or remove the folder"),
        (dict(preset="photos"), "oak tree holds no images; add some or remove the folder"),
        (dict(preset="photos", generator="sidclip"), "the head logistic and the recipe probe learn from photos only"),
        (dict(preset="photos", classes="elm"), "'oak tree' has no photo, and the head logistic"),
        (dict(classes="elm", generator="tint"), "the generator tint learns from photos only; add photos of it"),
        (dict(classes="elm", changes={"recipe.config.head_init": "prototype"}), "the recipe clip-distill learns"),
    ):
        with pytest.raises(InputError, match=words):
            specialize(some_empty, tmp_path / "run", **choices, **quiet)
    lonely = ImageSet(torch.zeros(2, 3, 8, 8), torch.tensor([0, 0]), ("cat", "dog"))
    with pytest.raises(InputError, match=r"class counts \[2, 0\]"):
        prepare(lonely, device="cpu")
    with pytest.raises(InputError, match="--int8 needs photos or drawn images"):
        specialize(None, tmp_path / "run", classes="cat,dog", int8=True, **quiet)
    assert not (tmp_path / "run").exists()


def test_the_gate_without_photos():
    shut = Gate(0.5, 0.4, None, photos=False)
    assert not shut.open and "(50% are asked for, as there is no photo to compare with)" in shut.words()
    assert Gate(0.5, 0.6, None, photos=False).open and Gate(0.5, 0.4, 0.7).open


@reads_names
def test_names_on_the_command_line(tmp_path):
    done = command("specialize", "--classes", "cup,soup spoon", "--out", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 0 and "its names decide: nothing is learned" in done.stdout, done.stderr
    assert (tmp_path / "run" / "model.onnx").is_file()
    done = command("specialize", "--out", tmp_path / "none")
    assert done.returncode == 2 and "neither photos nor class names" in done.stderr
