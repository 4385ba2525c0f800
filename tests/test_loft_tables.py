"Tables and figures of LoFT: their rows, their published numbers, what is refused, and one of them by the command line."

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny_nbdev.classify.classifiers import classifiers
from tiny_nbdev.classify.clip import has_sentence_encoder
from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate.analysis import class_f1, flip_ratio
from tiny_nbdev.generate.base import generators
from tiny_nbdev.papers import published_folder, tables_folder
from tiny_nbdev.run.classifier_tables import (
    CLASSIFIER_PRESETS,
    ClassifierRow,
    classifier_table,
    get_classifier_preset,
    preset_tasks,
    row_cost,
    row_experiment,
)
from tiny_nbdev.run.cli import main

NAMES = [*(f"figure{i}" for i in (3, 4, 5, 6, 7, 8)), *(f"table{i}" for i in range(1, 5))]


def cells(name):
    found = json.loads((tables_folder() / f"loft_{name}.ipynb").read_text())["cells"]
    return ["".join(c["source"]) for c in found if c["cell_type"] == "code"]


def rows_of(name, preset):
    "The rows of a notebook, with what its first cells know."
    known = dict(ClassifierRow=ClassifierRow, preset=preset, only="")
    (cell,) = [c for c in cells(name) if "rows = [" in c or "rows = []" in c]
    exec(cell, known)
    return known["rows"], known.get("claims", [])


@pytest.mark.parametrize("preset", ("smoke", "embedded", "paper"))
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_complete(name, preset):
    rows, claims = rows_of(name, preset)
    keys = [r.key for r in rows]
    assert len({*keys}) == len(keys) >= 4
    for r in rows:
        p = CLASSIFIER_PRESETS[preset]
        assert r.classifier in classifiers and (not r.generator or r.generator in generators)
        assert not r.like or r.like in keys
        if preset not in r.not_run and r.generator:
            e = row_experiment(r, p, p.datasets[0], "")
            assert e.generator.name == r.generator and (row_cost(r, p)["unet"] > 0)
            for key, value in r.changes.items():
                assert e.generator.config[key] == value
    for _, a, b in claims:
        assert {a, b} <= {*keys}


def published(name):
    return list(csv.DictReader((published_folder() / f"loft_{name}.csv").open(encoding="utf-8")))


def test_every_number_of_the_paper_stands_in_data():
    counts = {n: len(published(n)) for n in ("table1", "table2", "table3", "table4", "figure3", "figure6", "figure8")}
    assert counts == dict(table1=50, table2=60, table3=16, table4=18, figure3=10, figure6=3, figure8=6)


@pytest.mark.parametrize("name", ("table1", "table2"))
def test_averages_are_those_of_the_nine_sets(name):
    by = {}
    for r in published(name):
        by.setdefault(r["method"], {})[r["dataset"]] = float(r["value"])
    for method, sets in by.items():
        nine = [v for k, v in sets.items() if k != "average"]
        assert len(nine) == 9 and abs(sum(nine) / 9 - sets["average"]) < 0.11, method


@pytest.mark.parametrize("name", ("table1", "table2", "table3", "table4"))
def test_rows_carry_the_published_numbers(name):
    known = {float(r["value"]) for r in published(name) if r["dataset"] in ("average", "ImageNet")}
    own = {r.published for r in rows_of(name, "paper")[0] if r.published is not None}
    assert own and own <= known


def test_claims_agree_with_the_published_numbers():
    for name in ("table1", "table2", "table3", "table4"):
        rows, claims = rows_of(name, "paper")
        told = {r.key: r.published for r in rows}
        for text, a, b in claims:
            if None not in (told[a], told[b]) and not text.endswith("(ours)"):
                assert told[a] > told[b], text


def test_costs_are_those_of_the_paper():
    paper = replace(CLASSIFIER_PRESETS["paper"], tasks=1)
    loft = row_cost(ClassifierRow("loft", "", None, "clip-lora", generator="loft"), paper)
    training = 17_440 * 600 * 2 * 0.804 / 1e6  # EFLOP; a step forwards and backwards counted as two calls
    assert loft["unet"] * 0.804 / 1e6 - training == pytest.approx(545_000 * 102 * 0.804 / 1e6)
    dream = row_cost(ClassifierRow("d", "", None, "clip-lora", generator="datadream"), paper)
    assert dream["unet"] == 1090 * 400 * 8 * 2 + 545_000 * 102


def test_what_is_missing_is_one_sentence(tmp_path):
    for name in ("paper", "embedded"):
        if name == "paper":
            with pytest.raises(InputError, match="needs a diffusion model"):
                get_classifier_preset(name)
        with pytest.raises(InputError, match="no model_index.json"):
            get_classifier_preset(name, str(tmp_path))
    with pytest.raises(ValueError, match="synthetic and both have a generator"):
        ClassifierRow("x", "", None, "clip-lora", "both")


def test_a_row_that_was_not_run_says_what_it_costs(tmp_path):
    row = ClassifierRow("loft", "LoFT", 84.7, "clip-lora", generator="loft")
    (told,) = classifier_table([row], CLASSIFIER_PRESETS["paper"], tmp_path)
    assert told["ours"] is None and told["verdict"].startswith("not run: ") and "EFLOP" in told["verdict"]


def test_measures_by_hand():
    y = torch.tensor([0, 0, 1, 1])
    assert class_f1(torch.tensor([0, 1, 1, 1]), y, 2).tolist() == [2 / 3, 0.8]
    assert flip_ratio(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0])) == 0.5


@pytest.mark.skipif(not has_sentence_encoder(), reason="the sentence encoder is not installed")
@pytest.mark.parametrize("name", ("table1", "figure8"))
def test_smoke(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert main(["reproduce", f"loft/{name}", "--preset", "smoke", "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert all(r["ours"] or r["verdict"].startswith("not run") for r in rows) and any(r["ours"] for r in rows)
    assert Path(tmp_path / f"loft_{name}.ipynb").is_file()


def test_paper_refuses_missing_weights_in_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert main(["reproduce", "loft/table1", "--preset", "paper", "--out", str(tmp_path)]) == 2
    assert "needs a diffusion model" in capsys.readouterr().err.strip().splitlines()[-1]


def test_photos_of_all_classes():
    every = get_classifier_preset("embedded", n_shot=16)
    assert "one task each of all classes with 16 photos" in every.note
    assert "4 tasks each of 5 classes with 5 photos" in get_classifier_preset("embedded", tasks=4).note
    row = ClassifierRow("loft", "LoFT", 1.0, "clip-lora", generator="loft")
    assert row_cost(row, every)["unet"] > 76 * 16 * every.generators["loft"]["adapter"]["steps"]
    with pytest.raises(InputError, match="n_shot is for the preset embedded"):
        get_classifier_preset("smoke", n_shot=2)
    tasks = preset_tasks(replace(CLASSIFIER_PRESETS["smoke"], n_shot=2, tasks=2), "digits")
    assert len(tasks) == 2 and {*tasks[0].support.counts()} == {2} and {*tasks[0].queries.counts()} == {2}
    assert not torch.equal(tasks[0].support.images, tasks[1].support.images)
