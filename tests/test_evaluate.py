"""Evaluation on fixed episodes: killed runs, refused settings, damaged rows, stacked students, and the lists of the
package."""

import csv
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SCRIPT
from PIL import Image

from tiny_nbdev.data.episodes import (
    episode_list_files,
    load_episode_list,
    read_episode_list,
    sample_episode,
    save_episode_list,
)
from tiny_nbdev.data.loaders import has_cifar_fs, load_cifar_fs
from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate.protocol import COLUMNS, as_markdown, compare, oracle_split, read_rows, result_table
from tiny_nbdev.measure import mean_ci
from tiny_nbdev.run.cli import main

N = 6


def parquet(path, first, names, n=14):
    "Classes of noise, each in a colour of its own, in the layout of CIFAR-FS."
    rng, rows = np.random.default_rng(first), []
    for c in range(first, first + 3):
        tone = rng.integers(60, 196, 3)
        for _ in range(n):
            file = io.BytesIO()
            Image.fromarray((tone + rng.normal(0, 70, (32, 32, 3))).clip(0, 255).astype("uint8")).save(file, "PNG")
            rows.append(dict(image=dict(bytes=file.getvalue(), path=None), label=c))
    info = json.dumps(dict(info=dict(features=dict(label=dict(names=names)))))
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": info}), path)


@pytest.fixture(scope="module")
def world(stand_in, tmp_path_factory):
    "A small data set with an episode list; one thread, so that workers round as this process does."
    root, threads = tmp_path_factory.mktemp("world"), torch.get_num_threads()
    torch.set_num_threads(1)
    kept = {k: os.environ.get(k) for k in ("TINY_NBDEV_DATA", "OMP_NUM_THREADS", "TQDM_DISABLE")}
    os.environ.update(TINY_NBDEV_DATA=str(root / "data"), OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    names = [f"colour {i}" for i in range(9)]
    (root / "data").mkdir()
    for k, split in enumerate(("train", "validation", "test")):
        parquet(root / "data/cifar_fs" / f"{split}-0.parquet", 3 * k, names)
    save_episode_list(load_cifar_fs("test"), root / "list.json", "test", N, n_way=3, n_shot=3, dataset="cifar-fs")
    yield root
    torch.set_num_threads(threads)
    for k, v in kept.items():
        os.environ.pop(k, None) if v is None else os.environ.update({k: v})


PRESET = {
    "generator": {"per_class": 2, "options": {"textual_inversion.steps": 1, "n_steps": 2, "null_text.inner_steps": 1}},
    "teacher": {"head": "prototype", "early_weight": 0.0},
    "recipe": {"name": "whole", "config": {"steps": 4, "batch_size": 12, "lr": 0.05, "precision": "fp32"}},
    "base": {"images": "cifar-fs"},
}


def arguments(world, out, *more, generator="none", preset=PRESET):
    file = world / "preset.json"
    file.write_text(json.dumps(preset))
    what = ["evaluate", "--out", out, "--generator", generator, "--preset", file, "--list", world / "list.json"]
    return [*map(str, (*what, "--device", "cpu", "--cache", world / "cache", *more))]


@pytest.fixture(scope="module")
def whole(world):
    "An unbroken run."
    out = world / "whole"
    assert main(arguments(world, out)) == 0
    return out


def without_times(path):
    return [{k: v for k, v in r.items() if k not in ("seconds", "commit")} for r in csv.DictReader(path.open())]


def test_rows_and_summary(whole, world):
    rows = list(csv.DictReader((whole / "conv4-none.csv").open()))
    assert tuple(rows[0]) == COLUMNS and COLUMNS[:7] == (
        "episode",
        "accuracy",
        "n_query",
        "seconds",
        "seed",
        "commit",
        "machine",
    )
    assert [int(r["episode"]) for r in rows] == list(range(N)) and {r["n_query"] for r in rows} == {"33"}
    s = json.loads((whole / "conv4-none.summary.json").read_text())
    mean, half = mean_ci([float(r["accuracy"]) for r in rows])
    assert s["n_episodes"] == N and abs(s["mean"] - mean) < 1e-9 and abs(s["half_width"] - half) < 1e-9
    assert (
        s["settings"]["recipe"]["config"]["steps"] == 4 and s["settings"]["recipe"]["config"]["temperature"] == 4.0
    ), "every setting, also those not given"
    assert (
        len(s["settings"]["weights"]["teacher"][0]["sha256"]) == len(s["facts"]["list_sha256"]) == 64
        and s["versions"]["torch"]
    )
    for p in whole.glob("conv4-none.*"):
        assert str(world) not in p.read_text() and str(Path.home()) not in p.read_text()


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in found.read_text().split()] if found.exists() else []


def test_killed_run_goes_on_and_ends_the_same(whole, world, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [str(SCRIPT), *arguments(world, out, "--workers", 2)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.time() + 300
    while process.poll() is None and time.time() < end and not read_rows(out / "conv4-none.csv"):
        time.sleep(0.005)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    done = read_rows(out / "conv4-none.csv")
    assert 1 <= len(done) < N
    end = time.time() + 60
    while time.time() < end and any(Path(f"/proc/{p}").exists() for p in workers):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{p}").exists() for p in workers), "workers end with the main process"
    assert main(arguments(world, out)) == 0
    assert without_times(out / "conv4-none.csv") == without_times(whole / "conv4-none.csv")
    assert all(read_rows(out / "conv4-none.csv")[i] == r for i, r in done.items()), "finished episodes are kept"
    a, b = (json.loads((o / "conv4-none.summary.json").read_text()) for o in (whole, out))
    assert a["settings"] == b["settings"] and (a["mean"], a["half_width"]) == (b["mean"], b["half_width"])
    assert not list(out.rglob("*.tmp")) and not (out / ".conv4-none").exists()


def test_first_episodes_alone_give_the_same(whole, world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, "--episodes", 2)) == 0
    assert without_times(tmp_path / "conv4-none.csv") == without_times(whole / "conv4-none.csv")[:2]
    assert "| conv4-none |" in capsys.readouterr().out
    assert main(arguments(world, tmp_path, "--episodes", 4, "--students-at-once", 2)) == 0, (
        "a longer run takes what is there"
    )
    ours, theirs = (read_rows(o / "conv4-none.csv") for o in (tmp_path, whole))
    assert set(ours) == {0, 1, 2, 3} and all(abs(ours[i]["accuracy"] - theirs[i]["accuracy"]) < 0.1 for i in ours), (
        "stacked students differ by rounding"
    )


@pytest.mark.parametrize("damage", ["cut off", "nonsense", "impossible accuracy"])
def test_damaged_row_is_run_again(damage, whole, world, tmp_path):
    for p in whole.glob("conv4-none.*"):
        (tmp_path / p.name).write_bytes(p.read_bytes())
    file = tmp_path / "conv4-none.csv"
    lines = file.read_text().splitlines(keepends=True)
    if damage == "cut off":
        lines[-1] = lines[-1][:-5]
    elif damage == "nonsense":
        lines[2] = "1,��\0,hello\n"
    else:
        lines[2] = lines[2].replace(lines[2].split(",")[1], "8.5", 1)
    file.write_text("".join(lines))
    assert len(read_rows(file)) == N - 1
    assert main(arguments(world, tmp_path)) == 0
    assert without_times(file) == without_times(whole / "conv4-none.csv")


@pytest.mark.parametrize(
    "more,words",
    [
        (["--steps", 5], "recipe.config.steps was 4 and is now 5"),
        (["--seed", 1], "seed was 0 and is now 1"),
        (["--head", "logistic"], "teacher.config"),
        (["--init", "random"], "student.init was"),
    ],
)
def test_other_settings_are_refused(more, words, whole, world, capsys):
    before = (whole / "conv4-none.csv").read_bytes()
    assert main(arguments(world, whole, *more)) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1
    assert (whole / "conv4-none.csv").read_bytes() == before


BAD = {
    "unknown part": ({"reciep": {}}, [], "has no 'reciep'; did you mean 'recipe'"),
    "unknown setting": ({"recipe": {"config": {"stepps": 3}}}, [], "has no 'stepps'; did you mean 'steps'"),
    "wrong kind of value": ({"recipe": {"config": {"steps": "many"}}}, [], "steps of"),
    "missing weights": ({}, ["--teacher", "nowhere.safetensors"], "nowhere.safetensors"),
    "no encoder of that name": ({}, ["--teacher", "professor"], "professor"),
    "unknown head": ({}, ["--head", "prototypes"], "did you mean 'prototype'"),
    "no start for this student": ({}, ["--student", "resnet12"], "resnet12"),
    "unknown student": ({}, ["--student", "resnet1200", "--init", "random"], "resnet1200"),
    "unknown generator": ({}, ["--generator", "tnit"], "did you mean 'tint'"),
    "too many episodes": ({}, ["--episodes", 100], "from 1 to 6"),
    "another split": ({}, ["--split", "validation"], "list of the test split"),
    "no preset": ({}, ["--preset", "nowhere.json"], "nowhere.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, world, tmp_path, capsys):
    data, more, words = BAD[case]
    out = tmp_path / "out"
    assert main(arguments(world, out, *more, preset={**PRESET, **data})) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1 and "Traceback" not in err, err
    assert not out.exists()


def test_results_of_somebody_else(world, tmp_path, capsys):
    (tmp_path / "conv4-none.csv").write_text("a,b\n1,2\n")
    assert main(arguments(world, tmp_path)) == 2 and "not a result file" in capsys.readouterr().err


def stamps(world):
    return {p: p.stat().st_mtime_ns for p in (world / "cache/synthetic").rglob("*.png")}


def test_generators_pairs_and_table(whole, world):
    for generator in ("oracle", "ddim"):
        assert main(arguments(world, whole, "--episodes", 3, generator=generator)) == 0
    drawn = stamps(world)
    assert len(drawn) == 3 * 3 * 2 and len({p.parents[1] for p in drawn}) == 3
    assert main(arguments(world, world / "again", "--episodes", 3, "--steps", 3, generator="ddim")) == 0
    assert stamps(world) == drawn, "another student uses the same synthetic images"
    oracle, none = read_rows(whole / "conv4-oracle.csv"), read_rows(whole / "conv4-none.csv")
    assert all(r["n_query"] == 18 for r in oracle.values()), "11 queries a class, of which 5 are learnt from"
    c = compare(whole / "conv4-oracle.csv", whole / "conv4-none.csv")
    d = [oracle[i]["accuracy"] - none[i]["accuracy"] for i in range(3)]
    assert c["n"] == 3 and (c["mean"], c["half_width"]) == pytest.approx(mean_ci(d))
    table = result_table(whole, against="conv4-none")
    assert {r["method"] for r in table} == {"conv4-none", "conv4-oracle", "conv4-ddim"} and "± " in as_markdown(table)
    assert compare(whole / "conv4-none.csv", whole / "conv4-none.csv", "accuracy", "teacher_accuracy")["n"] == N


MORE = {
    "da-fusion": {},
    "retrieval": dict(too_few="fill", query="image", center=True),
    "nao-seed-select": dict(
        prompt="token", invert_steps=3, n_steps=3, path=dict(n_points=12, max_steps=2), tune=dict(steps=1)
    ),
}


@pytest.mark.parametrize("generator", MORE)
def test_rival_generators(generator, world, tmp_path):
    part = dict(PRESET["generator"], name=generator, config=MORE[generator])
    preset = {**PRESET, "generator": part}
    run = lambda out, *more: main(
        arguments(world, out, "--episodes", 1, "--steps", 2, *more, generator=generator, preset=preset)
    )
    before = set(stamps(world))
    assert run(tmp_path / "out") == 0
    drawn = {p: t for p, t in stamps(world).items() if p not in before}
    assert read_rows(tmp_path / f"out/conv4-{generator}.csv")[0]["n_query"] == 33 and len(drawn) == 3 * 2
    assert run(tmp_path / "fewer", "--per-class", 1) == 0
    assert {p: stamps(world)[p] for p in drawn} == drawn, "fewer images are the first of those that are there"


def test_retrieval_wants_a_pool(world, tmp_path, capsys):
    preset = {**PRESET, "generator": {"name": "retrieval", "config": MORE["retrieval"]}}
    assert main(arguments(world, tmp_path / "out", "--base", "none", generator="retrieval", preset=preset)) == 2
    assert "there are none" in capsys.readouterr().err


def test_digits_need_no_download(stand_in, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TINY_NBDEV_DATA", raising=False)
    command = ["evaluate", "--dataset", "digits", "--episodes", "2", "--steps", "2", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    rows = read_rows(tmp_path / "a/conv4-none.csv")
    assert set(rows) == {0, 1} and rows[0]["n_query"] == 871
    assert main([*command, "--split", "validation", "--out", str(tmp_path / "b")]) == 2
    assert "no validation split" in capsys.readouterr().err


def test_pairs_of_different_lists_are_refused(whole, tmp_path):
    for p in whole.glob("conv4-none.*"):
        (tmp_path / p.name).write_text(p.read_text().replace('"split": "test"', '"split": "validation"'))
    with pytest.raises(InputError, match="different episodes"):
        compare(whole / "conv4-none.csv", tmp_path / "conv4-none.csv")


def test_oracle_halves_are_disjoint(world):
    from tiny_nbdev.data.episodes import episode_sets, expand_episodes

    images = load_cifar_fs("test")
    episode = expand_episodes(read_episode_list(world / "list.json"), images)[0]
    support, queries = episode_sets(images, episode)
    for seed in range(5):
        learn, held = oracle_split(queries, seed)
        assert sorted([*learn.tolist(), *held.tolist()]) == list(range(len(queries)))
        assert queries.subset(learn).counts() == [5] * 3 and queries.subset(held).counts() == [6] * 3
    at = [i for g in episode.query for i in g]
    assert not {*[i for g in episode.support for i in g]} & {*at}
    assert not torch.equal(oracle_split(queries, 0)[0], oracle_split(queries, 1)[0])


LISTS = {
    ("test", 120): "cifar_fs_test_5way5shot.json",
    ("validation", 5): "cifar_fs_validation_5way5shot.json",
    ("validation", 30): "cifar_fs_validation_5way5shot_first30.json",
}
TEST_CLASSES = (
    "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper "
    "table telephone wardrobe whale woman worm"
).split()
VALIDATION_CLASSES = (
    "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea shark "
    "television tractor"
).split()


@pytest.mark.parametrize("split,n", LISTS)
def test_shipped_lists(split, n):
    file = next(p for p in episode_list_files(split=split) if p.name == LISTS[split, n])
    data = read_episode_list(file)
    assert (
        len(data["episodes"]) == n
        and [r["index"] for r in data["episodes"]] == list(range(n))
        and file.stat().st_size < 40_000
    )
    allowed = set(TEST_CLASSES if split == "test" else VALIDATION_CLASSES)
    for r in data["episodes"]:
        assert len(set(r["classes"])) == 5 and set(r["classes"]) <= allowed
        assert [len(g) for g in r["support"]] == [5] * 5 and len({i for g in r["support"] for i in g}) == 25
    assert (
        data["sha256"][:12]
        == {("test", 120): "300a8bc286a0", ("validation", 5): "39e731aac719", ("validation", 30): "c7eb56f6595e"}[
            split, n
        ]
    ), "the lists of published numbers never change"


def test_validation_lists_have_the_same_beginning():
    short, long = (read_episode_list(p)["episodes"] for p in episode_list_files(split="validation"))
    assert long[:5] == short


DATA = os.environ.get("TINY_NBDEV_DATA")


@pytest.mark.skipif(not DATA or not has_cifar_fs(), reason="CIFAR-FS is not at hand: TINY_NBDEV_DATA is not set")
@pytest.mark.parametrize("split,n", [("test", 120), ("validation", 30)])
def test_drawing_again_gives_the_shipped_list(split, n):
    images = load_cifar_fs(split, DATA)
    episodes, about = load_episode_list(images, split, n)
    assert episodes == [sample_episode(images, split, i) for i in range(n)] and about["n_images"] == len(images)
    for e in episodes:
        for c, name in enumerate(e.classes):
            ids = {*e.support[c]} | {*e.query[c]}
            assert (
                len(e.query[c]) == 595 and len(ids) == 600 and {images.classes[images.labels[i]] for i in ids} == {name}
            )
    with pytest.raises(InputError, match="other images, labels or order"):
        load_episode_list(images.subset(torch.arange(len(images)).flip(0)), split)
