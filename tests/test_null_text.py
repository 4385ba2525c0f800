"Null-text inversion: schedule, loss, batches, identities, a restart."

import pytest
import torch
from fastcore.test import expect_fail
from fastcore.test import test_eq as eq

from tiny_nbdev.diffusion.ddim import ddim_timesteps, move_factors
from tiny_nbdev.diffusion.model import LatentDiffusion
from tiny_nbdev.diffusion.null_text import (
    NullTextConfig,
    null_text_inversion,
    null_text_loss,
    null_text_reconstruction,
    optimise_null,
    plain_reconstruction,
    schedule_at,
)
from tiny_nbdev.diffusion.schedule import noise_schedule, sd_scheduler
from tiny_nbdev.diffusion.tiny import make_tiny_pipeline
from tiny_nbdev.diffusion.unet import Stem
from tiny_nbdev.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny").parent


@pytest.fixture(scope="module")
def model(folder):
    "A small random model: identities must hold for any weights."
    return LatentDiffusion.load(folder / "tiny")


def test_schedule():
    for i, lr, threshold in [(0, 0.01, 1e-5), (10, 0.009, 2.1e-4), (25, 0.0075, 5.1e-4), (49, 0.0051, 9.9e-4)]:
        torch.testing.assert_close(torch.tensor(schedule_at(NullTextConfig(), i)), torch.tensor([lr, threshold]))
        eq(schedule_at(NullTextConfig(schedule="constant"), i), (1e-2, 1e-5))
        eq(schedule_at(NullTextConfig(n_steps=60), 0), (1e-2, 1e-5))
    assert schedule_at(NullTextConfig(n_steps=1000), 999)[0] > 0
    with expect_fail(InputError, contains="schedule is 'fast'"):
        NullTextConfig(schedule="fast")
    with expect_fail(InputError, contains="spacing is 'even'"):
        NullTextConfig(spacing="even")


def test_loss_and_its_tuning(model):
    ts = ddim_timesteps(50)
    path = [*ts, 0]
    weight = {a: move_factors(a, b, model.alphas_cumprod)[1] ** 2 * 6.5**2 for a, b in zip(path, path[1:])}
    for a, known in {999: 0.679, 799: 0.358, 499: 0.139, 199: 0.073, 19: 0.468}.items():
        assert abs(weight[a] - known) < 6e-4, (a, weight[a])
    g = torch.Generator().manual_seed(0)
    z, target = torch.randn(2, 3, 4, 8, 8, generator=g)
    cond = model.encode_text(model.tokenize(["a red cat", "the dog", "a photo of an object"]))
    null = model.null_embedding().expand(3, -1, -1)
    with torch.no_grad():
        cond_pred, null_pred = model.noise_pred(z, 999, cond), model.noise_pred(z, 999, null)
        k_z, k_eps = move_factors(999, 979, model.alphas_cumprod)
        wanted = ((target - k_z * z) / k_eps - 7.5 * cond_pred) / (1 - 7.5)
        torch.testing.assert_close(
            null_text_loss(model, z, 999, 979, cond_pred, null, target, 7.5),
            weight[999] * (null_pred - wanted).square().flatten(1).mean(1).float(),
            rtol=1e-4,
            atol=1e-6,
        )
    config = NullTextConfig(schedule="constant", threshold=0.0, inner_steps=5)
    tuned, used, loss = optimise_null(model, z, 999, 979, cond_pred, null, target, 0, config)
    eq((used.tolist(), tuned.shape), ([5, 5, 5], null.shape))
    with torch.no_grad():
        before, after = (null_text_loss(model, z, 999, 979, cond_pred, u, target, 7.5) for u in (null, tuned))
    assert (after < loss).all() and (loss < before).all()
    same, used, _ = optimise_null(model, z, 999, 979, cond_pred, null, target, 0, NullTextConfig(guidance_scale=1.0))
    eq(same, null)  # guidance 1: the null prompt has no say, so no gradient
    same, used, loss = optimise_null(model, z, 999, 979, cond_pred, null, target, 0, NullTextConfig(inner_steps=0))
    eq((torch.equal(same, null), used.tolist(), loss.isnan().all().item()), (True, [0, 0, 0], True))


class Toy:
    "The Gaussian oracle plus one cross-attention to the prompt."

    device, dtype, n_train_timesteps, alphas_cumprod, guided = (
        torch.device("cpu"),
        torch.float32,
        1000,
        noise_schedule(sd_scheduler().config),
        LatentDiffusion.guided,
    )

    def __init__(self, g, L=4, d=8):
        self.q, self.k, self.v = (torch.randn(*s, generator=g) / s[0] ** 0.5 for s in [(4, d), (d, d), (d, 4)])
        self.null = torch.randn(1, L, d, generator=g)

    def null_embedding(self):
        return self.null

    def fingerprint(self):
        return "toy"

    def stem(self, z, t):
        return Stem(z, torch.tensor([t]))

    def noise_pred(self, z, t, emb):
        return self.noise_from(self.stem(z, t), emb)

    def noise_from(self, stem, emb):
        z = stem.z
        weights = (z.flatten(2).transpose(1, 2) @ self.q @ (emb @ self.k).transpose(1, 2) / 8**0.5).softmax(
            -1
        )  # [n, h*w, L]
        a = self.alphas_cumprod[stem.t[0]].item()
        return (1 - a) ** 0.5 * z / (0.5 * a + 1 - a) + 0.5 * (weights @ (emb @ self.v)).transpose(1, 2).reshape(
            z.shape
        )


def batched_against_single(model, z_0, cond, config):
    "Largest difference of the null embeddings, and the updates made in the batch."
    z_T, us, info = null_text_inversion(model, z_0, cond, config, progress=False)
    eq((us.shape[:2], info["inner_steps"].shape), ((config.n_steps, len(z_0)), (config.n_steps, len(z_0))))
    gap = (
        (
            null_text_inversion(model, z_0, cond, NullTextConfig(**vars(config) | dict(max_batch=3)), progress=False)[1]
            - us
        )
        .abs()
        .max()
        .item()
    )
    for k in range(len(z_0)):
        z1, u1, info1 = null_text_inversion(model, z_0[k : k + 1], cond[k : k + 1], config, progress=False)
        eq(info1["inner_steps"][:, 0], info["inner_steps"][:, k])
        gap = max(gap, (u1[:, 0] - us[:, k]).abs().max().item(), (z1[0] - z_T[k]).abs().max().item())
    assert any(
        len(set(row.tolist())) >= 3 for row in info["inner_steps"]
    )  # images really stopped at different updates of the same time
    return gap


def latents():
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(12)) * 0.7


def test_batch_equals_one_by_one(folder):
    # prompts at different distances from the empty one
    spread = torch.tensor([0.02, 0.04, 0.06, 0.1])[:, None, None]
    toy = Toy(torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(12)
    z_0 = torch.randn(4, 4, 8, 8, generator=g) * 0.7
    cond = toy.null + torch.randn(4, 4, 8, generator=g) * spread
    config = NullTextConfig(n_steps=6, schedule="constant", threshold=0.01)
    assert batched_against_single(toy, z_0, cond, config) <= 1e-5
    # with a real network in double precision: Adam's first update is almost the sign of the gradient, and where a
    # gradient is zero up to rounding, single precision gives it a random sign
    double = LatentDiffusion.load(folder / "tiny", dtype=torch.float64)
    cond = double.null_embedding() + torch.randn(4, 16, 32, generator=g).double() * spread
    config = NullTextConfig(n_steps=10, inner_steps=6, schedule="constant", threshold=1e-3)
    assert batched_against_single(double, (z_0 * 0.4).double(), cond, config) <= 1e-8


def test_identities(model):
    z_0 = latents()
    cond = model.encode_text(model.tokenize(["a red cat", "the dog", "a photo of an object", "blue disk"]))
    none = NullTextConfig(n_steps=6, inner_steps=0)
    z_T, us, info = null_text_inversion(model, z_0, cond, none, progress=False)
    eq(torch.equal(us, model.null_embedding().expand(6, 4, -1, -1)), True)
    plain = plain_reconstruction(model, z_0, cond, none)
    torch.testing.assert_close(null_text_reconstruction(model, z_T, cond, us, none), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(info["z_0"], plain, rtol=1e-4, atol=1e-4)
    _, us, _ = null_text_inversion(model, z_0, cond, NullTextConfig(n_steps=5, guidance_scale=1.0), progress=False)
    eq(torch.equal(us, model.null_embedding().expand(5, 4, -1, -1)), True)
    error = lambda x: (x - z_0).square().flatten(1).mean(1)
    for schedule in ["original", "constant"]:
        config = NullTextConfig(n_steps=6, schedule=schedule)
        z_T, us, info = null_text_inversion(model, z_0, cond, config, progress=False)
        torch.testing.assert_close(
            null_text_reconstruction(model, z_T, cond, us, config), info["z_0"], rtol=1e-3, atol=1e-3
        )
        assert (error(info["z_0"]) < error(plain)).all()


class Breaks:
    "A model that stops answering after a number of predictions."

    def __init__(self, model, n):
        self.model, self.left = model, n

    def __getattr__(self, name):
        return getattr(self.model, name)

    def noise_from(self, *args):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.model.noise_from(*args)


def test_killed_and_started_again(folder, model):
    z_0 = latents()
    cond = model.encode_text(model.tokenize(["a red cat", "the dog", "a photo of an object", "blue disk"]))
    config = NullTextConfig(n_steps=6, inner_steps=5, save_every=2)
    file = folder / "nti.safetensors"
    unbroken = null_text_inversion(model, z_0, cond, config, progress=False)
    with expect_fail(KeyboardInterrupt):
        null_text_inversion(Breaks(model, 30), z_0, cond, config, resume_path=file, progress=False)
    assert file.exists()
    resumed = null_text_inversion(model, z_0, cond, config, resume_path=file, progress=False)
    again = null_text_inversion(model, z_0, cond, config, resume_path=file, progress=False)
    for r in (resumed, again):
        eq(
            [
                torch.equal(x, y)
                for x, y in [
                    (r[0], unbroken[0]),
                    (r[1], unbroken[1]),
                    (r[2]["z_0"], unbroken[2]["z_0"]),
                    (r[2]["inner_steps"], unbroken[2]["inner_steps"]),
                ]
            ],
            [True] * 4,
        )
    with expect_fail(InputError, contains="delete it"):
        null_text_inversion(model, z_0 + 1, cond, config, resume_path=file, progress=False)
    with expect_fail(InputError, contains="at least one image"):
        null_text_inversion(model, z_0[:0], cond, config)
