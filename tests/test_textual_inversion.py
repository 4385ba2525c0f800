"Textual inversion: the optimiser, the draws, many classes at once, a restart."

import os
from unittest import mock

import pytest
import torch
from fastcore.test import expect_fail
from fastcore.test import test_eq as eq

from tiny_nbdev.data.loaders import load_digit_images
from tiny_nbdev.diffusion.model import LatentDiffusion
from tiny_nbdev.diffusion.textual_inversion import TextualInversionConfig, adam_step, draw_chunk, textual_inversion
from tiny_nbdev.diffusion.tiny import make_tiny_pipeline
from tiny_nbdev.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny").parent


@pytest.fixture(scope="module")
def model(folder):
    "A small random model: identities must hold for any weights."
    return LatentDiffusion.load(folder / "tiny")


@pytest.fixture(scope="module")
def latents(model):
    digits = load_digit_images()
    support = lambda c, n: digits.subset((digits.labels == c).nonzero()[:n, 0]).floats()
    return [model.encode(support(c, n)) for c, n in [(5, 5), (6, 3), (7, 1)]]


@pytest.fixture(scope="module")
def learned(model, latents):
    config = TextualInversionConfig(steps=40, lr=1e-2, batch_size=2)
    return config, *textual_inversion(model, latents, config, seeds=[1, 2, 3], progress=False)


def test_wrong_settings():
    with expect_fail(InputError, contains="optimizer is 'sgd'"):
        TextualInversionConfig(optimizer="sgd")
    with expect_fail(InputError, contains="t_min is 500"):
        TextualInversionConfig(t_min=500, t_max=400)
    with expect_fail(InputError, contains="needs optimizer='adamw'"):
        TextualInversionConfig(weight_decay=0.01)


def test_adam_is_pytorchs():
    for wd, theirs in [(0.0, torch.optim.Adam), (0.01, torch.optim.AdamW)]:
        target = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
        p = torch.nn.Parameter(torch.zeros(3, 7))
        opt = theirs([p], lr=0.01, weight_decay=wd)
        x, m, v = torch.zeros(3, 3, 7)
        for step in range(1, 201):
            opt.zero_grad()
            ((p - target) ** 2).sum().backward()
            opt.step()
            x, m, v = adam_step(x, 2 * (x - target), m, v, step, 0.01, weight_decay=wd)
        torch.testing.assert_close(x, p.detach(), rtol=0, atol=1e-6)


def test_draws():
    config = TextualInversionConfig(batch_size=2)
    k, t, noise = draw_chunk(7, 0, 5, (4, 8, 8), config)
    eq((k.shape, t.shape, noise.shape), ((100, 2), (100, 2), (100, 2, 4, 8, 8)))
    eq(k.flatten().bincount().tolist(), [40] * 5)
    assert 250 <= t.min() and t.max() <= 999
    eq(draw_chunk(7, 0, 5, (4, 8, 8), config)[2], noise)  # the same again
    assert not torch.equal(draw_chunk(7, 1, 5, (4, 8, 8), config)[1], t)  # another hundred
    assert not torch.equal(draw_chunk(8, 0, 5, (4, 8, 8), config)[1], t)  # another class
    eq(draw_chunk(7, 0, 3, (4, 8, 8), config)[0].max(), 2)


def test_all_classes_at_once_equal_one_by_one(model, latents, learned):
    config, vectors, losses = learned
    eq((vectors.shape, losses.shape), ((3, 32), (40, 3)))
    gaps = []
    for c in range(3):
        alone, loss = textual_inversion(model, latents[c : c + 1], config, seeds=[c + 1], progress=False)
        gaps.append((alone[0] - vectors[c]).abs().max().item())
        torch.testing.assert_close(loss[:, 0], losses[:, c], rtol=1e-4, atol=1e-5)
    moved = (vectors - model.token_embedding("object")).abs().max().item()
    assert max(gaps) <= 1e-5 and moved > 0.05


def test_classes_take_turns(model, latents, learned):
    vectors = learned[1]
    turns, _ = textual_inversion(
        model,
        latents,
        TextualInversionConfig(steps=40, lr=1e-2, batch_size=2, max_batch=2),
        seeds=[1, 2, 3],
        progress=False,
    )
    torch.testing.assert_close(turns, vectors, rtol=0, atol=1e-5)
    still, none = textual_inversion(model, latents, TextualInversionConfig(steps=0), progress=False)
    eq((torch.equal(still, model.token_embedding("object").expand(3, -1)), none.shape), (True, (0, 3)))


def whole_vocabulary(folder, z, seed, config):
    "Textual inversion of one class with the complete embedding table under Adam."
    full = LatentDiffusion.load(folder / "tiny")
    layer = full.text_encoder.get_input_embeddings()
    table = torch.nn.Parameter(torch.cat([layer.weight.data, full.token_embedding("object")[None]]))
    layer.weight = table
    layer.num_embeddings += 1
    ids, position = full.placeholder_ids()
    ids[0, position] = len(table) - 1
    opt, old = torch.optim.Adam([table], lr=config.lr), table.data[:-1].clone()
    k, t, noise = draw_chunk(seed, 0, len(z), z.shape[1:], config)
    for i in range(config.steps):
        a = full.alphas_cumprod.float()[t[i]][:, None, None, None]
        pred = full.noise_pred(a.sqrt() * z[k[i]] + (1 - a).sqrt() * noise[i], t[i], full.encode_text(ids))
        opt.zero_grad()
        (pred - noise[i]).square().mean().backward()
        opt.step()
        table.data[:-1] = old
    return table.detach()[-1]


def test_one_spliced_vector_equals_the_whole_vocabulary(folder, latents, learned):
    config, vectors, _ = learned
    gap = (whole_vocabulary(folder, latents[0], 1, config) - vectors[0]).abs().max().item()
    assert gap <= 1e-5


class Breaks:
    "A model that stops answering after a number of predictions."

    def __init__(self, model, n):
        self.model, self.left = model, n

    def __getattr__(self, name):
        return getattr(self.model, name)

    def noise_pred(self, *args):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.model.noise_pred(*args)


def test_killed_and_started_again(folder, model, latents):
    config = TextualInversionConfig(steps=110, save_every=20)
    unbroken, losses = textual_inversion(model, latents, config, seeds=[1, 2, 3], progress=False)
    for n in (30, 50):  # killed twice
        with expect_fail(KeyboardInterrupt):
            textual_inversion(
                Breaks(model, n), latents, config, [1, 2, 3], resume_path=folder / "ti.safetensors", progress=False
            )
    resumed, losses2 = textual_inversion(
        model, latents, config, seeds=[1, 2, 3], resume_path=folder / "ti.safetensors", progress=False
    )
    eq((torch.equal(resumed, unbroken), torch.equal(losses, losses2)), (True, True))
    again, _ = textual_inversion(
        Breaks(model, 0), latents, config, seeds=[1, 2, 3], resume_path=folder / "ti.safetensors", progress=False
    )
    eq(again, unbroken)  # finished work is not done again
    with expect_fail(InputError, contains="delete it"):
        textual_inversion(
            model,
            latents,
            TextualInversionConfig(steps=110, lr=0.1),
            seeds=[1, 2, 3],
            resume_path=folder / "ti.safetensors",
            progress=False,
        )


def test_bad_arguments(model, latents):
    with expect_fail(InputError, contains="at least one image"):
        textual_inversion(model, [latents[0], latents[0][:0]])
    with expect_fail(InputError, contains="one per class"):
        textual_inversion(model, latents, seeds=[1])
    with expect_fail(InputError, contains="below 1000"):
        textual_inversion(model, latents, TextualInversionConfig(t_max=2000))


class Small:
    "A model on a device that has room for two images."

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def noise_pred(self, z, *args):
        if len(z) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model.noise_pred(z, *args)


def test_small_memory_takes_turns(folder, model, latents):
    with mock.patch.dict(os.environ, TINY_NBDEV_CACHE=str(folder / "cache")):  # what fits is remembered there
        turns, _ = textual_inversion(
            Small(model), latents, TextualInversionConfig(steps=10), seeds=[1, 2, 3], progress=False
        )
    torch.testing.assert_close(
        turns,
        textual_inversion(model, latents, TextualInversionConfig(steps=10), seeds=[1, 2, 3], progress=False)[0],
        rtol=1e-4,
        atol=1e-5,
    )
    assert (folder / "cache" / "batch_sizes.json").exists()
