"Episodes are drawn once, kept in files, and refused when anything has changed."

from pathlib import Path

import pytest
import torch

from tiny_nbdev.data.episodes import (
    episode_list_files,
    episode_sets,
    expand_episodes,
    load_episodes,
    read_episode_list,
    sample_episode,
    save_episode_list,
    save_episodes,
)
from tiny_nbdev.data.loaders import load_digit_images
from tiny_nbdev.errors import InputError


@pytest.fixture(scope="module")
def digits():
    return load_digit_images()


def test_drawing(digits):
    e = sample_episode(digits, "digits", 0, n_way=3, n_shot=4)
    assert e == sample_episode(digits, "digits", 0, n_way=3, n_shot=4)
    assert e != sample_episode(digits, "digits", 1, n_way=3, n_shot=4)
    support, _ = episode_sets(digits, e)
    assert support.counts() == [4, 4, 4] and len(set(e.classes)) == 3
    for c, name in enumerate(e.classes):
        total = digits.counts()[digits.classes.index(name)]
        assert len({*e.support[c], *e.query[c]}) == total and not {*e.support[c]} & {*e.query[c]}
    for kw, word in ((dict(n_way=11), "n_way"), (dict(n_shot=500), "n_shot"), (dict(n_way=1), "at least 2")):
        with pytest.raises(InputError, match=word):
            sample_episode(digits, "digits", 0, **kw)
    with pytest.raises(InputError, match="another split"):
        episode_sets(digits.subset(torch.arange(1796, -1, -1)), e)


def test_whole_episodes_on_disk(digits, tmp_path):
    es, file = [sample_episode(digits, "digits", i) for i in range(3)], tmp_path / "e.json"
    save_episodes(es, file, dataset="digits")
    assert load_episodes(file) == es
    file.write_text(file.read_text().replace('"index": 2', '"index": 7'))
    with pytest.raises(InputError, match="hash"):
        load_episodes(file)


def test_lists_on_disk(digits, tmp_path):
    file = tmp_path / "e.json"
    save_episode_list(digits, file, "digits", 4, n_way=3, n_shot=4, dataset="digits")
    data = read_episode_list(file)
    drawn = [sample_episode(digits, "digits", i, 3, 4) for i in range(4)]
    assert expand_episodes(data, digits) == drawn and expand_episodes(data, digits, 2) == drawn[:2]
    with pytest.raises(InputError, match="from 1 to 4"):
        expand_episodes(data, digits, 5)
    turned = digits.subset([1, 0, *range(2, len(digits))])  # the same labels, two images of a class exchanged
    with pytest.raises(InputError, match="other images, labels or order"):
        expand_episodes(data, turned)
    file.write_text(file.read_text().replace('"index":2', '"index":7'))
    with pytest.raises(InputError, match="hash"):
        read_episode_list(file)


@pytest.mark.parametrize("split, counts", [("validation", [5, 30]), ("test", [120])])
def test_shipped_lists(split, counts):
    lists = [read_episode_list(Path(p)) for p in episode_list_files(split=split)]
    assert [len(l["episodes"]) for l in lists] == counts
    for l in lists:
        assert l["episodes"] == lists[-1]["episodes"][: len(l["episodes"])], "a short list begins a longer one"
        assert all(len({*r["classes"]}) == 5 and len({i for g in r["support"] for i in g}) == 25 for r in l["episodes"])
    with pytest.raises(InputError, match="cifar_fs_test_5way5shot"):
        episode_list_files(split="tset")
