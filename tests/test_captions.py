"Captions from a vocabulary, colours from rules."

import torch

from tiny_nbdev.data.captions import COLOR_WORDS, SUPERCLASS, captions_of, image_attributes
from tiny_nbdev.data.images import to_uint8


def test_captions():
    assert len(SUPERCLASS) == 110
    assert (
        captions_of("oak_tree")[0] == "a photo of an oak tree"
        and captions_of("digit 3")[3] == "a photo of a handwritten digit"
    )
    assert (
        captions_of("dolphin", {})
        == captions_of("dolphin")
        == captions_of("dolphin", dict(brightness=None, color=None))
    )
    assert captions_of("apple", dict(brightness="dark", color="red"))[:2] == [
        "a dark red photo of an apple",
        "apple, dark red",
    ]
    assert captions_of("tiger", dict(color="orange"))[3:] == [
        "an orange photo of a carnivore",
        "an orange photo of an object",
    ]
    for bad, why in ((dict(color="mauve"), "mauve"), (dict(size="big"), "size")):
        try:
            captions_of("apple", bad)
        except ValueError as e:
            assert why in str(e), e
        else:
            raise AssertionError(why)


def test_attributes():
    plain = dict(
        red=(1, 0, 0),
        orange=(1, 0.6, 0),
        yellow=(1, 1, 0),
        green=(0, 0.6, 0),
        blue=(0.3, 0.5, 1),
        purple=(0.5, 0, 1),
        pink=(1, 0.7, 0.75),
        brown=(0.45, 0.3, 0.15),
        black=(0, 0, 0),
        grey=(0.5, 0.5, 0.5),
        white=(1, 1, 1),
    )
    x = torch.tensor(list(plain.values()))[:, :, None, None].expand(-1, -1, 8, 8)
    assert [a["color"] for a in image_attributes(x)] == list(plain) == list(COLOR_WORDS)
    grey = torch.tensor([0.0, 0.3, 0.37, 0.39, 0.59, 0.61, 1.0]).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    assert [a["brightness"] for a in image_attributes(grey)] == ["dark"] * 3 + [None] * 2 + ["bright"] * 2
    half = x[:1].clone()
    half[..., 4:] = x[4:5, ..., 4:]
    third = half.clone()
    third[..., :3] = x[3:4, ..., :3]  # three colours, three eighths, one eighth and half
    assert image_attributes(third)[0]["color"] == "blue" and image_attributes(third, least=0.6)[0]["color"] is None
    noisy = torch.rand(50, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert image_attributes(noisy, batch=7) == image_attributes(noisy) == image_attributes(noisy.flip(-1)), (
        "in batches and mirrored: the same words"
    )
    assert image_attributes(to_uint8(x)) == image_attributes(x) and image_attributes(noisy[:0]) == []
