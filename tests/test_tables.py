"Tables of the papers by the command line: every one is there, runs, is written whole, and says what it did not run."

import csv
import json
from pathlib import Path

import pytest

from tiny_nbdev.run.cli import main
from tiny_nbdev.run.tables import TABLE_COLUMNS, list_tables, tables_folder

ROOT = Path(__file__).resolve().parent.parent
TABLES = ["theorem1", *(f"tint/figure{i}" for i in (3, 6)), *(f"tint/table{i}" for i in range(1, 7))]


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


@pytest.mark.parametrize("file", sorted((ROOT / "data" / "results" / "tint").glob("*.csv")), ids=lambda p: p.stem)
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
