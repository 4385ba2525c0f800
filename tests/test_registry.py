"A method of somebody else's, registered here alone, works everywhere."

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from tiny_nbdev.classify.encoders import encoders
from tiny_nbdev.classify.teachers import Teacher, heads
from tiny_nbdev.data.datasets import datasets
from tiny_nbdev.data.images import ImageSet, resize
from tiny_nbdev.generate.base import Generator, Specialization, batch_requests, generators
from tiny_nbdev.registry import Option
from tiny_nbdev.run.cli import main
from tiny_nbdev.run.evaluate import evaluate
from tiny_nbdev.run.specialize import specialize
from tiny_nbdev.run.tables import Row, TablePreset, finish_table, run_rows


@dataclass(frozen=True)
class GreyConfig:
    "Settings of the toy generator."

    strength: float = 0.5  # Share of the photo, in [0, 1]


class Grey(Generator):
    "Photos mixed with grey."

    name = "toy-grey"

    def __init__(self, config):
        self.config = config

    def specialize(self, support, seed=0, **kwargs):
        means = torch.stack([support.of_class(c).floats().mean(0) for c in range(support.n_classes)])
        return Specialization(self.name, dict(n_support=support.counts()), support.classes, dict(means=means))

    def sample(self, spec, per_class, seed=0, skip=None):
        for stretch, missing in batch_requests(self.requests(spec, per_class, seed), 8, skip):
            labels = torch.tensor([r.label for r in stretch])
            x = self.config.strength * spec.tensors["means"][labels] + (1 - self.config.strength) * 0.5
            yield ImageSet(x, labels, spec.classes, tuple(r.name for r in stretch)).subset(missing)


@dataclass(frozen=True)
class NearestConfig:
    "Settings of the toy head."

    sharpness: float = 5.0  # Factor of the negative distance


class Nearest(Teacher):
    "Distance to each class's mean."

    def fit_features(self, features, labels, n_classes):
        means = torch.stack([features[labels == c].mean(0) for c in range(n_classes)])
        return NearestHead(means, self.sharpness)


class NearestHead(nn.Module):
    def __init__(self, means, sharpness):
        super().__init__()
        self.register_buffer("means", means)
        self.sharpness = sharpness

    def forward(self, features):
        return -self.sharpness * torch.cdist(features, self.means)


@dataclass(frozen=True)
class PixelsConfig:
    "Settings of the toy encoder."

    side: int = 4  # Pixels


class Pixels(nn.Module):
    "A small picture as a feature."

    def __init__(self, side):
        super().__init__()
        self.side, self.num_features, self.image_size, self.name = side, 3 * side**2, side, f"pixels {side}"

    def forward(self, images):
        return resize(images, self.side).flatten(1)


@dataclass(frozen=True)
class StripesConfig:
    "Settings of the toy data set."

    n: int = 12  # Images of each class


def stripes(config, split, root=None, cache=None):
    rng = torch.Generator().manual_seed(len(split))
    images = torch.rand(6 * config.n, 3, 32, 32, generator=rng) * 0.5
    labels = torch.arange(6).repeat_interleave(config.n)
    for i, c in enumerate(labels.tolist()):
        images[i, :, :, c * 5 : c * 5 + 4] += 0.5
    return ImageSet((images * 255).to(torch.uint8), labels, tuple(f"stripe {c}" for c in range(6)))


@pytest.fixture(autouse=True)
def toys():
    "Register, and take everything out again."
    generators.register(
        "toy-grey",
        GreyConfig,
        cost=lambda config, size: {"mixing": {"decode": 0.0}},
        describe=lambda config: f"photos, {config.strength:.0%} of them",
        options=(Option("toy_strength", "strength", float, "share of the photo"),),
    )(lambda config, resources: Grey(config))

    def nearest(config, backbone=None, **kw):
        t = Nearest(backbone, **kw)
        t.sharpness = config.sharpness
        return t

    heads.register("toy-nearest", NearestConfig)(nearest)
    encoders.register("toy-pixels", PixelsConfig)(lambda config, device="cpu": Pixels(config.side).to(device))
    datasets.register("toy-stripes", StripesConfig)(stripes)
    yield
    for r, n in ((generators, "toy-grey"), (heads, "toy-nearest"), (encoders, "toy-pixels"), (datasets, "toy-stripes")):
        r.forget(n)


TOYS = dict(generator="toy-grey", head="toy-nearest", teacher="toy-pixels", base="none", per_class=3, device="cpu")


def test_specialize_and_plan(stand_in, photos, queries, tmp_path):
    said = []
    specialize(photos, tmp_path / "run", queries, preset="smoke", plan_only=True, say=said.append, **TOYS)
    assert "photos, 50% of them" in said[0] and not (tmp_path / "run").exists()
    m = specialize(photos, tmp_path / "run", queries, preset="smoke", say=said.append, toy_strength=1.0, **TOYS)
    assert m["generator"] == "toy-grey" and len(list((tmp_path / "run/synthetic").rglob("*.png"))) == 9
    assert 0 <= m["teacher_accuracy"] <= 1


def test_evaluate(stand_in, tmp_path):
    s = evaluate(tmp_path, "toy-stripes", episodes=2, preset="smoke", say=lambda *_: None, **TOYS)
    assert s["n_episodes"] == 2 and s["settings"]["generator"]["config"] == {"strength": 0.5}
    assert s["teacher"]["mean"] > 0.9, "stripes are easy to tell from small pictures"


def test_table(stand_in, tmp_path):
    preset = TablePreset("toy", "toy-stripes", "test", 1, 2, "smoke", {"base.images": "none"})
    rows = [Row("none", "nothing", 50.0), Row("grey", "photos and grey", 60.0, "toy-grey")]
    run_rows(rows, preset, tmp_path, say=lambda *_: None, device="cpu")
    ours, claims = finish_table("toy", rows, [("grey helps", "grey", "none")], preset, tmp_path)
    assert [r["row"] for r in ours] == ["none", "grey"] and claims[0]["n_episodes"] == 1


def test_command_line(stand_in, photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["specialize", "--help"])
    shown = capsys.readouterr().out
    assert "toy-grey" in shown and "toy-nearest" in shown and "--toy-strength" in shown
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "toy-stripes" in capsys.readouterr().out
    what = "--preset smoke --generator toy-grey --head toy-nearest --teacher toy-pixels --base none --toy-strength 0.9"
    assert main(["specialize", str(photos), "--out", str(tmp_path / "r"), *what.split(), "--device", "cpu"]) == 0
    assert (
        main(["specialize", str(photos), "--out", str(tmp_path / "p"), *what.split(), "--device", "cpu", "--plan"]) == 0
    )
    assert "photos, 90% of them" in capsys.readouterr().out


def test_plugin_in_a_process_of_its_own(stand_in, photos, tmp_path):
    import subprocess

    code = "from tests_toys import *\n"
    source = Path(__file__).read_text()
    start, end = (
        source.index("@dataclass(frozen=True)\nclass GreyConfig"),
        source.index("@dataclass(frozen=True)\nclass NearestConfig"),
    )
    imports = "\n".join(
        l
        for l in source[:start].splitlines()
        if l.startswith(("from dataclasses", "import torch", "from tiny_nbdev.data.images"))
    )
    code = f"{imports}\nfrom tiny_nbdev.generate.base import Generator, Specialization, batch_requests, generators\n\n"
    code += (
        source[start:end] + "\ngenerators.register('toy-grey', GreyConfig)(lambda config, resources: Grey(config))\n"
    )
    (tmp_path / "toys.py").write_text(code)
    env = {**os.environ, "TINY_NBDEV_PLUGINS": str(tmp_path / "toys.py")}
    what = [
        photos,
        "--out",
        tmp_path / "r",
        "--preset",
        "smoke",
        "--generator",
        "toy-grey",
        "--base",
        "none",
        "--device",
        "cpu",
    ]
    script = Path(sys.executable).parent / "tiny-nbdev"
    done = subprocess.run([script, "specialize", *what], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "r/synthetic").rglob("*.png"))) == 12


def test_settings_may_come_in_any_order():
    from tiny_nbdev.run.experiment import by_path

    changes = {"recipe.config.steps": 4, "recipe.name": "frozen"}
    want = {"recipe": {"name": "frozen", "config": {"steps": 4}}}
    assert by_path(changes) == by_path(dict(reversed(changes.items()))) == want
