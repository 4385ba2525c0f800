"Options of the pretraining notebook beyond its smoke settings: its cells, run with other parameters on the digits."

import json
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
NOTEBOOK = Path(__file__).parents[1] / "nbs/pretrain/p2_backbone.ipynb"


def run(out, **params):
    "All names after the last cell; the first code cell holds the parameters."
    cells = [
        "".join(c["source"])
        for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    ]
    names = {}
    exec(cells[0], names)
    assert set(params) <= set(names), "a parameter that the notebook does not have"
    names.update(
        params, out=str(out), device="cpu", batch_size=8, n_steps=2, eval_every=2, eval_episodes=1, final_episodes=1
    )
    for cell in cells[1:]:
        exec(cell, names)
    return names


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "A first generation of full IER."
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as m:
        m.delenv("TINY_NBDEV_DATA", raising=False)
        run(folder, model="resnet12", widths=[4, 4, 6, 8], ier="full", name="first")
    return folder / "first.safetensors"


@pytest.fixture(autouse=True)
def digits_only(monkeypatch):
    monkeypatch.delenv("TINY_NBDEV_DATA", raising=False)


def test_second_generation_of_another_width(first, tmp_path):
    names = run(tmp_path, model="resnet12", widths=[4, 4, 4, 4], ier="full", teacher_from=str(first), name="second")
    row = names["trainer"].history[-1]
    assert row["similarity"] > 0 and row["kd_class"] > 0 and "mse_feature" not in row
    record = json.loads((tmp_path / "second.json").read_text())
    assert (
        record["settings"]["teacher_from"] == "first.safetensors"
        and record["settings"]["started_from"]["first.safetensors"]
    )
    assert (tmp_path / "second.heads.safetensors").is_file()


def test_guides_see_what_the_student_sees(first, tmp_path):
    torch = pytest.importorskip("torch")
    names = run(tmp_path, guide_views="live", mixup=1.0, similarity_from=str(first), similarity_weight=40.0)
    assert names["trainer"].history[-1]["similarity"] > 0
    x, y = torch.rand(64, 3, 32, 32), torch.arange(64)
    blended, share, other = names["blend"](x, y, torch.Generator().manual_seed(0))
    want = share.view(-1, 1, 1, 1) * x + (1 - share.view(-1, 1, 1, 1)) * x[other]
    assert (
        torch.equal(blended, want) and 0 < share.min() and share.max() < 1 and sorted(other.tolist()) == list(range(64))
    )
    names["mixup"] = 0.0
    assert torch.equal(names["blend"](x, y, torch.Generator().manual_seed(0))[0], x)
    seen, sent = [], []
    names["guides"][:] = [lambda images: seen.append(images) or images.flatten(1)]
    logits = torch.randn(8, names["base"].n_classes, generator=torch.Generator().manual_seed(1))
    names["mixup"], names["similarity_weight"] = 1.0, 0.0
    spy = lambda images: (sent.append(images) or images.flatten(1), logits, None)
    drawn = {}
    blend = names["blend"]
    names["blend"] = lambda *a: drawn.setdefault("blend", blend(*a))
    loss, _ = names["lite_loss"](spy, 0, torch.Generator().manual_seed(2))
    assert seen[0] is sent[0] and torch.equal(sent[0], drawn["blend"][0]), "network and guide get the same blends"
    y = names["labels"][names["batch_indices"](len(names["base"]), 8, 0, names["seed"])]
    _, share, other = drawn["blend"]
    log = logits.log_softmax(1)
    want = -(share * log[range(8), y] + (1 - share) * log[range(8), other]).mean()
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(guide_views="always"), "guide_views is 'always'"),
        (dict(guide_views="live", guide_tta=True), "without guide_tta"),
        (dict(mixup=0.5, ier="full"), "mixup goes without"),
        (dict(mixup=0.5, transforms=0.5), "mixup goes without"),
    ],
)
def test_settings_that_do_not_go_together(wrong, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        run(tmp_path, **wrong)
