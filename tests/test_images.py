"Files of every kind read the same; what cannot be read is named; sets that cannot be made."

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_nbdev.data.decode import read_rgb
from tiny_nbdev.data.images import ImageSet, image_key, read_image, read_pixels, to_uint8, write_images
from tiny_nbdev.data.tones import to_rgb
from tiny_nbdev.errors import InputError


def two_halves(mode="RGB"):
    a = np.zeros((8, 12, 3), np.uint8)
    a[:, :6, 0] = 255
    a[:, 6:, 2] = 255
    return Image.fromarray(a).convert(mode)


def test_every_kind_of_file(tmp_path):
    d = tmp_path
    two_halves().save(d / "rgb.png")
    two_halves("RGBA").save(d / "rgba.png")
    two_halves("P").save(d / "palette.png")
    two_halves("CMYK").save(d / "cmyk.tif")
    turned = two_halves().transpose(Image.Transpose.ROTATE_90)
    ex = turned.getexif()
    ex[0x0112] = 6
    turned.save(d / "exif.png", exif=ex)
    two_halves().save(d / "moving.gif", save_all=True, append_images=[two_halves().rotate(180)])
    Image.fromarray((np.linspace(0, 65535, 96).reshape(8, 12)).astype(np.uint16)).save(d / "deep.png")
    clear = two_halves("RGBA")
    clear.putalpha(0)
    clear.save(d / "clear.png")
    want = read_image(d / "rgb.png")
    for f in ("rgba.png", "palette.png", "cmyk.tif", "exif.png", "moving.gif"):
        got = read_image(d / f)
        assert got.shape == (3, 8, 12) and (got - want).abs().max() < 0.02, f
    deep = read_image(d / "deep.png")
    assert deep.min() == 0 and deep.max() == 1 and 0.4 < deep.mean() < 0.6, "16 bit must be scaled, not clipped"
    assert read_image(d / "clear.png").min() == 1, "transparent lies on white"
    assert read_image(d / "rgb.png", 4).shape == (3, 4, 4)
    for f in ("rgb.png", "rgba.png", "palette.png", "cmyk.tif", "exif.png", "moving.gif"):
        assert np.array_equal(read_rgb(d / f).transpose(2, 0, 1), read_pixels(d / f).numpy()), f
    assert image_key(read_pixels(d / "rgb.png")) == image_key(read_pixels(d / "rgba.png"))


def test_grey_beyond_eight_bits():
    for values, mode in ((np.full((4, 4), 65535, np.int32), "I"), (np.ones((4, 4), np.float32), "F")):
        assert np.asarray(to_rgb(Image.fromarray(values))).min() == 255, mode
    with pytest.raises(ValueError, match="not finite"):
        to_rgb(Image.fromarray(np.full((4, 4), np.nan, np.float32)))


def bomb():
    "A PNG header that promises 60,000 x 60,000 pixels in a few bytes."

    def chunk(k, v):
        return struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def test_files_that_cannot_be_read(tmp_path):
    d = tmp_path
    two_halves().save(d / "ok.png")
    bad = {
        "empty.jpg": (b"", "0 bytes"),
        "text.jpg": (b"dear diary", "not an image"),
        "bomb.png": (bomb(), "100,000,000 pixels"),
        "cut.png": ((d / "ok.png").read_bytes()[:60], "damaged"),
    }
    for name, (data, why) in bad.items():
        (d / name).write_bytes(data)
        try:
            read_image(d / name)
        except InputError as e:
            assert name in str(e) and why in str(e), e
        else:
            raise AssertionError(name)

    with pytest.raises(InputError, match="does not exist"):
        read_image(d / "absent.png")


def test_image_sets():
    s = ImageSet(torch.rand(5, 3, 8, 8), torch.tensor([0, 0, 1, 2, 2]), ("a", "b", "c"), tuple("vwxyz"))
    assert (
        s.counts() == [2, 1, 2] and len(s.of_class(2)) == 2 and s.of_class(2).paths == ("y", "z") and s.size == (8, 8)
    )
    assert ImageSet.concat([s, s]).counts() == [4, 2, 4] and s.resized(4).size == (4, 4)
    u = replace(s, images=to_uint8(s.images))
    assert u.batch([1]).dtype == torch.float32 and (u.floats() - s.floats()).abs().max() <= 0.5 / 255 + 1e-6
    for bad, why in (
        (torch.full((5, 3, 8, 8), float("nan")), "nan"),
        (torch.full((5, 3, 8, 8), 255.0), "255"),
        (torch.rand(5, 8, 8), "expected"),
    ):
        try:
            replace(s, images=bad)
        except ValueError as e:
            assert why in str(e), e
        else:
            raise AssertionError(why)


def test_writing(tmp_path):
    x = torch.rand(2, 3, 8, 8)
    write_images(x, tmp_path, ["cat/0.png", "cat/1.png"])
    assert torch.equal(read_pixels(Path(tmp_path) / "cat/1.png"), to_uint8(x[1]))
    with pytest.raises(InputError, match="outside"):
        write_images(x[:1], tmp_path, ["../escaped.png"])
