"What is printed arrives on every console: UTF-8 that is strict, a code page of Windows, ASCII."

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny_nbdev
from tiny_nbdev.console import json_line, never_fail

CONSOLES = ("utf-8:strict", "cp1252:strict", "ascii:strict")
NAMES = ("Vögel", "鳥 🐦", "plain")


def printed(text, encoding, line=False):
    "What arrives at the other end of a stream of this encoding."
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="")
    if line:
        stream.write(json_line(text, stream))
    else:
        never_fail(stream)
        stream.write(text)
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", [c.split(":")[0] for c in CONSOLES])
def test_lines_of_json_come_back_as_they_were(encoding):
    for value in (
        dict(file="caf\udce9.jpg", label=NAMES[1], probabilities={n: 0.5 for n in NAMES}),
        "".join(map(chr, range(0x180))),
        "\u2028\u202e\x1b[2J\x9b2J\x7f",
        "\U0001f426\ud83d",  # a sign beyond 16 bits, and half of one
    ):
        line = printed(value, encoding, line=True)
        assert json.loads(line) == value and len(line.splitlines()) == 1
    line = printed("\x9b2J\x1b\x7f\u202e\n", encoding, line=True)
    assert line.isascii() and line.isprintable(), "nothing that steers a terminal"


def test_what_can_be_shown_is_not_escaped():
    assert printed("Vögel 鳥", "utf-8", line=True) == '"Vögel 鳥"'
    assert printed("Vögel 鳥", "cp1252", line=True) == '"Vögel \\u9ce5"'
    assert printed("87 ± 1 % of Vögel…", "cp1252") == "87 ± 1 % of Vögel…"
    assert printed("87 ± 1 % of Vögel…", "ascii") == "87 +/- 1 % of V\\xf6gel..."
    assert printed("caf\udce9.jpg", "utf-8") == "caf\\udce9.jpg"
    never_fail(io.StringIO())  # takes every character, and has no errors to set
    assert json_line("鳥", io.StringIO()) == '"鳥"'


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    "A classifier whose labels few consoles can show, and photos whose names are no easier."
    import torch

    from tiny_nbdev.classify.export import export_onnx
    from tiny_nbdev.classify.students import create_student

    home = tmp_path_factory.mktemp("console")
    torch.manual_seed(0)
    export_onnx(create_student("conv4", 3).eval(), home / "model.onnx", NAMES)
    files = [home / "鳥 ✓.png", home / "plain.png"]
    if sys.platform.startswith("linux"):  # a name in another encoding than the file system's
        files.append(Path(os.fsdecode(os.fsencode(home) + b"/caf\xe9.png")))
    for i, file in enumerate(files):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "any.png")
        (home / "any.png").rename(file)
    return home, files


def program(home, console, *args):
    "A command on a console of its own."
    env = os.environ | dict(PYTHONPATH=str(Path(tiny_nbdev.__file__).parents[1]), PYTHONIOENCODING=console)
    done = subprocess.run([sys.executable, "-m", *map(os.fspath, args)], cwd=home, env=env, capture_output=True)
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    encoding = console.split(":")[0]
    return done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)


# both doors, each console at least once: a process of its own takes seconds
@pytest.mark.parametrize(
    "module,console",
    [("tiny_nbdev.predict", CONSOLES[0]), ("tiny_nbdev.predict", CONSOLES[1]), ("tiny_nbdev.run.cli", CONSOLES[2])],
)
def test_predict_answers_on_every_console(classifier, module, console):
    home, files = classifier
    verb = ["predict"] if module.endswith("cli") else []
    if verb:
        module = "command"
        (home / "command.py").write_text("import sys\nfrom tiny_nbdev.run.cli import main\nsys.exit(main())\n")
    code, out, err = program(home, console, module, *verb, "model.onnx", *files, home / "nicht da 鳥.png")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and [a["file"] for a in answers] == [str(f) for f in files]
    assert all(tuple(a["probabilities"]) == NAMES and a["label"] in NAMES for a in answers)
    assert "does not exist" in err and len(err.splitlines()) == 1


def test_help_and_plans_on_ascii(tmp_path):
    (tmp_path / "command.py").write_text("import sys\nfrom tiny_nbdev.run.cli import main\nsys.exit(main())\n")
    for args in (["--help"], "plan-episodes --accuracy 93 --sigma 2.8 --half-width 0.5 --queries 2975".split()):
        code, out, err = program(tmp_path, "ascii:strict", "command", *args)
        assert code == 0 and out and not err
    assert "93 % +/- 0.50" in out
    code, _, err = program(tmp_path, "ascii:strict", "command", "specialize", "Vögel", "--out", "x")
    assert code == 2 and "V\\xf6gel does not exist" in err
