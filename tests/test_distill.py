"Distillation: its two recipes in both number formats, its checkpoints, and what a step learns from."

import pytest
import torch

from tiny_nbdev.classify.batches import make_sources
from tiny_nbdev.classify.distill import DistillRecipe, LogConfig, distill, recipes
from tiny_nbdev.classify.frozen import FrozenRecipe, block_activations
from tiny_nbdev.classify.students import create_student
from tiny_nbdev.classify.teachers import PrototypeTeacher
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.errors import InputError

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
    from tiny_nbdev.registry import config_dict

    for name, recipe in RECIPES.items():
        assert recipes.config(name, config_dict(recipe)) == recipe and recipe.kind == name
        assert recipes[name].build(recipe) is recipe and str(recipe.steps) in recipes.describe(name, recipe)
    with pytest.raises(InputError, match="frozen_blocks"):
        recipes.config("frozen", dict(frozen_block=2))
    with pytest.raises(InputError, match="'crop_pad'"):
        recipes.config("frozen", dict(crop_pad=8))
    with pytest.raises(InputError, match="frozen_blocks is 0"):
        FrozenRecipe(frozen_blocks=0)
