"The main job needs no network, and writes into its run folder and its cache alone."

from closed import run_closed

WORK = """
from tiny_nbdev.run.specialize import specialize

metrics = specialize(PHOTOS, out / "run", queries=QUERIES, preset="smoke", device="cpu", generator="tint")
assert 0 <= metrics["student_accuracy"] <= 1
"""


def test_main_job(photos, queries, tmp_path):
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    names = f"PHOTOS, QUERIES = {str(photos)!r}, {str(queries)!r}\n"
    # matplotlib keeps a list of fonts for all programs; here it goes where the job's own cache goes
    env = dict(XDG_CACHE_HOME=str(cache), MPLCONFIGDIR=str(cache / "matplotlib"), MPLBACKEND="agg", TQDM_DISABLE="1")
    out = run_closed(names + WORK, tmp_path, home, own=[cache.resolve()], HF_HUB_OFFLINE="1", **env)
    assert (out / "run" / "model.onnx").is_file() and (out / "run" / "report.html").is_file()
    assert not list(home.rglob("*")), "nothing is left in the home folder"
