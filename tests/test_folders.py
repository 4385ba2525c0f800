"What people have on their disks: folders of photos, folders without labels, and what is wrong with them."

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_nbdev.data.folders import (
    check_disjoint,
    class_folders,
    image_files,
    match_classes,
    read_folder,
    read_labelled,
    read_unlabelled,
)
from tiny_nbdev.data.images import ImageSet, describe, read_image, to_uint8
from tiny_nbdev.errors import InputError


def save(path, seed, size=(30, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)).save(path)


def refuses(call, *words):
    with pytest.raises(InputError) as e:
        call()
    assert all(w in str(e.value) for w in words), e.value
    assert "\n" not in str(e.value)


@pytest.fixture
def photos(tmp_path):
    for i, name in enumerate(("red cat/1.png", "red cat/2.png", "dog/9.png")):
        save(tmp_path / "p" / name, i)
    return tmp_path / "p"


def test_one_list_of_files_for_every_reader(photos):
    for name in (".hidden.png", "notes.txt", "deep/er/a.JPG"):
        path = photos / "dog" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((photos / "dog" / "9.png").read_bytes())
    (photos / "dog" / "folder.png").mkdir()
    found = [p.relative_to(photos).as_posix() for p in image_files(photos)]
    assert found == ["dog/9.png", "dog/deep/er/a.JPG", "red cat/1.png", "red cat/2.png"]
    assert [*read_unlabelled(photos, 16)[0].paths] == [str(photos / f) for f in found]


def test_classes_are_folders(photos):
    s, skipped = read_folder(photos, 16)
    assert s.classes == ("dog", "red cat") and s.counts() == [1, 2] and s.size == (16, 16) and not skipped
    assert torch.equal(s.images[1], to_uint8(read_image(photos / "red cat/1.png", 16)))


def test_layouts_that_cannot_be_right(photos, tmp_path):
    refuses(lambda: read_folder(tmp_path / "none"), "does not exist")
    refuses(lambda: read_folder(photos / "dog/9.png"), "is a file")
    refuses(lambda: read_folder(photos / "dog"), "no class folders")
    save(tmp_path / "one" / "cat" / "1.png", 1)
    refuses(lambda: read_folder(tmp_path / "one"), "one class only", "cat")
    assert read_folder(tmp_path / "one", min_classes=1)[0].counts() == [1]
    (photos / "bird").mkdir()
    refuses(lambda: read_folder(photos), "bird", "holds no images")


def test_files_that_cannot_be_read(photos):
    (photos / "dog" / "a.jpg").write_bytes(b"")
    refuses(lambda: read_folder(photos), "a.jpg", "0 bytes")
    s, skipped = read_folder(photos, skip_bad=True)
    assert len(s) == 3 and "a.jpg" in skipped[0]
    (photos / "dog" / "9.png").unlink()
    refuses(lambda: read_folder(photos, skip_bad=True), "dog has no readable image left")
    images, skipped = read_unlabelled(photos, 8, skip_bad=True)
    assert len(images) == 2 and "a.jpg" in skipped[0]
    refuses(lambda: read_unlabelled(photos, 8), "a.jpg")


def test_the_same_picture_twice(photos):
    save(photos / "dog" / "again.png", 2)
    s, skipped = read_folder(photos)
    assert s.counts() == [1, 2] and "counts once" in skipped[0]
    save(photos / "dog" / "cat.png", 1)
    refuses(lambda: read_folder(photos), "cat.png", "2.png", "another class")


def test_queries(photos, tmp_path):
    save(tmp_path / "q" / "dog" / "5.png", 7)
    support, (queries, _) = read_folder(photos)[0], read_folder(tmp_path / "q", min_classes=1)
    matched = match_classes(queries, support.classes, "q")
    assert matched.classes == support.classes and matched.labels.tolist() == [0]
    swapped = replace(support, classes=support.classes[::-1])
    assert match_classes(swapped, support.classes, "q").labels.tolist() == (1 - support.labels).tolist()
    refuses(lambda: match_classes(queries, ("cat", "cow"), "q"), "'dog'", "cat, cow")
    check_disjoint(support, matched)
    save(tmp_path / "q" / "red cat" / "5.png", 1)
    again = read_folder(tmp_path / "q", 16)[0]
    refuses(lambda: check_disjoint(support, again), "5.png", "2.png")  # at another size: the files are compared
    refuses(lambda: check_disjoint(replace(support, paths=()), replace(support, paths=())), "image 0")


def test_a_folder_or_a_set(photos):
    floats = ImageSet(torch.rand(4, 3, 8, 8), torch.tensor([0, 0, 1, 1]), ("a", "b"))
    s, skipped = read_labelled(floats, 16)
    assert s.images.dtype == torch.uint8 and s.size == (16, 16) and s.counts() == [2, 2] and skipped == []
    assert torch.equal(read_labelled(photos, 16)[0].images, read_folder(photos, 16)[0].images)
    lonely = floats.subset([0, 1])
    refuses(lambda: read_labelled(lonely, 16), "photos has the class counts [2, 0]")
    assert len(read_labelled(lonely, 16, what="queries", min_classes=1)[0]) == 2


def test_unlabelled(photos, tmp_path):
    base, _ = read_unlabelled(photos, 16)
    assert base.classes == ("base",) and len(base) == 3 and describe(base).startswith("3 images in 1 class (")
    (tmp_path / "empty").mkdir()
    refuses(lambda: read_unlabelled(tmp_path / "empty", 16), "holds no images", "--base")
    refuses(lambda: read_unlabelled(tmp_path / "x", 16), "is not a folder", "--base")


def test_folder_names_are_safe_everywhere():
    assert class_folders(("oak tree", "Ä é 犬", "cat")) == ("oak tree", "Ä é 犬", "cat")
    odd = class_folders(("..", "../../etc", "a/b", "", ".hidden", "CON", "ends.", "x" * 300))
    assert odd[:3] == ("class_000_x", "class_001_etc", "class_002_a_b")
    assert class_folders(("Cat", "cat", "dog")) == ("class_000_Cat", "class_001_cat", "dog")
    assert class_folders(("é", "e\u0301"))[0] != class_folders(("é", "e\u0301"))[1]
    for names in (("..", "../x", "a\\b", "nul.txt", "\n", "a:b"), ("..", "...", " ", "class_000_x")):
        folders = class_folders(names)
        assert len(set(folders)) == len(names)
        assert all((Path("/r") / f).resolve().parent == Path("/r") for f in folders)


def test_fingerprint(photos, tmp_path):
    s = read_folder(photos)[0]
    assert describe(None) is None and describe(s) == describe(replace(s, paths=()))
    assert describe(s) != describe(s.subset([0, 2, 1])) and describe(s) != describe(replace(s, classes=("dog", "cat")))
