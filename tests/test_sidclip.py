"""SIDCLIP: students that start from a small CLIP, learn from a big one on the same views, and the rows beside them."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from tiny_nbdev.classify.backbones import load_backbone, save_backbone, start_student
from tiny_nbdev.classify.batches import evaluate_classifier
from tiny_nbdev.classify.clip import has_sentence_encoder, load_clip
from tiny_nbdev.classify.clip_distill import ClipDistillRecipe
from tiny_nbdev.classify.clip_students import OPEN_CLIP_MODELS, OpenClipConfig, text_head
from tiny_nbdev.classify.distill import recipes
from tiny_nbdev.classify.students import Classifier, ClipTower
from tiny_nbdev.core import file_sha256, rng_for
from tiny_nbdev.data.datasets import datasets, load_dataset
from tiny_nbdev.data.fine_grained import FINE_GRAINED, flower_names, load_fine_grained
from tiny_nbdev.data.images import ImageSet, resize, to_uint8, write_image
from tiny_nbdev.data.shots import save_shot_lists
from tiny_nbdev.errors import InputError
from tiny_nbdev.evaluate.protocol import read_rows
from tiny_nbdev.models.bundle import get_bundle
from tiny_nbdev.run.evaluate import evaluate
from tiny_nbdev.run.experiment import make_experiment

WITH_OPEN_CLIP = importlib.util.find_spec("open_clip") is not None
_TEXT = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
_TINY = dict(timm_model_name="efficientnet_lite0", timm_pool="", timm_proj="linear", image_size=64)
_MAP = dict(timm_model_name="vit_pe_core_tiny_patch16_384", timm_pool="map", timm_proj=None, image_size=384)


@pytest.mark.skipif(not WITH_OPEN_CLIP, reason="open_clip is not installed")
@pytest.mark.parametrize("vision", [_TINY, _MAP], ids=["projection", "head of the trunk"])
def test_a_tower_of_open_clip_becomes_a_students_start(tmp_path, monkeypatch, vision):
    import open_clip

    settings = dict(embed_dim=48, vision_cfg=vision, text_cfg=_TEXT)
    monkeypatch.setitem(OPEN_CLIP_MODELS, "tiny", settings)
    torch.manual_seed(0)
    net = open_clip.CLIP(**settings).eval()
    file = tmp_path / "epoch.pt"
    torch.save(dict(epoch=1, state_dict={f"module.{k}": v for k, v in net.state_dict().items()}), file)
    clip = load_clip("open_clip", config=OpenClipConfig("tiny", str(file), file_sha256(file)))
    x = torch.rand(2, 3, vision["image_size"], vision["image_size"], generator=rng_for("images"))
    seen = clip.backbone.prepare(x)
    with torch.no_grad():
        torch.testing.assert_close(clip.backbone(x), net.encode_image(seen))
    assert clip.names(["cup", "dog"]).shape == (2, 48)
    save_backbone(clip.backbone, tmp_path / "t.safetensors", "clip_tower", **clip.backbone.build_kwargs)
    student = Classifier(load_backbone(tmp_path / "t.safetensors"), 2)
    text_head(student, clip, ["cup", "dog"])
    with torch.no_grad():
        zero_shot = clip.logit_scale * clip.directions(clip.backbone(x)) @ clip.names(["cup", "dog"]).T
        torch.testing.assert_close(student.eval()(x), zero_shot)


@pytest.mark.skipif(not WITH_OPEN_CLIP, reason="open_clip is not installed")
def test_clip_kd_has_the_size_of_the_paper():
    tower = ClipTower(of="efficientnet_b0", dim=512, unit=False, bias=False)
    assert sum(p.numel() for p in tower.parameters()) == 4_007_548 + 1280 * 512  # 4.66 million


@pytest.mark.skipif(WITH_OPEN_CLIP, reason="open_clip is installed")
def test_without_open_clip_one_sentence_says_what_to_install():
    with pytest.raises(InputError, match="pip install open_clip_torch"):
        load_clip("open_clip")


@pytest.mark.skipif(not has_sentence_encoder(), reason="the sentence encoder is not installed")
@pytest.mark.parametrize("name", ("conv4_clip", "lite_student_clip"))
def test_before_its_first_step_a_student_is_the_zero_shot_classifier(name):
    bundle, classes = get_bundle("photos"), ("Granny-Smith", "sky", "coffee cup", "T-Shirt", "grass", "zebra")
    clip = load_clip("small", bundle, config=dict(student=name))
    coarse = torch.rand(36, 3, 5, 5, generator=rng_for("images")) * torch.rand(36, 3, 1, 1, generator=rng_for("tints"))
    photos = ImageSet(to_uint8(resize(coarse, 96)), torch.arange(36) % 6, classes)
    student, _ = start_student(name, 6, bundle=bundle)
    ClipDistillRecipe().start_head(student, photos)
    student.eval()
    with torch.no_grad():
        directions = clip.directions(clip.backbone(photos.floats()))
        logits = clip.logit_scale * directions @ clip.names(classes).T
        torch.testing.assert_close(student(photos.floats()), logits, atol=1e-4, rtol=1e-4)
    right = logits.argmax(1) == photos.labels
    assert 0 < right.sum() < 36
    assert evaluate_classifier(student, photos)[0] == float(right.double().mean())


ROWS = {  # Preset to where the student starts, what is trained, and the share of the teacher
    "sidclip": ("conv4_clip", "text", "all", 0.9),
    "sidclip-no-init": ("conv4", "random", "all", 0.9),
    "sidclip-finetune": ("conv4", "random", "all", 0.0),
    "sidclip-tinyclip": ("lite_student_clip", "text", "head", 0.0),
    "sidclip-tinyvit": ("lite_student", "random", "all", 0.0),
    "sidclip-paper": ("clip_tower", "text", "all", 0.9),
}


@pytest.mark.parametrize("preset", ROWS)
def test_rows_of_the_paper_are_settings(preset):
    e = make_experiment(preset)
    recipe = recipes.config(e.recipe.name, e.recipe.config)
    assert (e.student.name, recipe.head_init, recipe.train, recipe.distill_weight) == ROWS[preset]
    assert (e.recipe.name, e.teacher.head, e.base.images) == ("clip-distill", "clip-linear", "none")
    assert (recipe.temperature, recipe.n_views, recipe.rand_augment, recipe.mix) == (2.0, 6, True, "balanced")
    plain = make_experiment(preset, {"recipe.config.rand_augment": False, "recipe.config.mix": "uniform"})
    assert plain.hash != e.hash


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    "Three classes of coloured noise as a folder, and lists of tasks with 0 and 2 photos of each."
    root = tmp_path_factory.mktemp("sidclip")
    for c, name in enumerate(("red cloth", "green grass", "blue sky")):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(6):
            x = torch.randint(90, (3, 32, 32), dtype=torch.uint8, generator=rng_for("cloth", c, i))
            x[c] += 150
            write_image(x, root / "photos" / name / f"{i}.png")
    images = load_dataset(root / "photos", "test")
    return root, save_shot_lists(images, root, "noise", "test", (0, 2), 1)


@pytest.mark.skipif(not has_sentence_encoder(), reason="the sentence encoder is not installed")
@pytest.mark.parametrize("n_shot", (0, 2))
def test_tasks_of_all_classes_go_the_one_road(tasks, n_shot):
    root, files = tasks
    changes = {"recipe.config.steps": 2, "recipe.config.batch_size": 6, "recipe.config.n_views": 2}
    settings = dict(list_file=files[n_shot], preset="sidclip", changes=changes, say=lambda *_: None, device="cpu")
    found = evaluate(root / f"out{n_shot}", root / "photos", **settings)
    row = read_rows(root / f"out{n_shot}" / "conv4_clip-none.csv")[0]
    assert row["n_query"] == 12 and found["n_episodes"] == 1
    if not n_shot:  # nothing was learned
        assert row["accuracy"] == row["before_accuracy"]


def flowers_of_the_hub(folder, labels, names):
    "Parquet files as the Hugging Face Hub has them: one image of each flower in every split, the number as grey level."
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    home = folder / "flowers"
    home.mkdir(parents=True)
    rows = []
    for i in range(len(labels)):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (i, i, i)).save(file, "png")
        rows.append(dict(bytes=file.getvalue(), path=f"{i:03d}.png"))
    table = pa.table(dict(image=rows, label=labels))
    if names:
        features = dict(label=dict(names=list(names), _type="ClassLabel"))
        header = json.dumps(dict(info=dict(features=features)))
        table = table.replace_schema_metadata({"huggingface": header})
    for split in ("train", "validation", "test"):
        pq.write_table(table, home / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("trap", ("from 0", "from 1", "alphabet", "another name", "a gap"))
def test_flowers_keep_their_names_however_they_are_numbered(tmp_path, trap):
    names, counts = flower_names(), dict(train=102, validation=102, test=102)
    facts = replace(FINE_GRAINED["flowers"], counts=counts, per_class=None)
    alphabet = sorted(names)
    labels = {
        "from 0": [*range(102)],
        "from 1": [*range(1, 103)],
        "alphabet": [alphabet.index(n) for n in names],
        "another name": [*range(102)],
        "a gap": [*range(101), 102],
    }[trap]
    given = {"alphabet": alphabet, "another name": ["cabbage", *names[1:]]}.get(trap)
    root = flowers_of_the_hub(tmp_path, labels, given)
    if trap in ("another name", "a gap"):
        with pytest.raises(InputError, match="cabbage" if trap == "another name" else "no names"):
            load_fine_grained("flowers", "test", root, 8, facts)
        return
    found = load_fine_grained("flowers", "test", root, 8, facts)
    assert found.classes == names
    grey = found.images.float().mean((1, 2, 3)).round().long()
    assert torch.equal(grey, found.labels)  # the first image is the first flower's, and so on


def test_official_counts_of_the_paper():
    counts = {n: f.counts for n, f in FINE_GRAINED.items()}
    assert counts == dict(
        cars=dict(train=8144, test=8041),
        flowers=dict(train=1020, validation=1020, test=6149),
        food=dict(train=75750, test=25250),
    )
    assert [f.n_classes for f in FINE_GRAINED.values()] == [196, 102, 101]
    assert {"cars", "flowers", "food"} <= {*datasets}
