"""What generators have in common when they draw gives the bits of the loops written out."""

import pytest
import torch
from stand_ins import make_token_pipeline

from tiny_nbdev.core import randn_images, rng_for
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.diffusion.approximate import sampling_autocast
from tiny_nbdev.diffusion.ddim import ddim_sample, ddim_timesteps, guided_noise
from tiny_nbdev.diffusion.model import LatentDiffusion
from tiny_nbdev.diffusion.plms import plms_sample
from tiny_nbdev.generate import prompts, variations  # noqa: F401, they register themselves
from tiny_nbdev.generate.base import Resources, batch_requests, generators

SUPPORT = ImageSet(torch.rand(5, 3, 32, 32, generator=rng_for("x")), torch.tensor([0, 0, 0, 1, 1]), ("red cat", "dog"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A small pipeline that reads image tokens."
    return LatentDiffusion.load(make_token_pipeline(tmp_path_factory.mktemp("model"))[0])


def condition(generator, spec, stretch):
    "What each image of a stretch is asked for with."
    if generator.name == "variations":
        own = [spec.tensors["features"][spec.tensors["labels"] == c] for c in range(2)]
        return generator.tokens(*(torch.stack(p) for p in zip(*(generator.mixture(r, own[r.label]) for r in stretch))))
    return generator.asked(spec, stretch, 2)[0]


@torch.no_grad()
def written_out(generator, spec, model, skip):
    "Stretch after stretch, image tensors by name."
    c, out, null = generator.config, {}, model.null_embedding()
    for stretch, missing in batch_requests(generator.requests(spec, 4, 2), c.batch_size, skip):
        predict = guided_noise(model, condition(generator, spec, stretch), null, c.guidance_scale)

        def noise_fn(z, t, i, predict=predict):
            with sampling_autocast(model.device, "fp32"):
                return predict(z, t, i)

        z = randn_images(model.latent_shape, [r.stream("noise") for r in stretch])
        if getattr(c, "sampler", "ddim") == "plms":
            z = plms_sample(noise_fn, z, c.n_steps, model.alphas_cumprod)
        else:
            z = ddim_sample(noise_fn, z, ddim_timesteps(c.n_steps, c.spacing), model.alphas_cumprod)
        images = model.decode(z)
        out |= {stretch[j].name: images[j] for j in missing}
    return out


@pytest.mark.parametrize("skip", [None, lambda name, i: i != 2])
@pytest.mark.parametrize(
    "name, settings",
    [("variations", {}), ("class-prompt", {}), ("class-prompt", dict(sampler="ddim", condition="image"))],
)
def test_the_same_bits_as_the_loop_written_out(name, settings, skip, model):
    settings = dict(n_steps=3, batch_size=3, precision="fp32", **settings)
    generator = generators[name].build(generators.config(name, settings), Resources(diffusion=lambda: model))
    spec = generator.specialize(SUPPORT, seed=1, progress=False)
    drawn = {p: x for b in generator.sample(spec, 4, 2, skip=skip) for p, x in zip(b.paths, b.images)}
    wanted = written_out(generator, spec, model, skip)
    assert drawn.keys() == wanted.keys() and len(drawn) == (8 if skip is None else 2)
    assert all(torch.equal(drawn[k], v) for k, v in wanted.items())
