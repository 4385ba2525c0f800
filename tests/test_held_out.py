"Photos that are left out: what they say before images are drawn, and when drawing stops."

from dataclasses import dataclass, replace
from importlib import import_module as module

import pytest
import torch
import torch.nn as nn
from conftest import photo

from tiny_nbdev.classify.encoders import encoders
from tiny_nbdev.core import rng_for
from tiny_nbdev.data.images import ImageSet, resize
from tiny_nbdev.evaluate.protocol import read_rows
from tiny_nbdev.generate.base import Generator, Specialization, draw_requests, generators
from tiny_nbdev.run import held_out
from tiny_nbdev.run.cli import main
from tiny_nbdev.run.evaluate import evaluate
from tiny_nbdev.run.experiment import make_experiment
from tiny_nbdev.run.held_out import HeldOut, Room, cannot_tell, measure_room, round_sizes
from tiny_nbdev.run.network_pack import NoPage
from tiny_nbdev.run.runner import Runner, Task
from tiny_nbdev.run.specialize import output_hashes, prepare, specialize

SILENT = dict(say=lambda *_: None)
NAMES = ("left", "middle", "right")


def picture(name, seed, noise=0.35, size=32):
    "A bright bar at a place of its own, in noise."
    x = noise * torch.rand(3, size, size, generator=rng_for("picture", seed))
    at, shift = 3 + 10 * NAMES.index(name), seed % 3
    x[:, 4 + shift : 28, at + shift : at + shift + 4] += 1 - noise
    return x


@pytest.fixture(scope="module")
def bars():
    "Four photos of each class."
    images = torch.stack([picture(c, i) for c in NAMES for i in range(4)])
    return ImageSet((images * 255).to(torch.uint8), torch.arange(3).repeat_interleave(4), NAMES)


@dataclass(frozen=True)
class RealConfig:
    "Settings of a generator that cheats."

    noise: float = 0.0  # Share of noise in a picture
    batch_size: int = 250  # Images drawn together


class Real(Generator):
    "Further real images of the classes."

    name = "toy-real"

    def __init__(self, config):
        self.config, self.batches = config, []

    @property
    def batch_size(self):
        return self.config.batch_size

    def specialize(self, support, seed=0, **kwargs):
        return Specialization(self.name, dict(n_support=support.counts()), support.classes, {})

    def sample(self, spec, per_class, seed=0, skip=None):
        yield from draw_requests(self, spec, per_class, seed, skip, self.draw)

    def draw(self, stretch):
        self.batches.append(len(stretch))
        noise = lambda r: torch.rand(3, 32, 32, generator=rng_for("noise", r.seed))
        mix = lambda r: (1 - self.config.noise) * picture(r.class_name, r.seed % 10**6) + self.config.noise * noise(r)
        return torch.stack([mix(r) for r in stretch])


@dataclass(frozen=True)
class EyeConfig:
    "Settings of the toy encoder."

    side: int = 8  # Pixels


class Eye(nn.Module):
    "A small picture as a feature."

    def __init__(self, side):
        super().__init__()
        self.side, self.num_features, self.image_size, self.seen = side, 3 * side**2, side, []

    def forward(self, images):
        self.seen.append(len(images))
        return resize(images, self.side).flatten(1)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    "Register, and take everything out again; what is exported is not asked here."

    def writes(student, file, *args, **kwargs):
        file.write_bytes(b"")
        return 0.0

    def no_page(*args):
        raise NoPage("not asked for")

    monkeypatch.setattr(module("tiny_nbdev.run.specialize"), "export_onnx", writes)
    monkeypatch.setattr(module("tiny_nbdev.run.specialize"), "latency_ms", lambda file: 1.0)
    monkeypatch.setattr(module("tiny_nbdev.run.formats"), "write_try_page", no_page)
    generators.register("toy-real", RealConfig)(lambda config, resources: Real(config))
    encoders.register("toy-eye", EyeConfig)(lambda config, device="cpu": Eye(config.side).to(device))
    yield
    generators.forget("toy-real")
    encoders.forget("toy-eye")


def how(**more):
    choices = dict(generator="toy-real", teacher="toy-eye", head="logistic", per_class=40, until_flat=True, flip=False)
    changes = {"recipe.name": "probe", "generator.config.noise": more.pop("noise", 0.0), "teacher.config.C": 1000.0}
    changes |= more.pop("changes", {})
    return choices | dict(bundle="embedded", base="none", device="cpu", changes=changes) | more


def files(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted((out / "synthetic").rglob("*.png"))}


# ---- the rule


def test_useful_images_go_on_and_useless_ones_stop(stand_in, bars, tmp_path):
    said = []
    good = specialize(bars, tmp_path / "good", say=said.append, **how())
    assert [r["per_class"] for r in good["rounds"]] == [0, 10, 20, 40]
    assert all(r["gain"] > r["interval"] for r in good["rounds"][1:-1]) and good["n_synthetic"] == 120
    assert "at most 3 x 40 images" in said[0] and "after 10, 20, 40 of each class" in said[0]
    bad = specialize(bars, tmp_path / "bad", say=said.append, **how(noise=1.0))
    assert [r["per_class"] for r in bad["rounds"]] == [0, 10]
    assert bad["rounds"][1]["gain"] <= bad["rounds"][1]["interval"]
    assert bad["n_synthetic"] == len(files(tmp_path / "bad")) == 30
    assert bad["rounds_words"].startswith("stopped at 10 of 40 images of each class; the last 10 ")
    assert "0, 10 images of each class: loss on left-out photos" in said[-1] and bad["rounds_words"] in said[-1]
    page = (tmp_path / "bad" / "report.html").read_text()
    assert bad["rounds_words"] in page and "Loss on left-out photos until drawing stopped" in page


def test_the_sizes_of_rounds():
    assert [round_sizes(n) for n in (4, 10, 25, 250)] == [[4], [10], [10, 20, 25], [10, 20, 40, 80, 160, 250]]


def test_queries_are_never_asked(stand_in, bars, tmp_path):
    other = replace(bars, images=255 - bars.images)
    runs = [specialize(bars, tmp_path / str(i), q, **SILENT, **how()) for i, q in enumerate((None, other))]
    assert runs[0]["rounds"] == runs[1]["rounds"] and output_hashes(tmp_path / "0")["synthetic"]


@pytest.mark.parametrize("why", ["recipe", "photos"])
def test_who_cannot_tell_draws_all_and_says_so(why, stand_in, bars, tmp_path):
    said, changes = [], {}
    photos = bars if why == "recipe" else bars.subset([0, 4, 8])
    if why == "recipe":
        changes = {"recipe.name": "whole", "recipe.config.steps": 2}
    m = specialize(photos, tmp_path / "run", say=said.append, **how(per_class=12, changes=changes))
    sentence = dict(
        recipe="the recipe whole would learn for long without each photo, so all 12 images of each class are drawn",
        photos="no class has a second photo to leave out, so all 12 images of each class are drawn",
    )[why]
    assert sentence in said[0] and sentence in said[-1] and m["rounds_words"] == sentence and m["rounds"] == []
    assert m["n_synthetic"] == 36 and m["room"] is None


# ---- the same images


class Killed(BaseException):
    pass


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_killed_run_ends_with_the_same_files(batch, stand_in, bars, tmp_path, monkeypatch):
    "Killed after so many batches: between rounds, or within one."
    how_many = how(changes={"generator.config.batch_size": 15}, per_class=20)
    whole = specialize(bars, tmp_path / "whole", **SILENT, **how_many)
    assert [r["per_class"] for r in whole["rounds"]] == [0, 10, 20], "two rounds of two batches each"
    draw, calls = Real.draw, []

    def dies(self, stretch):
        calls.append(1)
        if len(calls) > batch:
            raise Killed
        return draw(self, stretch)

    with monkeypatch.context() as m:
        m.setattr(Real, "draw", dies)
        with pytest.raises(Killed):
            specialize(bars, tmp_path / "run", **SILENT, **how_many)
    again = specialize(bars, tmp_path / "run", **SILENT, **how_many)
    assert again["rounds"] == whole["rounds"]
    hashes = [output_hashes(tmp_path / n) for n in ("whole", "run")]
    assert hashes[0] == hashes[1] and files(tmp_path / "run") == files(tmp_path / "whole")


def test_images_of_a_short_run_are_the_first_of_a_long_one(stand_in, bars, tmp_path, monkeypatch):
    "A diffusion model draws in batches; these end where rounds end."
    short = how(generator="class-prompt", sampling_steps=2, per_class=20)
    short["changes"].pop("generator.config.noise")
    asked = iter([(0.1, 0.2)])
    with monkeypatch.context() as m:
        m.setattr(held_out, "mean_ci", lambda v: next(asked, (0.1, 0.2)))
        specialize(bars, tmp_path / "short", **SILENT, **short)
        m.setattr(held_out, "mean_ci", lambda v: (0.2, 0.1))
        specialize(bars, tmp_path / "long", **SILENT, **short)
    first, all_of_them = files(tmp_path / "short"), files(tmp_path / "long")
    assert len(first) == 30 and len(all_of_them) == 60
    assert all(all_of_them[k] == v for k, v in first.items())


def test_batches_end_where_rounds_end(stand_in, bars, tmp_path):
    runner = Runner(make_experiment("photos", **{k: v for k, v in how().items() if k != "device"}), "cpu")
    task = Task(bars)
    runner.draw(task, tmp_path / "drawn", tmp_path / "work")
    assert set(runner.generator.batches) == {30} and len(runner.generator.batches) == task.rounds.per_class / 10
    assert runner.generator.config.batch_size == 250, "as it was"


# ---- what is asked


def held(bars, **more):
    choices = how(**more)
    runner = Runner(make_experiment("photos", **{k: v for k, v in choices.items() if k != "device"}), "cpu")
    return HeldOut(runner, Task(bars))


def test_no_teacher_and_no_student_sees_the_photo_it_is_asked_about(stand_in, bars):
    asked = held(bars)
    assert len(asked.folds) == 4 and asked.labels.tolist() == [0, 1, 2] * 4
    drawn = replace(bars, paths=tuple(f"{i}.png" for i in range(12)))
    features = asked.photos[0]
    for k, out in enumerate(asked.folds):
        photos, synthetic = asked.sources(k, drawn)
        assert len(photos.images) == 9 and len(synthetic.images) == 12
        head = asked.runner.head(0).named(NAMES).fit_features(features[~out], bars.labels[~out], 3)
        with torch.no_grad():
            assert torch.allclose(head(features), synthetic.logits, atol=1e-5)
    nets = [replace(bars, images=x) for x in (bars.images, bars.images.clone())]
    nets[1].images[asked.folds[0]] = 255 - nets[1].images[asked.folds[0]]  # seen nowhere but where they are asked
    first, other = (held(x) for x in nets)
    assert torch.equal(first.sources(0, drawn)[1].logits, other.sources(0, drawn)[1].logits)
    assert not torch.equal(first.sources(1, drawn)[1].logits, other.sources(1, drawn)[1].logits)


def test_what_never_changes_is_looked_at_once(stand_in, bars):
    asked = held(bars)
    draw = lambda n: ImageSet(
        torch.stack([picture(c, 100 + i) for c in NAMES for i in range(n)]),
        torch.arange(3).repeat_interleave(n),
        NAMES,
        tuple(f"{c}/{i}.png" for c in NAMES for i in range(n)),
    )
    alone = asked.ask_student(None)
    before, teachers = len(asked.runner.encoder.seen), asked.teachers
    ten = asked.ask_student(draw(10))
    twenty = asked.ask_student(draw(20))
    assert asked.runner.encoder.seen[before:] == [30, 30], "images of the second round are the new ones"
    assert asked.teachers is teachers
    assert torch.equal(alone, asked.ask_student(None)) and torch.equal(twenty, asked.ask_student(draw(20)))
    assert torch.equal(ten, held(bars).ask_student(draw(10)))


def test_many_photos_are_left_out_together(stand_in):
    images = torch.stack([picture(c, i) for c in NAMES for i in range(25)])
    many = ImageSet(images, torch.arange(3).repeat_interleave(25), NAMES)
    asked = held(many)
    assert len(asked.folds) == held_out.FOLDS == 20
    assert torch.stack(asked.folds).sum(0).eq(1).all(), "each photo once"
    assert asked.folds[0].sum() == 6 and asked.folds[19].sum() == 3


# ---- the room


def test_the_room_is_said_where_it_is_small(stand_in, bars, tmp_path):
    said = []
    specialize(bars, tmp_path / "run", plan_only=True, say=said.append, **how())
    room = measure_room(held(bars))
    assert room.n == 12 and ("add little" in said[0]) == room.little
    for teacher, student, interval, little in (
        (0.84, 0.82, 0.01, True),
        (0.7, 0.4, 0.5, True),
        (0.9, 0.6, 0.1, False),
        (0.5, 0.8, 0.1, True),
    ):
        r = Room(teacher, student, interval, 25)
        assert r.little == little == bool(r.words())
    sentence = "On left-out photos the teacher names 84 % right and the student 82 %: drawn images can add little."
    assert Room(0.84, 0.82, 0.01, 25).words() == sentence
    assert "within its interval (30 ± 50 points): drawn images may add little" in Room(0.7, 0.4, 0.5, 25).words()


@pytest.mark.parametrize("little", [True, False])
def test_the_sentence_comes_once_before_anything_is_drawn(little, stand_in, bars, tmp_path, monkeypatch):
    from tiny_nbdev.run import plan, runner

    room = Room(0.9, 0.9 if little else 0.5, 0.1, 12)
    monkeypatch.setattr(runner, "measure_room", lambda held: room)
    for seconds, name in ((10, "now"), (-1, "later")):  # in the plan, or at the start of the run
        monkeypatch.setattr(plan, "ROOM_SECONDS", seconds)
        said = []
        m = specialize(bars, tmp_path / name, say=said.append, **how(noise=1.0))
        plan_says, then_says = "add little" in said[0], "add little" in said[1]
        assert (plan_says, then_says) == ((little, False) if name == "now" else (False, little)) or (
            name == "now" and len(said) == 2
        )
        assert ("before the first image is drawn" in said[0]) == (name == "later")
        assert m["room"]["little"] == little and (m["room_words"] is None) == (not little)
        assert ("add little" in (tmp_path / name / "report.html").read_text()) == little


def test_the_room_with_unlabelled_photos(stand_in, bars, tmp_path):
    runner, inputs = prepare(bars, unlabelled=bars, **how())
    task = Task(inputs.support, unlabelled=runner.unlabelled)
    asked = runner.held_out(task)
    names = [s.name for s in asked.sources(0)]
    assert names == ["support", "unlabelled"] and task.unlabelled_features.shape == (12, 192)
    assert runner.room(task).n == 12 and runner.held_out(replace(task)) is asked


# ---- from outside


def test_evaluate_stops_for_each_episode(stand_in, tmp_path):
    for c in range(5):
        for i in range(7):
            photo(tmp_path / "data" / f"class {c}" / f"{i}.png", 100 * c + i, (32, 32))
    what = dict(dataset=str(tmp_path / "data"), split="test", episodes=1, preset="photos")
    views = how(generator="augment", per_class=12)
    views["changes"].pop("generator.config.noise")
    s = evaluate(tmp_path / "out", **what, **SILENT, **views)
    rows = read_rows(next((tmp_path / "out").glob("*.csv")))
    assert rows[0]["drawn_per_class"] in (10, 12) and s["drawn_per_class"] == rows[0]["drawn_per_class"]
    views["changes"] |= {"recipe.name": "whole", "recipe.config.steps": 2}
    said, sentence = [], "would learn for long without each photo, so all 12 images of each class are drawn."
    evaluate(tmp_path / "whole", say=said.append, **what, **views)
    assert any(s.startswith("The recipe whole") and s.endswith(sentence) for s in said)


def test_command_line(stand_in, bars, photos, tmp_path, capsys):
    what = "--bundle embedded --generator toy-real --teacher toy-eye --head logistic --base none --per-class 12"
    what += " --set recipe.name=probe --device cpu --until-flat --no-flip"
    assert main(["specialize", str(photos), "--out", str(tmp_path / "run"), "--plan", *what.split()]) == 0
    assert "stops        after 10, 12 of each class" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_an_experiment_that_draws_all_keeps_its_hash(stand_in):
    plain, flat = (make_experiment("photos", generator="toy-real", until_flat=b) for b in (None, True))
    assert "until_flat" not in plain.identity()["generator"] and flat.identity()["generator"]["until_flat"]
    assert plain.hash != flat.hash
    assert cannot_tell(plain, [0, 0]) and cannot_tell(plain, [1, 1]) and not cannot_tell(plain, [2, 1])
