"""Data sets with CoOp's splits: a made-up tiny copy of each, in every layout, and one sentence for copies that are not
what they should be."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tiny_nbdev.data import coop
from tiny_nbdev.data.coop import COOP_SETS, CoopConfig, coop_records, coop_words, find_coop, load_coop, where_to_get
from tiny_nbdev.data.datasets import dataset_info, datasets, load_dataset
from tiny_nbdev.errors import InputError

SPEC = {  # classes, train, validation, test: section 8 of the paper's facts
    "coop/caltech101": (100, 4128, 1649, 2465),
    "coop/dtd": (47, 2820, 1128, 1692),
    "coop/eurosat": (10, 13500, 5400, 8100),
    "coop/aircraft": (100, 3334, 3333, 3333),
    "coop/pets": (37, 2944, 736, 3669),
    "coop/cars": (196, 6509, 1635, 8041),
    "coop/sun397": (397, 15880, 3970, 19850),
    "coop/food101": (101, 50500, 20200, 30300),
    "coop/flowers102": (102, 4093, 1633, 2463),
    "coop/imagenet": (1000, 1281167, None, 50000),
}
NINE = [n for n in SPEC if n != "coop/imagenet"]
CLASSES = ("red_cat", "AnnualCrop")
COUNTS = dict(train=4, validation=2, test=3)  # of two classes, in turns


def picture(i, size=(12, 9)):
    file = io.BytesIO()
    Image.new("RGB", size, (20 * i, 100, 255 - 20 * i)).save(file, "PNG")
    return file.getvalue()


def rows_of(name):
    "Split to list of (file, label, class)."
    out, i = {}, 0
    inside = "a/sun_{}.jpg" if name == "coop/sun397" else "{}/image.jpg" if name == "coop/caltech101" else "{}.jpg"
    for split, n in COUNTS.items():
        out[split] = [(inside.format(f"{100 + i + k}"), k % 2, CLASSES[k % 2]) for k in range(n)]
        i += n
    return out


@pytest.fixture
def tiny(monkeypatch):
    "Facts of copies with two classes."
    for name, facts in COOP_SETS.items():
        counts = {s: n for s, n in COUNTS.items() if s in facts.n_images}
        monkeypatch.setitem(coop.COOP_SETS, name, replace(facts, n_classes=2, n_images=counts))


def write_images(folder, name, rows, only=None):
    facts, i = COOP_SETS[name], 0
    for split, part in rows.items():
        for file, _, _ in part:
            path = folder / facts.images / file
            if only is None or split in only:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(i))
            i += 1


def write_split(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    if name == "coop/aircraft":
        (folder / "variants.txt").write_text("".join(f"{c}\n" for c in CLASSES))
        for split, part in rows.items():
            lines = "".join(f"{Path(f).stem} {c}\n" for f, _, c in part)
            (folder / f"images_variant_{'val' if split == 'validation' else split}.txt").write_text(lines)
        return
    data = {"val" if s == "validation" else s: [list(r) for r in part] for s, part in rows.items()}
    (folder / COOP_SETS[name].split).write_text(json.dumps(data))


def write_parquet(folder, rows, paths=True, of=None):
    folder.mkdir(parents=True, exist_ok=True)
    i = 0
    for split, part in rows.items():
        table = []
        for file, label, _ in part:
            table.append(dict(image=dict(bytes=picture(i), path=Path(file).name if paths else None), label=label))
            i += 1
        info = json.dumps(dict(info=dict(features=dict(label=dict(names=list(CLASSES))))))
        at = folder / f"{(of or {}).get(split, split)}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(table).replace_schema_metadata({"huggingface": info}), at)


def check(name, root):
    found = {s: load_coop(name, s, root, config=CoopConfig(size=8)) for s in COOP_SETS[name].n_images}
    assert {s: len(x) for s, x in found.items()} == COOP_SETS[name].n_images
    train = found["train"]
    assert train.images.shape == (4, 3, 8, 8) and train.labels.tolist() == [0, 1, 0, 1]
    assert train.images[:, 0, 0, 0].tolist() == [0, 20, 40, 60], "each image with its own row"
    assert found["test"].images[:, 0, 0, 0].tolist() == [120, 140, 160]
    return train


@pytest.mark.parametrize("name", SPEC)
def test_counts_are_those_of_the_paper(name):
    facts = COOP_SETS[name]
    assert (facts.n_classes, *(facts.n_images.get(s) for s in ("train", "validation", "test"))) == SPEC[name]
    assert name in datasets and dataset_info(name).splits == tuple(facts.n_images)


@pytest.mark.parametrize("name", NINE)
def test_folder(name, tiny, tmp_path):
    folder = tmp_path / COOP_SETS[name].folders[0]
    write_images(folder, name, rows_of(name))
    write_split(folder, name, rows_of(name))
    assert check(name, tmp_path).classes == CLASSES
    assert check(name, folder).classes == CLASSES, "the folder itself may be given"


@pytest.mark.parametrize("name", ["coop/flowers102", "coop/aircraft"])
def test_hugging_face_with_these_splits(name, tiny, tmp_path):
    write_parquet(tmp_path / COOP_SETS[name].folders[0] / "data", rows_of(name), paths=False)
    assert check(name, tmp_path).classes == CLASSES


def test_hugging_face_with_other_splits_and_the_split_file(tiny, tmp_path):
    name, rows = "coop/pets", rows_of("coop/pets")
    folder = tmp_path / COOP_SETS[name].folders[0]
    write_split(folder, name, rows)
    write_parquet(folder, dict(train=rows["train"], rest=rows["validation"] + rows["test"]), of=dict(rest="test"))
    assert check(name, tmp_path).classes == CLASSES
    write_parquet(folder, dict(train=rows["train"], rest=rows["validation"]), of=dict(rest="test"))
    with pytest.raises(InputError, match="3 of 3 images, such as 106.jpg, are not in its parquet files once"):
        coop_records(name, "test", tmp_path)


def test_imagenet(tiny, tmp_path):
    ids, i = ("n01440764", "n01443537"), 0
    for split, n in (("train", 4), (None, 2), ("val", 3)):
        for k in range(n):
            if split:
                path = tmp_path / "imagenet/images" / split / ids[k % 2] / f"{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(i))
            i += 1
    test = load_coop("coop/imagenet", "test", tmp_path, config=CoopConfig(8))
    assert test.classes == ids and test.counts() == [2, 1]
    assert coop_words("coop/imagenet", test.classes) == ("tench", "goldfish")
    with pytest.raises(InputError, match="coop/imagenet has no validation split; give --split train or test"):
        coop_records("coop/imagenet", "validation", tmp_path)
    rows = dict(train=rows_of("coop/imagenet")["train"], test=rows_of("coop/imagenet")["test"])
    write_parquet(tmp_path / "hub/imagenet/data", rows, of=dict(test="validation"))
    assert len(load_coop("coop/imagenet", "test", tmp_path / "hub", config=CoopConfig(8))) == 3


def test_a_draw_of_few_is_fixed_and_the_cache_knows_it(tiny, tmp_path):
    name = "coop/dtd"
    folder = tmp_path / COOP_SETS[name].folders[0]
    write_images(folder, name, rows_of(name))
    write_split(folder, name, rows_of(name))
    few = lambda n: load_coop(name, "train", tmp_path, tmp_path / "cache", CoopConfig(8, n))
    one = few(1)
    assert one.counts() == [1, 1] and {*one.paths} < {*few(0).paths} and few(1).paths == one.paths
    assert (few(1).images == one.images).all()
    (folder / "images/100.jpg").unlink()
    with pytest.raises(InputError, match="lacks 1 of 4 images, such as images/100.jpg; get dtd-r1.0.1.tar.gz"):
        few(0)


def test_through_the_registry(tiny, tmp_path, monkeypatch):
    name = "coop/eurosat"
    write_images(tmp_path / "eurosat", name, rows_of(name))
    write_split(tmp_path / "eurosat", name, rows_of(name))
    monkeypatch.setenv("TINY_NBDEV_DATA", str(tmp_path))
    images = load_dataset(name, "validation", config=dict(size=16))
    assert images.size == (16, 16) and dataset_info(name).words(images.classes) == ("red cat", "Annual Crop Land")


def test_another_copy_is_refused(tiny, tmp_path):
    name, rows = "coop/food101", rows_of("coop/food101")
    folder = tmp_path / COOP_SETS[name].folders[0]
    write_images(folder, name, rows)
    write_split(folder, name, rows | dict(test=rows["test"][:2]))
    with pytest.raises(InputError, match="its test split has 2 images instead of 3; get food-101.tar.gz"):
        coop_records(name, "test", tmp_path)
    (folder / COOP_SETS[name].split).write_text("{}")
    with pytest.raises(InputError, match="holds no split_zhou_Food101.json with train, val and test"):
        coop_records(name, "test", tmp_path)
    (folder / COOP_SETS[name].split).unlink()
    with pytest.raises(InputError, match="neither split_zhou_Food101.json nor test-"):
        coop_records(name, "test", tmp_path)


def test_too_much_for_memory(tiny, tmp_path, monkeypatch):
    name = "coop/cars"
    folder = tmp_path / COOP_SETS[name].folders[0]
    write_images(folder, name, rows_of(name))
    write_split(folder, name, rows_of(name))
    monkeypatch.setattr(coop, "MOST_BYTES", 100)
    with pytest.raises(InputError, match="4 images of 8 pixels need .* of memory; give a smaller size, or per_class"):
        load_coop(name, "train", tmp_path, config=CoopConfig(8))


@pytest.mark.parametrize("name", SPEC)
def test_one_sentence_where_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_NBDEV_DATA", str(tmp_path))
    with pytest.raises(InputError) as e:
        find_coop(name)
    assert str(e.value).startswith(f"{name} is not at hand") and where_to_get(name) in str(e.value)
    assert COOP_SETS[name].folders[0] in str(e.value) and len(str(e.value).splitlines()) == 1
    monkeypatch.delenv("TINY_NBDEV_DATA")
    with pytest.raises(InputError, match="TINY_NBDEV_DATA is not set"):
        find_coop(name)


DATA = Path(os.environ.get("TINY_NBDEV_DATA") or "nowhere")
REAL = [n for n in SPEC if (DATA / COOP_SETS[n].folders[0]).is_dir()]


@pytest.mark.skipif(not REAL, reason="no data set of CoOp is at hand: TINY_NBDEV_DATA holds none")
def test_real_copies():
    for name in REAL:
        for split, n in COOP_SETS[name].n_images.items():
            assert len(coop_records(name, split)[1]) == n
