"What was measured is what ships: an episode through `evaluate` and through `specialize` gives the same student."

from pathlib import Path

import pytest
import torch

import tiny_nbdev
from tiny_nbdev.core import load_tensors
from tiny_nbdev.data.datasets import dataset_episodes, load_dataset
from tiny_nbdev.data.episodes import episode_sets
from tiny_nbdev.generate.base import generators
from tiny_nbdev.run.evaluate import EpisodeRunner, assign, episode_seed, evaluate
from tiny_nbdev.run.experiment import make_experiment
from tiny_nbdev.run.specialize import specialize

AMOUNTS = {"recipe.config.steps": 4, "recipe.config.batch_size": 40, "recipe.config.precision": "fp32"}
AMOUNTS |= {"base.max_images": 200}
FROZEN = {**AMOUNTS, "recipe.name": "frozen", "recipe.config.frozen_blocks": 3, "recipe.config.tta_flip": True}
TINT = dict(generator="tint", per_class=3, token_steps=2, sampling_steps=3)
CASES = {
    "tint, whole": (TINT, AMOUNTS),
    "tint, frozen": (TINT, FROZEN),
    "ddim, whole": (dict(generator="ddim", per_class=3, sampling_steps=3), AMOUNTS),
    "ddim, frozen": (dict(generator="ddim", per_class=3, sampling_steps=3), FROZEN),
    "nothing, whole": (dict(generator="none"), AMOUNTS),
}


@pytest.mark.parametrize("case", CASES)
def test_same_student_bit_for_bit(case, stand_in, tmp_path, monkeypatch):
    choices, changes = CASES[case]
    kept = []
    train = EpisodeRunner.train
    monkeypatch.setattr(EpisodeRunner, "train", lambda self, *a: kept.extend(train(self, *a)) or kept)
    what = dict(preset="digits", changes=changes, device="cpu", **choices)
    measured = evaluate(tmp_path / "eval", "digits", episodes=1, say=lambda *_: None, **what)

    images = load_dataset("digits", "test")
    episodes, _ = dataset_episodes("digits", images, "test", 1)
    photos, queries = episode_sets(images, episodes[0])
    seed = episode_seed(0, episodes[0].index)
    shipped = specialize(photos, tmp_path / "run", queries, seed=seed, say=lambda *_: None, **what)

    ours = load_tensors(tmp_path / "run/model.safetensors")[0]
    theirs = kept[0].state_dict()
    weights = {k: v for k, v in theirs.items() if k in ours}
    assert set(weights) == set(theirs) == set(ours)
    assert all(torch.equal(v.cpu(), ours[k]) for k, v in weights.items())
    assert shipped["student_accuracy"] == pytest.approx(measured["mean"], abs=1e-6)
    assert shipped["teacher_accuracy"] == pytest.approx(measured["teacher"]["mean"], abs=1e-6)


def test_the_same_experiment(stand_in, tmp_path):
    from tiny_nbdev.core import load_json
    from tiny_nbdev.run.experiment import Experiment

    a = assign(tmp_path / "eval", "digits", preset="digits", generator="none", device="cpu")
    photos = load_dataset("digits", "test").subset(range(0, 896, 40))
    specialize(photos, tmp_path / "run", preset="digits", generator="none", steps=2, device="cpu", say=lambda *_: None)
    run = Experiment.from_dict(load_json(tmp_path / "run/experiment.json"))
    assert (run.teacher, run.student, run.base, run.bundle) == (
        a.experiment.teacher, a.experiment.student, a.experiment.base, a.experiment.bundle,
    )  # fmt: skip


def test_shipped_recipe_serves_photos(photos, queries, tmp_path):
    from tiny_nbdev.data.loaders import has_cifar_fs

    if not has_cifar_fs():
        pytest.skip("CIFAR-FS is not at hand: TINY_NBDEV_DATA is not set")
    m = specialize(
        photos,
        tmp_path / "run",
        queries,
        preset="cifar-fs-conv4",
        steps=3,
        max_base=300,
        device="cpu",
        say=lambda *_: None,
    )
    assert m["n_base"] == 300 and 0 <= m["student_accuracy"] <= 1


PRESETS = sorted((Path(tiny_nbdev.__file__).parent / "presets").glob("*.json"))


@pytest.mark.parametrize("file", PRESETS, ids=lambda p: p.stem)
def test_every_preset_goes_with_every_generator(file):
    for name in generators:
        make_experiment(file.stem, generator=name)
