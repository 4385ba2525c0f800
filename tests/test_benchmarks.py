"miniImageNet and CUB in miniature, in every layout, and what is wrong with a copy."

import hashlib
import pickle
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tiny_nbdev.data.benchmarks import (
    CUB_SPLITS,
    SPLITS,
    benchmark_words,
    check_counts,
    find_dataset,
    get_benchmark,
    load_benchmark,
)
from tiny_nbdev.data.episodes import episode_sets, sample_episode
from tiny_nbdev.errors import InputError

mini = get_benchmark("mini-imagenet")


def refuses(call, *words):
    with pytest.raises(InputError) as e:
        call()
    assert all(w in str(e.value) for w in words), e.value


def pack(folder, archive):
    "A folder as an archive, its name in front of every entry."
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    if Path(archive).suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as z:
            for f in files:
                z.write(f, f.relative_to(Path(folder).parent))
    else:
        with tarfile.open(archive, "w:gz" if Path(archive).suffix == ".tgz" else "w") as t:
            for f in files:
                t.add(f, f.relative_to(Path(folder).parent))
    return archive


def photo(path, seed, size=(100, 60), box=None):
    "A smooth random photo, with one red box if asked."
    path.parent.mkdir(parents=True, exist_ok=True)
    im = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (3, 4, 3), np.uint8)).resize(size, Image.BILINEAR)
    if box:
        ImageDraw.Draw(im).rectangle((box[0], box[1], box[0] + box[2] - 1, box[1] + box[3] - 1), fill=(255, 0, 0))
    im.save(path, format="PNG" if box else "JPEG")  # the decoder goes by the content; PNG, for JPEG would smear the box


def test_lists():
    for which, split in CUB_SPLITS.items():
        assert [len(split[s]) for s in SPLITS] == [100, 50, 50] and len({c for s in SPLITS for c in split[s]}) == 200, (
            which
        )
    assert [sum(get_benchmark("cub").n_images[s] for s in SPLITS), get_benchmark("cub").n_images["all"]] == [
        11788,
        11788,
    ]
    assert get_benchmark("cub", "frn").n_images == dict(all=11788)
    # as their authors define them
    assert all(int(c) % 2 == 1 for c in CUB_SPLITS["closerlook"]["train"])
    assert all(int(c) % 4 == 2 for c in CUB_SPLITS["closerlook"]["validation"])
    assert all(int(c) % 2 == 0 for c in CUB_SPLITS["frn"]["train"])
    assert all(int(c) % 4 == 1 for c in CUB_SPLITS["frn"]["validation"])
    shared = lambda a, b: len({*CUB_SPLITS[a]["test"]} & {*CUB_SPLITS[b]["test"]})
    assert (shared("feat", "closerlook"), shared("feat", "frn"), shared("closerlook", "frn")) == (12, 10, 0)
    assert [len(mini.classes[s]) for s in ("validation", "test")] == [16, 20]
    assert not {*mini.classes["validation"]} & {*mini.classes["test"]}
    refuses(lambda: get_benchmark("omniglot"), "'omniglot'", "mini-imagenet")
    refuses(lambda: get_benchmark("cub", "mine"), "feat, closerlook, frn")


def test_counts():
    val = {c: 600 for c in mini.classes["validation"]}
    check_counts(val, mini, "validation", "here")
    short = {**val, "n09256479": 599}
    refuses(
        lambda: check_counts(short, mini, "validation", "here"),
        "n09256479 has 599",
        "600 images a class",
        "image-net.org",
    )
    refuses(
        lambda: check_counts({c: 600 for c in list(val)[1:]}, mini, "validation", "here"),
        "1 of 16 classes are missing (n01855672)",
    )
    refuses(lambda: check_counts({**val, "n1": 600}, mini, "validation", "here"), "too many (n1)")
    refuses(
        lambda: check_counts({**val, "n07613480": 600}, mini, "validation", "here"),
        "n07613480 belongs to another split",
    )
    refuses(lambda: check_counts(val, mini, "train", "here"), "belong to another split")
    refuses(lambda: check_counts({f"n{i}": 600 for i in range(63)}, mini, "train", "here"), "63 classes instead of 64")
    refuses(
        lambda: check_counts({f"n{i}": 600 for i in range(64)}, mini, "train", "here"),
        "not those of the published list",
    )
    refuses(
        lambda: check_counts({c: 50 for c in CUB_SPLITS["feat"]["test"]}, get_benchmark("cub"), "test", "here"),
        "2500 images instead of 2965",
    )


@pytest.fixture
def copies(tmp_path):
    "miniImageNet in miniature: two images of three classes per split, with the true ids, as folders and as lists."
    home = tmp_path
    ids = dict(
        train=("n01532829", "n01558993", "n01704323"),
        validation=mini.classes["validation"][:3],
        test=mini.classes["test"][:3],
    )
    small = replace(
        mini,
        classes={s: ids[s] for s in ("validation", "test")},
        n_classes={s: 3 for s in SPLITS},
        per_class=(2, 2),
        digests=dict(train=hashlib.sha256("\n".join(ids["train"]).encode()).hexdigest()),
    )
    folders, lists = home / "in_folders" / "mini-imagenet", home / "in_lists" / "mini-imagenet"
    for s, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        lines = []
        for c, wnid in enumerate(ids[s]):
            for i in range(2):
                for to in (folders / part / wnid, lists / "images"):
                    photo(to / f"{wnid}{i:08d}.jpg", 100 * c + i)
                lines.append(f"{wnid}{i:08d}.jpg,{wnid}")
        (lists / f"{part}.csv").write_text("filename,label\n" + "\n".join(reversed(lines)) + "\n")  # in another order

    return SimpleNamespace(home=home, ids=ids, small=small, folders=folders, lists=lists)


def test_every_layout_is_the_same(copies):
    ids, small, folders, lists, home = copies.ids, copies.small, copies.folders, copies.lists, copies.home
    every = [folders, lists] + [
        pack(f, f.parent / f"mini-imagenet{s}") for f in (folders, lists) for s in (".zip", ".tar", ".tgz")
    ]
    for s in SPLITS:
        sets = [load_benchmark("mini-imagenet", s, copy, facts=small) for copy in every]
        assert all(
            torch.equal(x.images, sets[0].images)
            and torch.equal(x.labels, sets[0].labels)
            and x.classes == tuple(sorted(ids[s]))
            for x in sets
        ), "every layout gives the same pixels in the same order"
        assert sets[0].size == (84, 84) and sets[0].images.dtype == torch.uint8 and sets[0].counts() == [2, 2, 2]
    assert load_benchmark("mini-imagenet", "test", home / "in_lists", facts=small).classes == sets[0].classes, (
        "the folder above will do"
    )
    support, queries = episode_sets(sets[0], sample_episode(sets[0], "test", 0, 3, 1))
    assert support.counts() == queries.counts() == [1, 1, 1]


def test_parquet_layout(copies):
    pytest.importorskip("pyarrow")
    from test_datasets import parquet

    want = load_benchmark("mini-imagenet", "test", copies.lists, facts=copies.small)
    home = copies.home / "hub" / "mini_imagenet"
    order = [3, 0, 5, 2, 4, 1]  # rows in another order; paths say which is which
    shuffled = want.subset(order)
    file = parquet(home / "test-00000-of-00001.parquet", shuffled, want.classes)
    assert find_dataset("mini-imagenet", home.parent) == home
    kept = copies.home / "kept.safetensors"
    for _ in range(2):
        got = load_benchmark("mini-imagenet", "test", home.parent, facts=copies.small, cache=kept)
        assert got.classes == want.classes and got.counts() == [2, 2, 2] and got.size == (84, 84)
        back = [order[int(Path(p).stem)] for p in got.paths]
        assert torch.equal(got.images, want.images[back]) and torch.equal(got.labels, want.labels)
    refuses(lambda: load_benchmark("mini-imagenet", "test", home), "17 of 20 classes are missing")
    refuses(lambda: load_benchmark("mini-imagenet", "validation", home), "no validation split")
    file.write_bytes(b"no")
    refuses(lambda: load_benchmark("mini-imagenet", "test", home, facts=copies.small), "test-00000", "copy or make it")


def test_kept_pixels(copies):
    small, folders, lists, home = copies.small, copies.folders, copies.lists, copies.home
    kept = home / "mini_test.safetensors"
    first = load_benchmark("mini-imagenet", "test", lists, facts=small, cache=kept)
    again = load_benchmark("mini-imagenet", "test", lists, facts=small, cache=kept)
    assert torch.equal(first.images, again.images) and first.classes == again.classes and first.paths == again.paths
    when = kept.stat().st_mtime_ns
    load_benchmark("mini-imagenet", "test", lists, facts=small, cache=kept)
    assert kept.stat().st_mtime_ns == when, "read, not written"
    load_benchmark("mini-imagenet", "test", folders, facts=small, cache=kept)
    assert kept.stat().st_mtime_ns != when, "another source: written anew"


def test_what_is_off_is_named(copies):
    ids, small, folders, lists, home = copies.ids, copies.small, copies.folders, copies.lists, copies.home
    refuses(lambda: load_benchmark("mini-imagenet", "test", folders), "17 of 20 classes are missing")
    gone = lists / "images" / f"{ids['test'][0]}00000000.jpg"
    data = gone.read_bytes()
    gone.unlink()
    refuses(lambda: load_benchmark("mini-imagenet", "test", lists, facts=small), "lacks 1 of the 6 images", gone.name)
    gone.write_bytes(data[:200])
    refuses(lambda: load_benchmark("mini-imagenet", "test", lists, facts=small), gone.name, "damaged")
    gone.write_bytes(data)
    moved = folders / "train" / ids["test"][0]
    (folders / "test" / ids["test"][0]).rename(moved)
    refuses(
        lambda: load_benchmark("mini-imagenet", "train", folders, facts=small),
        f"{ids['test'][0]} belongs to another split",
    )
    refuses(lambda: load_benchmark("mini-imagenet", "test", folders, facts=small), "1 of 3 classes are missing")
    moved.rename(folders / "test" / ids["test"][0])
    (home / "pickles").mkdir()
    (home / "pickles" / "mini-imagenet-cache-test.pkl").write_bytes(pickle.dumps(dict(image_data=[])))
    refuses(
        lambda: load_benchmark("mini-imagenet", "test", home / "pickles"),
        "mini-imagenet-cache-test.pkl is a pickle",
        "image-net.org",
    )
    refuses(
        lambda: load_benchmark("mini-imagenet", "test", home / "pickles" / "mini-imagenet-cache-test.pkl"),
        "is a pickle",
    )
    refuses(
        lambda: load_benchmark("mini-imagenet", "test", home / "in_folders" / "mini-imagenet" / "val"),
        "no test.csv",
        "train/<wnid>/*.jpg",
    )
    refuses(lambda: load_benchmark("mini-imagenet", "test", home / "nothing"), "not at hand", "image-net.org")
    (lists / "test.csv").write_text("a,b\n1,2\n")
    refuses(lambda: load_benchmark("mini-imagenet", "test", lists, facts=small), "test.csv", "filename,label")


@pytest.fixture
def birds(tmp_path):
    "CUB in miniature: every photo has a red box where its bird would be."
    home = tmp_path
    cub = home / "birds" / "CUB_200_2011"
    species = {
        1: "001.Black_footed_Albatross",
        2: "002.Laysan_Albatross",
        3: "003.Sooty_Albatross",
        10: "010.Red_winged_Blackbird",
    }
    tables = dict(images=[], image_class_labels=[], bounding_boxes=[])
    for n, (c, i) in enumerate(((c, i) for c in species for i in range(2)), 1):
        box = (10 + 5 * i, 8 + c, 50, 30)
        photo(cub / "images" / species[c] / f"bird_{i}.jpg", n, (120, 80), box)
        for table, row in zip(tables.values(), (f"{species[c]}/bird_{i}.jpg", c, " ".join(f"{v:.1f}" for v in box))):
            table.append(f"{n} {row}")
    for name, lines in tables.items():
        (cub / f"{name}.txt").write_text("\n".join(lines) + "\n")
    birds = replace(
        get_benchmark("cub"),
        classes=dict(train=("3",), validation=("1", "2"), test=("10",)),
        n_classes=dict(train=1, validation=2, test=1),
        per_class=(2, 2),
        n_images=dict(all=8, validation=4),
    )

    return SimpleNamespace(home=home, cub=cub, species=species, facts=birds)


def test_cub_is_cut_out_of_its_box(birds):
    cub, home, facts = birds.cub, birds.home, birds.facts
    loaded = [
        load_benchmark("cub", "validation", p, facts=facts)
        for p in (cub, home / "birds", pack(cub, home / "CUB_200_2011.tgz"))
    ]
    assert (
        all(torch.equal(x.images, loaded[0].images) for x in loaded)
        and loaded[0].classes == ("Black_footed_Albatross", "Laysan_Albatross")
        and loaded[0].counts() == [2, 2]
    )
    red = torch.tensor([255.0, 0, 0]).view(1, 3, 1, 1)
    assert loaded[0].size == (84, 84) and torch.equal(loaded[0].images.float(), red.expand(4, 3, 84, 84)), (
        "the box and nothing else"
    )


def test_a_cub_that_is_not_whole(birds, tmp_path):
    cub, species, facts = birds.cub, birds.species, birds.facts
    (tmp_path / "empty").mkdir()
    refuses(lambda: load_benchmark("cub", "validation", cub), "8 images instead of the 11,788", "data.caltech.edu")
    refuses(
        lambda: load_benchmark("cub", "validation", cub, facts=replace(facts, n_images=dict(validation=5))),
        "4 images instead of 5",
    )
    refuses(lambda: load_benchmark("cub", "test", tmp_path / "empty"), "no images.txt", "CUB_200_2011")
    boxes = (cub / "bounding_boxes.txt").read_text()
    (cub / "bounding_boxes.txt").write_text(boxes.replace("10.0 9.0", "500.0 9.0"))
    refuses(lambda: load_benchmark("cub", "validation", cub, facts=facts), "bird_0.jpg", "box lies outside")
    (cub / "bounding_boxes.txt").write_text("\n".join(boxes.splitlines()[1:]))
    refuses(lambda: load_benchmark("cub", "validation", cub, facts=facts), "no class or no box for 1 of its 8")
    (cub / "images" / species[2] / "bird_1.jpg").unlink()
    (cub / "bounding_boxes.txt").write_text(boxes)
    refuses(lambda: load_benchmark("cub", "validation", cub, facts=facts), "lacks 1 images", "bird_1.jpg")


def test_words():
    words = benchmark_words("mini-imagenet", mini.classes["validation"])
    assert words[0] == "goose" and words[-1] == "coral reef" and len(set(words)) == 16
    assert benchmark_words("cub", ["Laysan_Albatross"]) == ("Laysan Albatross",)
    assert benchmark_words("cifar-fs", ["oak_tree"]) == ("oak tree",)
    refuses(lambda: benchmark_words("mini-imagenet", ["goose"]), "goose is no class")
