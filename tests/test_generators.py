"""Every generator, with a random pipeline and few steps: what a specialization and an image depend on, and what is
refused."""

import threading
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_nbdev.run.experiment  # noqa: F401 - registers every generator
from tiny_nbdev.classify.encoders import Encoder
from tiny_nbdev.core import rng_for, save_tensors
from tiny_nbdev.data.images import ImageSet, image_key, resize, to_uint8, write_image
from tiny_nbdev.data.loaders import load_digit_images
from tiny_nbdev.diffusion.approximate import APPROXIMATE, SamplingConfig
from tiny_nbdev.diffusion.ddim import ddim_sample, ddim_timesteps, guided_noise
from tiny_nbdev.diffusion.model import LatentDiffusion
from tiny_nbdev.diffusion.null_text import null_text_reconstruction
from tiny_nbdev.diffusion.tiny import make_tiny_pipeline
from tiny_nbdev.errors import InputError
from tiny_nbdev.generate import latent, nao
from tiny_nbdev.generate import seed_select as tuning
from tiny_nbdev.generate.augmented import AugmentedPhotos
from tiny_nbdev.generate.base import (
    Generator,
    ImageRequest,
    Resources,
    Specialization,
    TaskSize,
    batch_requests,
    generators,
    list_requests,
    parse_alpha,
)
from tiny_nbdev.generate.da_fusion import DAFusion, DAFusionConfig, ddim_sample_from, draw_starts, start_steps
from tiny_nbdev.generate.latent import check_precision, sampling_precision
from tiny_nbdev.generate.nao import NAOConfig, lerp_path, log_norm_prior, nao_centroids, nao_paths, path_integral
from tiny_nbdev.generate.pool import build_index, open_pool
from tiny_nbdev.generate.retrieval import Retrieval, RetrievalConfig
from tiny_nbdev.generate.seed_select import NAOSeedSelect, NAOSeedSelectConfig, SeedSelectConfig
from tiny_nbdev.generate.tint import (
    TINT,
    DDIMConfig,
    PlainTextualInversionConfig,
    TINTConfig,
    draw_alphas,
    nearest_times,
)
from tiny_nbdev.measure import psnr
from tiny_nbdev.registry import config_dict

PROMPTED = ("loft", "datadream", "class-prompt", "caption-prompt", "token-pairs")  # `variations` has tests of its own
NAMES = ("tint", "textual-inversion", "ddim", "da-fusion", "nao-seed-select", "retrieval", "augment", *PROMPTED)
LATENT = (*NAMES[:5], *PROMPTED)
SMALL = dict(n_steps=5, textual_inversion=dict(steps=20, lr=1e-2), batch_size=8)
TINY = SMALL | dict(null_text=dict(inner_steps=3))
NAO_SMALL = dict(
    path=dict(n_points=6, max_steps=60),
    seeds_per_path=4,
    n_steps=3,
    invert_steps=6,
    batch_size=6,
    textual_inversion=dict(steps=4),
    tune=dict(steps=2, checkpoint=False),
)
PROMPT = dict(n_steps=3, sampler="ddim", batch_size=8)
CONFIGS = {
    "loft": PROMPT | dict(adapter=dict(rank=2, steps=4, warmup=1)),
    "datadream": PROMPT | dict(adapter=dict(rank=2, warmup=1), epochs=2),
    "class-prompt": PROMPT,
    "caption-prompt": PROMPT | dict(captioner="measured"),
    "token-pairs": PROMPT | dict(textual_inversion=dict(steps=4, lr=1e-2)),
    "tint": TINY,
    "textual-inversion": SMALL,
    "ddim": SMALL,
    "da-fusion": SMALL,
    "nao-seed-select": NAO_SMALL,
    "retrieval": dict(query="image", threshold=-1.0, center=True, too_few="fill", batch_size=8),
    "augment": dict(batch_size=8),
}


class TinyEncoder(nn.Module):
    "A small random encoder."

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, second = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 16, 3, stride=2)
            self.net = nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.eval().requires_grad_(False)

    def forward(self, images):
        return self.net(images - 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LatentDiffusion.load(make_tiny_pipeline(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def encoder():
    return TinyEncoder()


def few(counts, classes=None):
    "Digits 5, 6 and 7, so many of each, not sorted by class."
    digits = load_digit_images([5, 6, 7])
    images = digits.subset(torch.cat([(digits.labels == c).nonzero()[:n, 0] for c, n in enumerate(counts)]).flip(0))
    return replace(images, classes=classes) if classes else images


@pytest.fixture(scope="module")
def resources(model, encoder):
    pool = load_digit_images(range(5)).subset(range(0, 600, 10))
    return Resources(diffusion=lambda: model, encoder=lambda: encoder, encoder_name=lambda: "tiny", pool=lambda: pool)


def build(name, resources, **changes):
    return generators[name].build(generators.config(name, CONFIGS[name] | changes), resources)


@pytest.fixture(scope="module")
def made(resources):
    "What every generator learned from the same images: name -> (generator, specialization, images)."
    out = {}
    for name in NAMES:
        generator = build(name, resources)
        support = few([3, 2, 2]) if name == "nao-seed-select" else few([4, 2, 1])
        spec = generator.specialize(support, seed=1, progress=False)
        out[name] = generator, spec, drawn(generator, spec)
    return out


def drawn(generator, spec, n=3, seed=1, **kw):
    return ImageSet.concat(list(generator.sample(spec, n, seed, **kw)))


def tint(model, config=TINTConfig, **changes):
    return TINT(model, config(**TINY | changes))


def with_tensors(spec, **tensors):
    return replace(spec, tensors=spec.tensors | tensors)


# Registry and settings


def test_names():
    assert (
        set(NAMES) <= set(generators) and generators["augment"].build(AugmentedPhotos().config, None).name == "augment"
    )
    with pytest.raises(InputError, match="did you mean 'tint'"):
        generators["tin"]


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_json_and_come_as_plain_data(name):
    import json

    for data in ({}, CONFIGS[name]):
        if name == "retrieval" and not data:
            data = dict(threshold=0.3)
        config = generators.config(name, data)
        again = generators.config(name, json.loads(json.dumps(config_dict(config))))
        assert again == config and type(again) is type(config)
    with pytest.raises(InputError, match="batch_size"):
        generators.config(name, dict(batch_sizes=3))


def test_a_part_of_nested_settings_keeps_the_variants_defaults():
    config = generators.config("textual-inversion", dict(textual_inversion=dict(steps=7), n_steps=9))
    assert (config.textual_inversion.steps, config.textual_inversion.t_min, config.n_steps) == (7, 0, 9)
    assert not config.use_null_text and config.alpha == 1.0 and config.guidance_scale == 7.5
    ddim = generators.config("ddim")
    assert (ddim.alpha, ddim.guidance_scale, ddim.use_token, ddim.use_null_text) == (0.5, 1.0, False, False)
    assert generators.config("tint").textual_inversion.t_min == 250
    with pytest.raises(InputError, match="inner_steps"):
        generators.config("tint", dict(null_text=dict(inner=3)))


def test_tint_settings():
    config = TINTConfig(n_steps=20, alpha=[0.3, 0.8])
    assert (config.null_text.n_steps, config.alpha, config.name) == (20, (0.3, 0.8), "tint")
    for wrong in [-0.1, 1.5, (0.8, 0.2), (0.1, 0.2, 0.3), float("nan")]:
        with pytest.raises(InputError, match="alpha is"):
            TINTConfig(alpha=wrong)
    for wrong, what in (
        (dict(precision="fp8"), "precision is 'fp8'"),
        (dict(store="int8"), "store is"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(n_steps=0), "n_steps is 0"),
        (dict(spacing="odd"), "spacing is 'odd'"),
        (dict(sampling="quick"), "sampling is 'quick'"),
    ):
        with pytest.raises(InputError, match=what):
            TINTConfig(**wrong)
    assert TINTConfig(sampling="fast").sampling == APPROXIMATE
    assert generators.config("tint", dict(sampling="fast")).sampling == APPROXIMATE
    assert [TINTConfig(sampling=v).sampling for v in (None, "exact", {}, dict(cache_every=1))] == [None] * 4
    fewer = TINTConfig(sampling=dict(n_steps=9))
    assert generators.config("tint", config_dict(fewer)).sampling == SamplingConfig(n_steps=9)


@pytest.mark.parametrize("name", NAMES)
def test_builders_make_what_they_are_called(name, made, resources):
    generator, spec, images = made[name]
    assert generator.name == name == spec.generator
    assert images.counts() == [3, 3, 3] and images.images.dtype == torch.float32
    assert images.paths[:3] == tuple(f"{c}/00000.png" for c in spec.classes)
    entry = generators[name]
    assert set(entry.needs) <= {"diffusion", "encoder", "pool", "clip", "text"} and entry.source
    assert ("diffusion" in entry.needs) == (name in LATENT)
    assert generators.describe(name, generator.config)


def test_what_is_missing_is_said_by_name(model):
    with pytest.raises(InputError, match="needs the diffusion"):
        build("tint", Resources())
    with pytest.raises(InputError, match="needs the encoder, and there is none; name a teacher"):
        build("nao-seed-select", Resources(diffusion=lambda: model))
    assert build("nao-seed-select", Resources(diffusion=lambda: model), seed_select=False).encoder is None
    with pytest.raises(InputError, match="needs the pool"):
        build("retrieval", Resources(encoder=TinyEncoder, pool=lambda: None))


def test_resources_load_once():
    calls = []
    resources = Resources(diffusion=lambda: calls.append(1) or "model")
    assert resources.upscale is None and resources.cache is None and not calls
    assert resources.diffusion == resources.diffusion == "model" and calls == [1]


def test_options_reach_the_settings():
    for name in NAMES:
        for option in generators[name].options:
            config, *parts = generators.config(name), *option.path.split(".")
            for part in parts[:-1]:
                config = getattr(config, part)
            assert hasattr(config, parts[-1])
            option.type("1" if option.name == "alpha" else "7")
    assert [o.name for o in generators["tint"].options] == [
        "alpha",
        "token_steps",
        "token_start",
        "sampling_steps",
        "batch",
        "sampling",
    ]
    assert parse_alpha("1") == 1.0 and parse_alpha("0.2:0.8") == (0.2, 0.8)
    for bad in ("2", "-1", "0.8:0.2", "a", "0:1:1", "nan", ""):
        with pytest.raises(InputError, match="is not a blend"):
            parse_alpha(bad)


def test_costs():
    size, amounts = TaskSize(5, 25, 250), dict(n_steps=20, textual_inversion=dict(steps=300, batch_size=4))
    cost = lambda name, **kw: generators[name].cost(generators.config(name, amounts | kw), size)
    tint = cost("tint")
    assert list(tint) == ["encoding", "textual inversion", "inversion", "sampling"]
    assert tint["textual inversion"]["unet"] == 300 * 5 * 4 * 2
    assert tint["inversion"]["unet"] == 25 * 20 * (1 + 2 + 2 * 10 * 0.7)
    assert tint["sampling"] == dict(unet=1250 * 20 * 2, shallow=0, decode=1250)
    assert "inversion" not in cost("textual-inversion") and "textual inversion" not in cost("ddim")
    assert cost("ddim")["inversion"]["unet"] == 25 * 20 and cost("ddim")["sampling"]["unet"] == 1250 * 20
    fast = cost("tint", sampling="fast")["sampling"]
    assert fast["unet"] == fast["shallow"] == 1250 * 15 * 2 / 2
    assert cost("da-fusion")["sampling"]["unet"] == pytest.approx(1250 * 10.5 * 2)
    assert cost("da-fusion", strengths=[0.5])["sampling"]["unet"] == pytest.approx(1250 * 10 * 2)
    nao = cost("nao-seed-select")
    assert nao["sampling"] == dict(unet=1250 * 13 * 20, decode=1250 * (1 + 13 * 3), encoder=1250 * 13 * 3)
    image = generators.config("retrieval", dict(query="image"))
    assert generators["retrieval"].cost(image, TaskSize(5, 25, 250, n_pool=100)) == dict(retrieval=dict(encoder=125))


def test_descriptions():
    amounts = dict(n_steps=20, textual_inversion=dict(steps=300))
    say = lambda name, **kw: generators.describe(name, generators.config(name, amounts | kw))
    assert say("tint") == "TINT: 300 token steps, 20 DDIM steps, 10 null-text steps each, alpha 1.0"
    assert say("tint", alpha=[0.2, 0.8]).endswith("alpha 0.2 to 0.8")
    assert say("textual-inversion") == "textual inversion: 300 token steps, 20 DDIM steps"
    assert say("ddim") == "DDIM inversion: 20 steps, alpha 0.5"


@pytest.mark.parametrize("able", (torch.bfloat16, torch.float32))
def test_precision_auto_is_what_the_device_is_fast_in(able, monkeypatch, model, made):
    monkeypatch.setattr(latent, "compute_dtype", lambda device: able)
    net = lambda device, dtype=torch.float32: SimpleNamespace(device=device, dtype=dtype)
    wide = able == torch.bfloat16
    assert sampling_precision(net("cpu")) == ("bf16" if wide else "fp32")
    assert sampling_precision(net("cuda")) == ("bf16" if wide else "fp16")
    assert sampling_precision(net("cuda", torch.bfloat16)) == "fp32"  # its weights are in half precision already
    assert sampling_precision(net("cpu"), "fp16") == "fp16"
    named = "bf16" if wide else "fp32"
    for kind, config, name in ((TINT, TINTConfig, "tint"), (DAFusion, DAFusionConfig, "da-fusion")):
        spec = made[name][1]
        auto, same = (kind(model, config(**CONFIGS[name] | dict(precision=p))) for p in ("auto", named))
        assert torch.equal(drawn(auto, spec).images, drawn(same, spec).images)
        assert auto.identity() == same.identity() and auto.identity()["precision"] == named
    with pytest.raises(InputError, match="choose auto, fp32"):
        check_precision("fp8")


def test_identity_leaves_out_what_changes_no_image(model):
    same = dict(batch_size=3, null_text=dict(inner_steps=3, save_every=2, max_batch=5))
    assert tint(model).identity() == tint(model, **same).identity() != tint(model, alpha=0.5).identity()
    assert tint(model).identity()["textual_inversion"]["batch_size"] == 1


# What holds for all of them


@pytest.mark.parametrize("name", NAMES)
def test_saved_loaded_interrupted_and_more(name, made, tmp_path):
    generator, spec, images = made[name]
    spec.save(tmp_path / "spec.safetensors")
    loaded = Specialization.load(tmp_path / "spec.safetensors")
    assert torch.equal(drawn(generator, loaded).images, images.images)
    rest = drawn(generator, spec, skip=lambda c, i: (len(c) + i + int(c[-1])) % 2 == 0)
    where = {p: i for i, p in enumerate(images.paths)}
    assert 0 < len(rest) < len(images)
    assert torch.equal(rest.images, images.images[[where[p] for p in rest.paths]])
    more = drawn(generator, spec, 4)
    full = (
        9 // generator.config.batch_size * generator.config.batch_size
    )  # what lies in stretches that were full before
    assert more.paths[:9] == images.paths and torch.equal(more.images[:full], images.images[:full])


@pytest.mark.parametrize("name", LATENT)
def test_batch_size_and_seed(name, made, resources):
    generator, spec, images = made[name]
    single = drawn(build(name, resources, batch_size=1), spec)
    assert single.paths == images.paths
    torch.testing.assert_close(single.images, images.images, rtol=0, atol=2e-3)
    assert (drawn(generator, spec, seed=2).images - images.images).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_same_again(name, made, resources):
    _, spec, _ = made[name]
    support = few([3, 2, 2]) if name == "nao-seed-select" else few([4, 2, 1])
    again = build(name, resources).specialize(support, seed=1, progress=False)
    assert again.settings == spec.settings
    for k, v in spec.tensors.items():
        assert torch.equal(again.tensors[k], v), k


@pytest.mark.parametrize("name", LATENT)
def test_refused(name, made, resources):
    generator, spec, _ = made[name]
    other = replace(spec, settings=spec.settings | dict(fingerprint="other"))
    with pytest.raises(InputError, match="load that model"):
        drawn(generator, other)
    with pytest.raises(InputError, match="made by 'noisy'"):
        drawn(generator, Specialization("noisy", dict(n_support=[1]), ("x",), {}))
    if name == "class-prompt":  # asks for names alone
        return
    support = few([3, 2, 2])
    with pytest.raises(InputError, match="class 'digit 6' has no support image"):
        generator.specialize(support.subset((support.labels != 1).nonzero()[:, 0]), progress=False)


# The contract


def test_specialization_files(tmp_path):
    spec = Specialization("tint", dict(alpha=[0.2, 0.8]), ("cat", "dog"), dict(tokens=torch.randn(2, 8)))
    spec.save(tmp_path / "s.safetensors")
    back = Specialization.load(tmp_path / "s.safetensors")
    assert (back.generator, back.settings, back.classes) == (spec.generator, spec.settings, spec.classes)
    assert torch.equal(back.tensors["tokens"], spec.tensors["tokens"])
    save_tensors(dict(x=torch.zeros(1)), tmp_path / "other.safetensors", dict(a=1))
    with pytest.raises(InputError, match="is not a specialization"):
        Specialization.load(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="absent"):
        Specialization.load(tmp_path / "absent.safetensors")


def test_requests():
    requests = list_requests(["cat", "dog", "owl"], 1000, seed=3, n_support=[5, 2, 1])
    assert requests[4].name == "dog/00001.png" and len({p.seed for p in requests}) == 3000
    assert requests[:300] == list_requests(["cat", "dog", "owl"], 100, seed=3, n_support=[5, 2, 1])
    dogs = [ImageRequest(1, "dog", p.index, p.seed, p.k) for p in list_requests(["x", "dog"], 50, 3, [9, 2]) if p.label]
    assert [p for p in requests if p.class_name == "dog"][:50] == dogs
    counts = [torch.tensor([p.k for p in requests if p.label == c]).bincount().tolist() for c in range(3)]
    assert min(counts[0]) > 150 and min(counts[1]) > 420 and counts[2] == [1000]
    with pytest.raises(InputError, match="per_class is -1"):
        list_requests(["cat"], -1)


def test_batches_of_requests():
    requests = list_requests(["cat", "dog"], 5)
    assert [len(s) for s, _ in batch_requests(requests, 4)] == [4, 4, 2]
    assert batch_requests(requests, 4, lambda c, i: True) == []
    with pytest.raises(InputError, match="batch_size is 0"):
        batch_requests(requests, 0)


def test_a_generator_without_single_images_gives_none_back(made):
    for name in NAMES[1:]:
        generator, spec, _ = made[name]
        assert generator.reconstructions(spec) == {}
    assert issubclass(TINT, Generator)


# TINT


def test_tint_learns(made):
    shapes = {k: tuple(v.shape) for k, v in made["tint"][1].tensors.items()}
    assert shapes == dict(
        labels=(7,),
        z_0=(7, 4, 8, 8),
        tokens=(3, 32),
        token_losses=(20, 3),
        z_T=(7, 4, 8, 8),
        uncond_embeddings=(5, 7, 16, 32),
        inner_steps=(5, 7),
        null_text_loss=(5, 7),
    )
    assert set(made["textual-inversion"][1].tensors) == {"labels", "z_0", "tokens", "token_losses"}
    assert set(made["ddim"][1].tensors) == {"labels", "z_0", "tokens", "z_T"}


def test_alphas():
    requests = list_requests(["cat", "dog"], 500)
    alphas = draw_alphas(requests, (0.2, 0.6))
    assert alphas.min() >= 0.2 and alphas.max() <= 0.6 and abs(alphas.mean() - 0.4) < 0.02
    assert torch.equal(draw_alphas(requests[:7], (0.2, 0.6)), alphas[:7])
    assert draw_alphas(requests[:2], (1.0, 1.0)).tolist() == [1.0, 1.0]


def test_nearest_times():
    ts = ddim_timesteps(50)
    assert nearest_times(ts, ts) == list(range(50))
    assert nearest_times(ddim_timesteps(5), ts) == [0, 10, 20, 30, 40]
    assert nearest_times([999, 512, 3], [999, 499, 0]) == [0, 1, 2]


def test_blend_0_gives_back_and_blend_1_forgets(model, made):
    generator, spec, images = made["tint"]
    zero, support = tint(model, alpha=0.0), few([4, 2, 1])
    cond = generator.prompts(spec.tensors["tokens"])[support.labels]
    u, z_T = spec.tensors["uncond_embeddings"], spec.tensors["z_T"]
    expected = model.decode(null_text_reconstruction(model, z_T, cond, u, generator.config.null_text))
    torch.testing.assert_close(zero.reconstruct(spec), expected, rtol=0, atol=2e-3)
    for p, image in zip(zero.requests(spec, 3, seed=1), drawn(zero, spec).images):
        own = (support.labels == p.label).nonzero()[p.k, 0]
        torch.testing.assert_close(image, expected[own], rtol=0, atol=2e-3)
    forgot = with_tensors(spec, z_T=torch.randn(7, 4, 8, 8))
    assert torch.equal(drawn(generator, forgot).images, images.images)


def test_reconstructions(model, made):
    generator, spec, _ = made["tint"]
    rows = generator.reconstructions(spec)
    assert list(rows) == ["autoencoder", "plain DDIM inversion", "null-text inversion"]
    assert all(v.shape == (7, 3, 32, 32) for v in rows.values())
    assert torch.equal(rows["null-text inversion"], generator.reconstruct(spec))
    with pytest.raises(InputError, match="no inverted images"):
        TINT(model, PlainTextualInversionConfig(**SMALL)).reconstruct(made["textual-inversion"][1])


def test_fewer_digits(model, made):
    generator, spec, images = made["tint"]
    half = with_tensors(spec, uncond_embeddings=spec.tensors["uncond_embeddings"].half())
    assert 255 * (drawn(generator, half).images - images.images).abs().mean() < 1
    stored = tint(model, store="float16").specialize(few([4, 2, 1]), seed=1, progress=False)
    assert torch.equal(stored.tensors["uncond_embeddings"], half.tensors["uncond_embeddings"])
    gap = lambda p: (drawn(tint(model, precision=p), spec).images - images.images).abs().mean()
    assert 0 < gap("fp16") < gap("bf16") < 20 / 255


def test_each_core_draws_its_share(model, made):
    _, spec, images = made["tint"]
    before, busy, decode = torch.get_num_threads(), set(), model.decode
    torch.set_num_threads(2)
    model.decode = lambda *args, **kw: (busy.add(threading.get_ident()), decode(*args, **kw))[1]
    try:
        whole, rest = (drawn(tint(model), spec, 7, skip=s) for s in (None, lambda name, i: i < 3))
        assert len(busy) == 2
        busy.clear()
        drawn(tint(model, sampling="fast"), spec, 1)
        assert len(busy) == 1  # deep features are kept in one place
    finally:
        del model.decode
        torch.set_num_threads(before)
    torch.testing.assert_close(whole.images[:8], drawn(tint(model), spec, 7).images[:8], rtol=0, atol=1 / 255)
    kept = whole.subset([j for j, p in enumerate(whole.paths) if p in rest.paths])
    assert len(rest) and torch.equal(rest.images, kept.images)


class Breaks:
    "A model that stops answering after a number of predictions."

    def __init__(self, model, n):
        self.model, self.left = model, n

    def __getattr__(self, name):
        if name in ("noise_pred", "noise_from"):
            self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return getattr(self.model, name)


def test_killed_while_specialising(model, made, tmp_path):
    spec = made["tint"][1]
    for n in (8, 30):  # once in textual, once in null-text inversion
        with pytest.raises(KeyboardInterrupt):
            tint(Breaks(model, n)).specialize(few([4, 2, 1]), seed=1, folder=tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["null_text.safetensors", "tokens.safetensors"]
    resumed = tint(model).specialize(few([4, 2, 1]), seed=1, folder=tmp_path, progress=False)
    for k, v in spec.tensors.items():
        assert torch.equal(resumed.tensors[k], v), k


def test_variants(model, made):
    spec, support = made["tint"][1], few([4, 2, 1])
    cut = replace(spec, tensors={k: v for k, v in spec.tensors.items() if k != "uncond_embeddings"})
    plain = TINT(model, PlainTextualInversionConfig(**SMALL))
    assert torch.equal(drawn(plain, spec).images, drawn(plain, cut).images)  # null embeddings are never used
    ddim = TINT(model, DDIMConfig(n_steps=60))
    found = ddim.specialize(support, progress=False)
    assert torch.equal(found.tensors["tokens"], model.token_embedding("object").repeat(3, 1))
    fine, coarse = (
        psnr(g.reconstruct(f), model.decode(f.tensors["z_0"]))
        for g in (ddim, TINT(model, DDIMConfig(n_steps=20)))
        for f in [g.specialize(support, progress=False)]
    )
    assert fine.min() > 18 and (fine > coarse).all()  # DDIM inversion is exact in the limit of many steps
    assert drawn(TINT(model, DDIMConfig(alpha=(0.2, 0.8), n_steps=60)), found, 2).counts() == [2, 2, 2]


def test_images_stream(model, made):
    alive = []
    for batch in TINT(model, PlainTextualInversionConfig(n_steps=2, batch_size=3)).sample(
        made["textual-inversion"][1], 8
    ):
        alive.append(weakref.ref(batch.images))
        assert sum(r() is not None for r in alive) <= 2
    assert len(alive) == 8


def test_approximations_leave_no_trace(model, made):
    _, spec, images = made["tint"]
    assert torch.equal(drawn(tint(model, sampling="exact"), spec).images, images.images)
    assert not {"sampling", "upscale"} & {*spec.settings, *spec.settings["config"]}
    fewer = dict(n_steps=3, sampler="dpm", guidance_range=(0.1, 0.9), cache_every=2)
    quick = drawn(tint(model, sampling=fewer), spec)
    assert (quick.paths, quick.size) == (images.paths, images.size)
    assert 1e-3 < (quick.images - images.images).abs().mean() < 0.25
    again = tint(model, sampling=dict(n_steps=3)).specialize(few([4, 2, 1]), seed=1, progress=False)
    assert again.settings == spec.settings
    near, zero = tint(model, alpha=0.0, sampling=dict(n_steps=4)), tint(model, alpha=0.0)
    assert torch.equal(near.reconstruct(spec), zero.reconstruct(spec))  # what is given back is always exact


class Twice:
    "Doubles the sides, and counts its calls."

    fingerprint, calls = "twice", 0

    def __call__(self, images):
        self.calls += 1
        return images.resized(tuple(2 * s for s in images.size))


@pytest.mark.parametrize("name", NAMES[:5])
def test_enlarged_photos(name, model, encoder):
    tiny, twice = few([2, 2, 2]).resized((16, 16)), Twice()
    known = Resources(diffusion=lambda: model, encoder=lambda: encoder, upscale=lambda: twice)
    generator = build(name, known, **dict(textual_inversion=dict(steps=2)))
    spec = generator.specialize(tiny, progress=False)
    assert (twice.calls, spec.settings["upscale"], spec.settings["size"]) == (1, "twice", [16, 16])
    assert torch.equal(spec.tensors["z_0"], model.encode(tiny.resized((32, 32)).floats()))
    assert next(generator.sample(spec, 1)).size == (16, 16) and twice.calls == 1


def test_tint_refuses(model, made, tmp_path):
    generator, spec, _ = made["tint"]
    for changes, what in (
        (dict(n_steps=6), "n_steps=5, not 6"),
        (dict(spacing="leading"), "spacing=trailing, not leading"),
        (dict(guidance_scale=3.0), "guidance_scale=7.5, not 3.0"),
    ):
        with pytest.raises(InputError, match=what):
            drawn(tint(model, **changes), spec)
    with pytest.raises(InputError, match="alpha must be 1"):
        drawn(TINT(model, PlainTextualInversionConfig(alpha=0.5, n_steps=5)), made["textual-inversion"][1])
    for other in ("textual-inversion", "da-fusion"):
        with pytest.raises(InputError, match=f"made by '{other}' and holds no null embeddings"):
            drawn(generator, made[other][1])
    stranger = LatentDiffusion.load(make_tiny_pipeline(tmp_path / "other", seed=9))
    with pytest.raises(InputError, match="load that model"):
        drawn(TINT(stranger, generator.config), spec)


# DA-Fusion


def test_starts():
    starts, ts = start_steps(50, (1.0, 0.75, 0.5, 0.25)), ddim_timesteps(50)
    assert [ts[s] for s in starts] == [999, 739, 499, 239] and start_steps(4) == [0, 1, 2, 3]
    for wrong in [(), (0.0,), (1.2,), (0.5, -0.1), (float("nan"),)]:
        with pytest.raises(InputError, match="strengths are"):
            DAFusionConfig(strengths=wrong)
    with pytest.raises(InputError, match="leave no step to run of 5"):
        DAFusionConfig(n_steps=5, strengths=(1.0, 0.1))
    with pytest.raises(InputError, match="precision is 'fp8'"):
        DAFusionConfig(precision="fp8")
    requests = list_requests(["cat", "dog"], 2000)
    found = draw_starts(requests, start_steps(50))
    counts = found.bincount(minlength=50)
    assert counts.min() > 45 and counts.max() < 120
    assert torch.equal(draw_starts(requests[:9], start_steps(50)), found[:9])
    four = draw_starts(requests, starts).bincount(minlength=50)
    assert (four[[0, 13, 25, 38]].float() / 4000 - 0.25).abs().max() < 0.03 and four.sum() == 4000


def test_a_batch_of_starts_equals_one_by_one(model):
    ts, starts = ddim_timesteps(8), torch.tensor([3, 0, 7, 0, 5])
    z = torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, calls = model.encode_text(model.tokenize(["red", "green", "blue", "cat", "dog"])).detach(), []

    def noise_fn(z, t, rows):
        calls.append(len(rows))
        return model.noise_pred(z, t, cond[rows])

    with torch.no_grad():
        batch = ddim_sample_from(noise_fn, z, starts, ts, model.alphas_cumprod)
        assert calls == [2, 2, 2, 3, 3, 4, 4, 5]  # only those that have started
        for i, s in enumerate(starts.tolist()):
            predict = lambda z, t, _: model.noise_pred(z, t, cond[i : i + 1])
            alone = ddim_sample(predict, z[i : i + 1], ts[s:], model.alphas_cumprod)
            torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-4)


def test_strength_1_is_the_noised_image(model, made):
    spec, noise = made["da-fusion"][1], torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    full = DAFusion(model, DAFusionConfig(**SMALL | dict(strengths=(1.0,))))
    start = full.noised(spec.tensors["z_0"], torch.zeros(7, dtype=torch.long), noise)
    torch.testing.assert_close(start, 0.06827 * spec.tensors["z_0"] + 0.99767 * noise, rtol=1e-4, atol=1e-4)
    moved = with_tensors(spec, z_0=spec.tensors["z_0"] + 5)
    assert (drawn(full, moved).images - drawn(full, spec).images).abs().flatten(1).amax(1).min() > 1e-3


def test_the_last_step_alone_gives_the_support_image(model, made):
    spec, support = made["da-fusion"][1], few([4, 2, 1])
    # the random autoencoder puts all digits in nearly one place
    apart = spec.tensors["z_0"] + 20 * torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    last = DAFusion(model, DAFusionConfig(**SMALL | dict(n_steps=50, strengths=(1 / 50,))))
    images = drawn(last, with_tensors(spec, z_0=apart), 7).images
    own = torch.stack([(support.labels == p.label).nonzero()[p.k, 0] for p in last.requests(spec, 7, seed=1)])
    gap = (images[:, None] - model.decode(apart)[None]).square().flatten(2).mean(2)
    assert torch.equal(gap.argmin(1), own)


def test_da_fusion_shares_tints_tokens(made):
    generator, spec, images = made["da-fusion"]
    assert torch.equal(made["tint"][1].tensors["tokens"], spec.tensors["tokens"])
    assert torch.equal(drawn(generator, made["tint"][1]).images, images.images)


# NAO


def test_log_norm_prior():
    r = torch.tensor([16383**0.5, 126.0, 128.0, 130.0, 120.0, 100.0, 90.51])
    expected = torch.tensor([-0.57236, -4.5777, -0.57238, -4.5673, -65.907, -852.88, -1582.5])
    torch.testing.assert_close(log_norm_prior(r, 16384), expected, rtol=3e-5, atol=3e-5)
    assert torch.isfinite(log_norm_prior(torch.zeros(1), 256)).all()


def test_straight_lines_and_circles():
    p, q = torch.randn(2, 1, 16384, generator=torch.Generator().manual_seed(0))
    line, circle = lerp_path(p, q, 50), nao.slerp_path(p, q, 50)
    lengths = [nao.path_pieces(x)[0].sum().item() for x in (line, circle)]
    assert 180 < lengths[0] < 184 and 200 < lengths[1] < 205
    assert -1.5e5 < path_integral(line).item() < -1.3e5 and -500 < path_integral(circle).item() < -0.572 * lengths[1]
    assert torch.isfinite(nao.slerp_path(p, p, 5)).all()


def test_paths_are_what_they_are_alone():
    g = torch.Generator().manual_seed(2)
    p, q = torch.randn(2, 3, 512, generator=g)
    q[2] = 0.5 * p[2] + 0.75**0.5 * q[2]  # the third pair lies closer together
    settings = NAOConfig(n_points=10)
    many, info = nao_paths(p, q, settings)
    assert torch.equal(many[:, 0], p) and torch.equal(many[:, -1], q)
    for i in range(3):
        one, alone = nao_paths(p[i : i + 1], q[i : i + 1], settings, seeds=[i])
        torch.testing.assert_close(many[i : i + 1], one, rtol=0, atol=1e-3)
        assert alone["steps"].item() == info["steps"][i].item()
    assert (path_integral(many) > path_integral(nao.slerp_path(p, q, 10))).all()
    assert len(info["steps"].unique()) > 1 and info["steps"].max() < 10000
    with pytest.raises(InputError, match="n_points is 2"):
        NAOConfig(n_points=2)


def test_centroids_are_what_they_are_alone():
    points = torch.randn(7, 256, generator=torch.Generator().manual_seed(1))
    labels, settings = torch.tensor([0, 1, 0, 0, 1, 0, 0]), NAOConfig(n_points=8)
    centroids, paths, _ = nao_centroids(points, labels, settings)
    assert (centroids.norm(dim=1) - 16).abs().max() < 1 and points[labels == 0].mean(0).norm() < 8
    cos = F.cosine_similarity(centroids[:1], points[labels == 0])
    assert cos.min() > 0.2 and cos.max() - cos.min() < 0.3
    for c in (0, 1):
        rows = (labels == c).nonzero()[:, 0]
        alone = nao_centroids(points[rows], torch.zeros(len(rows), dtype=torch.long), settings, seeds=rows.tolist())
        torch.testing.assert_close(alone[0][0], centroids[c], rtol=0, atol=1e-3)
        torch.testing.assert_close(alone[1], paths[rows], rtol=0, atol=1e-3)
    with pytest.raises(InputError, match="needs two or more"):
        nao_centroids(points[:3], torch.tensor([0, 0, 1]))


# SeedSelect


def plain_seed_select(model, encoder, seed, cond, ts, features, mean):
    "One seed, torch's own AdamW, no checkpoints, the update after the last rendering made and thrown away."
    seed, levels = seed.clone().requires_grad_(), model.alphas_cumprod
    adamw = torch.optim.AdamW([seed], lr=0.05)
    for j in range(5):
        if j == 3:
            adamw.param_groups[0]["lr"] = 0.005
        adamw.zero_grad()
        z, losses = seed, []
        for a, b in zip(ts, [*ts[1:], 0]):
            eps = model.noise_pred(z, a, cond)
            clean = (z - float(1 - levels[a]) ** 0.5 * eps) / float(levels[a]) ** 0.5
            z = float(levels[b]) ** 0.5 * clean + float(1 - levels[b]) ** 0.5 * eps
            seen = encoder(tuning.decode_with_gradient(model, z))
            losses.append(1 - F.cosine_similarity(seen, features).mean())
        loss = 10 * (0.05 * losses[0] + 0.25 * losses[1] + 0.7 * losses[2]) + F.mse_loss(z, mean)
        loss.backward()
        rendered, before = z.detach(), seed.detach().clone()
        adamw.step()
    return rendered, before


def test_seed_select_equals_the_plain_way(model, encoder):
    g, ts, n = torch.Generator().manual_seed(0), ddim_timesteps(3, "leading"), 2
    z_T, mean = torch.randn(2, n, *model.latent_shape, generator=g)
    cond = model.encode_text(model.tokenize(["red", "green"])).detach()
    features = F.normalize(torch.randn(n, 64, generator=g), dim=1)
    predict = guided_noise(model, cond, model.null_embedding(), 1.0)
    select = lambda ts=ts, encoder=encoder, **kw: tuning.seed_select(
        model, encoder, z_T, predict, ts, features, mean, SeedSelectConfig(**kw)
    )
    z_0, info = select()
    for i in range(n):
        one = [x[i : i + 1] for x in (z_T, cond, features, mean)]
        rendered, before = plain_seed_select(model, encoder, one[0], one[1], ts, *one[2:])
        torch.testing.assert_close(z_0[i : i + 1], rendered, rtol=0, atol=2e-4)
        torch.testing.assert_close(info["seeds"][i : i + 1], before, rtol=0, atol=2e-4)
    total = 10 * info["semantic"] + info["appearance"]
    assert (total[-1] < total[0]).all()
    torch.testing.assert_close(select(checkpoint=False)[0], z_0, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(z_0), tuning.decode_with_gradient(model, z_0), rtol=0, atol=1e-6)
        assert torch.equal(select(steps=1)[0], ddim_sample(predict, z_T, ts, model.alphas_cumprod))
    with pytest.raises(InputError, match="lets no gradient through"):
        select(encoder=torch.no_grad()(encoder.forward))
    with pytest.raises(InputError, match="2 sampling steps are fewer"):
        select(ts=ts[:2])
    with pytest.raises(InputError, match="steps of SeedSelect is 0"):
        SeedSelectConfig(steps=0)


def test_spelling(model):
    assert tuning.spelling(model, "red cat") == dict(words=2, spelled=[], cut=False)
    assert tuning.spelling(model, "red zebra") == dict(words=2, spelled=["zebra"], cut=False)
    assert tuning.spelling(model, "cat " * 20)["cut"]


def test_nao_seed_select_learns(model, encoder):
    generator = NAOSeedSelect(model, encoder, NAOSeedSelectConfig(**NAO_SMALL))
    spec = generator.specialize(few([3, 2, 2], ("digit 5", "red_cat", "zebra")), seed=1, progress=False)
    assert {k: tuple(v.shape) for k, v in spec.tensors.items()} == dict(
        labels=(7,),
        z_0=(7, 4, 8, 8),
        prompts=(3, 16, 32),
        z_T=(7, 4, 8, 8),
        centroids=(3, 4, 8, 8),
        paths=(7, 6, 4, 8, 8),
        nao_loss=(3,),
        features=(3, 64),
        encoder_probe=(1, 64),
    )
    assert generator.uses_class_names and spec.settings["encoder"] == "TinyEncoder"
    spelled = {c: s["spelled"] for c, s in spec.settings["spelling"].items()}
    assert spelled == {"digit 5": ["five"], "red_cat": [], "zebra": ["zebra"]}


def test_every_seed_is_used_once(made):
    generator, spec, _ = made["nao-seed-select"]
    requests = generator.requests(spec, 8, seed=1)
    seeds, inner = generator.seeds(spec, requests, seed=1), spec.tensors["paths"][:, 1:-1]
    for c, n in enumerate([3, 2, 2]):
        own = torch.stack([s for p, s in zip(requests, seeds) if p.label == c])
        points = inner[spec.tensors["labels"] == c].flatten(0, 1)
        match = torch.cdist(own.flatten(1), points.flatten(1)) < 1e-6
        assert (match.sum(1) == 1).all() and match.sum(0).max() == 1  # none twice
        assert (match[:n].nonzero()[:, 1] // 4).tolist() == list(range(n))  # the first n images: one from each path
    with pytest.raises(InputError, match="class 'digit 6' has 8 seeds"):
        generator.requests(spec, 9)


def test_parts_can_be_switched_off(model, encoder, made):
    generator, spec, images = made["nao-seed-select"]
    make = lambda **kw: NAOSeedSelect(model, encoder, NAOSeedSelectConfig(**NAO_SMALL | kw))
    support, raw = few([3, 2, 2]), drawn(make(seed_select=False), spec)
    assert (raw.images - images.images).abs().flatten(1).amax(1).min() > 1e-3
    with torch.no_grad():
        predict = guided_noise(model, spec.tensors["prompts"][raw.labels], model.null_embedding(), 1.0)
        seeds = generator.seeds(spec, generator.requests(spec, 3, 1), 1)
        plain = ddim_sample(predict, seeds, ddim_timesteps(3, "leading"), model.alphas_cumprod)
    torch.testing.assert_close(raw.images, model.decode(plain), rtol=0, atol=2e-3)
    bare = NAOSeedSelect(model, None, NAOSeedSelectConfig(**NAO_SMALL, seed_select=False))
    bare_spec = bare.specialize(support, seed=1, progress=False)
    assert set(bare_spec.tensors) == set(spec.tensors) - {"features", "encoder_probe"}
    direct = make(nao=False)
    direct_spec = direct.specialize(support, seed=1, progress=False)
    first = direct.seeds(direct_spec, direct.requests(direct_spec, 2))[:1]
    assert torch.equal(first, direct_spec.tensors["z_T"][support.labels == 0][:1])
    assert drawn(direct, direct_spec, 2).counts() == [2, 2, 2]
    with pytest.raises(InputError, match="class 'digit 6' has 2 seeds"):
        drawn(direct, direct_spec, 3)
    with pytest.raises(InputError, match="holds no paths"):
        drawn(generator, direct_spec)
    with pytest.raises(InputError, match="holds no features"):
        drawn(generator, bare_spec)


@pytest.mark.parametrize("prompt", ("token", "object"))
def test_prompts_without_the_name(prompt, model, encoder):
    generator = NAOSeedSelect(model, encoder, NAOSeedSelectConfig(**NAO_SMALL | dict(prompt=prompt)))
    spec = generator.specialize(few([3, 2, 2]), seed=1, progress=False)
    assert not generator.uses_class_names and "spelling" not in spec.settings and len(drawn(generator, spec, 1)) == 3
    same = torch.equal(spec.tensors["prompts"][0], spec.tensors["prompts"][2])
    assert same == (prompt == "object")  # which says the same to all


def test_nao_seed_select_refuses(model, encoder, made):
    generator, spec, _ = made["nao-seed-select"]
    make = lambda **kw: NAOSeedSelect(model, encoder, NAOSeedSelectConfig(**NAO_SMALL | kw))
    support = few([3, 1, 2])
    with pytest.raises(InputError, match="class 'digit 6' has one support image"):
        generator.specialize(support, progress=False)
    with pytest.raises(InputError, match="SeedSelect needs an image encoder"):
        NAOSeedSelect(model)
    with pytest.raises(InputError, match="prompt is 'poem'"):
        make(prompt="poem")
    with pytest.raises(InputError, match="invert_steps=6, not 7"):
        drawn(make(invert_steps=7), spec)
    with pytest.raises(InputError, match="prompt=class, not object"):
        drawn(make(prompt="object"), spec)
    with pytest.raises(InputError, match="image encoder 'tiny', not with this 'another'"):
        drawn(NAOSeedSelect(model, TinyEncoder(9), generator.config, "another"), spec)


# Pools and retrieval

COLORS = dict(red=(0.9, 0.1, 0.1), green=(0.1, 0.9, 0.1), blue=(0.1, 0.1, 0.9))


def colored(name, i):
    "A noisy picture of one colour; a larger `i` is noisier."
    noise = torch.rand(3, 20, 24, generator=rng_for("picture", name, i))
    return to_uint8(torch.tensor(COLORS[name]).view(3, 1, 1) * (1 - 0.03 * i) + noise * 0.03 * i)


def color_of(x):
    return x.mean((2, 3)) - 0.4


def color_called(texts):
    return torch.stack([torch.tensor(COLORS[t.split()[-1]]) - 0.4 for t in texts])


EYE = Encoder(color_of, partial(resize, size=8), "colour", "colour 1", color_called)


@pytest.fixture(scope="module")
def pictures():
    images = torch.stack([colored(c, i) for i in range(10) for c in COLORS])
    return ImageSet(images, torch.zeros(30, dtype=torch.long), ("unlabelled",))


@pytest.fixture(scope="module")
def colors():  # these also lie in the pool
    return ImageSet(torch.stack([colored(c, 2) for c in COLORS]), torch.arange(3), tuple(COLORS))


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory, pictures):
    "The same pictures as files, parquet files and shards."
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    home = tmp_path_factory.mktemp("pools")
    for i, x in enumerate(pictures.images):
        write_image(x, home / "pool" / f"{i // 10}" / f"{i:03d}.png")
    files = sorted((home / "pool").rglob("*.png"))
    rows = [dict(bytes=f.read_bytes(), path=None) for f in files]
    (home / "parquet").mkdir()
    (home / "shards").mkdir()
    for k in range(2):
        table = pa.table(dict(image=rows[15 * k : 15 * k + 15], text=["?"] * 15))
        pq.write_table(table, home / "parquet" / f"{k}.parquet", row_group_size=4)
        with tarfile.open(home / "shards" / f"{k}.tar", "w") as t:
            for f in files[15 * k : 15 * k + 15]:
                t.add(f, f.name)
    with tarfile.open(home / "packed.tar", "w:gz") as t:
        t.add(home / "shards" / "0.tar", "0.tar")
    return home


def test_forms_of_pools(pictures, pool_folder, tmp_path):
    pools = [open_pool(p) for p in (pictures, *(pool_folder / f for f in ("pool", "parquet", "shards")))]
    for p in pools:
        assert len(p) == 30 and all(torch.equal(p.pixels(i), pictures.images[i]) for i in (0, 29, 14, 15, 3)), type(p)
        assert torch.equal(build_index(p, EYE)[0], build_index(pools[0], EYE)[0])
    assert len({p.fingerprint() for p in pools}) == 4
    assert (
        len(open_pool(pool_folder / "parquet" / "0.parquet")) == len(open_pool(pool_folder / "shards" / "1.tar")) == 15
    )
    (pool_folder / "pool" / "new.png").write_bytes((pool_folder / "pool" / "0" / "000.png").read_bytes())
    assert open_pool(pool_folder / "pool").fingerprint() != pools[1].fingerprint()
    (pool_folder / "pool" / "new.png").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.zip").write_bytes(b"?")
    for path, what in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "x.zip", "neither a folder nor"),
        (pool_folder / "packed.tar", "decompress it first"),
    ):
        with pytest.raises(InputError, match=what):
            open_pool(path)
    with pytest.raises(InputError, match="no column 'jpg'; its columns are image, text"):
        open_pool(pool_folder / "parquet", "jpg")


def test_index_of_another_encoder_is_refused(pictures, tmp_path):
    features, readable = build_index(open_pool(pictures), EYE, tmp_path / "index.safetensors", part=8)
    assert readable.all() and (features.float().norm(dim=1) - 1).abs().max() < 1e-3
    other = Encoder(color_of, EYE.prepare, "x", "colour 2")
    with pytest.raises(InputError, match="another encoder"):
        build_index(open_pool(pictures), other, tmp_path / "index.safetensors")


def test_unreadable_files_are_never_chosen(pictures, colors, pool_folder):
    whole = Retrieval(pictures, EYE, RetrievalConfig(threshold=0.9, top_k=6))
    (pool_folder / "pool" / "broken.jpg").write_bytes(b"not an image")
    (pool_folder / "pool" / "empty.png").write_bytes(b"")
    broken = Retrieval(pool_folder / "pool", EYE, RetrievalConfig(threshold=0.9, top_k=6))
    spec = broken.specialize(colors)
    assert (spec.settings["n_unreadable"], spec.settings["n_pool"]) == (2, 32)
    found = drawn(broken, spec, 5)
    assert torch.equal(found.images, drawn(whole, whole.specialize(colors), 5).images)
    assert (found.counts(), found.size) == ([5, 5, 5], (20, 24))
    (pool_folder / "pool" / "broken.jpg").unlink()
    (pool_folder / "pool" / "empty.png").unlink()


def test_retrieval_by_text_and_by_image(pictures, colors):
    by_text = Retrieval(pictures, EYE, RetrievalConfig(threshold=0.9, top_k=6)).specialize(colors)
    for c in range(3):
        own = by_text.tensors["labels"] == c
        assert (by_text.tensors["scores"][own].diff() <= 0).all() and (by_text.tensors["indices"][own] % 3 == c).all()
    by_image = Retrieval(pictures, EYE, RetrievalConfig("image", threshold=0.9, top_k=10, too_few="fewer"))
    spec = by_image.specialize(colors)
    indices, labels = spec.tensors["indices"], spec.tensors["labels"]
    assert [set((indices[labels == c] // 3).tolist()) for c in range(3)] == [{*range(10)} - {2}] * 3
    facts = spec.settings["n_copies"], spec.settings["n_passed"], spec.settings["n_chosen"]
    assert facts == ([1] * 3, [10] * 3, [9] * 3)
    images = torch.cat([pictures.images, pictures.images[:3]])
    twice = ImageSet(images, torch.zeros(33, dtype=torch.long), ("unlabelled",))
    assert Retrieval(twice, EYE, by_image.config).specialize(colors).settings["n_chosen"] == [9] * 3
    every = drawn(by_image, spec, 9)
    assert len({image_key(to_uint8(x)) for x in every.images}) == 27  # nothing twice
    shared = lambda exclusive: Retrieval(
        pictures, EYE, RetrievalConfig("image", threshold=-1.0, top_k=30, exclusive=exclusive, too_few="fewer")
    )
    assert [shared(e).specialize(colors).settings["n_passed"] for e in (True, False)] == [[10] * 3, [30] * 3]


def test_too_few_is_never_hidden(pictures, colors):
    asked = lambda too_few: Retrieval(pictures, EYE, RetrievalConfig(threshold=0.9999, top_k=6, too_few=too_few))
    n = asked("fewer").specialize(colors).settings["n_chosen"]
    assert 0 < max(n) < 5
    with pytest.warns(UserWarning, match="no image is repeated"):
        assert drawn(asked("fewer"), asked("fewer").specialize(colors), 5).counts() == n
    filled = asked("fill").specialize(colors)
    assert drawn(asked("fill"), filled, 5).counts() == [5] * 3 and filled.settings["n_below"] == [6 - k for k in n]
    with pytest.raises(InputError, match="passed the threshold 1 for class 'red'"):
        Retrieval(pictures.subset([27, 28, 29]), EYE, RetrievalConfig(threshold=1.0)).specialize(colors)


def test_retrieval_refuses(pictures, colors):
    generator = Retrieval(pictures, EYE, RetrievalConfig("image", threshold=0.9, top_k=9))
    other = Retrieval(pictures.subset(range(29)), EYE, generator.config)
    with pytest.raises(InputError, match="another pool"):
        drawn(other, generator.specialize(colors), 1)
    with pytest.raises(InputError, match="made by 'tint'"):
        drawn(generator, Specialization("tint", {}, ()), 1)
    with pytest.raises(InputError, match="encodes no texts"):
        Retrieval(pictures, Encoder(color_of, EYE.prepare, "colour", "1"))
    with pytest.raises(InputError, match="class 'blue' has no support image"):
        generator.specialize(colors.subset([0, 1]))
    for wrong, what in (
        (dict(query="both"), "query is"),
        (dict(threshold=2), "threshold is"),
        (dict(too_few="?"), "too_few is"),
        (dict(top_k=0), "top_k is"),
        (dict(template="a photo"), "template is"),
        (dict(center=True), "center is for"),
    ):
        with pytest.raises(InputError, match=what):
            RetrievalConfig(**wrong)


def test_the_index_lies_in_the_cache(pictures, colors, encoder, tmp_path):
    known = Resources(cache=tmp_path, pool=lambda: pictures, encoder=lambda: encoder)
    build("retrieval", known).specialize(colors)
    assert [p.name[:5] for p in tmp_path.iterdir()] == ["pool-"]
    build("retrieval", known).specialize(colors)
    assert len(list(tmp_path.iterdir())) == 1
