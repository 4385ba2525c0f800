"Fidelity: distances against known values and other libraries, classes, recognition, variety, copies."

import importlib.util
import os
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.linalg import sqrtm

from tiny_nbdev.classify.students import Classifier, create_backbone
from tiny_nbdev.core import file_sha256, rng_for, save_tensors
from tiny_nbdev.data.episodes import sample_episode
from tiny_nbdev.data.images import ImageSet, to_uint8
from tiny_nbdev.data.loaders import load_digit_images
from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate.fidelity import (
    INCEPTION_FILE,
    InceptionBackbone,
    backbone_fid,
    backbone_kid,
    diversity,
    draw_real,
    early_features,
    fid_with_floor,
    frechet_distance,
    inception_fid,
    inception_weights,
    kernel_distance,
    load_eval_classifier,
    memorization,
    per_class_fid,
    recognizability,
)

digits, many = load_digit_images(range(5)), load_digit_images()
noisy = to_uint8(
    (digits.floats() + 0.15 * torch.randn(digits.images.shape, generator=rng_for("noisy digits"))).clamp(0, 1)
)


def refuses(f, *parts):
    "Check that `f` raises an `InputError` with all `parts` in its message."
    try:
        f()
    except InputError as e:
        assert all(p in str(e) for p in parts), e
    else:
        raise AssertionError("nothing was raised")


class Patches(nn.Module):  # 12 features: mean grey of nine tiles, mean edge of three columns
    num_features = 12

    def forward(self, x):
        return torch.cat(
            [
                F.adaptive_avg_pool2d(x[:, :1], 3).flatten(1),
                F.adaptive_avg_pool2d((x[:, :1, :, 1:] - x[:, :1, :, :-1]).abs(), (1, 3)).flatten(1),
            ],
            1,
        )


class Nearest(nn.Module):  # to the mean digit
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.stack([digits.of_class(c).floats().mean(0).flatten() for c in range(5)]))

    def forward(self, x):
        return -torch.cdist(x.flatten(1), self.mean)


class Always(nn.Module):  # takes everything for class 1
    def forward(self, x):
        return F.one_hot(torch.ones(len(x), dtype=torch.long), 5).float()


def stand_in(e, noise=0.0):  # real images that are in neither part, as if they were generated
    used = {*torch.cat([p for c in range(5) for p in draw_real(many, e, c, 55)]).tolist()}
    at, labels = zip(*[(i, c) for c, q in enumerate(e.query) for i in q if i not in used])
    x = many.floats()[list(at)]
    return ImageSet(
        (x + noise * torch.randn(x.shape, generator=rng_for(e.index))).clamp(0, 1), torch.tensor(labels), e.classes
    )


def test_frechet_distance():
    g = rng_for("gaussians")
    x = torch.randn(500, 8, generator=g, dtype=torch.float64)
    white = (x - x.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(torch.cov(x.T))
    ).T  # mean 0 and covariance I exactly
    mu = torch.linspace(-1, 2, 8, dtype=torch.float64)
    assert abs(frechet_distance(white, white + mu) - (mu**2).sum().item()) < 1e-9, "N(0, I) against N(mu, I): |mu|^2"
    s = torch.linspace(0.5, 3, 8, dtype=torch.float64)
    assert abs(frechet_distance(white, white * s) - ((s - 1) ** 2).sum().item()) < 1e-9, (
        "N(0, I) against N(0, S^2): sum of (s-1)^2"
    )
    assert frechet_distance(x, x) < 1e-9 and frechet_distance(x, x.flip(0)) < 1e-9
    y = (
        torch.randn(300, 8, generator=g, dtype=torch.float64) @ torch.randn(8, 8, generator=g, dtype=torch.float64)
        + 0.3
    )
    c1, c2 = torch.cov(x.T), torch.cov(y.T)
    want = (
        ((x.mean(0) - y.mean(0)) ** 2).sum()
        + (c1 + c2).trace()
        - 2 * torch.from_numpy(sqrtm((c1 @ c2).numpy())).real.trace()
    )
    assert (
        abs(frechet_distance(x, y) - want.item()) < 1e-6 * want
        and abs(frechet_distance(x, y) - frechet_distance(y, x)) < 1e-9 * want
    )
    few = torch.randn(5, 8, generator=g, dtype=torch.float64)
    assert (
        frechet_distance(few, few, least=2) < 1e-9
        and abs(frechet_distance(few, few + mu, least=2) - (mu**2).sum().item()) < 1e-9
    ), "also without full rank"
    refuses(lambda: frechet_distance(x[:8], y), "8 dimensions", "at least 9")
    refuses(lambda: frechet_distance(x[:1], y, least=1), "at least 2")


def test_kernel_distance():
    g = rng_for("gaussians")
    x, y = torch.randn(400, 8, generator=g), torch.randn(300, 8, generator=g) + 0.4
    mean, sd = kernel_distance(x, y, 20, 100)
    assert (
        mean > 3 * sd > 0
        and abs(kernel_distance(y, x, 20, 100)[0] - mean) < sd
        and (mean, sd) == kernel_distance(x, y, 20, 100)
    )
    assert abs(kernel_distance(x[:200], x[200:], 50, 100)[0]) < 0.1 * mean, (
        "two samples of one distribution: about zero at any n"
    )
    u, v = x[:5].double(), y[:5].double()
    sums = [
        sum(((p @ q).item() / 8 + 1) ** 3 for i, p in enumerate(s) for j, q in enumerate(t) if s is not t or i != j)
        for s, t in ((u, u), (v, v), (u, v))
    ]
    assert abs(kernel_distance(u, v, 1, 5)[0] - ((sums[0] + sums[1]) / 20 - 2 * sums[2] / 25)) < 1e-9, (
        "the sums, term by term"
    )
    refuses(lambda: kernel_distance(x, y), "subsets of 1000", "from 2 to 300")


def test_on_a_backbone_and_on_inception():
    ours = backbone_fid(digits, noisy, Patches(), "toy")
    assert (
        ours["name"] == "FID (toy features)"
        and ours["n_real"] == len(digits)
        and ours["value"]
        > 10 * backbone_fid(digits.subset(range(0, 901, 2)), digits.subset(range(1, 901, 2)), Patches(), "toy")["value"]
    )
    assert backbone_fid(digits, digits.images, Patches(), "toy")["value"] < 1e-9
    refuses(lambda: backbone_fid(digits, noisy[:12], Patches(), "toy"), "at least 13")
    kid = backbone_kid(digits, noisy, Patches(), "toy", 20, 200)
    assert (
        kid["name"] == "KID (toy features)"
        and kid["value"] > 3 * kid["sd"] > 0
        and abs(
            backbone_kid(digits.subset(range(0, 901, 2)), digits.subset(range(1, 901, 2)), Patches(), "toy", 20, 200)[
                "value"
            ]
        )
        < 0.1 * kid["value"]
    )
    with tempfile.TemporaryDirectory() as d, mock.patch.dict(os.environ, dict(TINY_NBDEV_INCEPTION=f"{d}/w.pth")):
        refuses(lambda: inception_fid(digits, noisy), f"{d}/w.pth", INCEPTION_FILE, "TINY_NBDEV_INCEPTION")
        Path(f"{d}/w.pth").write_bytes(b"something else")
        refuses(inception_weights, "SHA-256")
        if importlib.util.find_spec("torchmetrics") and importlib.util.find_spec("torch_fidelity"):
            import torch_fidelity.feature_extractor_inceptionv3 as fe
            from torchmetrics.image.fid import FrechetInceptionDistance
            from torchmetrics.image.kid import KernelInceptionDistance

            with (
                mock.patch.object(fe, "load_state_dict_from_url"),
                mock.patch.object(fe.FeatureExtractorInceptionV3, "load_state_dict"),
            ):
                net = fe.FeatureExtractorInceptionV3("random", ["64"])
            torch.save(net.state_dict(), f"{d}/w.pth")
            h = file_sha256(f"{d}/w.pth")
            few = digits.images[:6], noisy[:6]
            got = inception_fid(*few, 64, least=2, sha256=h[:8], batch=4)
            incept = InceptionBackbone(64, sha256=h[:8])
            got_kid = backbone_kid(*few, incept, "Inception, 64", 1, 6)
            warnings.filterwarnings("ignore", "Metric `Kernel Inception")
            metrics = (
                FrechetInceptionDistance(64, feature_extractor_weights_path=f"{d}/w.pth"),
                KernelInceptionDistance(incept.net, subsets=1, subset_size=6),
            )
            for m in metrics:
                m.update(few[0], real=True)
                m.update(few[1], real=False)
            fid, (kid, _) = (m.compute() for m in metrics)
            assert (
                got["name"] == "FID (Inception, 64 features)"
                and got["n_generated"] == 6
                and abs(fid - got["value"]) < 1e-3 * got["value"]
            ), (fid, got)
            assert got_kid["name"] == "KID (Inception, 64 features)" and abs(
                kid - got_kid["value"]
            ) < 1e-5 + 1e-3 * abs(got_kid["value"]), (kid, got_kid)
            refuses(lambda: inception_fid(*few, 64, sha256=h[:8]), "6 and 6", "at least 65")
        else:
            pass


def test_the_floor():
    row = fid_with_floor(digits, noisy[::3], lambda a, b: backbone_fid(a, b, Patches(), "toy"))
    assert row["n"] == 301 and row["n_reference"] == 600 and row["value"] > 5 * row["floor"] > 0
    same = fid_with_floor(digits, digits.images[::3], lambda a, b: backbone_fid(a, b, Patches(), "toy"))
    assert same["value"] < 3 * same["floor"]
    refuses(lambda: fid_with_floor(digits, noisy, None), "901", "at most 450")


def test_class_by_class():
    episodes = [sample_episode(many, "digits", i, n_way=5) for i in range(2)]
    at, rest = draw_real(many, episodes[0], 1, 80)
    assert (
        len({*at.tolist()}) == 80
        and not {*at.tolist()} & {*rest.tolist()}
        and not {*at.tolist(), *rest.tolist()} & {*episodes[0].support[1]}
        and {*many.labels[torch.cat([at, rest])].tolist()} == {many.classes.index(episodes[0].classes[1])}
    )
    torch.manual_seed(0)
    early_weight, early_name = early_features(create_backbone("resnet12", widths=(16, 16, 16, 16)).eval())
    assert (
        early_name == "ResNet12 block 1, 16"
        and early_weight(many.batch([0, 1])).shape == (2, 16)
        and early_features(create_backbone("conv4"), 4)[0].num_features
        == early_features(create_backbone("resnet12"))[0].num_features
        == 64
    )

    same, worse = (
        per_class_fid(many, episodes, lambda e: stand_in(e, s), early_weight, early_name, n=55) for s in (0.0, 0.2)
    )
    assert (
        len(same["rows"]) == 10
        and abs(same["value"] - sum(r["value"] for r in same["rows"]) / 10) < 1e-12
        and same["n"] == same["n_floor"] == 55
    )
    assert (
        per_class_fid(many, episodes[:1], stand_in, early_weight, early_name, n=50)["n_floor"] == 50
        and min(len(draw_real(many, episodes[0], c, 100)[1]) for c in range(5)) < 100
    ), "the floor takes what is left"
    assert (
        0.5 < same["value"] / same["floor"] < 2
        and worse["value"] > 10 * worse["floor"]
        and worse["floor"] == same["floor"]
    )
    itself = lambda e: ImageSet.concat(
        [ImageSet(many.images[draw_real(many, e, c, 55)[0]], torch.full((55,), c), e.classes) for c in range(5)]
    )
    assert per_class_fid(many, episodes[:1], itself, early_weight, early_name, n=55)["value"] < 1e-6, "FID(X, X) = 0"
    refuses(lambda: per_class_fid(many, episodes, lambda e: stand_in(e), early_weight, early_name), "300 are wanted")
    refuses(lambda: draw_real(many, episodes[0], 0, 300), "beside its support", "lower n")
    refuses(lambda: per_class_fid(many, episodes[:1], [digits], early_weight, early_name), "expected")
    refuses(lambda: early_features(create_backbone("resnet18")), "ResNet has no block")


def test_recognition():
    seen = recognizability(digits, digits.labels, Nearest())
    assert (
        seen["top1"] > 0.9
        and abs(seen["f1"] - seen["top1"]) < 0.02
        and seen["chance"] == 0.2
        and seen["n"] == 901
        and len(seen["per_class"]) == 5
    )
    assert abs(sum(p * n for p, n in zip(seen["per_class"], digits.counts())) / 901 - seen["top1"]) < 1e-6
    assert (
        recognizability(digits, (digits.labels + 1) % 5, Nearest())["top1"] < 0.1
        and recognizability(digits.images[:9], digits.labels[:9], Nearest(), 4)["per_class"][1:] == [None] * 4
    )

    part = digits.subset((digits.labels < 2).nonzero().flatten())
    n0, n1 = part.counts()[:2]
    one = recognizability(part, part.labels, Always())
    assert abs(one["top1"] - n1 / (n0 + n1)) < 1e-6 and abs(one["f1"] - 0.5 * 2 * n1 / (n0 + 2 * n1)) < 1e-6, (
        "F1 of class 0 is 0, of class 1 2 n1/(n0+2 n1)"
    )
    refuses(lambda: recognizability(digits.images[:0], digits.labels[:0], Nearest()), "no images")
    net = Classifier(create_backbone("conv4"), 5, normalize_features=False).eval()
    with tempfile.TemporaryDirectory() as d:
        save_tensors(
            {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()},
            f"{d}/j.safetensors",
            dict(model="conv4", kwargs={}, classes=list(digits.classes)),
        )
        eval_classifier, classes = load_eval_classifier(f"{d}/j.safetensors")
        assert (
            classes == digits.classes
            and not eval_classifier.training
            and (eval_classifier(digits.batch([0])) - net(digits.batch([0]))).abs().max() < 0.01
        )
        save_tensors(
            net.backbone.net.state_dict(), f"{d}/b.safetensors", dict(kind="backbone", name="conv4", kwargs={})
        )
        refuses(lambda: load_eval_classifier(f"{d}/b.safetensors"), "b.safetensors", "no classifier")
        eval_classifier, classes = load_eval_classifier(
            f"{d}/b.safetensors", fit_to=digits
        )  # a head for a bare backbone; even on random features it learns what it was fitted to
        assert classes == digits.classes and recognizability(digits, digits.labels, eval_classifier)["top1"] > 0.8
        assert torch.equal(
            load_eval_classifier(f"{d}/j.safetensors", fit_to=digits)[0].head.weight, net.head.weight.half().float()
        )  # a head of its own stays


def test_variety():
    x, y = digits.images[::4], digits.labels[::4]
    d = diversity(x, y, Patches(), digits)
    u = F.normalize(Patches()(x[y == 2].float() / 255).double(), dim=1)
    pairs = [1 - (u[i] @ u[j]).item() for i in range(len(u)) for j in range(i)]
    assert abs(d["per_class"][2] - sum(pairs) / len(pairs)) < 1e-6, "the sum over all pairs"
    assert 0.8 < d["share"] < 1.25, "a fifth of the real images is about as varied as all of them"
    copies = digits.subset([i for c in range(5) for i in [(digits.labels == c).nonzero()[0].item()] * 4])
    assert abs(diversity(copies, copies.labels, Patches(), digits)["share"]) < 1e-6
    refuses(lambda: diversity(x[:1], y[:1], Patches()), "no class has two")
    refuses(lambda: diversity(x, y, Patches(), digits.subset(range(9))), "class 1")


def test_copies():
    half, other = digits.subset(range(0, 901, 2)), digits.subset(range(1, 901, 2))
    honest, thief = (
        memorization(other, half, Patches(), quantile=0.05),
        memorization(half.images[:50], half, Patches(), quantile=0.05),
    )
    assert thief["copies"] == 1 and thief["nearest"].tolist() == list(range(50)) and thief["median"] < 1e-6
    assert honest["copies"] < 0.15 and 0.5 < honest["median"] / honest["real_median"] < 2
    brute = 1 - F.normalize(Patches()(other.floats()[:3]), dim=1) @ F.normalize(Patches()(half.floats()), dim=1).T
    assert torch.allclose(honest["distance"][:3], brute.min(1).values, atol=1e-5)
