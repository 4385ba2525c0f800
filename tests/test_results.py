"What was measured: every line of the ledger is found in its file, every question has a short answer."

import csv
import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
SUBJECTS = {"demo", "photos", "cifar_fs", "mini_imagenet", "models", "tint", "loft", "sidclip", "speed"}
HOW = "papermill nbs/benchmarks/ledger.ipynb OUT.ipynb -p out data/results/ledger.csv"


def ledger():
    return list(csv.DictReader((RESULTS / "ledger.csv").open(encoding="utf-8")))


def leaves(x):
    "All numbers of a JSON file."
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list):
        yield from (v for part in x for v in leaves(part))
    elif isinstance(x, (int, float)) and not isinstance(x, bool):
        yield float(x)


def mean_and_half(values):
    "A mean and half of its 95 % interval, by the t-distribution, in percent."
    from scipy.stats import t

    n, mean = len(values), sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return 100 * mean, 100 * t.ppf(0.975, n - 1) * spread / math.sqrt(n)


def same(text, number):
    return number is not None and math.isclose(float(text), number, rel_tol=2e-4, abs_tol=1e-9)


def stands_in(row, file):
    "Whether a line's mean and interval stand side by side in its file, or follow from the episodes in it."
    if file.suffix == ".csv":
        rows = list(csv.DictReader(file.open(encoding="utf-8")))
        name = row["claim"].partition(": ")[2]
        number = lambda text: float(text) if text else None
        if "ratio" in rows[0]:
            return any(
                name == f"{r['row']}, {r['device']}, ratio" and same(row["mean"], number(r["ratio"])) for r in rows
            )
        found = [r for r in rows if r["row"] == name]
        half = lambda r: not row["interval"] and not r["ci95"] or same(row["interval"] or "nan", number(r["ci95"]))
        return any(same(row["mean"], number(r["ours"])) and half(r) for r in found)
    about = json.loads(file.read_text(encoding="utf-8"))
    if "accuracies" in about:
        mean, half = mean_and_half(about["accuracies"])
        return same(row["mean"], mean) and same(row["interval"], half)
    if "half_width" in about:
        half = about["half_width"]
        own = same(row["interval"], 100 * half) if row["interval"] else not half
        return same(row["mean"], 100 * about["mean"]) and own and int(row["episodes"]) == about["n_episodes"]
    who = re.search(r"teacher|student", row["claim"])[0]
    return same(row["mean"], 100 * about[f"{who}_accuracy"])


def test_every_line_is_found_in_its_file():
    rows, bad = ledger(), []
    assert len(rows) > 100
    for row in rows:
        file = ROOT / row["file"]
        if not file.is_file() or not row["command"] or not stands_in(row, file):
            bad.append(f"{row['claim']}: {row['mean']} ± {row['interval']} in {row['file']}")
    assert not bad, f"run {HOW}\n" + "\n".join(bad)


def test_a_wrong_figure_is_noticed():
    for row in ledger()[::17]:
        wrong = row | dict(mean=str(float(row["mean"]) * 1.01 + 0.1))
        assert not stands_in(wrong, ROOT / row["file"]), row


def test_the_ledger_is_complete():
    listed = {row["file"] for row in ledger()}
    for file in (RESULTS / "current").rglob("*.summary.json"):
        if json.loads(file.read_text())["n_episodes"]:
            assert file.relative_to(ROOT).as_posix() in listed, f"run {HOW}"


def test_subjects_and_questions():
    assert {p.name for p in RESULTS.iterdir()} == {"current", "experiments", "ledger.csv", "HISTORY.md"}
    assert {p.name for p in (RESULTS / "current").iterdir()} == SUBJECTS


@pytest.mark.parametrize("folder", sorted((RESULTS / "experiments").iterdir()), ids=lambda p: p.name)
def test_questions_are_answered_in_five_lines(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    head, *rest = [line for line in text.splitlines() if line]
    assert head.startswith("# ") and head.endswith("?") and len(rest) == 4
    assert any("ommand" in line for line in rest) and any("Files:" in line for line in rest)
    for name in re.findall(r"`([\w./*-]+\.(?:csv|json)|[\w./-]+/)`", " ".join(x for x in rest if "Files:" in x)):
        assert list(folder.glob(name)) or (folder / name).exists(), name


def test_paths_below_the_results_exist():
    files = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("tiny_nbdev/weights/*/README.md"), ROOT / "README.md"]
    for file in files:
        if ".ipynb_checkpoints" in file.parts:
            continue
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".ipynb":
            text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"])
        for path in re.findall(r"(version 0\.12\.0, (?:in )?`)?(?<![\w.])(data/results/[\w./-]*\w)", text):
            gone = path[0] or "0.12.0" in text.split(path[1])[0][-120:]
            assert gone or list(ROOT.glob(path[1])) or list(ROOT.glob(path[1] + ".*")), f"{file.name}: {path[1]}"
