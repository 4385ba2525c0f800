"LoFT, DataDream and prompts from end to end: on every verb, after a kill, with nothing named in `run`."

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tiny_nbdev
from tiny_nbdev.core import load_json, save_tensors
from tiny_nbdev.diffusion import adapters
from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate.protocol import read_rows
from tiny_nbdev.generate.base import generators
from tiny_nbdev.run.evaluate import evaluate
from tiny_nbdev.run.experiment import make_experiment
from tiny_nbdev.run.specialize import specialize

FEW = {"recipe.config.steps": 4, "recipe.config.batch_size": 40, "base.max_images": 100}
SMALL = {"generator.config.n_steps": 2, "generator.config.precision": "fp32"}
STEPS = {"generator.config.adapter": dict(steps=4, warmup=1, save_every=2)}
CASES = {
    "loft": STEPS,
    "datadream": {"generator.config.adapter": dict(warmup=1), "generator.config.epochs": 2},
    "class-prompt": {},
    "caption-prompt": {"generator.config.captioner": "measured", "generator.config.mix": 2},
    "token-pairs": {"generator.config.textual_inversion": dict(steps=2)},
}


def how(name, **more):
    return dict(generator=name, preset="digits", per_class=2, changes=FEW | SMALL | CASES[name] | more, device="cpu")


def files(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted((out / "synthetic").rglob("*.png"))}


@pytest.mark.parametrize("name", CASES)
def test_specialize(name, stand_in, photos, tmp_path):
    said = []
    specialize(photos, tmp_path / "run", say=said.append, **how(name))
    config = load_json(tmp_path / "run/experiment.json")["generator"]["config"]
    assert generators.describe(name, generators.config(name, config)) in said[0], "the plan says what will be done"
    assert len(files(tmp_path / "run")) == 6
    assert name in (tmp_path / "run" / "report.html").read_text()


class Killed(BaseException):
    pass


def test_a_kill_within_an_adapter_changes_nothing(stand_in, photos, tmp_path, monkeypatch):
    specialize(photos, tmp_path / "whole", say=lambda *_: None, **how("loft"))

    def dying(*args):
        save_tensors(*args)
        raise Killed

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(adapters, "save_tensors", dying)
        specialize(photos, tmp_path / "broken", say=lambda *_: None, **how("loft"))
    state = next((tmp_path / "broken").rglob("adapters_*.safetensors"))
    assert len(load_file(state)["losses"]) == 2, "half of the steps"
    specialize(photos, tmp_path / "broken", say=lambda *_: None, **how("loft"))
    one, two = (load_file(tmp_path / n / "specialization.safetensors") for n in ("whole", "broken"))
    assert one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)
    assert files(tmp_path / "whole") == files(tmp_path / "broken")


def test_evaluate(stand_in, tmp_path):
    evaluate(tmp_path / "eval", "digits", episodes=1, say=lambda *_: None, **how("loft"))
    assert len(read_rows(next((tmp_path / "eval").glob("*.csv")))) == 1


def test_run_names_no_method():
    room = Path(tiny_nbdev.__file__).parent / "run"
    files = [f for f in room.glob("*.py") if f.name != "classifier_tables.py"]  # LoFT's own tables name their rows
    for name in ("loft", "datadream", "class-prompt", "caption-prompt", "token-pairs"):
        found = [f.name for f in files if re.search(rf"\b{name}\b", f.read_text(), re.I)]
        assert not found, f"{name} is named in {', '.join(found)}"


def test_one_sentence_for_a_captioner_that_is_not_there(stand_in, photos, tmp_path):
    changes = {"generator.config.captioner": "paligemma", "generator.config.captioning.path": str(tmp_path)}
    with pytest.raises(InputError, match="choose --captioner measured"):
        specialize(photos, tmp_path / "run", say=lambda *_: None, **how("caption-prompt", **changes))


def test_presets_amounts_reach_the_generators():
    "A preset names amounts; each generator takes those that it has."
    fast = make_experiment("fast", generator="loft").generator.config
    assert fast["n_steps"] == 20 and fast["adapter"]["steps"] < 600
    assert make_experiment("paper", generator="loft").generator.config["adapter"]["steps"] == 600
