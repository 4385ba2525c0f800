"Teachers: both heads against their definitions, the registry of heads, and a teacher's encoder from a bundle."

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from tiny_nbdev.classify.augment import Augment
from tiny_nbdev.classify.backbones import EnsembleBackbone, extract_features, save_backbone
from tiny_nbdev.classify.encoders import encoders
from tiny_nbdev.classify.students import create_backbone
from tiny_nbdev.classify.teachers import (
    CosineHead,
    FittedTeacher,
    LogisticHead,
    LogisticTeacher,
    PrototypeTeacher,
    Teacher,
    check_support,
    evaluate_teacher,
    fit_temperature,
    heads,
    leave_one_out_cosines,
    prototypes,
    teacher_encoder,
    teacher_logits,
)
from tiny_nbdev.core import rng_for
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.errors import InputError
from tiny_nbdev.registry import config_dict


def gaussians(n=(5, 5, 5), d=16, distance=8.0, seed=0):
    "Separated clouds of features, one per class."
    y = torch.arange(len(n)).repeat_interleave(torch.tensor(n))
    return torch.eye(len(n), d)[y] * distance + torch.randn(len(y), d, generator=rng_for("gaussians", seed)), y


def accuracy(logits, y):
    return float((logits.argmax(1) == y).float().mean())


def images(n=4, n_classes=3, size=16):
    x = torch.randint(0, 256, (n * n_classes, 3, size, size), dtype=torch.uint8, generator=rng_for("images"))
    return ImageSet(x, torch.arange(n_classes).repeat_interleave(n), tuple(f"class {c}" for c in range(n_classes)))


def test_heads_are_their_formulas():
    head = CosineHead(torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    x = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(head(x), torch.tensor([[10.0, 0.0], [50**0.5, 50**0.5], [-10.0, 0.0]]))
    assert {n for n, _ in head.named_parameters()} == {"scale", "bias"}
    shifted, plain = CosineHead(torch.eye(2), bias=0.3), CosineHead(torch.eye(2))
    torch.testing.assert_close(shifted(torch.eye(2)).softmax(1), plain(torch.eye(2)).softmax(1))
    centred = CosineHead(torch.eye(2), center=torch.ones(2))(torch.tensor([[3.0, 1.0]]))
    torch.testing.assert_close(centred, torch.tensor([[10.0, 0.0]]))
    logits = LogisticHead(torch.eye(2), torch.ones(2))(torch.tensor([[0.0, 7.0]]))
    torch.testing.assert_close(logits, torch.tensor([[1.0, 2.0]]))


def test_prototypes_leave_one_out_and_temperature():
    f, y = gaussians((5, 3, 8))
    q, yq = gaussians((100,) * 3, seed=1)
    head = PrototypeTeacher().fit_features(f, y, 3)
    assert accuracy(head(q), yq) == 1
    torch.testing.assert_close(PrototypeTeacher().fit_features(f * 100, y, 3)(q * 5), head(q))
    out = []
    for i in range(len(f)):
        keep = torch.arange(len(f)) != i
        out.append(CosineHead(prototypes(f[keep], y[keep], 3), 1.0)(f[i : i + 1])[0])
    torch.testing.assert_close(leave_one_out_cosines(f, y, 3), torch.stack(out).detach())
    logits = torch.randn(20000, 5, generator=rng_for("logits"))
    drawn = torch.distributions.Categorical(logits=logits).probs.multinomial(1, generator=rng_for("labels")).flatten()
    assert abs(fit_temperature(logits * 3, drawn) - 3) < 0.15
    assert PrototypeTeacher(scale="auto").fit_features(*gaussians((1, 1, 1)), 3).scale.item() == 10


def by_gradient(f, y, n, C=1.0):
    "The logistic objective, minimised by torch."
    f, b = F.normalize(f.double(), dim=1), torch.zeros(n, dtype=torch.double, requires_grad=True)
    W = torch.zeros(n, f.shape[1], dtype=torch.double, requires_grad=True)
    opt = torch.optim.LBFGS([W, b], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = C * F.cross_entropy(f @ W.T + b, y, reduction="sum") + W.square().sum() / 2
        loss.backward()
        return loss

    opt.step(closure)
    return W.detach().float()


@pytest.mark.parametrize("n", [2, 3])
def test_logistic_is_the_multinomial_solution(n):
    f, y = gaussians((6, 4, 5)[:n], distance=2.0)
    ours = LogisticTeacher(balanced=False).fit_features(f, y, n).linear.weight.detach()
    torch.testing.assert_close(ours, by_gradient(f, y, n), atol=2e-3, rtol=0)


def test_logistic_balances_classes():
    f, y = gaussians((5, 3, 8))
    q, yq = gaussians((300,) * 3, distance=2.5, seed=1)
    unit = lambda x: F.normalize(x, dim=1)
    theirs = LogisticRegression(max_iter=1000, class_weight="balanced").fit(unit(f), y).predict_proba(unit(q))
    ours = LogisticTeacher().fit_features(f, y, 3)(q).softmax(1).detach()
    torch.testing.assert_close(ours, torch.from_numpy(theirs).float(), atol=1e-5, rtol=1e-4)
    f, y = gaussians((5,) * 4)
    equal = [LogisticTeacher(balanced=b).fit_features(f, y, 4).linear.weight for b in (True, False)]
    assert torch.equal(*equal)
    f, y = gaussians((2, 2, 40), distance=2.5)
    fair, leaning = (accuracy(LogisticTeacher(balanced=b).fit_features(f, y, 3)(q), yq) for b in (True, False))
    assert fair > leaning + 0.1


@pytest.mark.parametrize("name", ["prototype", "logistic"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fit_in_both_formats(name, precision):
    torch.manual_seed(0)
    support, backbone = images(), create_backbone("conv4", 16)
    options = dict(augment=Augment(flip=False), center=torch.ones(64), precision=precision, seed=3)
    teacher = heads[name].build(heads.config(name, dict(center=True)), backbone=backbone, **options)
    fitted = teacher.fit(support)
    logits = teacher_logits(fitted, support, precision=precision)
    assert logits.shape == (12, 3) and logits.dtype == torch.float32 and not logits.requires_grad
    known = extract_features(backbone, support, precision=precision)
    torch.testing.assert_close(logits, teacher_logits(fitted, support, known))
    assert not fitted.train().training and torch.equal(*(teacher.support_features(support)[0] for _ in range(2)))
    again = heads[name].build(heads.config(name, dict(center=True)), backbone=backbone, **options).fit(support)
    assert torch.equal(again.from_features(known), fitted.from_features(known))


def test_logits_come_in_parts_and_labels_are_checked():
    head = PrototypeTeacher().fit_features(*gaussians(), 3)
    many, judge = torch.randn(5000, 16, generator=rng_for("many")), FittedTeacher(nn.Identity(), head)
    torch.testing.assert_close(teacher_logits(judge, range(5000), many), head(many).detach())
    with pytest.raises(ValueError, match="3 features for 12 images"):
        teacher_logits(judge, images(), many[:3])
    with pytest.raises(InputError, match="only one class"):
        check_support(torch.tensor([0, 0]), ("cat",))
    with pytest.raises(InputError, match="Class dog has no image"):
        check_support(torch.tensor([0, 2]), ("cat", "dog", "cow"))
    with pytest.raises(ValueError, match="no backbone"):
        PrototypeTeacher().fit(images())


def test_heads_are_plain_data():
    for name in heads:
        config = heads.config(name)
        assert heads.config(name, config_dict(config)) == config and heads.describe(name, config) != name
        assert isinstance(heads[name].build(config), Teacher)
    assert heads["logistic"].build(heads.config("logistic", dict(C=3.0, n_augment=0))).C == 3
    for data, words in ((dict(scale="much"), "'auto'"), (dict(scale=True), "scale"), (dict(scal=1), "'scale'")):
        with pytest.raises(InputError, match=words):
            heads.config("prototype", data)
    with pytest.raises(InputError, match="base images"):
        heads["prototype"].build(heads.config("prototype", dict(center=True)))
    with pytest.raises(InputError, match="did you mean 'prototype'"):
        heads["prototypes"]


def test_an_episode_of_one_split():
    f, y = gaussians((20,) * 3)
    episode = SimpleNamespace(support=[[0, 1], [20, 21], [40, 41]], query=[[2, 3], [22], [42, 43]])
    r = evaluate_teacher(PrototypeTeacher(), f, y, [episode, episode])
    assert r["accuracies"] == [1, 1] and r["n_query"] == [5, 5] and r["mean"] == 1
    mixed = SimpleNamespace(support=[[0, 21], [20, 1]], query=[[2], [22]])
    with pytest.raises(ValueError, match="mixes classes"):
        evaluate_teacher(PrototypeTeacher(), f, y, [mixed])


@pytest.fixture
def bundle(tmp_path):
    for i in (1, 2):
        torch.manual_seed(i)
        save_backbone(create_backbone("conv4", 16), tmp_path / f"{i}.safetensors", "conv4")
    return SimpleNamespace(
        folder=tmp_path,
        encoders={"one": {"path": "1.safetensors", "kind": "backbone"}, "two": {"path": "2.safetensors"}},
        students={},
        files={},
    )


def test_teacher_encoder(bundle):
    x = images().floats()
    one, two = teacher_encoder("one", bundle), teacher_encoder(["two"], bundle)
    assert one(x).shape == (12, 64) and not any(p.requires_grad for p in one.parameters()) and not one.training
    both = teacher_encoder(("one", "two"), bundle, tta_flip=True, tta_shift=True)
    assert torch.equal(both(x), EnsembleBackbone([one, two], True, True)(x))
    deep = teacher_encoder("one", bundle, early_weight=0.5)
    assert deep(x).shape == (12, 64 * 2 * 2 + 64)
    with pytest.raises(InputError, match="known: one, two, clip, timm"):
        teacher_encoder("none of these", bundle)
    with pytest.raises(InputError, match="no encoder"):
        teacher_encoder([], bundle)


def test_an_encoder_and_a_head_of_somebody_else(bundle):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        n_augment: int = 0

    class NearestMean(Teacher):
        def fit_features(self, features, labels, n_classes):
            head = nn.Linear(features.shape[1], n_classes)
            head.weight.data = prototypes(features, labels, n_classes)
            return head

    encoders.register("pixels", Config)(lambda config, device="cpu": nn.Flatten())
    heads.register("nearest", Config)(lambda config, backbone=None, **options: NearestMean(backbone))
    try:
        teacher = heads["nearest"].build(heads.config("nearest"), backbone=teacher_encoder("pixels", bundle))
        assert teacher.fit(images())(images().floats()).shape == (12, 3)
    finally:
        encoders.forget("pixels"), heads.forget("nearest")
