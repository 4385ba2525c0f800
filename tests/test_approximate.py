"Approximations: settings, the second-order solver, deep features used again, a small decoder."

import json
from dataclasses import asdict

import pytest
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel
from fastcore.test import expect_fail
from fastcore.test import test_eq as eq

from tiny_nbdev.core import quiet_libraries, randn_images
from tiny_nbdev.diffusion.approximate import (
    APPROXIMATE,
    DeepCache,
    SamplingConfig,
    approximate_noise,
    as_sampling,
    dpm_sample,
    load_decoder,
    run_sampler,
    sampling_times,
    step_kinds,
)
from tiny_nbdev.diffusion.ddim import ddim_sample, ddim_timesteps, guided_noise
from tiny_nbdev.diffusion.model import LatentDiffusion, combine_guidance
from tiny_nbdev.diffusion.schedule import noise_schedule, sd_scheduler
from tiny_nbdev.diffusion.tiny import make_tiny_pipeline
from tiny_nbdev.errors import InputError

alphas_cumprod = noise_schedule(sd_scheduler().config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder):
    "A small random model: identities must hold for any weights."
    return tiny(folder)


def test_settings_come_in_many_forms():
    some = SamplingConfig(n_steps=15, sampler="dpm", guidance_range=(0.2, 0.8))
    eq(as_sampling(json.loads(json.dumps(asdict(some)))), some)
    eq([as_sampling(v).exact for v in (None, "exact", {}, dict(cache_depth=1), some)], [True] * 4 + [False])
    for wrong, says in [
        (dict(sampler="euler"), "sampler is 'euler'"),
        (dict(n_steps=0), "n_steps of sampling is 0"),
        (dict(guidance_range=(0.5, 0.2)), "low <= high"),
        (dict(cache_every=0), "cache_every is 0"),
        (dict(speed=9), "no setting speed"),
    ]:
        with expect_fail(InputError, contains=says):
            as_sampling(wrong)
    with expect_fail(InputError, contains="sampling is 'quick'"):
        as_sampling("quick")
    eq((as_sampling("fast"), as_sampling("fast").exact), (APPROXIMATE, False))


def test_the_solver_is_that_of_diffusers():
    s = 0.5
    power = lambda t: float(alphas_cumprod[t]) * s**2 + 1 - float(alphas_cumprod[t])
    best = lambda z, t, i: (1 - float(alphas_cumprod[t])) ** 0.5 * z / power(t)
    z = torch.randn(8, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bent = lambda z, t, i: best(z, t, i) + 0.1 * torch.sin(3 * z)  # not linear, so that every term counts
    for n in (1, 2, 5, 14, 15, 20, 50):
        theirs = DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            algorithm_type="dpmsolver++",
            solver_order=2,
            timestep_spacing="trailing",
            final_sigmas_type="sigma_min",
            steps_offset=1,
            euler_at_final=True,
        )
        theirs.set_timesteps(n)
        eq(theirs.timesteps.tolist(), ddim_timesteps(n))
        x = z.float()
        for i, t in enumerate(theirs.timesteps):
            x = theirs.step(bent(x, int(t), i), t, x).prev_sample
        ours = dpm_sample(bent, z, ddim_timesteps(n), alphas_cumprod)
        gap = float((ours - x).norm() / ours.norm())
        assert gap < 5e-6, (n, gap)
    torch.testing.assert_close(
        dpm_sample(bent, z, [999], alphas_cumprod), ddim_sample(bent, z, [999], alphas_cumprod), rtol=1e-10, atol=1e-10
    )
    assert torch.isfinite(
        dpm_sample(bent, z, ddim_timesteps(20, "leading0"), alphas_cumprod)
    ).all()  # a list of times that ends at 0


@torch.no_grad()
def check_cache(model, gaps=None):
    c, (z, other) = (
        model.encode_text(model.tokenize(["a cat", "a red disk"])),
        torch.randn(2, 2, *model.latent_shape, generator=torch.Generator().manual_seed(0)),
    )
    for depth in range(len(model.unet.up_blocks[-1].resnets)):
        cache = DeepCache(model, depth)
        kept = cache.full(lambda: model.noise_pred(z, 600, c))
        torch.testing.assert_close(kept, model.noise_pred(z, 600, c), rtol=0, atol=0)
        torch.testing.assert_close(cache.shallow(z, 600, c), kept, rtol=1e-5, atol=1e-5)
        null = model.null_embedding().expand(2, -1, -1)
        guided = cache.full(lambda: model.guided(z, 600, c, null, 7.5))
        torch.testing.assert_close(
            combine_guidance(*cache.shallow(z, 600, torch.cat([null, c])).chunk(2)[::-1], 7.5),
            guided,
            rtol=1e-4,
            atol=1e-4,
        )
        torch.testing.assert_close(cache.shallow(z, 600, c), kept, rtol=1e-5, atol=1e-5)  # the prompt's half alone
        cache.full(lambda: model.noise_pred(z, 600, c))
        near = z + 0.05 * other
        if gaps is not None:
            gaps.append(float((cache.shallow(near, 580, c) - model.noise_pred(near, 580, c)).abs().mean()))
    eq(len(model.unet.up_blocks[-1].resnets[-1].norm1._forward_pre_hooks), 0)


def tiny(folder, **changes):
    "The tiny random model with another UNet."
    base = LatentDiffusion.load(
        make_tiny_pipeline(folder / "tiny", prediction_type=changes.pop("prediction_type", "epsilon"))
    )
    if changes:
        base.unet = UNet2DConditionModel(**{**base.unet.config, **changes}).eval().requires_grad_(False)
    return base


def test_a_shallow_pass_after_a_full_one_gives_the_same(folder):
    check_cache(tiny(folder))
    check_cache(tiny(folder, prediction_type="v_prediction"))
    check_cache(tiny(folder, layers_per_block=2))  # as in Stable Diffusion: attention outside, two layers
    check_cache(
        tiny(
            folder,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
    )  # as in the embedded model
    with expect_fail(InputError, contains="cache_depth is 9"):
        DeepCache(tiny(folder), 9)


def kinds(n_steps=10, **settings):
    return step_kinds(ddim_timesteps(n_steps), SamplingConfig(**settings))


def test_what_each_step_does():
    eq(kinds(), "FFFFFFFFFF")
    eq(kinds(guidance_range=(0.3, 0.7)), "fffFFFFfff")
    eq(kinds(cache_every=3), "FSSFSSFSSF")
    eq(kinds(cache_every=2, guidance_range=(0.3, 0.7)), "fsfFSFSfsf")  # guidance sets in with a whole step
    eq(step_kinds(ddim_timesteps(4), SamplingConfig(cache_every=2), 1.0), "fsfs")


@torch.no_grad()
def draw(model, config, n=2, n_steps=50, scale=7.5):
    "Latents of two prompts from the same noise under any settings."
    z, ts, null = (
        randn_images(model.latent_shape, range(2 * n)),
        sampling_times(config, n_steps),
        model.null_embedding(),
    )
    cond = model.encode_text(model.tokenize(["a photo of a rose", "a photo of a tiger"])).repeat(n, 1, 1)
    return run_sampler(
        approximate_noise(model, cond, lambda i: null, ts, scale, config), z, ts, model.alphas_cumprod, config
    )


def test_exact_settings_are_exact(model):
    few = dict(n_steps=6)
    z, cond = (
        randn_images(model.latent_shape, range(4)),
        model.encode_text(model.tokenize(["a photo of a rose", "a photo of a tiger"])).repeat(2, 1, 1),
    )
    with torch.no_grad():
        plain = ddim_sample(
            guided_noise(model, cond, model.null_embedding()), z, ddim_timesteps(6), model.alphas_cumprod
        )
    eq(torch.equal(draw(model, SamplingConfig(), **few), plain), True)
    eq(
        torch.equal(
            draw(model, SamplingConfig(guidance_range=(0, 0)), **few), draw(model, SamplingConfig(), scale=1.0, **few)
        ),
        True,
    )
    eq(torch.equal(draw(model, SamplingConfig(cache_every=1, cache_depth=1), **few), plain), True)
    assert (draw(model, SamplingConfig(cache_every=2), **few) - plain).abs().max() > 1e-3
    draw(model, SamplingConfig("dpm", None, (0.3, 0.7), 2), **few)
    draw(model, SamplingConfig(cache_every=2), scale=1.0, **few)  # every kind of step


def test_a_small_decoder(folder, model):
    few = dict(n_steps=6)
    torch.manual_seed(0)
    for name, levels in [("small", 3), ("large", 4)]:
        with quiet_libraries():
            AutoencoderTiny(
                latent_channels=model.latent_shape[0],
                encoder_block_out_channels=(8,) * levels,
                decoder_block_out_channels=(8,) * levels,
                num_encoder_blocks=(1,) * levels,
                num_decoder_blocks=(1,) * levels,
            ).save_pretrained(folder / name)
    z = draw(model, SamplingConfig(), **few)
    images = load_decoder(model, str(folder / "small"))(z, batch=3)
    eq((images.shape, images.dtype), (model.decode(z).shape, torch.float32))
    assert 0 <= images.min() and images.max() <= 1
    with quiet_libraries():
        theirs = AutoencoderTiny.from_pretrained(folder / "small").decode(z).sample
    torch.testing.assert_close(images, (theirs / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    eq(torch.equal(load_decoder(model)(z), model.decode(z)), True)
    with expect_fail(InputError, contains="makes 64 pixels"):
        load_decoder(model, str(folder / "large"))
    with expect_fail(InputError, contains="madebyollin/taesd"):
        load_decoder(model, str(folder / "nothing"))
