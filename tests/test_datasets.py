"Data sets by name: what is registered, folders, a set of somebody else's, their tasks and base images."

import io
import json
import os
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_nbdev.run.experiment  # noqa: F401, loads all that is registered
from tiny_nbdev.core import seed_for
from tiny_nbdev.data import datasets as rooms
from tiny_nbdev.data.datasets import (
    DatasetInfo,
    dataset_entry,
    dataset_episodes,
    dataset_info,
    datasets,
    load_dataset,
    read_base,
)
from tiny_nbdev.data.episodes import sample_episode, save_episode_list, split_sha256
from tiny_nbdev.data.images import ImageSet, describe, write_images
from tiny_nbdev.data.loaders import decode_rows, has_cifar_fs, load_digit_images, parquet_rows
from tiny_nbdev.errors import InputError

DATA = os.environ.get("TINY_NBDEV_DATA")  # Before a fixture hides it from the commands


def refuses(call, *words):
    with pytest.raises(InputError) as e:
        call()
    assert all(w in str(e.value) for w in words), e.value
    assert "\n" not in str(e.value)


def noise(n=24, n_classes=3, seed=0, size=32):
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ImageSet(images, torch.arange(n) % n_classes, tuple(f"class {c}" for c in range(n_classes)))


def write_set(images, folder):
    write_images(images.images, folder, [f"{images.classes[l]}/{i:03d}.png" for i, l in enumerate(images.labels)])
    return folder


@pytest.fixture
def toy():
    "A data set of somebody else's, defined here alone."

    @dataclass(frozen=True)
    class Toy:
        info: ClassVar = DatasetInfo(("train", "test"), 32, n_episodes=dict(test=3))
        seed: int = 0

    calls = []

    @datasets.register("toy", Toy, source="this test")
    def _build(config, split, root, cache):
        calls.append((config.seed, split))
        return noise(seed=config.seed + (split == "test"))

    yield calls
    datasets.forget("toy")


def test_what_is_registered():
    photos = tuple(f"photos/{n}" for n in ("grocery", "clothing", "trash", "xsdd", "aid"))
    coop = "aircraft caltech101 cars dtd eurosat flowers102 food101 imagenet pets sun397".split()
    large = ("cars", "flowers", "food", *(f"coop/{n}" for n in coop))
    assert sorted(datasets.names()) == sorted(
        ("cifar-fs", "cifar-fs+digits", "digits", "mini-imagenet", "cub", *photos, *large)
    )
    for name in datasets:
        info = dataset_info(name)
        assert info.size in ((None,) if name in large else (32, 84, 128)) and info.splits and datasets[name].source
    assert {n for n in datasets if dataset_info(n).listed} == {"cifar-fs", *photos}
    assert dataset_info("cifar-fs").words(["oak_tree"]) == ("oak tree",)
    assert dataset_info("digits").words(["digit 7"]) == ("digit seven",)
    refuses(lambda: dataset_entry("cifer-fs"), "'cifer-fs' is not a data set", "'cifar-fs'")
    refuses(lambda: dataset_entry("some/where"), "some/where does not exist", "cifar-fs")
    refuses(lambda: load_dataset("cub", "test", config={"split_off": "frn"}), "'split_of'")


def test_digits():
    images = load_dataset("digits", "test")
    assert describe(images) == describe(load_digit_images(range(5, 10))) and load_dataset("digits", "test") is images
    for split in ("validation", "train"):
        refuses(lambda: load_dataset("digits", split), f"The digits have no {split} split", "--split test")
    episodes, about = dataset_episodes("digits", images, "test")
    assert episodes == [sample_episode(images, "test", i) for i in range(5)]
    assert about == dict(
        dataset="digits",
        split="test",
        n_way=5,
        n_shot=5,
        n_query=None,
        seed=0,
        n_images=len(images),
        split_sha256=split_sha256(images),
        sha256=None,
    )
    assert dataset_episodes("digits", images, "test", 2)[0] == episodes[:2]


def test_a_registered_set(toy):
    images = load_dataset("toy", "test")
    assert load_dataset("toy", "test") is images and toy == [(0, "test")]
    assert describe(load_dataset("toy", "test", config={"seed": 4})) != describe(images)
    refuses(lambda: load_dataset("toy", "test", config={"sed": 4}), "'seed'")
    episodes, about = dataset_episodes("toy", images, "test", n_way=3, n_shot=2)
    assert len(episodes) == 3 and about["dataset"] == "toy" and episodes[0] == sample_episode(images, "test", 0, 3, 2)


def test_another_builder_under_the_same_name_is_not_mistaken(toy):
    first = load_dataset("toy", "train")
    datasets.register("toy", datasets["toy"].config)(lambda config, split, root, cache: noise(seed=99))
    assert describe(load_dataset("toy", "train")) != describe(first)


def test_two_splits_are_kept(toy):
    for split in ("train", "test", "train", "test"):
        load_dataset("toy", split)
    assert len(toy) == 2
    load_dataset("toy", "train", config={"seed": 1})
    assert len(rooms._kept) == 2


def test_a_list_of_ones_own(toy, tmp_path):
    images = load_dataset("toy", "test")
    save_episode_list(images, tmp_path / "own.json", "test", 4, n_way=2, n_shot=3, dataset="toy")
    episodes, about = dataset_episodes("toy", images, "test", 2, tmp_path / "own.json")
    assert episodes == [sample_episode(images, "test", i, 2, 3) for i in range(2)] and len(about["sha256"]) == 64
    refuses(
        lambda: dataset_episodes("toy", images, "validation", None, tmp_path / "own.json"),
        "is a list of the test split; give --split test",
    )


def test_a_folder_is_a_data_set(tmp_path):
    images, said = noise(), []
    folder = write_set(images, tmp_path / "photos")
    own = load_dataset(folder, "test", config={"size": 32}, say=said.append)
    order = torch.argsort(images.labels, stable=True)
    assert torch.equal(own.images, images.images[order]) and own.classes == images.classes
    assert said == [f"{folder} has no folder test; all its images are taken."]
    assert load_dataset(str(folder), "test") is own and dataset_info(folder).size is None
    (folder / "class 0" / "000.png").unlink()
    assert len(load_dataset(folder, "test")) == len(images) - 1, "read anew"
    assert load_dataset(folder, "test", config={"size": 16}).size == (16, 16)
    episodes, about = dataset_episodes(folder, own, "test", n_way=3, n_shot=2)
    assert len(episodes) == 5 and about["dataset"] == str(folder)


def test_a_folder_with_splits(tmp_path):
    for split, seed in (("train", 1), ("val", 2)):
        write_set(noise(seed=seed), tmp_path / split)
    said = []
    assert dataset_info(tmp_path).splits == ("train", "validation")
    val = load_dataset(tmp_path, "validation", say=said.append)
    assert (
        describe(replace(val, paths=())) == describe(noise(seed=2).subset(torch.argsort(noise().labels, stable=True)))
        and not said
    )
    refuses(lambda: load_dataset(tmp_path, "test"), "has no test split, only train, validation", "--split train")


def test_classes_may_be_called_like_splits(tmp_path):
    write_set(replace(noise(), classes=("test", "train", "quiz")), tmp_path)
    assert load_dataset(tmp_path, "test").classes == ("quiz", "test", "train")


def test_base_images(toy, tmp_path):
    assert read_base("none") == read_base("generated") == (None, [])
    images = load_dataset("toy", "train")
    base, skipped = read_base("toy")
    assert base.classes == ("base",) and torch.equal(base.images, images.images) and skipped == []
    # the stream that a run's base images have always come from
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed_for(7, "base")))
    few, _ = read_base("toy", max_images=10, seed=7)
    assert torch.equal(few.images, images.images[order[:10].sort().values]) and not few.paths
    assert read_base("toy", 16)[0].size == (16, 16)
    folder = write_set(images, tmp_path / "any")
    assert len(read_base(folder, 16)[0]) == len(images) and len(read_base(folder, 16, max_images=5)[0]) == 5
    refuses(lambda: read_base("digits"), "digits has no train split", "cifar-fs+digits", "toy")
    refuses(lambda: read_base(tmp_path / "nowhere", 16), "is not a folder", "--base")


def parquet(path, images, names, label="label"):
    "A file in the layout of the Hugging Face hub."
    import pyarrow as pa
    import pyarrow.parquet as pq

    def png(x):
        out = io.BytesIO()
        Image.fromarray(np.asarray(x.permute(1, 2, 0))).save(out, "PNG")
        return out.getvalue()

    rows = [dict(bytes=png(x), path=f"{i}.png") for i, x in enumerate(images.images)]
    table = pa.table({"image": rows, label: images.labels.tolist()})
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(meta), path)
    return path


def test_parquet(tmp_path):
    images = replace(noise(), classes=("a", "b", "c", "unused"))
    files = [
        parquet(tmp_path / f"{i}.parquet", images.subset(range(12 * i, 12 * i + 12)), images.classes) for i in (0, 1)
    ]
    classes, rows = parquet_rows(files)
    read = decode_rows(rows, classes)
    assert classes == ("a", "b", "c") and torch.equal(read.images, images.images)
    assert torch.equal(read.labels, images.labels) and read.paths[:2] == ("0.png", "1.png")
    assert decode_rows(rows, classes, 16).size == (16, 16)
    other = parquet(tmp_path / "other.parquet", noise(3, size=20), classes)
    refuses(lambda: decode_rows(rows + parquet_rows([other])[1], classes), "another size")
    (tmp_path / "bad.parquet").write_bytes(b"no")
    refuses(lambda: parquet_rows([tmp_path / "bad.parquet"]), "bad.parquet is cut or no parquet file", "copy or make")
    refuses(lambda: parquet_rows([tmp_path / "none.parquet"]), "none.parquet", "No such file")


def cells(n=4):
    "Images as the hub stores them."
    out = []
    for i in range(n):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (50 * i, 0, 9)).save(file, "PNG")
        out.append(dict(bytes=file.getvalue(), path=f"{i}.png"))
    return out


def write_table(path, columns, names=None, header=b"huggingface"):
    "A parquet file of these columns; `names` goes from column to class names."
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {k: {"names": v, "_type": "ClassLabel"} for k, v in (names or {}).items()}
    meta = {header: json.dumps({"info": {"features": features}}).encode()} if names is not None else None
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table.replace_schema_metadata(meta), path)
    return path


def read_table(path, **more):
    classes, rows = parquet_rows([path], **more)
    images = decode_rows(rows, classes)
    assert len(images) == 4 and torch.equal(images.images[:, 0, 0, 0], torch.tensor([0, 50, 100, 150]).byte())
    return classes, images.labels.tolist()


def test_parquet_as_people_have_it(tmp_path):
    file, y, names = tmp_path / "set.parquet", [2, 0, 0, 2], ["cat", "dog", "ant"]
    want = (("cat", "ant"), [1, 0, 0, 1])
    whole = dict(image=cells(), label=y)
    assert read_table(write_table(file, whole, dict(label=names))) == want
    hub = dict(img=cells(), fine_label=y, coarse_label=[0, 0, 1, 1])
    assert read_table(write_table(file, hub, dict(fine_label=names, coarse_label=["a", "b"]))) == want
    assert read_table(write_table(file, dict(picture=cells(), kind=y, weight=y), dict(kind=names))) == want
    assert read_table(write_table(file, dict(image=[c["bytes"] for c in cells()], label=y), dict(label=names))) == want
    text = (("ant", "cat"), [0, 1, 1, 0])  # of the alphabet
    assert read_table(write_table(file, dict(image=cells(), label=[names[l] for l in y]))) == text
    assert read_table(write_table(file, dict(image=cells(), label=[names[l] for l in y]), {}, b"pandas")) == text
    assert read_table(write_table(file, dict(image=cells(), label=[float(l) for l in y]), dict(label=names))) == want
    for header in (b"huggingface", b"pandas"):
        write_table(file, whole, {}, header)
        refuses(lambda: parquet_rows([file]), "set.parquet has numbers for its classes and no names", "as text")
        assert read_table(file, unnamed=lambda numbers: names if numbers == {0, 2} else None) == want
    # two files that number their classes differently
    one = write_table(tmp_path / "1.parquet", whole, dict(label=names))
    two = write_table(tmp_path / "2.parquet", whole, dict(label=["dog", "cat", "owl"]))
    classes, rows = parquet_rows([one, two])
    assert (
        classes == ("ant", "cat", "dog", "owl") and [r.label for r in rows] == "ant cat cat ant owl dog dog owl".split()
    )


def test_parquet_that_cannot_be_used_has_its_sentence(tmp_path):
    import pyarrow.parquet as pq

    file, y, names = tmp_path / "set.parquet", [0, 1, 1, 0], dict(label=["cat", "dog"])
    images = cells()
    for columns, words in (
        (dict(image=images, label=[0, 1, 2, 0]), "row 3 (2.png) has the class 2, and the names are those of 2 classes"),
        (dict(image=images, label=[0, -1, 1, 0]), "row 2 (1.png) has the class -1"),
        (dict(image=images, label=[0, None, 1, 0]), "row 2 (1.png) has no class"),
        (dict(image=images, label=[0, 0.5, 1, 0]), "row 2 (1.png) has the class 0.5"),
        (dict(image=[c | dict(bytes=None) for c in images], label=y), "row 1 holds no image, only the path 0.png"),
        (dict(image=[None, *images[1:]], label=y), "row 1 holds no image; write the images into the file"),
        (dict(image=[[1, 2]] * 4, label=y), "has no column that could hold image files as bytes among image (list"),
        (dict(image=[c["path"] for c in images], label=y), "has no column that could hold image files"),
        (dict(a=images, b=images, label=y), "has several columns that could hold image files"),
        (dict(image=images), "has no column that could hold classes"),
        (dict(image=images, a=y, b=y), "has several columns that could hold classes"),
        (pq.read_table(write_table(file, dict(image=images, label=y))).slice(0, 0), "set.parquet holds no rows"),
    ):
        write_table(file, columns, names)
        refuses(lambda: parquet_rows([file]), "set.parquet", words)
    bad = [*images[:2], images[2] | dict(bytes=images[2]["bytes"][:50]), images[3] | dict(bytes=b"no image")]
    for row, part in ((3, bad[:3]), (4, [*images[:3], bad[3]])):
        classes, rows = parquet_rows([write_table(file, dict(image=part, label=y[: len(part)]), names)])
        refuses(
            lambda: decode_rows(rows, classes), f"set.parquet, row {row} ({row - 1}.png) is", "make or copy the parquet"
        )
    whole = write_table(file, dict(image=images, label=y), names).read_bytes()
    for content, words in (
        (whole[: len(whole) // 2], "is cut or no parquet file"),
        (whole[:-1], "is cut or no parquet file"),
        (b"", "is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a page of a web server"),
    ):
        file.write_bytes(content)
        refuses(lambda: parquet_rows([file]), "set.parquet", words)
    rng = np.random.default_rng(0)
    for _ in range(60):  # damage of any kind is read, or has its sentence
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        file.write_bytes(data.tobytes())
        try:
            classes, rows = parquet_rows([file])
            decode_rows(rows, classes, 8)
        except InputError as e:
            assert "\n" not in str(e) and "set.parquet" in str(e)


def test_cifar_fs_with_numbers_alone(tmp_path):
    from tiny_nbdev.data.loaders import load_cifar_fs

    fine = [2, 5, 8, 21, 34, 42, 46, 58, 60, 62, 69, 70, 77, 83, 84, 86, 94, 95, 98, 99]  # CIFAR-100's own numbers
    (tmp_path / "cifar_fs").mkdir()
    file = tmp_path / "cifar_fs" / "test-0.parquet"
    write_table(file, dict(img=cells(1) * 20, fine_label=fine))
    images = load_cifar_fs("test", tmp_path)
    assert images.classes[:3] == ("baby", "bed", "bicycle") and images.counts() == [1] * 20
    for other in (list(range(20)), [3, *fine[1:]], [100, *fine[1:]]):
        write_table(file, dict(img=cells(1) * 20, fine_label=other))
        refuses(lambda: load_cifar_fs("test", tmp_path), "test-0.parquet has numbers for its classes and no names")


def test_another_set_in_the_place_of_cifar_fs(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_NBDEV_DATA", str(tmp_path))
    (tmp_path / "cifar_fs").mkdir()
    for names, words in (
        (["cat", "dog"], "20 of 20 classes are missing (baby, bed, bicycle and 17 more)"),
        (["baby", "beaver"], "beaver belongs to another split"),
    ):
        columns = dict(image=cells(), label=[0, 1, 1, 0])
        write_table(tmp_path / "cifar_fs" / "test-0.parquet", columns, dict(label=names))
        images = load_dataset("cifar-fs", "test")
        refuses(lambda: dataset_episodes("cifar-fs", images, "test"), f"{tmp_path / 'cifar_fs'} is not the test", words)
        rooms._kept.clear()


@pytest.mark.slow
@pytest.mark.skipif(not DATA or not has_cifar_fs(), reason="CIFAR-FS is not at hand: TINY_NBDEV_DATA is not set")
def test_cifar_fs(monkeypatch):
    monkeypatch.setenv("TINY_NBDEV_DATA", DATA)
    images = load_dataset("cifar-fs", "validation")
    episodes, about = dataset_episodes("cifar-fs", images, "validation")
    assert len(episodes) == 5 and len(about["sha256"]) == 64, "the shipped list"
    assert episodes == [sample_episode(images, "validation", i) for i in range(5)]
    base, plus = load_dataset("cifar-fs", "train"), load_dataset("cifar-fs+digits", "train")
    assert len(plus) == len(base) + 901 and torch.equal(plus.images[: len(base)], base.images)
    refuses(lambda: dataset_episodes("cifar-fs", base, "train"), "no episode list")
