"Tables of the papers by the command line: every one is there, runs, is written whole, and says what it did not run."

import csv
import json
from pathlib import Path

import pytest

from tiny_nbdev.papers import tables_folder
from tiny_nbdev.run.cli import main
from tiny_nbdev.run.reproduce import list_tables
from tiny_nbdev.run.tables import TABLE_COLUMNS, Row, get_preset, row_assignment

ROOT = Path(__file__).resolve().parent.parent
LOFT = [*(f"loft/figure{i}" for i in range(3, 9)), *(f"loft/table{i}" for i in range(1, 5))]
SIDCLIP = [*(f"sidclip/figure{i}" for i in (1, 3, 4)), *(f"sidclip/table{i}" for i in range(1, 7))]
TABLES = [*LOFT, *SIDCLIP, "theorem1", *(f"tint/figure{i}" for i in (3, 6)), *(f"tint/table{i}" for i in range(1, 7))]


def test_every_table_of_the_paper_is_there():
    assert [r["table"] for r in list_tables()] == TABLES


@pytest.mark.parametrize("name", [t.replace("/", "_") for t in TABLES])
def test_notebook_takes_preset_and_folder(name):
    cells = json.loads((tables_folder() / f"{name}.ipynb").read_text())["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    values = {}
    exec("".join(tagged[0]["source"]), values)
    assert values["preset"] == "smoke" and values["out"] == ""


@pytest.fixture(scope="module")
def rows():
    "What the cells of the table notebooks call rows, by table and key."
    found = {}
    for n in (1, 3, 4, 5):
        cells = json.loads((tables_folder() / f"tint_table{n}.ipynb").read_text())["cells"]
        (cell,) = [s for c in cells if "rows = [" in (s := "".join(c["source"]))]
        names = dict(Row=Row, no_sr="")
        exec(cell[cell.index("rows = [") : cell.index("]\n", cell.index("rows = [")) + 2], names)
        found |= {(n, r.key): r for r in names["rows"]}
    return found


@pytest.mark.parametrize(
    "table, key, wanted",
    [
        (1, "ti-limited", {"textual_inversion.t_min": 250}),
        (3, "ti-limited", {"textual_inversion.t_min": 250}),
        (3, "plain-ti", {"textual_inversion.t_min": 0}),
        (3, "tint", {"alpha": 1.0, "textual_inversion.t_min": 250}),
        (3, "tint-alpha", {"alpha": [0.0, 0.6]}),
        (5, "test-tint", {"alpha": [0.0, 0.6]}),
        (4, "tint", {"alpha": 1.0}),
    ],
)
def test_rows_change_what_they_say(rows, table, key, wanted, tmp_path):
    e = row_assignment(rows[table, key], get_preset("embedded"), tmp_path, device="cpu").experiment
    for path, value in wanted.items():
        found = e.generator.config
        for part in path.split("."):
            found = found[part]
        assert found == value, path
    learning = {k: e.generator.config["textual_inversion"][k] for k in ("steps", "batch_size", "lr")}
    assert learning == dict(steps=200, batch_size=4, lr=5e-3) and e.generator.config["n_steps"] == 20
    assert e.generator.superres is (key != "plain-ti")


def test_label_halluc_has_its_own_settings(rows, tmp_path):
    e = row_assignment(rows[5, "test-lh"], get_preset("embedded"), tmp_path, device="cpu").experiment
    wanted = dict(steps=150, lr=0.025, temperature=4.0, base_weight=1.0, support_weight=1.0, head_init="random")
    assert wanted.items() <= e.recipe.config.items() and e.recipe.name == "whole"
    assert (e.teacher.head, e.teacher.encoders, e.teacher.tta_flip) == ("logistic", ("conv4",), False)
    assert e.teacher.config["n_augment"] == 5


def test_list_and_table_by_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert main(["reproduce", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(t in shown for t in TABLES)
    assert main(["reproduce", "theorem1", "--preset", "smoke", "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "theorem1.csv").open()))
    assert (
        tuple(rows[0]) == TABLE_COLUMNS
        and {r["preset"] for r in rows} == {"smoke"}
        and "reproduced" in {r["verdict"] for r in rows}
    )
    cells = json.loads((tmp_path / "theorem1.ipynb").read_text())["cells"]
    assert any(o["output_type"] == "display_data" for c in cells for o in c.get("outputs", [])), (
        "the executed notebook has its picture"
    )


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["tint/table99", "--out", "x"], "is not a table; choose"),
        (["tint/table3"], "--out is missing"),
        (["theorem1", "--out", "x", "--only", "none"], "has no parameter only"),
    ],
)
def test_mistakes(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_unknown_row_stops_the_notebook_with_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert main(["reproduce", "tint/table3", "--preset", "smoke", "--out", str(tmp_path), "--only", "nun"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "The table has no row nun" in err and "the same command goes on" in err


COMMITTED = [
    f
    for paper in ("loft", "sidclip", "tint")
    for f in sorted((ROOT / "data" / "results" / "current" / paper).glob("*.csv"))
]


@pytest.mark.parametrize("file", COMMITTED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_committed_table_is_whole(file):
    rows = list(csv.DictReader(file.open()))
    assert tuple(rows[0]) == TABLE_COLUMNS and len({r["row"] for r in rows}) == len(rows)
    for r in rows:
        if r["ours"]:
            assert (
                float(r["ours"]) == float(r["ours"]) and r["commit"] and r["machine"] and int(r["n_episodes"] or 1) >= 1
            )
        else:
            assert r["verdict"].startswith("not run")


def test_every_number_of_the_paper_stands_in_data():
    counts = {
        n: len(list(csv.DictReader((ROOT / "data" / "published" / f"tint_table{n}.csv").open()))) for n in range(1, 7)
    }
    assert counts == {1: 4, 2: 7, 3: 7, 4: 6, 5: 37, 6: 14}
