"""The notebooks as a house: outputs made with the shipped weights, imports from below only, nothing too long."""

import ast
import json
import re
import subprocess
import sys

import pytest
from light import ROOT, source, stamped, uses_weights, weights_hash

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(q.startswith((".", "_")) for q in p.parts))
NUMBERED = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)]
SHOWN = [*NUMBERED, ROOT / "nbs" / "tutorials" / "quickstart.ipynb"]
MODULES = sorted(p for p in (ROOT / "tiny_nbdev").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
COLUMNS, FUNCTION, MODULE, NOTEBOOK = 120, 50, 500, 500_000  # characters, lines, lines, bytes


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def name_of(path):
    return str(path.relative_to(ROOT))


def listed(sizes: dict) -> str:
    "Places and sizes, the largest first."
    return "\n".join(f"{n:8} {place}" for place, n in sorted(sizes.items(), key=lambda item: -item[1]))


def written(module) -> list:  # Lines
    "A module without what nbdev writes into it."
    text = re.sub(r"^__all__ = \[.*?\]\n", "", module.read_text(encoding="utf-8"), flags=re.M | re.S)
    return text.splitlines()


def exports() -> dict:  # Module name to its notebook
    "The numbered notebook that each module is exported from."
    out = {}
    for path in NUMBERED:
        for cell in read(path)["cells"]:
            if found := re.match(r"#\|\s*default_exp\s+(\S+)", source(cell)):
                out[f"tiny_nbdev.{found[1]}"] = path
    return out


EXPORTS = exports()


def imported(cell) -> set:  # Names of this package's modules
    "What a cell imports from this package."
    out = set()
    for node in ast.walk(ast.parse(source(cell))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tiny_nbdev":
            # `from tiny_nbdev.data import images` imports a module, `from tiny_nbdev.core import rng_for` a name
            out |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
    return out & set(EXPORTS)


def number(path) -> int:
    return int(path.name[:2])


@pytest.mark.parametrize("path", SHOWN, ids=lambda p: p.stem)
def test_pictures_come_from_the_shipped_weights(path):
    nb = read(path)
    if uses_weights(nb):
        assert stamped(nb) == weights_hash(), (
            f"{name_of(path)} shows pictures made with {stamped(nb) or 'unknown'} weights, the shipped ones are "
            f"{weights_hash()}; run `python tests/light.py {name_of(path)}`"
        )


def test_a_changed_weight_changes_the_hash(tmp_path):
    for name, content in (("a.safetensors", b"1"), ("unet/b.safetensors", b"2")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    first = weights_hash(tmp_path)
    (tmp_path / "provenance.json").write_text("{}")
    assert weights_hash(tmp_path) == first, "only weights count"
    (tmp_path / "unet" / "b.safetensors").write_bytes(b"3")
    assert weights_hash(tmp_path) != first


def test_cleaning_keeps_the_stamp():
    line = re.search(r"^allowed_metadata_keys *=(.*)$", (ROOT / "settings.ini").read_text(), re.M)
    assert line and "tiny_nbdev" in line[1].split()


def test_numbers_are_unique():
    assert len({number(p) for p in NUMBERED}) == len(NUMBERED)


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_imports_come_from_below(path):
    up = set()
    for cell in read(path)["cells"]:
        if cell["cell_type"] == "code" and re.search(r"^#\|\s*exporti?\b", source(cell), re.M):
            up |= {EXPORTS[m] for m in imported(cell) if number(EXPORTS[m]) >= number(path) and EXPORTS[m] != path}
    assert not up, f"{path.name} imports from {', '.join(sorted(p.name for p in up))}"


def test_no_private_name_is_imported():
    bad = []
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("tiny_nbdev")):
                names = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
                bad += [f"{name_of(file)}:{node.lineno} {n}" for n in names]
    assert not bad, "\n".join(bad)


def test_modules_are_short():
    lengths = {name_of(p): len(written(p)) for p in MODULES}
    bad = {k: n for k, n in lengths.items() if n > MODULE}
    assert not bad, listed(bad)


def test_functions_are_short():
    bad = {}
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION:
                    bad[f"{name_of(file)}:{node.lineno} {node.name}"] = length
    assert not bad, listed(bad)


def test_lines_are_short():
    bad = {}
    for file in [*MODULES, *(ROOT / "tests").glob("*.py")]:
        for i, line in enumerate(written(file), 1):
            if len(line) > COLUMNS:
                bad[f"{name_of(file)}:{i}"] = len(line)
    for path in NOTEBOOKS:
        for i, cell in enumerate(read(path)["cells"]):
            long = [len(line) for line in source(cell).splitlines() if len(line) > COLUMNS]
            if long and cell["cell_type"] == "code":
                bad[f"{name_of(path)}: cell {i}"] = max(long)
    assert not bad, listed(bad)


def test_notebooks_are_light():
    sizes = {name_of(p): p.stat().st_size for p in NOTEBOOKS}
    bad = {k: n for k, n in sizes.items() if n > NOTEBOOK}
    assert not bad, listed(bad)


def run_for_the_pages(nb) -> str:
    "What nbdev runs of a notebook to make its page: what is exported, and every cell that imports something."
    out = []
    for cell in nb["cells"]:
        text = source(cell)
        if cell["cell_type"] != "code" or "nbdev_export()" in text or re.search(r"^#\|\s*eval:\s*false", text, re.M):
            continue
        imports = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(ast.parse(text)))
        if imports or re.match(r"#\|\s*export", text):
            out.append(text)
    return "\n\n".join(out)


def test_pages_of_the_documentation_can_be_made(tmp_path):
    "A cell that imports and computes is run for the page, too; what it computes with must be known there."
    exported = [p for p in NOTEBOOKS if any(re.match(r"#\|\s*default_exp", source(c)) for c in read(p)["cells"])]
    for path in exported:
        (tmp_path / f"{path.stem}.py").write_text(run_for_the_pages(read(path)), encoding="utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and len(exported) > 90, done.stdout
