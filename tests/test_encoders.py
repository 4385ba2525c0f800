"Backbones, encoders and students of a bundle: which weights a name stands for, and what is refused."

from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F

from tiny_nbdev.classify.backbones import (
    EnsembleBackbone,
    MultiLayerFeatures,
    as_backbone,
    extract_features,
    load_backbone,
    save_backbone,
    start_student,
)
from tiny_nbdev.classify.encoders import encoder_record, encoders, load_encoder
from tiny_nbdev.classify.students import Classifier, create_backbone, create_student, split_backbone, tta_views
from tiny_nbdev.core import file_sha256, rng_for, save_tensors, seed_for
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.errors import InputError

TIMM = "vit_base_patch16_224.dino"
TINY = dict(embed_dim=24, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "A teacher, a vision transformer in timm's own naming, and a student's weights, all random."
    folder = tmp_path_factory.mktemp("bundle")
    torch.manual_seed(0)
    save_backbone(
        create_backbone("resnet12", 16, widths=(4, 4, 8, 8)), folder / "t.safetensors", "resnet12", widths=(4, 4, 8, 8)
    )
    save_backbone(create_backbone("conv4", 16), folder / "c.safetensors", "conv4")
    save_tensors(
        timm.create_model(TIMM, num_classes=0, **TINY).state_dict(), folder / "v.safetensors", dict(format="pt")
    )
    return SimpleNamespace(
        folder=folder,
        image_size=16,
        encoders={
            "teacher": {"path": "t.safetensors", "kind": "backbone"},
            TIMM: {"path": "v.safetensors", "kind": "timm", "kwargs": TINY, "statistics": "imagenet"},
        },
        students={"conv4": {"path": "c.safetensors", "image_size": 16}},
        files={"c.safetensors": {"sha256": "known"}},
    )


def test_a_name_of_the_bundle_goes_first(bundle):
    x = torch.rand(2, 3, 20, 20, generator=rng_for("x"))
    file = bundle.folder / "t.safetensors"
    teacher = load_encoder("teacher", bundle)
    assert torch.equal(teacher(x), load_encoder(str(file))(x)) and teacher.name == "resnet12"
    assert encoder_record("teacher", bundle) == dict(file="t.safetensors", sha256=file_sha256(file))
    assert encoder_record(str(file)) == encoder_record("teacher", bundle)
    assert load_encoder("conv4", bundle).image_size == 16 and encoder_record("conv4", bundle)["sha256"] == "known"
    plain, other = load_encoder(TIMM, bundle), load_encoder(f"{TIMM}@cifar-fs", bundle)
    assert plain.num_features == 24 and plain.image_size == 224 and not torch.equal(plain.mean, other.mean)
    assert encoder_record(f"{TIMM}@cifar-fs", bundle)["statistics"] == "cifar-fs"
    with pytest.raises(InputError, match="mini-imagenet"):
        load_encoder(f"{TIMM}@coco", bundle)
    with pytest.raises(InputError, match="its own pixel statistics"):
        load_encoder("teacher@cifar-fs", bundle)


def test_then_the_registry_then_timm(bundle):
    net = load_encoder("timm", bundle, config=dict(name="resnet10t", image_size=24, pretrained=False))
    assert net.image_size == 24 and net.num_features == 512 and not net.training
    assert not any(p.requires_grad for p in net.parameters()) and encoder_record("timm", bundle)["sha256"] is None
    with pytest.raises(InputError, match="did you mean 'pretrained'"):
        load_encoder("timm", config=dict(pretraind=False))
    with pytest.raises(InputError, match="did you mean 'teacher'.*known: teacher, .*clip, timm, .*lite0.*, conv4"):
        load_encoder("teachr", bundle)
    with pytest.raises(InputError, match="none.safetensors does not exist"):
        load_encoder("none.safetensors", bundle)
    assert {*encoders} == {"clip", "clip_vit_large_14", "timm", *(f"efficientnet_lite{k}" for k in range(3))}


def test_a_student_starts_from_the_bundle(bundle):
    student, record = start_student("conv4", 3, 16, "bundle", bundle, seed=4)
    assert record == dict(file="c.safetensors", sha256="known") and all(p.requires_grad for p in student.parameters())
    with torch.random.fork_rng(devices=[]):  # the head comes after the network's own numbers
        torch.manual_seed(seed_for(4, "student", "conv4"))
        want = Classifier(load_backbone(bundle.folder / "c.safetensors"), 3)
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), want.state_dict().values()))
    before = torch.get_rng_state()
    fresh, record = start_student("conv4", 3, 32, "random", bundle, seed=4)
    assert torch.equal(before, torch.get_rng_state()) and record["file"] == "random" and fresh.backbone.image_size == 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(4, "student", "conv4"))
        want = create_student("conv4", 3, 32)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), want.state_dict().values()))
    as_teacher, record = start_student("resnet12", 3, None, "teacher", bundle)
    assert as_teacher.backbone.image_size == 16 and record["file"] == "t.safetensors"
    assert start_student("conv4", 3, 16, str(bundle.folder / "c.safetensors"))[1]["sha256"] != "known"


@pytest.mark.parametrize(
    "args, words",
    [
        (("conv4", 3, 32, "bundle"), "16 pixels and these have 32; give --image-size 16, or --init random"),
        (("resnet12", 3, 16, "bundle"), "no starting weights for resnet12"),
        (("conv4", 3, 16, "teacher"), "holds a resnet12, not a conv4"),
        (("conv4", 3, 16, "best"), "one of bundle, random, conv4, teacher"),
        (("conv5", 3, 16, "random"), "not a model timm knows"),
    ],
)
def test_a_student_never_starts_at_random_in_silence(bundle, args, words):
    with pytest.raises(InputError, match=words):
        start_student(*args, bundle)


def test_ensembles_and_earlier_layers():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32, generator=rng_for("ensemble"))
    one, two = as_backbone("conv4"), as_backbone(timm.create_model("resnet10t", num_classes=0))
    cosine = lambda f: F.normalize(f, dim=1) @ F.normalize(f, dim=1).T
    both = EnsembleBackbone([one, two])(x)
    torch.testing.assert_close(both @ both.T, (cosine(one(x)) + cosine(two(x))) / 2)
    flipped = EnsembleBackbone([one, two], tta_flip=True)
    torch.testing.assert_close(flipped(x), flipped(x.flip(3)))
    six = sum(F.normalize(one(v), dim=1) for v in tta_views(x, True, True))
    torch.testing.assert_close(EnsembleBackbone([one], True, True)(x), F.normalize(six, dim=1))
    b = as_backbone(create_backbone("resnet12", widths=(8, 8, 16, 24)))
    deep, early = MultiLayerFeatures(b, 0.3), split_backbone(b, 3)[0](x).flatten(1)
    torch.testing.assert_close(deep(x) @ deep(x).T, 0.3 * cosine(early) + 0.7 * cosine(b(x)))
    assert deep.num_features == 280 and deep(torch.rand(2, 3, 50, 40)).shape == (2, 280)
    for bad, words in (
        (lambda: EnsembleBackbone([]), "no backbones"),
        (lambda: MultiLayerFeatures(two), "cannot be cut into blocks"),
        (lambda: MultiLayerFeatures(torch.nn.Flatten()), "Flatten cannot be cut"),
        (lambda: MultiLayerFeatures(b, 1.5), "from 0 to 1"),
    ):
        with pytest.raises(InputError, match=words):
            bad()


def test_a_backbone_comes_back_or_says_why_not(tmp_path):
    torch.manual_seed(0)
    x, path, widths = torch.rand(2, 3, 32, 32), tmp_path / "b.safetensors", (8, 8, 16, 16)
    b = as_backbone(create_backbone("resnet12", widths=widths, mean=(0.1, 0.2, 0.3)))
    save_backbone(b, path, "resnet12", widths=widths)
    assert torch.equal(load_backbone(path)(x), b(x))
    full = path.stat().st_size
    save_backbone(b, path, "resnet12", half=True, widths=widths)
    assert path.stat().st_size < 0.75 * full
    torch.testing.assert_close(load_backbone(path)(x), b(x), atol=5e-3, rtol=1e-2)
    for name, kwargs, words in (
        ("resnet12", dict(widths=(8, 8, 16, 32)), "instead of"),
        ("conv4", {}, "missing: blocks.0.0.weight.*unexpected: stages.0"),
    ):
        save_backbone(b, path, name, **kwargs)
        with pytest.raises(InputError, match=words):
            load_backbone(path)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match="hash"):
        load_backbone(path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_kept_for_their_network_and_images(tmp_path, precision):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    images, net, other = (
        ImageSet(x, torch.zeros(9, dtype=torch.long), ("a",)),
        as_backbone("conv4"),
        as_backbone("conv4"),
    )
    kept = lambda net, images=images: extract_features(net, images, precision=precision, cache=tmp_path)
    f = kept(net)
    assert f.shape == (9, 256) and torch.equal(f, kept(net)) and not torch.equal(f, kept(other))
    parts = extract_features(net, images, batch_size=4, precision=precision)
    torch.testing.assert_close(parts, f, atol=0.1 if precision == "bf16" else 1e-5, rtol=0.05)
    assert kept(net, images.subset(range(4))).shape == (4, 256)
    assert not torch.equal(kept(EnsembleBackbone([net])), kept(EnsembleBackbone([net], tta_flip=True)))
    assert len(list(tmp_path.iterdir())) == 5
    for file in tmp_path.iterdir():
        file.write_bytes(b"half a file")
    assert torch.equal(f, kept(net))
    with pytest.raises(InputError, match="no images"):
        extract_features(net, images.subset([]))


def test_views_and_blocks():
    x = torch.rand(4, 3, 32, 32, generator=rng_for("views"))
    views = tta_views(x, True, True)
    assert len(tta_views(x)) == 1 and len(views) == 6 and torch.equal(views[1], x.flip(3))
    assert torch.equal(views[2][..., 1:, 1:], x[..., :-1, :-1]) and torch.equal(views[4][..., :-1, :-1], x[..., 1:, 1:])
    assert torch.equal(views[2][..., 0, 1:], x[..., 1, :-1])  # reflected at the border
    large = torch.arange(96 * 64.0).view(1, 1, 96, 64)
    assert tta_views(large, tta_shift=True)[2][0, 0, 0, 0] == 2 * 64 + 2  # two pixels of 64
    torch.manual_seed(0)
    s = create_student("conv4", 5).eval()
    s.tta_flip = s.tta_shift = True
    torch.testing.assert_close(s(x), sum(s.from_features(s.backbone(v)) for v in views) / 6)
    for name, kwargs in (("conv4", {}), ("resnet12", dict(widths=(4, 8, 8, 16)))):
        b = create_backbone(name, **kwargs).eval()
        for k in (1, 2, 3):
            first, last = split_backbone(b, k)
            torch.testing.assert_close(last(first(x)), b(x))
    with pytest.raises(InputError, match="choose 1 to 3"):
        split_backbone(b, 4)
    with pytest.raises(InputError, match="use conv4 or resnet12"):
        split_backbone(create_backbone("resnet18"), 1)
