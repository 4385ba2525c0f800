"What people have on their disks: folders of photos, folders without labels, and what is wrong with them."

import os
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import without_rights
from PIL import Image

from tiny_nbdev.data import folders
from tiny_nbdev.data.folders import (
    check_disjoint,
    class_folders,
    image_files,
    match_classes,
    read_folder,
    read_labelled,
    read_unlabelled,
    split_folders,
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


# ---- what lies in folders besides photos

JUNK = ".ipynb_checkpoints .thumbnails @eaDir .@__thumb #recycle $RECYCLE.BIN __MACOSX lost+found".split()


def test_system_folders_are_neither_photos_nor_classes(photos):
    before = read_folder(photos)[0]
    for k, name in enumerate(JUNK):
        save(photos / "dog" / name / "deep" / "old.png", 50 + k)
        save(photos / name / "old.png", 70 + k)
    (photos / "dog" / "._9.png").write_bytes(b"\0\5\x16\7")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
        (photos / "dog" / name).touch()
        (photos / name).touch()
    after, said = read_folder(photos)
    assert after.classes == before.classes and after.paths == before.paths
    assert len(said) == 1 and said[0].startswith("17 hidden or system files and folders in"), said
    assert len(image_files(photos)) == 3 and len(read_unlabelled(photos, 8)[0]) == 3


def test_what_is_passed_over_is_counted_and_named(photos, tmp_path):
    dog, cat = photos / "dog", photos / "red cat"
    for name in ("IMG_1.JXL", "IMG_2.mpo", "IMG_0003"):
        (dog / name).write_bytes(b"?")
    for name in ("a.jpg", "b.jpg"):
        (cat / name).symlink_to(f"/mnt/usb/{name}")
    save(tmp_path / "elsewhere" / "1.png", 8)
    (dog / "more").symlink_to(tmp_path / "elsewhere")
    (dog / "circle").symlink_to(dog)
    save(photos / "loose.png", 9)
    said = read_folder(photos)[1]
    assert [s.split(f" in {photos}: ")[0] for s in said] == [
        "3 files of types that are not read (.jxl, .mpo, no suffix)",
        "2 links to what is not there",
        "2 links to folders",
        "1 file beside the class folders",
    ]
    text = " ".join(said)
    assert "dog/IMG_0003, dog/IMG_1.JXL, dog/IMG_2.mpo; convert" in text and "dog/circle, dog/more" in text
    assert "red cat/a.jpg, red cat/b.jpg; copy" in text and text.endswith("loose.png.")
    assert read_unlabelled(photos, 8)[1][:2] == said[:2] and len(read_unlabelled(photos, 8)[0]) == 4


def test_a_link_beside_the_classes(photos, tmp_path):
    save(tmp_path / "elsewhere" / "1.png", 8)
    (photos / "bird").symlink_to(tmp_path / "elsewhere")
    (photos / "again").symlink_to(photos)
    (photos / "gone").symlink_to("/nowhere")
    s, said = read_folder(photos)
    assert s.classes == ("bird", "dog", "red cat") and s.counts() == [1, 1, 2]
    assert [w[:24] for w in said] == ["1 link to what is not th", "1 link to a folder in " + str(photos)[:2]], said


def test_a_class_of_which_nothing_is_read(photos):
    bird = photos / "bird"
    bird.mkdir()
    refuses(lambda: read_folder(photos), "bird holds no images; add some")
    (bird / "1.jxl").touch()
    refuses(lambda: read_folder(photos), "bird holds no images, only 1 file of a type that is not read (.jxl); convert")
    save(photos / "loose" / "x" / "1.png", 1)
    refuses(lambda: read_folder(bird), "no class folders")
    save(bird / "1.png", 77)
    refuses(lambda: read_folder(bird), "no class folders", "1 images lie in it directly")


def test_folders_without_permission(open_place):
    for i, name in enumerate(("p/cat/1.png", "p/cat/private/2.png", "p/dog/3.png")):
        save(open_place / name, i)
    p = open_place / "p"
    with without_rights(p / "cat" / "private"):
        s, said = read_folder(p)
        assert s.counts() == [1, 1] and "1 folder that cannot be opened" in said[0] and "cat/private; change" in said[0]
    for closed in (p / "cat", p):
        with without_rights(closed):
            refuses(lambda: read_folder(p), f"{closed} cannot be opened (Permission denied); change its permissions.")
            refuses(lambda: read_unlabelled(closed, 8), f"{closed} cannot be opened (Permission denied)")


@pytest.mark.parametrize(
    "train,val,test",
    [("train", "val", "test"), ("Training", "Validation", "Testing"), ("seg_train", "dev", "TEST_SET")],
)
def test_splits_are_not_classes(train, val, test, tmp_path):
    for i, part in enumerate((train, val, test)):
        inside = part if part != "seg_train" else "seg_train/seg_train"  # as Kaggle packs some
        for k, name in enumerate(("cat", "dog")):
            save(tmp_path / inside / name / "1.png", 10 * i + k)
    inner = tmp_path / (train if train != "seg_train" else "seg_train/seg_train")
    refuses(lambda: read_folder(tmp_path), f"give {inner} as photos, and {tmp_path / val} with --queries")
    assert set(split_folders(tmp_path)) == {"train", "validation", "test"}
    assert read_folder(inner)[0].classes == ("cat", "dog")


def test_a_class_may_be_called_train(tmp_path):
    for i, name in enumerate(("train", "bus", "test")):
        save(tmp_path / "p" / name / "1.png", i)
    assert read_folder(tmp_path / "p")[0].classes == ("bus", "test", "train")
    for i, name in enumerate(("train", "test")):
        save(tmp_path / "q" / name / "1.png", i)
    refuses(lambda: read_folder(tmp_path / "q"), "names of splits", "rename these folders if they are classes")
    save(tmp_path / "w" / "photos" / "cat" / "1.png", 1)
    save(tmp_path / "w" / "photos" / "dog" / "1.png", 2)
    refuses(lambda: read_folder(tmp_path / "w"), f"so give {tmp_path / 'w' / 'photos'} if they lie there")


def test_one_name_in_two_forms_is_one_class(tmp_path):
    composed, apart = "Vögel", unicodedata.normalize("NFD", "Vögel")
    for i, name in enumerate((apart, "dog")):
        save(tmp_path / "p" / name / "1.png", i)
    save(tmp_path / "q" / composed / "2.png", 5)
    support, said = read_folder(tmp_path / "p")
    assert support.classes == (composed, "dog") and not said
    queries = match_classes(read_folder(tmp_path / "q", min_classes=1)[0], support.classes, tmp_path / "q")
    assert queries.labels.tolist() == [0]
    save(tmp_path / "p" / composed / "3.png", 6)
    if len(list((tmp_path / "p").iterdir())) == 3:  # a file system that keeps both
        support, said = read_folder(tmp_path / "p")
        assert support.counts() == [2, 1] and "one name, stored in two ways, and one class" in said[0]


def test_names_that_differ_in_capitals(tmp_path):
    for i, name in enumerate(("Cat", "dog")):
        save(tmp_path / "p" / name / "1.png", i)
    save(tmp_path / "q" / "cat" / "2.png", 5)
    queries = read_folder(tmp_path / "q", min_classes=1)[0]
    refuses(lambda: match_classes(queries, ("Cat", "dog"), tmp_path / "q"), "'cat'", "rename that folder to 'Cat'")
    save(tmp_path / "p" / "cat" / "3.png", 6)
    if len(list((tmp_path / "p").iterdir())) == 3:
        support, said = read_folder(tmp_path / "p")
        assert support.classes == ("Cat", "cat", "dog") and "'Cat' and 'cat' differ in capitals only" in said[0]


def test_queries_one_folder_too_high(photos, tmp_path):
    save(tmp_path / "q" / "all" / "dog" / "5.png", 7)
    queries = read_folder(tmp_path / "q", min_classes=1)[0]
    refuses(lambda: match_classes(queries, ("dog", "red cat"), tmp_path / "q"), "give that folder with --queries")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_text_or_would_be_obeyed(tmp_path):
    latin = os.fsdecode("café".encode("cp1252"))
    for i, name in enumerate((latin, "two\nlines", "\x1b[31mred")):
        save(tmp_path / name / "1.png", i)
    (tmp_path / latin / os.fsdecode(b"\xff.jpg")).touch()
    refuses(lambda: read_folder(tmp_path), r"caf\xe9/\xff.jpg is empty")
    s, said = read_folder(tmp_path, skip_bad=True)
    assert s.classes == ("\x1b[31mred", "café", "two\nlines") and len(said) == 2
    assert r"caf\xe9 has a name in another encoding" in said[0] and "'café'" in said[0]
    for sentence in (*said, str(InputError(f"{tmp_path}/two\nlines/\x1b[31m\u202e.jpg"))):
        assert sentence.isprintable() and sentence.encode(), sentence


@pytest.mark.parametrize("readable", [True, False])
def test_heic_of_phones(readable, photos, monkeypatch):
    suffixes = folders.IMAGE_SUFFIXES - folders.HEIF_SUFFIXES
    monkeypatch.setattr(folders, "IMAGE_SUFFIXES", suffixes | {".heic"} if readable else suffixes)
    (photos / "bird").mkdir()
    (photos / "bird" / "IMG_1.HEIC").write_bytes(b"?")
    if readable:
        refuses(lambda: read_folder(photos), "IMG_1.HEIC")
        assert [f.name for f in image_files(photos / "bird")] == ["IMG_1.HEIC"]
    else:
        refuses(
            lambda: read_folder(photos), "only 1 file of a type that is not read (.heic); convert", folders.HEIF_REMEDY
        )
        save(photos / "bird" / "1.png", 99)
        assert f"run {folders.HEIF_REMEDY} to read them." in read_folder(photos)[1][0]
