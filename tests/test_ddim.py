"DDIM: the times, the step, both directions, and a network inside."

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from fastcore.test import expect_fail
from fastcore.test import test_eq as eq

from tiny_nbdev.diffusion.ddim import (
    ddim_invert,
    ddim_sample,
    ddim_step,
    ddim_timesteps,
    guided_noise,
    move_factors,
    prompt_noise,
)
from tiny_nbdev.diffusion.model import LatentDiffusion
from tiny_nbdev.diffusion.schedule import noise_schedule, sd_scheduler
from tiny_nbdev.diffusion.tiny import make_tiny_pipeline
from tiny_nbdev.errors import InputError

alphas_cumprod = noise_schedule(sd_scheduler().config)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A small random model: identities must hold for any weights."
    return LatentDiffusion.load(make_tiny_pipeline(tmp_path_factory.mktemp("model")))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


z, eps = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)


def test_times():
    eq(ddim_timesteps(50), list(range(999, 0, -20)))
    eq(ddim_timesteps(50, "leading"), list(range(981, 0, -20)))
    eq(ddim_timesteps(50, "leading0"), list(range(980, -1, -20)))
    eq((ddim_timesteps(25)[-1], ddim_timesteps(20)[-1], ddim_timesteps(1)), (39, 49, [999]))
    eq(ddim_timesteps(1000), list(range(999, -1, -1)))
    for n in (7, 30, 300):
        eq(ddim_timesteps(n)[0], 999)  # also when N does not divide 1000
    with expect_fail(InputError, contains="spacing is 'middle'"):
        ddim_timesteps(50, "middle")
    with expect_fail(InputError, contains="n_steps is 0"):
        ddim_timesteps(0)
    with expect_fail(InputError, contains="past time 999"):
        ddim_timesteps(1000, "leading")


def test_one_step():
    z, eps = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)
    for a, b in [(999, 979), (19, 0), (0, 19), (500, 480)]:
        k_z, k_eps = move_factors(a, b, alphas_cumprod)
        torch.testing.assert_close(
            ddim_step(z, a, b, eps, alphas_cumprod), k_z * z + k_eps * eps, rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            ddim_step(ddim_step(z, a, b, eps, alphas_cumprod), b, a, eps, alphas_cumprod), z, rtol=1e-12, atol=1e-12
        )
    torch.testing.assert_close(ddim_step(z, 300, 300, eps, alphas_cumprod), z, rtol=1e-14, atol=1e-14)


def test_diffusers_agrees():
    config = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    z32, eps32 = z.float(), eps.float()
    worst = {}
    for spacing in ["trailing", "leading"]:
        down = DDIMScheduler(**config, timestep_spacing=spacing, steps_offset=1)
        down.set_timesteps(50)
        up = DDIMInverseScheduler(**config, timestep_spacing=spacing, steps_offset=1)
        up.set_timesteps(50)
        ts = ddim_timesteps(50, spacing)
        path = [0, *ts[::-1]]
        eq(down.timesteps.tolist(), ts)
        eq(up.timesteps.tolist(), ts[::-1])
        gap = lambda x, y: ((x - y).norm() / y.norm()).item()
        worst[spacing, "down"] = max(
            gap(ddim_step(z32, a, b, eps32, alphas_cumprod), down.step(eps32, a, z32).prev_sample)
            for a, b in zip(ts[:-1], ts[1:])
        )
        worst[spacing, "last"] = gap(
            ddim_step(z32, ts[-1], 0, eps32, alphas_cumprod), down.step(eps32, ts[-1], z32).prev_sample
        )
        worst[spacing, "up"] = max(
            gap(ddim_step(z32, a, b, eps32, alphas_cumprod), up.step(eps32, b, z32).prev_sample)
            for a, b in zip(path[1:], path[2:])
        )
        worst[spacing, "first"] = gap(
            ddim_step(z32, 0, ts[-1], eps32, alphas_cumprod), up.step(eps32, ts[-1], z32).prev_sample
        )
    assert max(worst.values()) <= 1.2e-6


def round_trip(noise_fn, n_steps=50, at="destination", z=z):
    "Relative error of sampling what was inverted."
    ts = ddim_timesteps(n_steps)
    back = ddim_sample(noise_fn, ddim_invert(noise_fn, z, ts, alphas_cumprod, at)[-1], ts, alphas_cumprod)
    return ((back - z).norm() / z.norm()).item()


def test_noise_that_ignores_the_latent_is_undone_exactly():
    constant = lambda z, t, i: eps.to(z)
    time_only = lambda z, t, i: eps.to(z) * np.cos(t / 300)
    assert round_trip(constant) <= 3e-15 and round_trip(constant, z=z.float()) <= 2e-6
    assert round_trip(time_only) <= 3e-15
    assert round_trip(time_only, at="source") > 0.05


def test_known_error_for_gaussian_data():
    s = 0.7
    oracle = lambda z, t, i: (1 - alphas_cumprod[t]).sqrt() * z / (alphas_cumprod[t] * s**2 + 1 - alphas_cumprod[t])
    golden = {
        10: (0.099654, 0.285246),
        25: (0.034903, 0.130894),
        50: (0.016502, 0.069543),
        100: (0.0080060, 0.035957),
        200: (0.0039429, 0.018227),
        1000: (0.00078003, 0.0038403),
    }
    errors = {n: (round_trip(oracle, n), round_trip(oracle, n, "source")) for n in golden}
    for n, (dest, src) in errors.items():
        for got, known in zip((dest, src), golden[n]):
            assert abs(got - known) <= 6e-5 * known, (n, got, known)
    eq(abs(round_trip(oracle, 50, z=normal(1, 4, 16, 16, seed=5)) - errors[50][0]) < 1e-12, True)  # any data, any shape


def test_network_is_asked_in_order():
    s = 0.7
    oracle = lambda z, t, i: (1 - alphas_cumprod[t]).sqrt() * z / (alphas_cumprod[t] * s**2 + 1 - alphas_cumprod[t])
    eq(ddim_invert(oracle, z, ddim_timesteps(10), alphas_cumprod).shape, (11, 2, 4, 8, 8))
    eq(ddim_invert(oracle, z, ddim_timesteps(10), alphas_cumprod)[0], z)
    seen = []
    ddim_sample(lambda z, t, i: seen.append((t, i)) or oracle(z, t, i), z, ddim_timesteps(4), alphas_cumprod)
    eq(seen, [(999, 0), (749, 1), (499, 2), (249, 3)])
    seen = []
    ddim_invert(lambda z, t, i: seen.append((t, i)) or oracle(z, t, i), z, ddim_timesteps(4), alphas_cumprod)
    eq(seen, [(249, 3), (499, 2), (749, 1), (999, 0)])  # same time, same i in both directions
    with expect_fail(InputError, contains="at is 'middle'"):
        ddim_invert(oracle, z, ddim_timesteps(4), alphas_cumprod, at="middle")


def test_batch_equals_one_by_one(model):
    cond = model.encode_text(model.tokenize(["a photo of a cat", "a photo of a dog", "the red object"]))
    null = model.null_embedding()
    z_T, ts = normal(3, *model.latent_shape, dtype=torch.float32), ddim_timesteps(5)
    with torch.no_grad():
        together = ddim_sample(guided_noise(model, cond, null), z_T, ts, model.alphas_cumprod)
        zs = ddim_invert(prompt_noise(model, cond), together, ts, model.alphas_cumprod)
        for i in range(3):  # batched = one by one, both ways
            one = slice(i, i + 1)
            torch.testing.assert_close(
                ddim_sample(guided_noise(model, cond[one], null), z_T[one], ts, model.alphas_cumprod),
                together[one],
                rtol=1e-4,
                atol=1e-4,
            )
            torch.testing.assert_close(
                ddim_invert(prompt_noise(model, cond[one]), together[one], ts, model.alphas_cumprod),
                zs[:, one],
                rtol=1e-4,
                atol=1e-4,
            )
        alone = ddim_sample(prompt_noise(model, cond), z_T, ts, model.alphas_cumprod)
        eq(
            ddim_sample(guided_noise(model, cond, 9 * null, 1.0), z_T, ts, model.alphas_cumprod), alone
        )  # guidance 1 = the prompt alone, any null embedding
        per_time = null[None].expand(5, 3, -1, -1)
        torch.testing.assert_close(
            ddim_sample(guided_noise(model, cond, per_time), z_T, ts, model.alphas_cumprod),
            together,
            rtol=1e-4,
            atol=1e-4,
        )
