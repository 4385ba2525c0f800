"A training run that is killed and started again is the unbroken one, to the last bit."

import pytest
import torch
import torch.nn as nn

from tiny_nbdev.core import load_tensors, save_tensors
from tiny_nbdev.data.training import TrainConfig, Trainer, batch_indices, make_optimizer, orthogonalize, rate_at
from tiny_nbdev.errors import InputError

x = torch.linspace(-1, 1, 64)[:, None]
config = TrainConfig(n_steps=120, batch_size=16, lr=0.02, bf16=False, save_every=0.0)


def sine_loss(model, step, rng, kill_at=None):
    if step == kill_at:
        raise KeyboardInterrupt
    i = batch_indices(64, 16, step)
    return ((model(x[i]) - torch.sin(3 * x[i]) + 0.01 * torch.randn(16, 1, generator=rng)) ** 2).mean()


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))


def conv_model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 2)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


images = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def conv_loss(model, step, rng, kill_at=None):
    if step == kill_at:
        raise KeyboardInterrupt
    i = batch_indices(32, 8, step)
    return nn.functional.cross_entropy(model(images[i].contiguous(memory_format=torch.channels_last)), i % 2)


muon = TrainConfig(n_steps=12, optimizer="muon", lr=0.05, bf16=False, save_every=0.0)


@pytest.mark.parametrize("model, loss, c", [(new_model, sine_loss, config), (conv_model, conv_loss, muon)])
def test_resumed_is_unbroken(model, loss, c, tmp_path):
    whole = Trainer(model(), c, tmp_path / "a.safetensors").fit(loss, eval_every=3)
    with pytest.raises(KeyboardInterrupt):
        Trainer(model(), c, tmp_path / "b.safetensors").fit(lambda m, s, r: loss(m, s, r, kill_at=6), eval_every=3)
    broken = Trainer(model(), c, tmp_path / "b.safetensors")
    assert broken.step == 6
    broken.fit(loss, eval_every=3)
    for a, b in ((whole.model, broken.model), (whole.ema, broken.ema)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert [h["loss"] for h in whole.history] == [h["loss"] for h in broken.history]
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]


def test_checkpoints(tmp_path):
    file = tmp_path / "a.safetensors"
    Trainer(new_model(), config, file).fit(sine_loss)
    with pytest.raises(InputError, match="lr was 0.02 and is now 0.5"):
        Trainer(new_model(), TrainConfig(n_steps=120, batch_size=16, lr=0.5, bf16=False, save_every=0.0), file)
    t, meta = load_tensors(file)
    del meta["config"]["schedule"]
    save_tensors(t, tmp_path / "less.safetensors", meta)
    assert Trainer(new_model(), config, tmp_path / "less.safetensors").step == 120, "a missing setting is the default"


def test_a_loss_that_is_not_finite(tmp_path):
    bursts = lambda m, step, rng: sine_loss(m, step, rng) * (float("inf") if step == 7 else 1.0)
    file = tmp_path / "f.safetensors"
    with pytest.raises(InputError, match="The loss is inf at step 8 or shortly before"):
        Trainer(new_model(), TrainConfig(n_steps=20, batch_size=16, lr=0.02, bf16=False), file).fit(bursts)
    assert not file.exists()


def test_stopping_early(tmp_path):
    fit = lambda: Trainer(new_model(), config, tmp_path / "e.safetensors").fit(
        sine_loss, eval_every=10, stop=lambda history: len(history) == 4
    )
    assert fit().step == fit().step == 40, "nothing is added when it is started again"


def test_bfloat16(tmp_path):
    c = TrainConfig(n_steps=20, batch_size=16, lr=0.02, bf16=True)
    t = Trainer(new_model(), c, tmp_path / "h.safetensors").fit(sine_loss, eval_every=10)
    assert t.history[-1]["loss"] < t.history[0]["loss"] and next(t.model.parameters()).dtype == torch.float32


def test_rates_and_optimisers():
    assert rate_at(TrainConfig(100, lr=2.0, schedule="step"), 99) == 0.2 and rate_at(TrainConfig(100, lr=2.0), 9) == 2.0
    with pytest.raises(ValueError, match="'linear'"):
        rate_at(TrainConfig(schedule="linear"), 0)
    with pytest.raises(ValueError, match="'adam'"):
        make_optimizer(new_model(), TrainConfig(optimizer="adam"))


@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (32, 27)])
def test_orthogonalize(shape):
    g = torch.Generator().manual_seed(0)
    before = torch.randn(shape, generator=g) @ torch.diag(torch.logspace(0, -2, shape[1]))
    after = orthogonalize(before)
    values = torch.linalg.svdvals(after)
    u, _, vt = torch.linalg.svd(before, full_matrices=False)
    assert after.shape == before.shape and values.max() < 1.3 and (values > 0.6).float().mean() > 0.8
    assert torch.nn.functional.cosine_similarity(after.flatten(), (u @ vt).flatten(), dim=0) > 0.9
    assert torch.isfinite(orthogonalize(torch.zeros(3, 5))).all(), "a gradient of zero moves nothing"


def test_a_kernel_keeps_its_length():
    net, steps = conv_model(), TrainConfig(1, optimizer="muon", lr=0.05)
    optimizer = make_optimizer(net, steps)
    conv_loss(net, 0, None).backward()
    optimizer.step()
    assert 0.9 < net[0].weight.norm() / 8**0.5 < 1.1, "up to one step"
