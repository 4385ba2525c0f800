"Image tokens and variations: a model that reads photos, from end to end, with random weights."

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from stand_ins import make_token_pipeline

from tiny_nbdev.classify.backbones import extract_features
from tiny_nbdev.classify.teachers import teacher_logits
from tiny_nbdev.core import load_json, rng_for
from tiny_nbdev.diffusion.image_tokens import load_image_tokens
from tiny_nbdev.diffusion.model import LatentDiffusion
from tiny_nbdev.diffusion.tiny import make_tiny_pipeline
from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate.protocol import read_rows
from tiny_nbdev.generate.base import Resources, Specialization
from tiny_nbdev.generate.variations import VariationsConfig, build_variations
from tiny_nbdev.models.bundle import MANIFEST, get_bundle, write_bundle
from tiny_nbdev.run.evaluate import evaluate
from tiny_nbdev.run.runner import Task
from tiny_nbdev.run.specialize import prepare, specialize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small pipeline that reads image tokens."
    return make_token_pipeline(tmp_path_factory.mktemp("reads_images"))[0]


def how(folder, **more):
    changes = {"generator.diffusion": str(folder), "generator.config.n_steps": 2, "generator.config.precision": "fp32"}
    return dict(bundle="photos", generator="variations", changes=changes | more, device="cpu")


def files(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted((out / "synthetic").rglob("*.png"))}


def test_specialize_draws_variations(folder, photos, tmp_path):
    said = []
    specialize(photos, tmp_path / "run", per_class=3, say=said.append, **how(folder))
    assert "mixtures of 2 photos, noise 0.1, 2 DDIM steps, guidance 2" in said[0]
    whole = files(tmp_path / "run")
    assert len(whole) == 9
    spec = load_file(tmp_path / "run" / "specialization.safetensors")
    assert spec["features"].shape == (9, 1280) and sorted(spec["labels"].bincount().tolist()) == [2, 3, 4]
    # a longer run begins with the same images
    specialize(photos, tmp_path / "more", per_class=4, say=lambda *_: None, **how(folder))
    more = files(tmp_path / "more")
    assert len(more) == 12 and all(more[k] == v for k, v in whole.items())


def test_photos_are_seen_at_the_size_of_the_training(folder, photos):
    runner, inputs = prepare(photos, **how(folder))
    task = Task(inputs.support)
    assert runner.shown(task).size == (22, 22) and runner.small(task).size == (64, 64)
    assert runner.generator.identity()["image_tokens"] == load_image_tokens(runner.model).fingerprint()
    key = runner.images_key(task)
    other, _ = prepare(photos, **how(folder, **{"generator.config.noise": 0.2}))
    assert other.images_key(task) != key


def test_what_is_asked_for_decides(folder):
    generator = build_variations(
        VariationsConfig(n_steps=3, precision="fp32"), Resources(diffusion=lambda: LatentDiffusion.load(folder))
    )
    noise, none = torch.randn(2, *generator.model.latent_shape, generator=rng_for("z")), torch.zeros(2, 1280)
    a, b = torch.randn(2, 2, 1280, generator=rng_for("features"))
    first, again, other = (generator.draw(f, none, noise) for f in (a, a, b))
    assert torch.equal(first, again) and first.shape == (2, 3, 32, 32)
    assert (first - other).abs().max() > 1e-3
    spread = generator.draw(a, torch.full((2, 1280), 2.0), noise)
    assert (first - spread).abs().max() > 1e-3


def test_refusals(folder, photos, tmp_path):
    built = lambda where: prepare(photos, **how(where))[0].generator
    parts = {k: v for k, v in load_json(get_bundle("photos").folder / MANIFEST).items() if k != "diffusion"}
    write_bundle(tmp_path, parts | dict(name="bare", students={}, clip={}, files={}))
    with pytest.raises(InputError, match="The bundle bare has no diffusion"):
        prepare(photos, bundle=str(tmp_path), generator="variations", device="cpu")
    plain = make_tiny_pipeline(tmp_path / "plain", prediction_type="v_prediction")
    with pytest.raises(InputError, match="reads words only .*choose a bundle whose model reads images"):
        built(plain)
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "image_tokens" / "config.json").read_text())
    (broken / "image_tokens" / "config.json").write_text(json.dumps(config | dict(hidden=9)))
    with pytest.raises(InputError, match="model.safetensors does not fit its config.json"):
        load_image_tokens(LatentDiffusion.load(broken))
    (broken / "image_tokens" / "config.json").write_text(json.dumps(config | dict(encoder_sha256="00")))
    with pytest.raises(InputError, match="trained with other weights of efficientnet_lite0"):
        built(broken)
    specialize(photos, tmp_path / "run", per_class=1, say=lambda *_: None, **how(folder))
    config = load_json(folder / "image_tokens" / "config.json")
    (broken / "image_tokens" / "config.json").write_text(json.dumps(config | dict(source_side=20)))
    generator = built(broken)
    spec = Specialization.load(tmp_path / "run" / "specialization.safetensors")
    with pytest.raises(InputError, match="other image tokens; specialise again"):
        next(generator.sample(spec, 1))


def test_a_tiny_autoencoder_serves(tmp_path):
    from diffusers import AutoencoderTiny

    folder = make_tiny_pipeline(tmp_path / "m", prediction_type="v_prediction")
    channels = json.loads((folder / "vae" / "config.json").read_text())["latent_channels"]
    shutil.rmtree(folder / "vae")
    sizes = dict(encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3)
    blocks = dict(num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderTiny(latent_channels=channels, scaling_factor=2.0, **sizes, **blocks)
    vae.register_to_config(block_out_channels=[8, 8, 8])
    vae.save_pretrained(folder / "vae")
    index = load_json(folder / "model_index.json")
    (folder / "model_index.json").write_text(json.dumps(index | dict(vae=["diffusers", "AutoencoderTiny"])))
    model = LatentDiffusion.load(folder)
    x = torch.rand(2, 3, 32, 32, generator=rng_for("x"))
    z = model.encode(x)
    with torch.no_grad():
        want = vae.eval().encode(x * 2 - 1).latents
        assert torch.allclose(z, want * 2, atol=1e-5) and z.shape == (2, *model.latent_shape)
        assert torch.allclose(model.decode(z), (vae.decode(want).sample / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_a_gate_decides_whether_drawn_images_are_learned_from(folder, photos, queries, tmp_path):
    def student(name, **kw):
        said = []
        specialize(photos, tmp_path / name, queries, say=said.append, **kw)
        return load_file(tmp_path / name / "model.safetensors"), load_json(tmp_path / name / "metrics.json"), said[-1]

    alone, m, _ = student("alone", bundle="photos", generator="none", device="cpu")
    assert m["gate"] is None
    planned = []
    specialize(photos, tmp_path / "p", plan_only=True, say=planned.append, **how(folder, **{"generator.gate": 0.9}))
    assert "open at 90% of what the teacher reaches on left-out photos" in planned[0]
    shut, m, said = student("shut", per_class=2, **how(folder, **{"generator.gate": 9.0}))
    assert all(torch.equal(shut[k], v) for k, v in alone.items())
    assert m["gate"]["open"] is False and 0 <= m["gate"]["agreement"] <= 1 and m["n_synthetic"] == 6
    assert "they are not learned from (--set generator.gate=0" in said and "with synthetic" not in said
    report = lambda name: (tmp_path / name / "report.html").read_text()
    assert "they are not learned from" in report("shut") and "with the help of" not in report("shut")
    assert m["gate"]["gain"] is not None and "the student's loss on left-out photos" in said
    lax = {"generator.gate": 1e-9, "generator.must_help": False}
    wide, m, said = student("wide", per_class=2, **how(folder, **lax))
    assert m["gate"]["gain"] is None
    assert m["gate"]["open"] is True and "they are learned from" in said and "with synthetic images" in said
    assert not all(torch.equal(wide[k], v) for k, v in alone.items()) and "with the help of 6" in report("wide")


def test_the_gate_stands_in_the_rows_of_evaluate(folder, tmp_path):
    more = dict(episodes=1, split="test", say=lambda *_: None, per_class=2, preset="photos")
    lax = {"generator.gate": 0.5, "generator.must_help": False}
    evaluate(tmp_path / "out", "digits", **more, **how(folder, **lax))
    row = next(iter(read_rows(next((tmp_path / "out").glob("*.csv"))).values()))
    assert row["gate_open"] in (0, 1) and row["gate_open"] == (row["drawn_agreement"] >= 0.5 * row["left_out_accuracy"])
    assert load_json(next((tmp_path / "out").glob("*.summary.json")))["gate_open"] == row["gate_open"]


def start_from(folder, photos, start, **settings):
    "Specialization of plain textual inversion, and its generator."
    learn = dict(start=start, steps=3, batch_size=2, lr=1e-2) | settings
    changes = {"generator.diffusion": str(folder), "generator.config.n_steps": 2}
    changes |= {f"generator.config.textual_inversion.{k}": v for k, v in learn.items()}
    runner, inputs = prepare(photos, bundle="photos", generator="textual-inversion", changes=changes, device="cpu")
    return runner.generator, runner.shown(Task(inputs.support))


def test_textual_inversion_starts_at_what_the_encoder_saw(folder, photos):
    generator, support = start_from(folder, photos, "photos", steps=0)
    assert generator.photo_size == 32 and support.size == (32, 32)
    mapper, encoder = generator.photo_tokens
    seen = extract_features(encoder, support.resized(22), 50)  # as in the mapper's training
    means = torch.stack([seen[support.labels == c].mean(0) for c in range(3)])
    first = generator.specialize(support, progress=False).tensors["tokens"]
    torch.testing.assert_close(first, mapper(means)[:, : mapper.tokens], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(generator.prompts(first), mapper(means), rtol=1e-4, atol=1e-4)


def test_learned_image_tokens_draw_at_the_models_size(folder, photos, tmp_path):
    generator, support = start_from(folder, photos, "photos")
    spec = generator.specialize(support, progress=False)
    assert spec.tensors["tokens"].shape[:2] == (3, 4) and spec.tensors["token_losses"].shape == (3, 3)
    still = start_from(folder, photos, "photos", steps=0)[0].specialize(support, progress=False)
    assert (spec.tensors["tokens"] - still.tensors["tokens"]).abs().max() > 1e-3
    spec.save(tmp_path / "spec.safetensors")
    drawn, again = (
        torch.cat([x.images for x in generator.sample(s, 2)])
        for s in (spec, Specialization.load(tmp_path / "spec.safetensors"))
    )
    assert drawn.shape == (6, 3, 32, 32) and torch.equal(drawn, again)
    word, _ = start_from(folder, photos, "word")
    assert word.photo_size is None and "image_tokens" not in word.identity()
    assert generator.identity()["image_tokens"] == load_image_tokens(generator.model).fingerprint()


def test_tint_draws_from_image_tokens(folder, photos, tmp_path):
    more = {"generator.config.textual_inversion.start": "photos", "generator.config.textual_inversion.steps": 2}
    more |= {"generator.config.null_text.inner_steps": 1}
    choices = how(folder, **more) | dict(generator="tint")
    choices["changes"].pop("generator.config.precision")
    specialize(photos, tmp_path / "run", per_class=2, say=lambda *_: None, **choices)
    assert len(files(tmp_path / "run")) == 6


def test_a_model_that_reads_words_only_is_named(photos, tmp_path):
    plain = make_tiny_pipeline(tmp_path / "words", prediction_type="v_prediction")
    with pytest.raises(InputError, match="reads words only"):
        start_from(plain, photos, "photos")
    with pytest.raises(InputError, match="choose 'word' or 'photos'"):
        start_from(plain, photos, "picture")


def test_labels_by_a_teacher_of_photos_through_the_autoencoder(folder, photos, tmp_path):
    lax = {"generator.gate": 0.0, "generator.must_help": False}
    other = how(folder, **lax, **{"generator.labels_from": "autoencoder"})
    planned = []
    specialize(photos, tmp_path / "p", plan_only=True, say=planned.append, per_class=2, **other)
    assert "as the autoencoder gives them back" in planned[0]
    drawn, labelled = [], []
    for settings in (how(folder, **lax), other):
        runner, inputs = prepare(photos, per_class=2, **settings)
        task = Task(inputs.support)
        drawn.append(runner.draw(task, tmp_path / "drawn", tmp_path / "work"))
        teacher = runner.fit_teacher(task.support, 0)
        labelled.append({s.name: s for s in runner.sources(task, teacher, drawn[-1])})
    assert torch.equal(drawn[0].images, drawn[1].images)  # one drawing serves both
    seen = runner.generator.through_autoencoder(runner.shown(task))
    model = runner.model
    z = model.encode(runner.shown(task).floats())
    assert seen.size == (32, 32) and torch.equal(seen.labels, task.support.labels)
    assert (seen.floats() - model.decode(z)).abs().max() <= 0.5 / 255 + 1e-6
    expected = teacher_logits(runner.fit_teacher(seen, 0), drawn[1])
    torch.testing.assert_close(labelled[1]["synthetic"].logits, expected, rtol=1e-2, atol=1e-2)
    assert (labelled[0]["synthetic"].logits - expected).abs().max() > 0.1
    with pytest.raises(InputError, match="choose photos or autoencoder"):
        prepare(photos, **how(folder, **{"generator.labels_from": "dreams"}))
    wrong = dict(bundle="photos", generator="augment", changes={"generator.labels_from": "autoencoder"}, device="cpu")
    runner, inputs = prepare(photos, per_class=2, **wrong)
    task = Task(inputs.support)
    with pytest.raises(InputError, match="augment has no autoencoder"):
        runner.sources(task, teacher, runner.draw(task, tmp_path / "drawn", tmp_path / "work"))
