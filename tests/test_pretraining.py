"Pretraining: sixteen copies, the losses against slow versions, what is written and read back."

import copy
import math
import tempfile

import numpy as np
import torch
import torch.nn.functional as F

from tiny_nbdev.classify.augment import Augment, crop_at
from tiny_nbdev.classify.backbones import save_backbone
from tiny_nbdev.classify.pretraining import (
    IERNet,
    IEROutput,
    all_features,
    draw_negatives,
    episode_accuracies,
    generation_loss,
    ier_loss,
    load_generation,
    load_trained,
    one_of_16,
    save_heads,
    similarities,
    similarity_loss,
    sixteen,
    update_bank,
)
from tiny_nbdev.classify.students import Classifier, create_backbone
from tiny_nbdev.core import rng_for, save_tensors
from tiny_nbdev.data.loaders import load_digit_images
from tiny_nbdev.errors import InputError

augment = Augment()


def small_net():
    return IERNet(create_backbone("conv4", width=8), 5, 40)


def test_a_resumed_run_meets_the_same_images():
    x, g = torch.rand(64, 3, 32, 32, generator=rng_for("golden")), rng_for(0, "step", 0)
    a = augment(x, g, torch.arange(64) % 2 == 0)
    b, kind = one_of_16(a, g, 0.5)
    assert kind[:12].tolist() == [12, 4, 0, 0, 0, 0, 6, 14, 0, 15, 0, 2]
    torch.testing.assert_close(
        torch.stack([a.double().mean(), b.double().mean()]).float(),
        torch.tensor([0.4454766, 0.4571466]),
        atol=1e-6,
        rtol=0,
    )
    torch.testing.assert_close(b[5, 1, 7, 3:6], torch.tensor([0.6628065, 0.4381477, 0.5741387]), atol=1e-6, rtol=0)


def test_sixteen_copies():
    photos = load_digit_images(range(10)).subset(range(0, 1790, 179))
    some, ok = photos.floats(), torch.zeros(10, dtype=torch.bool)
    x16, kind = sixteen(some[1:2], ok[1:2], rng_for(7))
    assert kind.tolist() == list(range(16)) and {(k // 4, k % 4) for k in range(16)} == {
        (v, t) for v in range(4) for t in range(4)
    }
    plain = lambda x, **kw: sixteen(
        x, torch.zeros(len(x), dtype=torch.bool), rng_for(8), **dict(dict(pad=0, jitter=0.0), **kw)
    )[0].unflatten(0, (4, 4, len(x)))
    for side in (32, 84):
        x = torch.rand(5, 3, side, side, generator=rng_for(9))
        got = plain(x)
        torch.testing.assert_close(got[0, 0], x, atol=0 if side == 32 else 2e-5, rtol=0)
        for t in range(4):
            assert torch.equal(torch.rot90(got[:, t], -t, (3, 4)), got[:, 0])
        assert torch.equal(torch.rot90(got[2, 3], 1, (2, 3)), got[2, 0]), (
            "the fourth quarter turn is the first position again"
        )
        w = math.ceil(2 * side / 3)
        u = torch.rand(8, 4, 5, generator=rng_for(8))
        assert w == {32: 22, 84: 56}[side]
        for v, (h, b) in enumerate(((side, side), (w, side), (side, w), (w, w))):
            for i in range(5):
                top, left = (int(u[2, v, i] * (side - h)), int(u[3, v, i] * (side - b)))
                want = F.interpolate(
                    x[i : i + 1, :, top : top + h, left : left + b],
                    size=(side, side),
                    mode="bilinear",
                    align_corners=False,
                )[0]
                torch.testing.assert_close(got[v, 0, i], want, atol=2e-5, rtol=0)
    flips = sixteen(x, torch.ones(5, dtype=torch.bool), rng_for(8), pad=0, jitter=0.0)[0].unflatten(0, (4, 4, 5))
    same, mirrored = [
        (a - b).abs().flatten(2).amax(2) < 2e-5
        for a, b in ((flips[:, 0], plain(x)[:, 0]), (flips[:, 0], plain(x)[:, 0].flip(4)))
    ]
    assert torch.equal(mirrored, u[4] < 0.5) and torch.equal(same, u[4] >= 0.5), (
        "each view is mirrored or not by its own draw"
    )
    c = sixteen(x, ok[:5], rng_for(8), pad=8)[0]
    assert c.shape == (80, 3, 84, 84) and 0 <= c.min() and c.max() <= 1
    a = plain(x, pad=8)
    torch.testing.assert_close(a[0, 0], crop_at(x, *(u[:2, 0] * 17).long(), 8), atol=2e-5, rtol=0)


def test_a_trained_file_is_read_back():
    net = Classifier(create_backbone("resnet12", widths=(4, 4, 8, 8)), 3, normalize_features=False).eval()
    x = torch.rand(2, 3, 32, 32, generator=rng_for(4))
    with tempfile.TemporaryDirectory() as d:
        save_tensors(net.state_dict(), f"{d}/a.safetensors", dict(model="resnet12", kwargs=dict(widths=[4, 4, 8, 8])))
        save_backbone(net.backbone, f"{d}/b.safetensors", "resnet12", widths=[4, 4, 8, 8])
        save_tensors(dict(x=x), f"{d}/c.safetensors")
        for f in "ab":
            got, how = load_trained(f"{d}/{f}.safetensors")
            torch.testing.assert_close(got(x), net.backbone(x).detach(), atol=1e-6, rtol=1e-5)
            assert how == dict(model="resnet12", kwargs=dict(widths=(4, 4, 8, 8))) and not any(
                p.requires_grad for p in got.parameters()
            )
        try:
            load_trained(f"{d}/c.safetensors")
        except InputError as e:
            assert "holds no backbone" in str(e)
        else:
            raise AssertionError


def test_episodes_of_features():
    photos = load_digit_images(range(10)).subset(range(0, 1790, 179))
    net = Classifier(create_backbone("resnet12", widths=(4, 4, 8, 8)), 3, normalize_features=False).eval()
    y = torch.arange(6).repeat_interleave(30)
    separate = F.one_hot(y, 6) + 0.05 * torch.randn(180, 6, generator=rng_for(5))
    assert (
        episode_accuracies(separate, y, 3, "toy")
        == [1.0] * 3
        == episode_accuracies(separate, y, 3, "toy", logistic=True)
    )
    noise = torch.randn(180, 6, generator=rng_for(6))
    first = episode_accuracies(noise, y, 8, "toy")
    assert first[5:] == episode_accuracies(noise, y, 3, "toy", start=5) and abs(np.mean(first) - 0.2) < 0.08
    toy = photos.subset(range(4))
    assert all_features(net.backbone, toy, "cpu").shape == (4, 8)


def test_heads():
    from tiny_nbdev.classify import pretraining

    tiny = IERNet(create_backbone("conv4", width=8), 5, 40)
    out = tiny(torch.rand(6, 3, 32, 32, generator=rng_for(10)))
    assert [tuple(t.shape) for t in out] == [(6, 32), (6, 5), (6, 16), (6, 64)]
    torch.testing.assert_close(tiny.bank.norm(dim=1), torch.ones(40))
    assert "bank" in tiny.state_dict() and "bank" not in dict(tiny.named_parameters())
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(pretraining._mlp(640, 16)), count(pretraining._mlp(640, 64))) == (833_296, 864_064)


def test_the_loss_is_that_of_a_slow_version():
    g = rng_for(11)
    n, m = 3, 7
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    logits, turns, z, mem, neg = rand(16 * n, 5), rand(16 * n, 16), rand(16 * n, 8), rand(n, 8), rand(m, 8)
    labels = torch.tensor([0, 4, 2])
    unit = lambda v: v / math.sqrt(sum(float(a) ** 2 for a in v))

    def slow(temperature, gamma):
        ce = eq = inv = 0.0
        for k in range(16):
            for i in range(n):
                j = k * n + i
                ce -= math.log(math.exp(logits[j, labels[i]]) / sum(math.exp(a) for a in logits[j])) / (16 * n)
                eq -= math.log(math.exp(turns[j, k]) / sum(math.exp(a) for a in turns[j])) / (16 * n)
                anchor = unit(mem[i]) if k == 0 else unit(z[i])
                e = math.exp(float(anchor @ unit(z[j])) / temperature)
                inv -= math.log(e / (e + sum(math.exp(float(unit(b) @ unit(z[j])) / temperature) for b in neg))) / (
                    16 * n
                )
        return ce + gamma * (eq + inv), inv

    for temperature, gamma in ((1.0, 1.0), (0.1, 0.5)):
        got, parts = ier_loss(IEROutput(None, logits, turns, z), labels, mem, neg, temperature, gamma)
        want, inv = slow(temperature, gamma)
        assert (
            got.dtype == torch.float64
            and abs(got.item() - want) < 1e-10
            and abs(parts["invariance"].item() - inv) < 1e-10
        )

    bank = torch.arange(12.0).view(6, 2)
    update_bank(bank, torch.tensor([4, 1]), torch.tensor([[100.0, 0.0], [0.0, 100.0]]))
    torch.testing.assert_close(bank[[1, 4]], torch.tensor([[0.99 * 2, 0.99 * 3 + 1], [0.99 * 8 + 1, 0.99 * 9]]))
    assert torch.equal(bank[[0, 2, 3, 5]], torch.arange(12.0).view(6, 2)[[0, 2, 3, 5]])

    own = torch.tensor([3, 50, 99])
    d = draw_negatives(100, own, 60, rng_for(12))
    assert len(d.unique()) == 60 and not set(d.tolist()) & set(own.tolist())
    assert (
        len(draw_negatives(100, own, 6400, rng_for(12))) == 97
        and len(draw_negatives(100, own, 6400, rng_for(12), False)) == 100
    )


def test_the_second_generation():
    tiny = small_net()
    tiny.eval()
    x = torch.rand(6, 3, 32, 32, generator=rng_for(13))
    loss, parts = generation_loss(tiny(x), copy.deepcopy(tiny)(x))
    assert len(parts) == 4 and abs(loss.item()) < 1e-6, "nothing to learn from an identical network"
    other = IERNet(create_backbone("conv4", width=8), 5, 40).eval()
    loss, parts = generation_loss(tiny(x), other(x))
    assert all(v.item() > 0 for v in parts.values())
    wide = IERNet(create_backbone("conv4", width=12), 5, 40).eval()
    loss, parts = generation_loss(tiny(x), wide(x))
    assert "mse_feature" not in parts and parts["similarity"] > 0 and torch.isclose(loss, sum(parts.values()))
    f, turn = torch.randn(6, 4, generator=rng_for(14)), torch.linalg.qr(torch.randn(4, 4, generator=rng_for(15)))[0]
    assert (
        similarity_loss(f, [similarities(f)]) < 1e-6 and similarity_loss(5 * f @ turn + 1, [similarities(f)]) < 1e-5
    ), "neither size nor place nor direction counts"
    torch.testing.assert_close(similarities(f).exp().sum(1), torch.ones(6))
    assert (
        similarities(f).exp().diagonal().max() == 0
        and similarity_loss(f, [similarities(f), similarities(f.flip(0))]) > 0
    )
    with tempfile.TemporaryDirectory() as d:
        save_tensors(
            tiny.classifier.state_dict(),
            f"{d}/a.safetensors",
            dict(model="conv4", kwargs=dict(width=8), classes=list("abcde")),
        )
        try:
            load_generation(f"{d}/a.safetensors")
        except InputError as e:
            assert "a.heads.safetensors does not exist" in str(e)
        else:
            raise AssertionError
        save_heads(tiny, f"{d}/a.safetensors")
        again = load_generation(f"{d}/a.safetensors")
        assert (
            not hasattr(again, "bank") and not again.training and not any(p.requires_grad for p in again.parameters())
        )
        for a, b in zip(again(x), tiny(x)):
            torch.testing.assert_close(a, b.detach(), atol=1e-6, rtol=1e-5)
