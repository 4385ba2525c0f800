"Distillation: its two recipes in both number formats, its checkpoints, and what a step learns from."

from dataclasses import replace

import pytest
import torch

from tiny_nbdev.classify.backbones import extract_features
from tiny_nbdev.classify.batches import kd_loss, make_sources, stream_positions, support_positions, weighted_positions
from tiny_nbdev.classify.distill import DistillRecipe, LogConfig, distill, recipes
from tiny_nbdev.classify.distill_many import distill_many
from tiny_nbdev.classify.frozen import FrozenRecipe, block_activations, compose_activations, freeze_blocks
from tiny_nbdev.classify.students import create_student
from tiny_nbdev.classify.teachers import PrototypeTeacher
from tiny_nbdev.core import rng_for
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.errors import InputError
from tiny_nbdev.registry import config_dict

RECIPES = {
    "whole": DistillRecipe(steps=3, batch_size=12),
    "frozen": FrozenRecipe(steps=3, batch_size=12, tta_flip=True, tta_shift=True),
}


def images(n, n_classes, seed, size=16):
    "Random pictures, smooth enough to be of some kind."
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n * n_classes, 3, 4, 4, generator=g)
    x = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").mul(255).to(torch.uint8)
    return ImageSet(x, torch.arange(n_classes).repeat_interleave(n), tuple(f"class {c}" for c in range(n_classes)))


def new_student(seed=0, **kwargs):
    torch.manual_seed(seed)
    return create_student("conv4", 3, 16, **kwargs)


@pytest.fixture(scope="module")
def parts():
    support, base, synthetic = images(4, 3, 0), images(10, 4, 1), images(6, 3, 2)
    return support, base, synthetic, PrototypeTeacher(torch.nn.Flatten(), precision="fp32").fit(support)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_block_activations(parts, precision, dtype):
    backbone = new_student().backbone
    views = block_activations(backbone, parts[0], 3, True, True, precision, dtype=dtype)
    assert views.shape == (6, 12, 64, 2, 2) and views.dtype == dtype
    exact = block_activations(backbone, parts[0], 3, True, True, "fp32", dtype=torch.float32)
    torch.testing.assert_close(views.float(), exact, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
@pytest.mark.parametrize("name", RECIPES)
def test_both_recipes_in_both_formats(parts, name, precision):
    recipe = recipes.config(name, dict(steps=3, batch_size=12, precision=precision))
    student = new_student()
    history = distill(student, make_sources(*parts, recipe), recipe, log=LogConfig(log_every=1))
    assert history["step"] == [1, 2, 3] and all(torch.isfinite(p).all() for p in student.parameters())
    assert not student.training and all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_fits_its_own_settings_only(parts, name, tmp_path):
    recipe, file = RECIPES[name], tmp_path / "state.safetensors"
    whole, other = new_student(), next(r for n, r in RECIPES.items() if n != name)
    history = distill(whole, make_sources(*parts, recipe), recipe, resume_path=file, log=LogConfig(save_every=2))
    again = new_student(1)
    assert distill(again, make_sources(*parts, recipe), recipe, resume_path=file) == history and equal(whole, again)
    with pytest.raises(InputError, match="recipe was"):
        distill(new_student(), make_sources(*parts, other), other, resume_path=file)
    with pytest.raises(InputError, match="seed was 0 and is now 1"):
        distill(new_student(), make_sources(*parts, recipe), recipe, seed=1, resume_path=file)


def test_recipes_are_plain_data():
    for name, recipe in RECIPES.items():
        assert recipes.config(name, config_dict(recipe)) == recipe and recipe.kind == name
        assert recipes[name].build(recipe) is recipe and str(recipe.steps) in recipes.describe(name, recipe)
    with pytest.raises(InputError, match="frozen_blocks"):
        recipes.config("frozen", dict(frozen_block=2))
    with pytest.raises(InputError, match="'crop_pad'"):
        recipes.config("frozen", dict(crop_pad=8))
    with pytest.raises(InputError, match="frozen_blocks is 0"):
        FrozenRecipe(frozen_blocks=0)


def test_kd_loss_is_the_formula():
    s, t = (torch.randn(7, 5, generator=rng_for(k), dtype=torch.double) * 3 for k in "st")
    for T in (1.0, 4.0):
        ps, pt, leaf = (s / T).softmax(1), (t / T).softmax(1), s.clone().requires_grad_()
        torch.testing.assert_close(kd_loss(s, t, T), T**2 * (pt * (pt / ps).log()).sum(1).mean())
        kd_loss(leaf, t, T).backward()
        torch.testing.assert_close(leaf.grad, T * (ps - pt) / len(s))
    assert abs(kd_loss(t + 5, t)) < 1e-12


def test_positions():
    for n, share in ((15, 50), (7, 75), (3, 150), (50, 50)):
        counts = [torch.bincount(support_positions(n, share, step, 0), minlength=n) for step in range(3 * n)]
        counts = torch.stack(counts)
        assert set(counts.unique().tolist()) <= {share // n, share // n + 1} and (counts.sum(1) == share).all()
        assert counts.sum(0).unique().numel() == 1
    for n, share in ((200, 50), (70, 50), (10, 50), (50, 50)):
        seen = torch.cat([stream_positions(n, share, step, 0, "synthetic") for step in range(n)])
        assert all(torch.equal(p.sort().values, torch.arange(n)) for p in seen.split(n))
        assert torch.equal(stream_positions(n, share, 3, 0, "synthetic"), seen[3 * share : 4 * share])
    drawn = torch.cat([weighted_positions(torch.tensor([1.0, 0, 3]), 100, step, 0) for step in range(100)])
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.25, 0, 0.75]), atol=0.02, rtol=0)


def test_sources(parts):
    support, base, synthetic, teacher = parts
    recipe = replace(RECIPES["whole"], batch_size=48, energy_weighting=2.0)
    for args, want in (((None, None), [48]), ((base, None), [24, 24]), ((base.subset([]), synthetic), [24, 24])):
        assert [s.batch_share for s in make_sources(support, *args, teacher, recipe)] == want
    known = extract_features(torch.nn.Flatten(), base, precision="fp32")
    with_features = make_sources(support, base, synthetic, teacher, recipe, known, image_size=32)
    plain = make_sources(support, base, synthetic, teacher, recipe)
    torch.testing.assert_close(with_features[1].logits, plain[1].logits, atol=1e-4, rtol=1e-4)
    assert with_features[1].images.size == (32, 32) and plain[1].images is base
    energy, p = plain[1].logits.logsumexp(1), plain[1].probabilities
    torch.testing.assert_close(p[0] / p[1], (2 * (energy[0] - energy[1])).double().exp(), rtol=1e-4, atol=0)
    assert plain[0].probabilities is None and plain[2].probabilities is None
    by_class = replace(recipe, synthetic_labels="class")
    assert make_sources(support, None, synthetic, None, by_class)[1].logits is None
    for args, words in (
        ((base, None, None), "need a teacher"),
        ((None, base, teacher), "expected those of the support"),
        ((base, None, torch.nn.Flatten()), "768 classes"),
    ):
        with pytest.raises(InputError, match=words):
            make_sources(support, *args, recipe)


class Killed(Exception):
    pass


def kill_at(n):
    def callback(step, history):
        if step == n:
            raise Killed

    return callback


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
def test_killed_or_not(parts, name, drop_rate, tmp_path):
    recipe = replace(RECIPES[name], steps=6, precision="fp32")
    sources, file = make_sources(*parts, recipe), tmp_path / "state.safetensors"
    log, whole = LogConfig(save_every=2, log_every=4), new_student(drop_rate=drop_rate)
    before = torch.get_rng_state()
    history = distill(whole, sources, recipe, log=log)
    assert torch.equal(before, torch.get_rng_state()) and history["step"] == [1, 4, 6]
    with pytest.raises(Killed):
        stop = replace(log, callback=kill_at(5))
        distill(new_student(drop_rate=drop_rate), sources, recipe, resume_path=file, log=stop)
    broken = new_student(drop_rate=drop_rate)
    assert distill(broken, sources, recipe, resume_path=file, log=log) == history and equal(whole, broken)
    other = new_student(drop_rate=drop_rate)
    distill(other, sources, recipe, seed=1, log=log)
    assert not equal(whole, other)


def test_sources_are_left_alone_and_brought_to_size(parts):
    for recipe in RECIPES.values():
        sources = make_sources(*parts, recipe)
        before = [(s.images, s.batch_share, s.activations) for s in sources]
        torch.manual_seed(0)
        student = create_student("conv4", 3, 32)
        distill(student, sources, recipe)
        assert before == [(s.images, s.batch_share, s.activations) for s in sources]
        assert student.backbone.image_size == 32 and student.tta_flip == recipe.tta_flip
    with pytest.raises(InputError, match="lower the learning rate"):
        distill(new_student(), sources, replace(RECIPES["whole"], lr=1e30, steps=9, precision="fp32"))
    with pytest.raises(InputError, match="create it with num_classes=3"):
        distill(create_student("conv4", 4, 16), sources, RECIPES["whole"])


def test_frozen_blocks_stay(parts):
    recipe = replace(RECIPES["frozen"], precision="fp32", frozen_blocks=2, head_init="prototype")
    student, came = new_student(), new_student().state_dict()
    base = recipe.train_activations(student.backbone, parts[1])
    asked = recipe.test_activations(student.backbone, parts[2])
    distill(student, make_sources(*parts, recipe), recipe)
    changed = [k for k, v in student.state_dict().items() if not torch.equal(v, came[k])]
    assert changed and all(("blocks.2" in k or "blocks.3" in k or "head" in k) and "running" not in k for k in changed)
    again = new_student()
    distill(again, make_sources(*parts, recipe, base_activations=base), recipe)
    assert equal(student, again)
    assert recipe.accuracy(student, parts[2], asked) == recipe.accuracy(student, parts[2])
    whole = RECIPES["whole"]
    assert (
        whole.train_activations(student.backbone, parts[1])
        is whole.test_activations(student.backbone, parts[1])
        is None
    )
    with pytest.raises(ValueError, match="activations of shape"):
        distill(new_student(), make_sources(*parts, recipe, base_activations=base[:1]), recipe)
    with pytest.raises(InputError, match="choose 1 to 3"):
        distill(new_student(), make_sources(*parts, recipe), replace(recipe, frozen_blocks=4))


def test_a_batch_of_activations(parts):
    recipe = replace(RECIPES["frozen"], precision="fp32", energy_weighting=2.0)
    sources = make_sources(*parts, recipe)
    freeze_blocks(new_student(), sources, recipe)
    assert [s.activations.shape[0] for s in sources] == [6, 2, 2]  # shifted views of the support alone
    x, at = compose_activations(sources, 3)
    assert torch.equal(x, compose_activations(sources, 3)[0]) and [len(i) for i in at] == [72, 6, 6]
    assert torch.bincount(at[0]).tolist() == [6] * 12 and torch.equal(x[:12], sources[0].activations[0].float())
    assert torch.equal(at[1], weighted_positions(sources[1].probabilities, 6, 3, 0, "base"))


def test_activations_are_kept(parts, tmp_path):
    backbone = new_student().backbone
    made = block_activations(backbone, parts[1], 3, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    assert torch.equal(made, block_activations(backbone, parts[1], 3))
    assert torch.equal(made, block_activations(backbone, parts[1], 3, cache=tmp_path))
    assert file.stat().st_mtime_ns == stamp
    assert block_activations(backbone, parts[1], 2, cache=tmp_path).shape[2:] == (64, 4, 4)
    assert block_activations(new_student(1).backbone, parts[1], 3, cache=tmp_path).ne(made).any()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_many_in_both_formats(parts, precision):
    recipe = replace(RECIPES["whole"], precision=precision)
    students = [new_student(i) for i in range(2)]
    sources = [make_sources(*parts, recipe) for _ in students]
    history = distill_many(students, sources, recipe, log_every=1)
    assert history["step"] == [1, 2, 3] and all(torch.isfinite(p).all() for s in students for p in s.parameters())
    with pytest.raises(InputError, match="one by one"):
        distill_many(students, sources, RECIPES["frozen"])
