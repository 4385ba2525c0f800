"""SIDCLIP's mixtures: the embedded model from end to end with random weights, and Kandinsky 2.2 and Stable unCLIP as
small random pipelines of the same layout, with the traps of each."""

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stand_ins import make_prior_pipeline

from tiny_nbdev.core import quiet_libraries, rng_for
from tiny_nbdev.data.class_names import without_photos
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.diffusion.prior import RidgePrior, save_prior
from tiny_nbdev.diffusion.tiny import make_tiny_pipeline
from tiny_nbdev.diffusion.tokenizer import write_clip_tokenizer
from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate.gate import label_accuracy
from tiny_nbdev.evaluate.protocol import read_rows
from tiny_nbdev.generate.base import Resources, Specialization, TaskSize, generators
from tiny_nbdev.generate.clip_mix import SIDCLIP, SIDCLIPKandinskyConfig, parse_weights
from tiny_nbdev.generate.unclip_pipelines import (
    KandinskyConfig,
    KandinskyUnCLIP,
    StableUnCLIP,
    StableUnCLIPConfig,
)
from tiny_nbdev.run.drawn import SyntheticImages
from tiny_nbdev.run.evaluate import evaluate
from tiny_nbdev.run.experiment import make_experiment
from tiny_nbdev.run.runner import Task
from tiny_nbdev.run.specialize import prepare, specialize

D = 32  # length of the small pipelines' embeddings

# The embedded model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small pipeline that reads image tokens, and beside it a prior for the same encoder and sentences."
    return make_prior_pipeline(tmp_path_factory.mktemp("reads_images"))


def how(folder, **more):
    changes = {"generator.diffusion": str(folder), "generator.config.prior": str(folder / "prior.safetensors")}
    changes |= {"generator.config.n_steps": 2, "generator.config.precision": "fp32"}
    return dict(bundle="photos", generator="sidclip", changes=changes | more, device="cpu")


def files(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted((out / "synthetic").rglob("*.png"))}


def test_specialize_draws_mixtures_and_goes_on(folder, photos, tmp_path):
    said = []
    specialize(photos, tmp_path / "run", per_class=3, say=said.append, **how(folder))
    assert "SIDCLIP: caption and photos by number of photos 0: 1, 1: 0.4:0.6, 2: 0.2:0.4:0.4; 2 steps" in said[0]
    whole = files(tmp_path / "run")
    spec = load_file(tmp_path / "run" / "specialization.safetensors")
    assert len(whole) == 9 and spec["features"].shape == (9, 1280)
    specialize(photos, tmp_path / "more", per_class=4, say=lambda *_: None, **how(folder))
    more = files(tmp_path / "more")
    assert len(more) == 12 and all(more[k] == v for k, v in whole.items()), "a longer run begins with the same images"


def test_settings_decide_what_is_drawn(folder, photos):
    runner, inputs = prepare(photos, mix_weights=parse_weights("1,0.4:0.6"), guidance=3.0, **how(folder))
    g, task = runner.generator, Task(inputs.support)
    assert g.config.weights == ((1.0,), (0.4, 0.6)) and g.config.guidance_scale == 3.0
    assert runner.shown(task).size == (22, 22)
    key = runner.images_key(task)
    other, _ = prepare(photos, guidance=3.0, **how(folder))
    assert other.images_key(task) != key
    assert generators["sidclip"].cost(g.config, TaskSize(3, 9, 4)) == dict(
        encoding=dict(encoder=9), sampling=dict(unet=3 * 4 * 2 * 2, decode=12)
    )


def test_missing_images_are_drawn_as_before(folder, photos):
    runner, inputs = prepare(photos, **how(folder))
    g = runner.generator
    g.config.batch_size = 4
    spec = g.specialize(runner.shown(Task(inputs.support)))
    drawn = lambda **kw: {p: x for b in g.sample(spec, 3, 7, **kw) for p, x in zip(b.paths, b.images)}
    whole, rest = drawn(), drawn(skip=lambda name, i: (name, i) != ("dog", 1))
    assert list(rest) == ["dog/00001.png"] and torch.equal(rest["dog/00001.png"], whole["dog/00001.png"])


def test_class_names_alone_are_drawn_into_a_folder(folder, photos, tmp_path):
    g = prepare(photos, **how(folder))[0].generator
    classes = ("Granny-Smith", "oak_tree")
    store = SyntheticImages(tmp_path / "drawn", classes)
    spec = store.specialize(g, without_photos(classes), 3, tmp_path / "work")
    assert spec.tensors["features"].shape == (0, 1280)
    assert store.draw(g, Specialization.load(store.spec_file), 2, 3) == 4 and store.load(2).counts() == [2, 2]
    assert store.draw(g, spec, 2, 3) == 0, "nothing is missing"


def test_evaluate_measures_mixtures(folder, tmp_path):
    more = dict(episodes=1, split="test", say=lambda *_: None, per_class=2, preset="photos")
    lax = {"generator.gate": 1e-9, "generator.must_help": False}
    evaluate(tmp_path / "out", "digits", **more, **how(folder, **lax))
    row = next(iter(read_rows(next((tmp_path / "out").glob("*sidclip.csv"))).values()))
    assert 0 <= row["drawn_agreement"] <= 1 and row["gate_open"] == 1


def test_refusals(folder, photos, tmp_path):
    built = lambda where, **kw: prepare(photos, **how(where, **kw))[0].generator
    plain = make_tiny_pipeline(tmp_path / "plain", prediction_type="v_prediction")
    shutil.copy(folder / "prior.safetensors", plain)
    with pytest.raises(InputError, match="reads words only"):
        built(plain)
    with pytest.raises(InputError, match="is no prior of the bundle photos"):
        built(folder, **{"generator.config.prior": "rigde"}).identity()
    other = RidgePrior.fit(torch.randn(5, 384), torch.rand(5, 1280), about=dict(encoder="resnet18"))
    save_prior(other, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="was made for another encoder"):
        built(folder, **{"generator.config.prior": str(tmp_path / "other.safetensors")}).identity()
    with pytest.raises(InputError, match="weights for 1 photos are 0.4, 0.5"):
        built(folder, **{"generator.config.weights": [[1.0], [0.4, 0.5]]})
    with pytest.raises(InputError, match="n_steps is 0"):
        built(folder, **{"generator.config.n_steps": 0})


def test_label_accuracy_per_class():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    assert label_accuracy(logits, torch.tensor([0, 0, 1, 1]), 3) == dict(mean=0.5, classes=[0.5, 0.5, None])


# Small pipelines


def clip_parts(tokenizer):
    "A CLIP of one layer, the same for both models."
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    n = write_clip_tokenizer(tokenizer, ["red cat", "dog"], 77)
    ends = dict(bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1)
    size = dict(hidden_size=D, intermediate_size=37, projection_dim=D, num_hidden_layers=1, num_attention_heads=4)
    text = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=n, max_position_embeddings=77, **size, **ends))
    text.get_input_embeddings().weight.data.normal_(std=0.5)  # words must matter, also untrained
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=32, patch_size=8, **size))
    square = dict(height=32, width=32)
    processor = CLIPImageProcessor(crop_size=square, size=dict(shortest_edge=32))
    return text.eval(), CLIPTokenizer.from_pretrained(tokenizer), vision.eval(), processor


def small_prior(width=D):
    "A prior of one layer and its scheduler."
    from diffusers import PriorTransformer, UnCLIPScheduler

    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=width, num_layers=1)
    prior.clip_std.data.fill_(1.0)
    prior.clip_mean.data.normal_()
    how = dict(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0)
    return prior.eval(), UnCLIPScheduler(num_train_timesteps=1000, clip_sample=True, **how)


def small_decoder(width=D):
    "Kandinsky's decoder: image embeddings in, learned variance out, and a MoVQ."
    from diffusers import DDIMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel

    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=width,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    beta = dict(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, prediction_type="epsilon")
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, set_alpha_to_one=False, **beta)
    return KandinskyV22Pipeline(unet=unet.eval(), movq=movq.eval(), scheduler=scheduler)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    "Folders: Kandinsky's prior and decoder, Stable unCLIP, and Karlo's prior for it."
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        KandinskyV22PriorPipeline,
        StableUnCLIPImg2ImgPipeline,
        UNet2DConditionModel,
    )
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPTextModel

    root = tmp_path_factory.mktemp("pipelines")
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(0)
        text, tokenizer, vision, processor = clip_parts(root / "tokenizer")
        prior, scheduler = small_prior()
        parts = dict(prior=prior, text_encoder=text, tokenizer=tokenizer, scheduler=scheduler)
        KandinskyV22PriorPipeline(**parts, image_encoder=vision, image_processor=processor).save_pretrained(
            root / "prior"
        )
        small_decoder().save_pretrained(root / "decoder")
        small_decoder(D // 2).save_pretrained(root / "narrow")
        for name, part in dict(parts, prior_scheduler=scheduler).items():
            if name != "scheduler":
                part.save_pretrained(root / "karlo" / name)
        unet = UNet2DConditionModel(
            sample_size=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            attention_head_dim=(2, 4),
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * D,  # the embedding, and the noise level's
            cross_attention_dim=D,
            layers_per_block=1,
        )
        beta = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
        StableUnCLIPImg2ImgPipeline(
            feature_extractor=processor,
            image_encoder=vision,
            image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=D),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=tokenizer,
            text_encoder=CLIPTextModel(text.config),
            unet=unet,
            scheduler=DDIMScheduler(prediction_type="v_prediction", set_alpha_to_one=False, **beta),
            vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
        ).save_pretrained(root / "stable")
    return root


def kandinsky(root, **more):
    paths = dict(prior_path=str(root / "prior"), decoder_path=str(root / "decoder"))
    small = dict(prior_steps=3, n_steps=2, image_size=64, stored_size=16)
    return KandinskyUnCLIP(KandinskyConfig(**paths | small | more))


def stable(root, **more):
    paths = dict(path=str(root / "stable"), prior_path=str(root / "karlo"))
    return StableUnCLIP(StableUnCLIPConfig(**paths | dict(prior_steps=3, n_steps=2, stored_size=16) | more))


def picture(seed=0, size=(40, 32)):
    pixels = torch.randint(256, (*size, 3), generator=rng_for("picture", seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()), pixels.permute(2, 0, 1)[None].float() / 255


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("make", (kandinsky, stable))
def test_captions_pass_the_prior(pipelines, make):
    models = make(pipelines)
    found = models.encode_text_as_image(["red cat", "dog"], 2, [5, 6, 7, 8])
    assert found.shape == (4, D) and (found[0] - found[1]).abs().max() > 1e-4, "another seed, another embedding"
    alone = models.prior("dog", num_inference_steps=3, guidance_scale=4.0, generator=seeded(8)).image_embeds
    torch.testing.assert_close(found[3:], alone, rtol=1e-4, atol=1e-4)
    ids = models.prior.tokenizer(["dog"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        raw = models.prior.text_encoder(ids).text_embeds
    assert (raw - found[3:]).abs().max() > 0.1, "never the text's own embedding"
    with torch.no_grad():
        models.prior.prior.clip_mean += 1
    shifted = models.encode_text_as_image(["dog"], 1, [8])
    torch.testing.assert_close(shifted, found[3:] + 1, rtol=1e-4, atol=1e-4)


def test_a_mixture_is_what_kandinsky_interpolates(pipelines):
    models, (image, pixels) = kandinsky(pipelines), picture()
    how = dict(num_inference_steps=3, guidance_scale=4.0)
    wanted = models.prior.interpolate(["red cat", image], [0.4, 0.6], generator=seeded(5), **how)
    caption, photo = models.encode_text_as_image(["red cat"], 1, [5]), models.encode_images(pixels)
    torch.testing.assert_close(0.4 * caption + 0.6 * photo, wanted.image_embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(models.negative, wanted.negative_image_embeds, rtol=1e-4, atol=1e-4)
    assert models.negative.abs().max() > 1e-3, "the embedding of an image of zeros, no zeros"
    # nothing is normalised and nobody checks the weights there; here they must sum to 1
    double = models.prior.interpolate(["red cat", image], [0.8, 1.2], generator=seeded(5), **how)
    torch.testing.assert_close(double.image_embeds, 2 * wanted.image_embeds, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="sum to 1"):
        SIDCLIPKandinskyConfig(weights=((1.0,), (0.8, 1.2)))
    # a tensor would count as prepared pixels
    wrong = models.prior.image_encoder(torch.nn.functional.interpolate(pixels, (32, 32))).image_embeds
    assert (wrong - photo).abs().max() > 1e-3


def test_kandinskys_decoder_gets_embeddings_alone(pipelines, monkeypatch):
    from diffusers import KandinskyV22PriorPipeline

    models = kandinsky(pipelines)
    assert type(models.prior) is KandinskyV22PriorPipeline, "emb2emb's interpolate fails for strings"
    assert "prompt" not in inspect.signature(type(models.decoder).__call__).parameters
    asked, call = [], type(models.decoder).__call__
    monkeypatch.setattr(type(models.decoder), "__call__", lambda self, **kw: asked.append(kw) or call(self, **kw))
    models.decode(torch.randn(2, D, generator=rng_for("e")), 2, 0)
    assert [len(a["image_embeds"]) for a in asked] == [1] * 4
    assert all(torch.equal(a["negative_image_embeds"], models.negative) and a["output_type"] == "np" for a in asked)


@pytest.mark.parametrize("make", (kandinsky, stable))
@pytest.mark.parametrize("guidance", (1.0, 4.0))
def test_images_lie_in_range_and_depend_on_their_own_seed(pipelines, make, guidance):
    models, e = make(pipelines, guidance_scale=guidance), torch.randn(2, D, generator=rng_for("e"))
    images = models.decode(e, 2, [1, 2, 3, 4])
    assert images.shape == (4, 3, 16, 16) and 0 <= images.min() and images.max() <= 1
    models.batch_size = 4
    torch.testing.assert_close(models.decode(e, 2, [1, 2, 3, 4]), images, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(models.decode(e[1:], 1, [4])[0], images[3], rtol=1e-3, atol=1e-3)
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert (models.decode(-3 * e[:1], 1, [1])[0] - images[0]).abs().max() > 1e-4, "the embedding matters"
    with pytest.raises(InputError, match=f"draws from .n, {D}."):
        models.decode(torch.zeros(1, D + 1))


def test_stable_unclips_own_noise_level(pipelines):
    e = torch.randn(1, D, generator=rng_for("e"))
    quiet, loud = (stable(pipelines, noise_level=n).decode(e, 1, [1]) for n in (0, 500))
    assert (quiet - loud).abs().max() > 1e-4
    with pytest.raises(InputError, match="noise_level is 1000"):
        stable(pipelines, noise_level=1000)


def test_stable_unclip_needs_a_prior_for_captions_only(pipelines):
    models = stable(pipelines, prior_path="")
    config = generators.config("sidclip-unclip", dict(weights=[[1.0], [0.0, 1.0]], n_steps=2))
    g = SIDCLIP(models, config)
    photos = ImageSet(
        (torch.cat([picture(0)[1], picture(1)[1]]) * 255).byte(), torch.tensor([0, 1]), ("red cat", "dog")
    )
    assert sum(len(b) for b in g.sample(g.specialize(photos), 1)) == 2
    with pytest.raises(InputError, match="prior needs a folder .*generator.config.prior_path"):
        list(g.sample(g.specialize(without_photos(photos.classes)), 1))


def test_kandinsky_behind_the_registry(pipelines):
    data = dict(prior_path=str(pipelines / "prior"), decoder_path=str(pipelines / "decoder"), batch_size=3)
    data |= dict(prior_steps=2, n_steps=2, image_size=64, stored_size=32)
    config = generators.config("sidclip-kandinsky", json.loads(json.dumps(data)))
    g = generators["sidclip-kandinsky"].build(config, Resources())
    images = torch.cat([picture(i)[1] for i in range(3)])
    spec = g.specialize(ImageSet((images * 255).byte(), torch.tensor([1, 2, 2]), ("bee", "dog", "red cat")))
    drawn = ImageSet.concat(list(g.sample(spec, 2, 1)))
    assert drawn.size == (32, 32) and drawn.counts() == [2, 2, 2]
    assert "with Kandinsky 2.2" in generators.describe("sidclip-kandinsky", config)
    made = make_experiment("photos", generator="sidclip-kandinsky", changes={"generator.config.n_steps": 7})
    assert made.generator.config["n_steps"] == 7 and made.generator.config["guidance_scale"] == 4.0


def test_what_does_not_fit_is_refused(pipelines, tmp_path):
    with pytest.raises(InputError, match=f"draws from embeddings of {D // 2} numbers"):
        kandinsky(pipelines, decoder_path=str(pipelines / "narrow"))
    broken = shutil.copytree(pipelines / "decoder", tmp_path / "decoder")
    next((broken / "unet").glob("*.safetensors")).unlink()
    for where in (broken, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="The decoder of Kandinsky 2.2 could not be loaded") as e:
            kandinsky(pipelines, decoder_path=str(where))
        assert len(str(e.value).splitlines()) == 1 and "generator.config.decoder_path=FOLDER" in str(e.value)
    assert np.isfinite(kandinsky(pipelines).encode_images(picture()[1]).numpy()).all()
