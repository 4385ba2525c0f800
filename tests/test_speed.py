"""The speed benchmark: its baseline gives our results, its limit counts what it should, its table is whole and goes on
after a kill."""

import csv
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "benchmarks" / "speed.ipynb"
FIRST = "row device baseline_s ours_s ratio limit_s max_abs_diff commit".split()


def load(name, **parameters):
    "What the notebook defines, with parameters as papermill would set them."
    module = types.ModuleType(name)
    sys.modules[name] = module
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "parameters" in tags or "tools" in tags:
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), vars(module))
        if "parameters" in tags:
            vars(module).update(parameters)
    return module


@pytest.fixture(scope="module")
def speed(tmp_path_factory):
    threads = torch.get_num_threads()
    yield load("speed_notebook", out=str(tmp_path_factory.mktemp("speed")))
    torch.set_num_threads(threads)


@pytest.fixture
def table(speed, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "folder", str(tmp_path))
    return speed


def test_same_results_in_double_precision(speed):
    w = speed.in_double(speed.cpu_world("smoke"))
    found = speed.equal_null(w, 4, 3)
    assert found["updates_differ"] == 0
    assert max(found[k] for k in ("z_T", "null_embeddings", "loss", "images")) < 1e-9
    tokens = speed.equal_tokens(w, 6)
    assert tokens["tokens"] < 1e-9 and tokens["moved"] > 4e-3, "six steps of 1e-3, and the same ones"


def test_same_results_in_single_precision(speed):
    w = speed.cpu_world("smoke")
    assert speed.equal_tokens(w, 4)["tokens"] < 1e-5
    assert speed.equal_images(w, 4)["images"] < 1e-4
    student = speed.equal_student(w)
    assert student["labels"] < 1e-4 and student["loss"] < 1e-3
    null = speed.equal_null(w, 4, 3)
    assert null["z_T"] < 1e-4 and null["loss"] < 1e-3 and null["images"] < 1e-3


def test_other_draws_are_noticed(speed, monkeypatch):
    w = speed.cpu_world("smoke")
    draws = speed.draws_of
    monkeypatch.setattr(speed, "draws_of", lambda p, seed, *rest: draws(p, seed + 1, *rest))
    found = dict(fp32=speed.equal_tokens(w, 4))
    with pytest.raises(AssertionError, match="tokens differ"):
        speed.check_equal(found)


def test_early_stop_is_the_same(speed):
    "Images of one batch stop after different numbers of updates, as they do one by one."
    w = speed.cpu_world("smoke")
    p, (n_steps, inner) = w.plain, (2, 6)
    token = speed.with_new_token(p)
    with torch.no_grad():
        cond = token[0](token[1])[0]
    pixels = speed.pixels_of(p, w.support)
    z_0 = torch.cat([speed.plain_encode(p, x) for x in pixels])
    every = [speed.plain_null_text(p, x, cond, n_steps, inner, epsilon=-1.0)[2] for x in pixels]
    threshold = (every[0][2] + every[0][3]) / 2
    theirs = torch.tensor([speed.plain_null_text(p, x, cond, n_steps, inner, epsilon=threshold)[3] for x in pixels]).T
    ours = speed.null_text_inversion(
        w.model,
        z_0,
        cond,
        speed.NullTextConfig(n_steps=n_steps, inner_steps=inner, threshold=threshold),
        progress=False,
    )[2]["inner_steps"]
    assert torch.equal(ours.cpu(), theirs) and theirs[0, 0] == 4, "stopped on the way"


def test_work_is_counted_by_shape(speed):
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        one = speed.work_of(lambda: conv(x))
        three = speed.work_of(lambda: [conv(x) for _ in range(3)] and torch.relu(x))
    flops = 2 * 2 * 16 * 16 * 8 * 27
    assert one["flops"] == flops and three["flops"] == 3 * flops
    (key,) = [k for k in one if k != "flops"]
    assert three[key] == 3 and len(three) == 2, "the same shape once; what is no product is left out"
    assert speed.thawed(key[1])[0].is_contiguous(memory_format=torch.channels_last)
    assert speed.mixed((-2, one), (1, three)) == {"flops": flops, key: 1}
    assert speed.alone(one, 0) > 0


def test_backward_and_attention_are_counted(speed):
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    work = speed.work_of(lambda: attention(q, q, q).sum().backward())
    names = " ".join(str(k[0]) for k in work if k != "flops")
    assert "attention" in names or "bmm" in names
    assert "backward" in names or names.count("bmm") > 1
    assert speed.alone(work, 0) > 0


def test_ratio_is_the_median_over_turns(speed):
    seconds = iter([(6.0, 1.0), (8.0, 1.0), (1.0, 1.0)])
    order = []
    row = speed.take_turns(
        speed.cpu_world("smoke"),
        lambda: order.append("b"),
        lambda: order.append("o"),
        3,
        lambda b, o: next(seconds),
        lambda: 0.5,
    )
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (6, 1, 8)
    assert (row["baseline_s"], row["ours_s"], row["limit_s"], row["share"]) == (6, 1, 0.5, 0.5)
    assert "".join(order) == "boobbo", "who comes first changes"


def test_ways_leave_no_trace(speed):
    model = speed.cpu_world("smoke").model
    plain = model._run_stem, model._run_body, speed.split_unet._resnet
    with speed.way_of(model, "compile+parts"):
        assert not {model._run_stem, model._run_body, speed.split_unet._resnet} & {*plain}
    assert (model._run_stem, model._run_body, speed.split_unet._resnet) == plain and not {
        "guided",
        "_run_stem",
        "_run_body",
    } & {*vars(model)}


def test_line_fit(speed):
    fit = speed.line_through([1, 2, 3], [3.0, 5.0, 7.0])
    assert abs(fit["slope"] - 2) < 1e-9 and abs(fit["start"] - 1) < 1e-9 and fit["residual"] < 1e-9
    assert speed.line_through([1, 2, 3, 4], [1.0, 4.0, 9.0, 16.0])["residual"] > 0.05


def test_table_layout(table, tmp_path):
    table.write_table()
    lines = list(csv.DictReader((tmp_path / "speed.csv").open()))
    assert list(lines[0])[:8] == FIRST and list(lines[0]) == table.COLUMNS
    assert len(lines) == len(table.ROWS) and all(
        r["note"].startswith("not run: papermill") and r["ours_s"] == "" for r in lines
    )
    name = "cpu_tokens"
    table.save_json(
        dict(
            settings=table.settings_of(name),
            result=dict(baseline_s=12.0, ours_s=2.0, ratio=6.0, max_abs_diff=1e-7),
            device="CPU",
            machine="m",
            commit="c",
        ),
        tmp_path / "rows" / f"{name}.json",
    )
    table.write_table()
    (row,) = [r for r in csv.DictReader((tmp_path / "speed.csv").open()) if r["commit"] == "c"]
    assert (
        row["row"] == table.ROWS[name].text
        and float(row["ratio"]) == 6
        and row["met"] == "yes"
        and row["limit_s"] == ""
    )


def test_rows_are_kept(table, monkeypatch):
    made = []
    monkeypatch.setitem(
        table.ROWS,
        "cpu_fake",
        types.SimpleNamespace(text="fake", goal="", minutes=0, make=lambda: made.append(1) or dict(ours_s=1.0)),
    )
    assert table.measure("cpu_fake") == table.measure("cpu_fake") == dict(ours_s=1.0)
    assert made == [1]
    monkeypatch.setattr(table, "seed", 1)
    with pytest.raises(table.InputError, match="other settings"):
        table.measure("cpu_fake")


def test_killed_row_leaves_nothing(table, tmp_path, monkeypatch):
    def broken():
        raise KeyboardInterrupt

    monkeypatch.setitem(table.ROWS, "cpu_fake", types.SimpleNamespace(text="fake", goal="", minutes=0, make=broken))
    with pytest.raises(KeyboardInterrupt):
        table.measure("cpu_fake")
    assert not list(tmp_path.rglob("*.json"))


def test_unknown_row(table, monkeypatch):
    monkeypatch.setattr(table, "rows", "cpu_tokens, cpu_tokns")
    with pytest.raises(table.InputError, match="no row cpu_tokns"):
        table.chosen_rows()


def test_goals(speed):
    assert [speed.met(dict(ratio=x), "ratio >= 6") for x in (6.0, 5.9)] == ["yes", "no"]
    assert [speed.met(dict(ours_s=x), "ours_s <= 90") for x in (90, 91)] == ["yes", "no"]
    assert speed.met({}, "ratio >= 6") == "" and speed.met(dict(ratio=1), "") == ""


def test_kinds_of_operations(speed):
    names = dict(
        attention="aten::_scaled_dot_product_flash_attention_for_cpu",
        convolution="aten::mkldnn_convolution",
        normalisation="aten::native_group_norm",
        activation="aten::silu",
        arithmetic="aten::add",
    )
    assert {k: speed.kind_of(v) for k, v in names.items()} == {k: k for k in names}
    assert (
        speed.kind_of("aten::addmm") == "matrix product"
        and speed.kind_of("aten::copy_") == "copies and layout"
        and speed.kind_of("nothing of these") == "other"
    )


def test_facts_of_stable_diffusion(speed):
    facts = speed.sd15_facts()
    assert abs(facts["forward"] - 0.803) < 1e-3 and abs(facts["guided image, 50 steps"] - 82.8) < 0.1


def test_memory_in_a_fresh_process(speed):
    held = torch.ones(150 * 2**20)  # 600 MiB of this process are no memory of that one
    a, b = speed.peaks_fresh([(1, 1), (2, 2)], 5)
    here = speed.resource.getrusage(speed.resource.RUSAGE_SELF).ru_maxrss / 2**10
    assert held[-1] == 1 and 50 < a["mib"] <= b["mib"] < here
    assert (a["images"], b["images"]) == (5, 10)
    assert b["held_mib"] > a["held_mib"], "a null embedding per step"
    row = speed.memory_row([a, b])
    assert row["peak_mib"] == b["mib"] and "per 1,000 images" in row["note"]


def test_layout_of_stable_diffusion(speed):
    "What the GPU preset builds, small: two parts of one model, the same in fp32, and rows that run on it."
    w = speed.sd15_world(speed.SIZES["smoke"]["gpu"], "cpu", torch.float32, tiny=True)
    assert w.model.latent_shape == (4, 8, 8) and w.model.image_size == 64 and w.support.size == (84, 84)
    assert len(w.plain.text_encoder.get_input_embeddings().weight) == 49_408
    assert speed.equal_images(w, 2)["images"] < 1e-3
    for part in (w.plain.vae, w.plain.unet, w.plain.text_encoder):
        part.double()  # AdamW divides gradients by their size: small ones are rounding in single precision
    double = replace(
        w, model=w.model.to("cpu", torch.float64), plain=SimpleNamespace(**vars(w.plain) | dict(dtype=torch.float64))
    )
    assert speed.equal_tokens(double, 2)["tokens"] < 1e-9
    assert speed.seconds_per_image(w, 1, 1) > 0


def test_what_is_not_finite_is_a_word(speed):
    assert speed.plain_numbers(dict(a=[float("nan"), 1.0], b=(2,))) == dict(a=["nan", 1.0], b=[2])
    assert speed.met(dict(ratio="nan"), "ratio >= 6") == "no"


def test_gpu_preset_needs_a_gpu(speed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(speed.InputError, match="needs a CUDA GPU"):
        speed.gpu_world("gpu")


@pytest.mark.skipif(
    not (ROOT / "data" / "results" / "current" / "speed" / "speed.csv").exists(), reason="not measured yet"
)
def test_committed_table_is_whole(speed):
    lines = list(csv.DictReader((ROOT / "data" / "results" / "current" / "speed" / "speed.csv").open()))
    assert list(lines[0])[:8] == FIRST
    assert {r["row"] for r in lines} == {r.text for r in speed.ROWS.values()}
    for r in lines:
        measured = [r[k] for k in ("ours_s", "peak_mib", "residual") if r[k]]
        if measured:
            assert r["commit"] and r["machine"] and all(float(v) >= 0 for v in measured) and r["preset"] != "smoke"
        else:
            assert r["note"], "what was not run says so"
