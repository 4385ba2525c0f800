"""Python in a process of its own that can open no socket, and a list of all it wrote.

What Python opens for writing is seen by an audit hook. What libraries in C write is seen by looking into the home
folder and the folder of temporary files afterwards, both of which belong to the process alone.
"""

import os
import subprocess
import sys
from pathlib import Path

import tiny_nbdev

HEAD = """
import os, socket, sys
from pathlib import Path

class Closed(socket.socket):
    def __init__(self, *a, **k):
        raise OSError("sockets are closed")

socket.socket = Closed
out, written = Path(sys.argv[1]).resolve(), []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def watch(event, args):
    if event in ("socket.__new__", "socket.connect", "socket.getaddrinfo"):
        raise OSError("sockets are closed")
    if event == "open" and isinstance(args[0], (str, bytes)) and isinstance(args[2], int) and args[2] & WRITES:
        written.append(os.path.realpath(os.fsdecode(args[0])))

sys.addaudithook(watch)
"""
TAIL = """
print("== written elsewhere")
own = (out, Path(os.environ["TMPDIR"]).resolve(), *map(Path, sys.argv[2:]))
print(*(w for w in written if w != os.devnull and not any(Path(w).is_relative_to(o) for o in own)), sep="\\n")
"""


def run_closed(
    code,  # Python; `out` is its folder
    tmp_path,  # Empty folder for `out` and temporary files
    home,  # Its home folder, which may be unwritable
    own=(),  # Further folders that it may write to
    **env,  # Further environment
) -> Path:  # `out`
    "Run code without sockets; an assertion fails if it writes anywhere but into folders of its own."
    out, temp = tmp_path / "out", tmp_path / "tmp"
    out.mkdir()
    temp.mkdir()
    hidden = ("XDG_", "ORT_", "TMP", "TEMP", "HF_", "TINY_NBDEV")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    clean |= dict(HOME=str(home), TMPDIR=str(temp), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", **env)
    clean["PYTHONPATH"] = str(Path(tiny_nbdev.__file__).parents[1])
    command = [sys.executable, "-c", HEAD + code + TAIL, str(out), *map(str, own)]
    done = subprocess.run(command, cwd=out, env=clean, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "elemetry" not in done.stdout + done.stderr
    elsewhere = done.stdout.partition("== written elsewhere")[2].strip()
    assert not elsewhere, elsewhere
    assert not [p for p in temp.rglob("*") if p.is_file()]
    return out
