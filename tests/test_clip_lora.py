"CLIP with LoRA: what is frozen stays, nothing changes before the first step, losses and lengths are LoFT's."

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiny_nbdev.classify.classifiers import (
    SCRATCH_EPOCHS,
    ScratchConfig,
    classifiers,
    start_weights,
    train_from_scratch,
)
from tiny_nbdev.classify.clip_lora import (
    FeatureSettings,
    FinetuneSettings,
    LoRALinear,
    add_lora,
    cutmix,
    epochs_for,
    finetune_features,
    learning_rate,
    mixup,
    pooled_images,
    real_synthetic_loss,
)
from tiny_nbdev.classify.probes import METHODS, Known
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.errors import InputError


def test_lora_starts_at_nothing_and_adds_scaled_products():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    lora = LoRALinear(layer, rank=2, alpha=4.0, dropout=0.0)
    assert torch.equal(lora(x), layer(x)) and not layer.weight.requires_grad
    nn.init.normal_(lora.B)
    torch.testing.assert_close(lora(x) - layer(x), 2.0 * x @ lora.A.T @ lora.B.T)
    assert lora.A.abs().max() <= 1 / math.sqrt(6) + 1e-6  # Kaiming-uniform with a = sqrt(5)


def test_only_queries_and_values_are_trained():
    block = nn.ModuleDict({k: nn.Linear(8, 8) for k in ("q_proj", "k_proj", "v_proj", "out_proj")})
    weights = add_lora(nn.ModuleList([block]), rank=2)
    assert sum(w.numel() for w in weights) == 2 * 2 * (8 + 8)
    assert [k for k, m in block.items() if isinstance(m, LoRALinear)] == ["q_proj", "v_proj"]
    with pytest.raises(InputError, match="has no linear layer"):
        add_lora(nn.ModuleList([nn.Linear(2, 2)]))


def test_rate_and_lengths():
    assert [epochs_for(n) for n in (1, 100_000, 1_000_000)] == [(90, 9), (80, 8), (50, 5)]
    assert epochs_for(250_000, SCRATCH_EPOCHS) == (200, 20)
    rates = [learning_rate(e / 10, 60, 6, 1e-4) for e in range(600)]
    assert rates[0] == 1e-8 and max(rates) == pytest.approx(1e-4) and rates.index(max(rates)) == 60
    assert all(a >= b for a, b in zip(rates[60:], rates[61:]))


def test_losses_of_both_kinds():
    torch.manual_seed(0)
    z, y = torch.randn(6, 3), F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 3).float()
    photo = torch.tensor([True, True, False, False, False, False])
    parts = [F.cross_entropy(z[k], y[k]) for k in (photo, ~photo)]
    torch.testing.assert_close(real_synthetic_loss(z, y, photo), 0.8 * parts[0] + 0.2 * parts[1])
    torch.testing.assert_close(real_synthetic_loss(z[:2], y[:2], photo[:2]), parts[0])


def test_mixing_keeps_shares():
    x, y = torch.rand(4, 3, 16, 16), torch.eye(4)
    for mixed, targets in (mixup(x, y, 0.3), cutmix(x, y, 0.4, (0.1, 0.9))):
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert mixed.shape == x.shape and 0 <= mixed.min() and mixed.max() <= 1
    cut, targets = cutmix(x, y, 0.4, (0.1, 0.9))
    taken = (cut != x).any(1).double().mean((1, 2))  # the share of pixels that came from the neighbour
    torch.testing.assert_close(taken, 1 - targets.diagonal().double(), atol=1e-6, rtol=0)


def images(n, seed):
    y = torch.arange(n) % 3
    noise = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    x = 127 + 25 * noise + 90 * torch.eye(3)[y][:, :, None, None]
    return ImageSet(x.clamp(0, 255).to(torch.uint8), y, ("red", "green", "blue"))


def test_photos_are_repeated():
    both, photo = pooled_images(images(33, 0), images(6, 1))
    assert (len(both), int(photo.sum())) == (33 + 30, 30) and bool(photo[:30].all())
    with pytest.raises(InputError, match="nothing to learn from"):
        pooled_images(None, None)


class Towers:
    "Directions that know the classes not at all."

    logit_scale = 20.0

    def names(self, classes, templates):
        return F.normalize(torch.randn(len(classes), 8, generator=torch.Generator().manual_seed(0)), dim=1)


def test_features_learn_and_begin_at_zero_shot():
    g = torch.Generator().manual_seed(1)
    y = torch.arange(60) % 3
    x = torch.randn(3, 20, generator=g)[y] + 0.3 * torch.randn(60, 20, generator=g)
    f = F.normalize(torch.randn(60, 8, generator=g), dim=1)
    some = lambda a, b: Known(f[a:b], y[a:b], x[a:b])
    long = FeatureSettings(lr=3e-2, epochs=100)  # one batch an epoch, and directions that say nothing
    head, rows = finetune_features(Towers(), ("a", "b", "c"), some(0, 15), some(15, 30), long)
    right = lambda h: float((h(f[30:], x[30:]).argmax(1) == y[30:]).double().mean())
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"] and right(head) > 0.8
    with torch.no_grad():
        for w in (head.image_B, head.text_B):
            w.zero_()
        torch.testing.assert_close(head(f, x), 20 * f @ Towers().names(range(3), None).T, atol=1e-5, rtol=1e-5)
    assert right(head) < 0.7, "without the thin matrices nothing is known"
    quick = [
        finetune_features(Towers(), ("a", "b", "c"), some(0, 15), None, FeatureSettings(seed=s))[0] for s in (1, 1, 2)
    ]
    assert torch.equal(quick[0].image_B, quick[1].image_B) and not torch.equal(quick[0].image_B, quick[2].image_B)


def test_network_from_nothing_learns_colours():
    config = ScratchConfig("resnet18", 32, lr=4.0, batch_size=16, epochs=6, mix=0.0, augment=False)
    net, losses = train_from_scratch(images(48, 0), config)
    asked = images(30, 9)
    with torch.no_grad():
        right = (net(asked.floats()).argmax(1) == asked.labels).double().mean()
    assert losses[-1] < losses[0] and right > 0.8


def test_start_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 7), nn.Flatten(), nn.Linear(400, 100))
    start_weights(net)
    limit = math.sqrt(6 / (3 * 49 + 64 * 49))
    assert limit * 0.99 < net[0].weight.abs().max() <= limit
    assert abs(net[2].weight.std() - 0.01) < 5e-4 and not net[2].bias.any()


def test_every_head_is_a_classifier():
    assert {"clip-lora", "scratch", *METHODS} <= set(classifiers)
    assert classifiers.config("clip-lora", dict(towers=dict(lr=1e-6))).towers == FinetuneSettings(lr=1e-6)
    with pytest.raises(InputError, match="is not a classifier"):
        classifiers["clip-lore"]
