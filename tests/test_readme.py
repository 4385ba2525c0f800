"""The front page keeps its promises: its commands and its Python run from a plain installation, and it reads easily.

Sizes are made small by options that follow the README's own (the last one counts). Nothing is downloaded.
"""

import json
import re

import pytest
from conftest import photo
from front_page import with_tables
from plain_install import ROOT, plain_install

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    "What stands in the README's fenced blocks of a language."
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands():
    "Lines of the README's shell blocks, as a user types them in an environment that is switched on."
    return [line.replace(".venv/bin/", "") for block in blocks("bash") for line in block.splitlines() if line.strip()]


SMOKE = "--preset smoke --device cpu"
NEEDS_NETWORK = "downloads gigabytes"
RUN = {  # command: options that make it small
    "tiny-nbdev specialize photos --out runs/pets --queries more_photos": SMOKE,
    "tiny-nbdev predict runs/pets/model.onnx new.jpg": "",
    "tiny-nbdev doctor": "",
    "tiny-nbdev evaluate --out results --dataset cifar-fs --preset cifar-fs-conv4": (
        f"--dataset digits --episodes 1 {SMOKE}"
    ),
    "tiny-nbdev reproduce --list": "",
    "tiny-nbdev reproduce theorem1 --out results/tables": "--preset smoke",
    "tiny-nbdev plan-episodes --accuracy 93 --sigma 2.8 --half-width 0.5 --queries 2975": "",
    "tiny-nbdev fetch sd15 --list": "",
}
SETS_UP = {  # command: the part of it that is run here, and options that make it small
    "python3 -m venv .venv && pip install . && tiny-nbdev demo": ("tiny-nbdev demo", SMOKE),
}
SKIPPED = {
    "tiny-nbdev fetch sd15": NEEDS_NETWORK,
    "python3 -m venv .venv && pip install '.[dev]' && python tests/run.py": "is the test run itself, and CI's command",
}
WITHOUT_WEIGHTS = "tiny-nbdev specialize photos --bundle sd15 --out runs/big --plan"


def test_every_command_is_covered():
    assert sorted(commands()) == sorted([*RUN, *SETS_UP, *SKIPPED, WITHOUT_WEIGHTS])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return plain_install(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with the photos that the README speaks of."
    d = tmp_path_factory.mktemp("readme")
    for c, name in enumerate(("cat", "dog")):
        for i in range(3):
            photo(d / "photos" / name / f"{i}.jpg", 100 * c + i)
            photo(d / "more_photos" / name / f"{i}.jpg", 1000 + 100 * c + i)
    photo(d / "new.jpg", 7)
    return d


def shell(plain, folder, command, more=""):
    "One command of the README with further options, in the plain environment; `sd15` is not there."
    return plain.run(*command.split(), *more.split(), cwd=folder, TINY_NBDEV_SD15=str(folder / "nothing"))


@pytest.fixture(scope="module")
def pets(plain, folder):
    "The run that the README asks for first and uses later."
    command = next(iter(RUN))
    done = shell(plain, folder, command, RUN[command])
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "pets"


def test_what_you_get(pets):
    table = README.partition("## What you get")[2].partition("\n## ")[0]
    named = [n for row in re.findall(r"^\| (`.*?) \|", table, re.M) for n in re.findall(r"`(.*?)`", row)]
    assert len(named) == 7
    for name in named:
        assert list(pets.glob(name.replace("<class>", "*"))), f"{name} is not in the run folder"


@pytest.mark.parametrize("command", [*RUN][1:])
def test_command(command, plain, folder, pets):
    done = shell(plain, folder, command, RUN[command])
    assert done.returncode == 0, done.stderr
    if "predict" in command:
        assert json.loads(done.stdout)["label"] in ("cat", "dog")
    if command.endswith("reproduce --list"):
        assert "theorem1" in done.stdout and "tint/table3" in done.stdout
    if "plan-episodes" in command:
        assert "episodes" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", SETS_UP)
def test_demo(command, plain, folder):
    part, more = SETS_UP[command]
    assert part in command
    done = shell(plain, folder, part, more)
    assert done.returncode == 0, done.stderr
    assert "student_accuracy" in json.loads((folder / "demo" / "metrics.json").read_text())


@pytest.mark.parametrize("command", SKIPPED)
def test_command_that_is_not_run_here(command):
    pytest.skip(SKIPPED[command])


def test_bundle_that_is_not_there_is_one_sentence(plain, folder):
    done = shell(plain, folder, WITHOUT_WEIGHTS)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "tiny-nbdev fetch sd15" in done.stderr and not (folder / "runs" / "big").exists()


def test_python(plain, folder, pets):
    (block,) = blocks("python")
    assert len(block.strip().splitlines()) <= 10
    assert 'preset="fast"' in block
    (folder / "readme.py").write_text(block.replace('preset="fast"', 'preset="smoke", device="cpu"'), encoding="utf-8")
    done = plain.run("python", "readme.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "'label'" in done.stdout.splitlines()[-1]


# The page itself


def test_page_is_short():
    assert len(README.encode()) <= 8 * 1024


def test_figures_are_those_of_the_results():
    assert with_tables(README) == README, "run python tests/front_page.py"


def test_a_place_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="0 places for the table 'gains'"):
        with_tables(README.replace("<!-- gains -->", ""))


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_notebooks_that_are_named_exist():
    text = README.partition("## The notebooks")[2].partition("\n## ")[0]
    assert len(re.findall(r"^- ", text, re.M)) == 6
    numbers = {p.name[:2] for p in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    ranges = re.findall(r"`(\d\d)` to `(\d\d)`", text)
    assert len(ranges) == 5 and all(lo in numbers and hi in numbers for lo, hi in ranges), ranges
    single = set(re.findall(r"`(\d\d)`", re.sub(r"`\d\d` to `\d\d`", "", text)))
    assert single <= numbers
    assert not [n for n in numbers - single if not any(lo <= n <= hi for lo, hi in ranges)]


def sentences():
    "Prose of the README: no code blocks, tables, pictures or headings; inline code counts as one word."
    text = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    text = re.sub(r"!\[.*?\]\(.*?\)", "", text)
    text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "CODE", text)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#"))]
    paragraphs = re.split(r"\n\s*\n|\n(?=- )", "\n".join(lines))
    for p in paragraphs:
        yield from (s.strip() for s in re.split(r"(?<=[.!?:])\s+", " ".join(p.split()).replace("**", "")) if s.strip())


def test_sentences_are_short_and_hold_one_number():
    found = [*sentences()]
    assert len(found) > 40
    long = [s for s in found if len(s.split()) > 20]
    assert not long, long
    numbers = [s for s in found if len(re.findall(r"(?<![\w.-])\d[\d.,]*", s)) > 1]
    assert not numbers, numbers


def test_no_history_on_the_front_page():
    assert not re.search(r"\b0\.[1-9]\.\d\b|since version|earlier version of|used to", README)
