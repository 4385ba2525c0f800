"""Execute notebooks, store their outputs and stamp them with the hash of the shipped weights.

`python tests/light.py nbs/34_ddim.ipynb nbs/38_blend.ipynb` runs each notebook with one thread, as `nbdev_test` does,
but keeps what the cells print and draw. `python tests/light.py` without names lists the notebooks whose pictures were
made with other weights. `tests/test_notebooks.py` fails for these.
"""

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "tiny_nbdev" / "weights" / "embedded"
KEY = "tiny_nbdev"  # the notebook's own metadata; settings.ini names it in allowed_metadata_keys
SKIPPED = re.compile(r"^#\|\s*(eval:\s*false|slow|cuda)\b|nbdev_export\(\)", re.M)  # what `nbdev_test` leaves out, too
LOADS = (
    "example_model",
    "load_diffusion",
    "get_bundle",
    "embedded_folder",
    "load_encoder",
    "start_student",
    "specialize",
    "demo",
)
USES = re.compile(rf"\b({'|'.join(LOADS)})\(")  # ways to load a shipped model


def weights_hash(
    folder=WEIGHTS,  # Folder of the embedded models
) -> str:  # 12 hex digits
    "Hash over the weights files: their places and their content."
    h = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*.safetensors")):
        h.update(file.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return h.hexdigest()[:12]


def numbered() -> list:  # Paths
    "The numbered notebooks and the quickstart."
    return sorted(ROOT.glob("nbs/[0-9]*.ipynb")) + [ROOT / "nbs" / "tutorials" / "quickstart.ipynb"]


def source(cell) -> str:
    return "".join(cell["source"])


def uses_weights(nb) -> bool:
    "Whether some cell that is run loads a shipped model and some cell shows a picture, or would if it were run."
    cells = [c for c in nb["cells"] if c["cell_type"] == "code"]
    own = [c for c in cells if not re.search(r"^#\|\s*exporti?\b", source(c), re.M)]
    pictures = any("image/png" in o.get("data", {}) for c in cells for o in c["outputs"])
    pictures = pictures or any(re.search(r"\b(show_images|plot_\w+|plt\.\w+)\(", source(c)) for c in own)
    return pictures and any(USES.search(source(c)) for c in own)


def stamped(nb):  # str or None
    "The hash that was stored when the notebook was executed."
    return nb["metadata"].get(KEY, {}).get("weights")


def execute(path):
    "Run a notebook, put its outputs into the file, clean it and stamp it."
    import nbformat
    from nbclient import NotebookClient
    from nbdev.clean import clean_nb

    nb = nbformat.read(path, as_version=4)
    run = [c for c in nb.cells if c.cell_type == "code" and not SKIPPED.search(c.source)]
    # the kernel's working directory is the notebook's folder, as for somebody who opens it
    part = nbformat.v4.new_notebook(cells=run, metadata=nb.metadata)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(part, timeout=3600, startup_timeout=600, kernel_name="python3", resources=where).execute()
    for cell in run:  # a widget lives in a running notebook only; warnings name places of this machine
        fleeting = lambda o: (
            "application/vnd.jupyter.widget-view+json" in o.get("data", {}) or o.get("name") == "stderr"
        )
        cell.outputs = [o for o in cell.outputs if not fleeting(o)]
    raw = json.loads(nbformat.writes(nb))
    clean_nb(raw, allowed_metadata_keys=[KEY], allowed_cell_metadata_keys=["tags"], clean_ids=False)
    raw["metadata"].pop(KEY, None)
    if uses_weights(raw):
        raw["metadata"][KEY] = {"weights": weights_hash()}
    path.write_text(json.dumps(raw, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


def main(names):
    os.environ |= dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.pop("MPLBACKEND", None)  # pictures go into the notebook
    for name in names:
        start = time.time()
        execute(Path(name).resolve())
        print(f"{name}: {time.time() - start:.0f} s, {Path(name).stat().st_size / 1e3:.0f} kB", flush=True)
    if not names:
        for path in numbered():
            nb = json.loads(path.read_text())
            if uses_weights(nb) and stamped(nb) != weights_hash():
                print(f"{path.relative_to(ROOT)} was executed with {stamped(nb) or 'unknown'} weights")


if __name__ == "__main__":
    main(sys.argv[1:])
