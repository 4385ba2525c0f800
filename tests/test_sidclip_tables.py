"Tables and figures of SIDCLIP: their rows, their published numbers, tasks, costs, what is refused, one end to end."

import csv
import json
from dataclasses import replace

import pytest
import torch

from tiny_nbdev.classify.clip import has_sentence_encoder
from tiny_nbdev.core import rng_for
from tiny_nbdev.data.images import ImageSet
from tiny_nbdev.errors import InputError
from tiny_nbdev.papers import published_rows, tables_folder
from tiny_nbdev.run.cli import main
from tiny_nbdev.run.sidclip_results import published_number, shot_claims, shot_table
from tiny_nbdev.run.sidclip_tables import (
    FULL,
    SHOT_PRESETS,
    SHOT_ROWS,
    cell_cost,
    cell_experiment,
    cost_seconds,
    get_shot_preset,
    row_cost,
    row_shots,
    run_shots,
    task_rows,
)

EMBEDDED, PAPER = SHOT_PRESETS["embedded"], SHOT_PRESETS["paper"]
SOURCE = dict(figure1="table1", figure3="table6") | {f"table{i}": f"table{i}" for i in range(1, 7)}


def table(name):
    "Methods and claims of a notebook."
    cells = json.loads((tables_folder() / f"sidclip_{name}.ipynb").read_text())["cells"]
    (cell,) = [s for c in cells if (s := "".join(c["source"])).startswith("methods = {")]
    known = {}
    exec(cell, known)
    return known["methods"], known["claims"]


@pytest.mark.parametrize("name", SOURCE)
def test_rows_and_claims_are_known(name):
    methods, claims = table(name)
    printed = {r["method"] for r in published_rows(f"sidclip_{SOURCE[name]}")}
    assert {*methods} <= {*SHOT_ROWS} and {*methods.values()} <= printed
    for text, a, b in claims:
        assert {a, b} <= {*methods} and text


@pytest.mark.parametrize("name", [n for n in SOURCE if n.startswith("table")])
def test_every_number_of_the_paper_has_a_row(name):
    methods, _ = table(name)
    known = [r for r in published_rows(f"sidclip_{name}") if r["role"] == "computed here"]
    shots = (0, 4, FULL) if name == "table2" else PAPER.shots
    preset, found = replace(PAPER, shots=shots), 0
    for key, method in methods.items():
        for k in row_shots(SHOT_ROWS[key], preset):
            found += sum(published_number(known, method, k, d) is not None for d in PAPER.published.values())
    assert found == len(known) > 0


def test_claims_carry_the_published_differences(tmp_path):
    methods, claims = table("table1")
    order = shot_claims(claims, methods, "table1", PAPER, tmp_path)
    told = {c["claim"]: c["published"] for c in order}
    assert [round(told[f"{text}, all shots"], 2) for text, _, _ in claims[:3]] == [14.25, 16.63, 16.19]
    assert told["S: drawn images help, 0 shots"] is None and {c["verdict"] for c in order} == {"not run"}


def test_what_sets_the_rows_apart():
    of = lambda key, preset=EMBEDDED, d="photos/aid": cell_experiment(SHOT_ROWS[key], preset, d, 1)
    sidclip, plain = of("sidclip"), of("no-randaugment")
    assert sidclip.generator == plain.generator and sidclip.generator.gate < 0
    assert sidclip.recipe.config | dict(rand_augment=False) == plain.recipe.config
    assert [of(k).generator.per_class for k in ("synthetic-100", "synthetic-200", "sidclip")] == [10, 20, 30]
    assert [of(k).student.name for k in ("enb0", "enb0-i-d", "tinyclip")] == [
        "conv4",
        "conv4_clip",
        "lite_student_clip",
    ]
    assert [of(k).generator.name for k in ("enb0-i-d", "enb0-d-s")] == ["none", "sidclip"]
    full = of("enb0-d-s", PAPER, "food")
    assert (full.student.name, full.generator.name) == ("efficientnet_b0", "sidclip-kandinsky")
    assert full.generator.per_class == 300 and full.teacher.config["clip"] == "openai/clip-vit-large-patch14"


def test_costs_by_hand():
    found = cell_cost(SHOT_ROWS["sidclip"], EMBEDDED, "photos/aid", 2)
    drawn, photos = 5 * 30, 5 * 2
    once = dict(images=drawn, encoder=photos, unet=drawn * 10 * 2, decode=drawn, views=6 * (photos + drawn), steps=60)
    assert found == {k: 3 * n for k, n in once.items()}
    s = EMBEDDED.seconds
    by_hand = sum(s[k] * found[k] for k in ("unet", "decode", "encoder", "views")) + 180 * s["steps small-clip"]
    assert cost_seconds(SHOT_ROWS["sidclip"], found, EMBEDDED) == pytest.approx(by_hand)
    assert cell_cost(SHOT_ROWS["enb0"], EMBEDDED, "photos/aid", 8) == dict(steps=180), "labels ask no teacher"
    assert cell_cost(SHOT_ROWS["enb0-i-d"], EMBEDDED, "photos/aid", 0) == {}, "nothing to learn from"
    pool = row_cost(SHOT_ROWS["sidclip"], replace(PAPER, draws=1))
    assert pool["images"] == pool["movq"] == (196 + 102 + 101) * 300 * 5 == 598_500
    assert pool["decoder"] == 598_500 * 50 * 2 and pool["prior"] == 598_500 * 25 * 2
    cars = cell_cost(SHOT_ROWS["sidclip"], replace(PAPER, draws=1), "cars", 8)
    assert cars["steps"] == -(-30 * 196 * 308 // 256) and cars["views"] == 6 * 196 * 308


def test_a_row_that_was_not_run_says_what_it_costs(tmp_path):
    methods, _ = table("table1")
    rows = {r["row"]: r for r in shot_table(methods, "table1", EMBEDDED, tmp_path)}
    assert len(rows) == (4 * 5 + 3 * 4) * 5 and all(r["ours"] is None for r in rows.values())
    assert all(r["verdict"].startswith("not run: ") for r in rows.values())
    assert "of one core" in rows["sidclip-2"]["verdict"] and "1,800 images" in rows["sidclip-2"]["verdict"]
    assert "450 images" in rows["sidclip-photos-aid-2"]["verdict"]
    assert rows["clip-1"]["verdict"] == "not run: comes with enb0-i-d"
    paper = {r["row"]: r for r in shot_table(methods, "table1", PAPER, tmp_path)}
    assert "no network of timm" in paper["tinyclip-0"]["verdict"] and paper["sidclip-cars-8"]["published"] == 80.9


def test_official_splits_make_tasks():
    "Three classes; the first twelve images are for learning, the others are asked."
    labels = torch.arange(30) % 3
    x = torch.randint(255, (30, 3, 4, 4), dtype=torch.uint8, generator=rng_for("tasks"))
    images = ImageSet(x, labels, ("a", "b", "c"))
    preset = replace(PAPER, datasets=dict(made=3), queries_from=dict(made=12), nested=(0, 1, 2), draws=1)
    rows = task_rows(images, preset, "made")
    assert [*rows] == [0, 1, 2, FULL]
    (one, two, every) = (rows[k][0] for k in (1, 2, FULL))
    assert all({*a} < {*b} <= {*range(12)} for a, b in zip(one["support"], two["support"]))
    assert [sorted(s) for s in every["support"]] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    two_of_three = task_rows(images, replace(preset, datasets=dict(made=2), queries=2), "made")
    for k, found in two_of_three.items():
        for r in found:
            assert len(r["classes"]) == 2 and r["classes"] == two_of_three[0][r["index"]]["classes"]
            asked = [{i for i in range(12, 30) if images.classes[labels[i]] == c} for c in r["classes"]]
            asked = [a - {*aside} for a, aside in zip(asked, r["aside"])]
            assert [len(a) for a in asked] == [2, 2], k
    with pytest.raises(InputError, match="asks for more"):
        task_rows(images, replace(preset, datasets=dict(made=4)), "made")


def test_paper_refuses_missing_weights_in_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with pytest.raises(InputError, match=r"tower.safetensors.*598,500 images.*59,850,000 calls of the decoder"):
        get_shot_preset("paper")
    for f in PAPER.weights[1:]:
        (tmp_path / f).write_bytes(b"")
    with pytest.raises(InputError, match="a folder with tower.safetensors \\("):
        get_shot_preset("paper", str(tmp_path))
    (tmp_path / PAPER.weights[0]).write_bytes(b"")
    e = cell_experiment(SHOT_ROWS["sidclip"], get_shot_preset("paper", str(tmp_path)), "cars", 1)
    assert e.student.init == str(tmp_path / "tower.safetensors")
    assert e.recipe.config["clip_config"] == dict(weights=str(tmp_path / "clip.safetensors"))
    out = tmp_path / "out"
    assert main(["reproduce", "sidclip/table1", "--preset", "paper", "--out", str(out)]) == 2
    assert "needs weights that are not at hand" in capsys.readouterr().err.strip().splitlines()[-1]


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="choose smoke, embedded, paper"):
        get_shot_preset("quick")
    with pytest.raises(InputError, match="has no photos/trash"):
        get_shot_preset("embedded", datasets="photos/trash")
    with pytest.raises(InputError, match="has no row nun; it has enb0"):
        run_shots(["enb0"], SHOT_PRESETS["smoke"], tmp_path, "nun")


@pytest.mark.skipif(not has_sentence_encoder(), reason="the sentence encoder is not installed")
def test_smoke(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert main(["reproduce", "sidclip/table3", "--preset", "smoke", "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "table3.csv").open()))
    assert len(rows) == 8 and all(r["ours"] and r["commit"] for r in rows)
    claims = json.loads((tmp_path / "table3.json").read_text())["claims"]
    assert [c["n_episodes"] for c in claims] == [1, 1, 1] and (tmp_path / "sidclip_table3.ipynb").is_file()
    drawn = [p for p in (tmp_path / "cache" / "synthetic").iterdir() if p.is_dir()]
    assert len(drawn) == 2, "both rows learn from the same drawn images"
    smoke, before = get_shot_preset("smoke"), {f: f.read_bytes() for f in tmp_path.rglob("runs/**/*.csv")}
    run_shots(["sidclip", "enb0-d-s"], smoke, tmp_path)
    assert len(before) == 4 and before == {f: f.read_bytes() for f in tmp_path.rglob("runs/**/*.csv")}
    with pytest.raises(InputError, match="seed was 0 and is now 1"):
        run_shots(["sidclip"], smoke, tmp_path, seed=1)
