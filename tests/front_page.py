"The tables of figures on the front page, from what was measured: `python tests/front_page.py` writes them."

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
SETS = r"photos-(aid|clothing|grocery|trash|xsdd)"
# What a row is called, and its lines of the ledger; several lines are sets of the same number of tasks
ROWS = (
    ("five sets of real photos: Conv4, 64 pixels", rf"photos: conv4-u0/{SETS},"),
    ("the same and 100 unlabelled photos", rf"photos: conv4-u100/{SETS},"),
    ("`--student lite_student`, 1.4 million parameters, 128 pixels", rf"photos: lite_student-u0/{SETS},"),
    ("the same and 100 unlabelled photos", rf"photos: lite_student-u100/{SETS},"),
    ("miniImageNet's test classes: Conv4", r"mini_imagenet: conv4-u0/"),
    ("the same and 500 unlabelled photos", r"mini_imagenet: conv4-u500/"),
    ("CIFAR-FS, `--preset cifar-fs-conv4`, 32 pixels", r"cifar_fs: conv4-none,"),
    ("printed symbols, `tiny-nbdev demo`", r"demo: student, 200"),
)
ARMS = {
    "real": "real photos with labels",
    "unlabelled": "real photos without labels, named by the teacher",
}


def ledger():
    return list(csv.DictReader((RESULTS / "ledger.csv").open(encoding="utf-8")))


def accuracy_table() -> str:
    "Means of the ledger's lines, as Markdown."
    lines, out = ledger(), ["| five photos of each of five classes | tasks | accuracy, % |", "|---|---|---|"]
    for label, pattern in ROWS:
        found = [r for r in lines if re.match(pattern, r["claim"])]
        if not found or len({r["episodes"] for r in found}) > 1:
            raise ValueError(f"{pattern} names {len(found)} lines of the ledger with other numbers of tasks")
        mean = sum(float(r["mean"]) for r in found) / len(found)
        half = f" ± {float(found[0]['interval']):.1f}" if len(found) == 1 and found[0]["interval"] else ""
        out.append(f"| {label} | {sum(int(r['episodes']) for r in found)} | {mean:.1f}{half} |")
    return "\n".join(out)


def gains() -> dict:  # Arm to (mean, half-width, tasks), in points; the best first
    "What students gain over the photos alone, paired by task."
    from tiny_nbdev.measure import mean_ci

    file = RESULTS / "experiments" / "which_generator_helps" / "equal_number.csv"
    arms = {}
    for r in csv.DictReader(file.open(encoding="utf-8")):
        arms.setdefault(r["arm"], {})[r["set"], r["episode"]] = 100 * float(r["accuracy"])
    alone, out = arms.pop("none"), {}
    for arm, rows in arms.items():
        out[arm] = (*mean_ci([v - alone[k] for k, v in rows.items()]), len(rows))
    return dict(sorted(out.items(), key=lambda item: -item[1][0]))


def gain_table() -> str:
    "The same as Markdown."
    out = ["| what the student learns from, beside the photos | gain, points | tasks |", "|---|---|---|"]
    for arm, (mean, half, n) in gains().items():
        out.append(f"| {ARMS.get(arm, f'`--generator {arm}`')} | {mean:+.1f} ± {half:.1f} | {n} |")
    return "\n".join(out)


TABLES = dict(accuracy=accuracy_table, gains=gain_table)


def with_tables(page: str) -> str:
    "A page with its tables as they follow from the results."
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        page, n = re.subn(f"{begin}\n.*?{end}", lambda _, t=table: f"{begin}\n{t()}\n{end}", page, flags=re.S)
        if n != 1:
            raise ValueError(f"README.md has {n} places for the table {name!r}")
    return page


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
