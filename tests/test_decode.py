"Whatever a file holds, decoding gives an RGB picture or one sentence: formats, EXIF, tones, colours, damage, size."

import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from tiny_nbdev.data import decode as module
from tiny_nbdev.data.decode import HEIF_REMEDY, LARGE, LONG, MAX_PIXELS, decode, has_heif, read_bytes, read_rgb
from tiny_nbdev.data.jpeg import JpegFile, read_layout
from tiny_nbdev.data.tones import Samples, grey_range, to_rgb, to_srgb
from tiny_nbdev.errors import InputError


def picture(width=90, height=60):
    "Smooth, with four different corners."
    y, x = np.mgrid[:height, :width]
    a = np.stack([x * 255 // width, y * 255 // height, 128 + 100 * np.sin(x / 9)], -1).astype(np.uint8)
    s = max(1, height // 4)
    a[:s, :s], a[:s, -s:], a[-s:, :s], a[-s:, -s:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    return Image.fromarray(a)


def noise(width=96, height=64):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(im, fmt, **options):
    b = io.BytesIO()
    im.save(b, fmt, **options)
    return b.getvalue()


def chunk(name, body):
    return struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))


def tiff(values, kind, photometric=1):
    "A grey TIFF of one strip; `kind` is a NumPy type such as '<u2'."
    e, (h, w) = kind[0], np.shape(values)
    raw = np.asarray(values).astype(kind).tobytes()
    sample = {"u": 1, "i": 2, "f": 3}[kind[1]]
    tags = [(256, w), (257, h), (258, int(kind[2]) * 8), (259, 1), (262, photometric), (273, 134), (277, 1), (278, h)]
    tags += [(279, len(raw)), (339, sample)]
    body = struct.pack(e + "H", len(tags)) + b"".join(struct.pack(e + "HHLL", tag, 4, 1, v) for tag, v in tags)
    return ((b"II*\0" if e == "<" else b"MM\0*") + struct.pack(e + "L", 8) + body + bytes(4)).ljust(134, b"\0") + raw


def off(data, truth):
    "Largest difference in levels of 255."
    got, want = np.asarray(decode(data, "file")).astype(int), np.asarray(truth.convert("RGB")).astype(int)
    assert got.shape == want.shape
    return abs(got - want).max()


def sentence(data, name="file"):
    "The sentence that a file gets."
    with pytest.raises(InputError) as e:
        decode(data, name)
    text = str(e.value)
    assert text.startswith(f"{name} ") and len(text.splitlines()) == 1 and text.endswith(".") and len(text) < 300
    return text


# ---------------------------------------------------------------- formats

FORMATS = {
    "jpeg": lambda: saved(noise(24, 16), "JPEG"),
    "jpeg exif": lambda: saved(noise(24, 16), "JPEG", exif=exif(BROKEN["rational"])),
    "jpeg progressive": lambda: saved(noise(24, 16), "JPEG", progressive=True),
    "jpeg restarts": lambda: saved(noise(48, 32), "JPEG", restart_marker_blocks=1),
    "jpeg cmyk": lambda: saved(noise(24, 16).convert("CMYK"), "JPEG"),
    "mpo": lambda: saved(noise(24, 16), "MPO", save_all=True, append_images=[noise(24, 16)]),
    "png": lambda: saved(noise(24, 16), "PNG"),
    "png profile": lambda: saved(noise(24, 16), "PNG", icc_profile=profile(P3, 2.2)),
    "png palette": lambda: saved(noise(24, 16).quantize(16), "PNG", transparency=3),
    "png 16": lambda: saved(Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24)), "PNG"),
    "webp": lambda: saved(noise(24, 16), "WEBP"),
    "webp lossless": lambda: saved(noise(24, 16).convert("RGBA"), "WEBP", lossless=True),
    "gif": lambda: saved(noise(24, 16), "GIF"),
    "bmp": lambda: saved(noise(24, 16), "BMP"),
    "tiff": lambda: saved(noise(24, 16), "TIFF"),
    "tiff lzw": lambda: saved(noise(24, 16), "TIFF", compression="tiff_lzw"),
    "tiff jpeg": lambda: saved(noise(24, 16), "TIFF", compression="jpeg"),
    "tiff grey": lambda: tiff(np.arange(384).reshape(16, 24), "<i2"),
    "tiff float": lambda: tiff(np.arange(384).reshape(16, 24) / 384, ">f4"),
    "ppm": lambda: saved(noise(24, 16), "PPM"),
    "pgm text": lambda: b"P2\n4 3\n255\n" + b" ".join(b"%d" % (20 * i) for i in range(12)),
    "jpeg 2000": lambda: saved(noise(24, 16), "JPEG2000"),
    "avif": lambda: saved(noise(24, 16), "AVIF"),
    "heic": lambda: saved(noise(24, 16), "HEIF"),
}


def sample(name):
    "A small file of a format, or a skipped test where this machine has no such format."
    if name == "avif" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    if name == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    return FORMATS[name]()


def mutated(data, rng):
    "The same bytes with something wrong: changed, lost, doubled, cut, overwritten."
    a = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(min(len(a), rng.choice((40, 200, 10**9)))) if a else 0
        size = rng.choice((1, 1, 2, 4, 30))
        match rng.randrange(6):
            case 0:
                a[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                a[at : at + size] = b""
            case 2:
                a[at:at] = a[at : at + size]
            case 3:
                a[at : at + size] = bytes([rng.choice((0, 255, 127))]) * size
            case 4:
                a[at : at + size] = rng.randbytes(size)
            case 5:
                del a[rng.randrange(len(a) + 1) :]
    return bytes(a)


@pytest.mark.filterwarnings("error")  # Pillow's warnings are no business of a person with photos
@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files(name, monkeypatch):
    data = sample(name)
    monkeypatch.setattr(module, "MAX_PIXELS", 10**6)  # a header that promises more only costs time here
    assert decode(data, "file").mode == "RGB"
    rng = random.Random(name)
    for _ in range(300):
        bad = mutated(data, rng)
        try:
            im = decode(bad, "file")
        except InputError as e:
            assert str(e).startswith("file ") and len(str(e).splitlines()) == 1, e
        else:
            assert im.mode == "RGB" and im.width and im.height


def test_whatever_a_decoder_raises(monkeypatch):
    for error in (
        struct.error("x"),
        RuntimeError("two\nlines"),
        NotImplementedError(),
        RecursionError(),
        Exception(""),
    ):
        monkeypatch.setattr(module, "_decode", lambda data, error=error: (_ for _ in ()).throw(error))
        assert "damaged or of a rare kind (" in sentence(b"x")
    monkeypatch.setattr(module, "_decode", lambda data: (_ for _ in ()).throw(MemoryError))
    assert "memory" in sentence(b"x")


def test_no_outside_program_is_started(monkeypatch):
    def started(*args, **kw):
        raise AssertionError(f"a program was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr("os.system", started)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    others = [saved(picture().convert("RGBA"), f) for f in ("DDS", "ICO", "TGA") if f in Image.SAVE]
    for data in (eps, *others, b"<!DOCTYPE html><html></html>", b"%PDF-1.4", b"\xff\x0a" + bytes(300)):
        assert "is not an image that can be read" in sentence(data)
    assert "git lfs pull" in sentence(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def test_heic(monkeypatch):
    start = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    monkeypatch.setattr(module, "has_heif", lambda: False)
    assert HEIF_REMEDY in sentence(start + bytes(99)) and "HEIC" in sentence(start + bytes(99))
    monkeypatch.undo()
    assert (".heic" in module.IMAGE_SUFFIXES) == has_heif()
    if has_heif():
        assert "damaged" in sentence(start + bytes(99))
        got = np.asarray(decode(saved_heic(picture()), "f")).astype(int)
        assert abs(got - np.asarray(picture())).mean() < 6


def saved_heic(im):
    pytest.importorskip("pillow_heif").register_heif_opener()
    return saved(im, "HEIF", quality=95)


def test_avif(monkeypatch):
    data = saved(picture(), "AVIF", quality=95) if features.check("avif") else b"\0\0\0\x18ftypavif\0\0\0\0mif1avif"
    if features.check("avif"):
        assert decode(data, "file").size == (90, 60) and "damaged" in sentence(data[: len(data) // 2])
    monkeypatch.setattr(module.features, "check", lambda name: False)
    assert "upgrade pillow" in sentence(data)


# ---------------------------------------------------------------- EXIF

H, L, S = (lambda *v, f=f: struct.pack(f"<{len(v)}{f}", *v) for f in "HLl")
SIX = (0x112, 3, 1, H(6))  # turn by 90 degrees
BROKEN = {
    "rational": [SIX, (0x11A, 10, 1, S(-1, 0))],
    "rational -72/1": [SIX, (0x11A, 10, 1, S(-72, 1)), (0x11B, 10, 1, S(-1, 0))],
    "no number": [SIX, (0x11A, 12, 1, struct.pack("<d", float("nan")))],
    "infinite": [SIX, (0x11A, 12, 1, struct.pack("<d", float("inf")))],
    "counts": [SIX, (0x128, 3, 3, H(2, 2, 2)), (0x131, 2, 0, b"")],
    "unknown types": [SIX, (0x9999, 13, 1, L(8)), (0xC4A5, 99, 7, L(8))],
    "no text": [SIX, (0x10F, 2, 6, b"\xff\xfe\xe9\xfcx\0"), (0x132, 2, 4, bytes(4))],
    "loops": [SIX, (0x8769, 4, 1, L(8)), (0x8825, 4, 1, L(8))],
    "as long": [(0x112, 4, 1, L(6))],
    "twice": [(0x112, 3, 2, H(6, 6))],
}


def exif(entries, prefix=b"Exif\0\0"):
    "EXIF by hand, for what no library writes."
    body, tail, at = b"", b"", 14 + 12 * len(entries)
    for tag, kind, count, raw in sorted(entries):
        value = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack("<L", at + len(tail))
        tail += raw if len(raw) > 4 else b""
        body += struct.pack("<HHL", tag, kind, count) + value
    return prefix + b"II" + struct.pack("<HLH", 42, 8, len(entries)) + body + bytes(4) + tail


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BROKEN)
def test_odd_exif_is_no_fault(name):
    lying = picture().transpose(Image.Transpose.ROTATE_90)
    for prefix in (b"Exif\0\0", b"Exif\0\0Exif\0\0"):
        data = saved(lying, "JPEG", quality=95, subsampling=0, exif=exif(BROKEN[name], prefix))
        assert off(data, picture()) < 90 and np.asarray(decode(data, "f"))[2, 2].tolist()[0] > 200


def test_exif_that_is_cut_or_no_rotation():
    lying = picture().transpose(Image.Transpose.ROTATE_90)
    for raw in (exif([SIX])[:12], exif([(0x112, 2, 2, b"6\0")]), exif([(0x112, 3, 1, H(99))]), b"Exif\0\0nonsense"):
        assert decode(saved(lying, "JPEG", exif=raw), "f").size == lying.size
    for turn in range(1, 9):
        data = saved(picture(), "JPEG", exif=exif([(0x112, 3, 1, H(turn))]))
        assert decode(data, "f").size == ((90, 60) if turn < 5 else (60, 90))


# ---------------------------------------------------------------- tones and colours


def grey():
    im = picture().convert("L")
    im.paste(0, (40, 20, 50, 30))
    return im


@pytest.mark.parametrize(
    "kind,photometric,change",
    [
        ("<u2", 1, lambda g: g * 257),
        (">u2", 1, lambda g: g * 257),
        ("<u2", 0, lambda g: 65535 - g * 257),
        (">u2", 0, lambda g: 65535 - g * 257),
        ("<u1", 0, lambda g: 255 - g),
        ("<i2", 1, lambda g: g * 257 - 32768),
        ("<i2", 1, lambda g: g * 32767 // 255),
        ("<u4", 1, lambda g: g * 16843009),
        ("<u4", 1, lambda g: g),
        ("<u2", 1, lambda g: g * 4095 // 255),
        ("<u2", 1, lambda g: g * 1023 // 255),
        ("<f4", 1, lambda g: g / 255),
        ("<f4", 1, lambda g: g),
        ("<f4", 1, lambda g: g * 257),
        ("<f4", 1, lambda g: 20 + g / 255 * 20),
        ("<f4", 1, lambda g: g / 255 - 0.5),
    ],
)
def test_deep_greys(kind, photometric, change):
    g = np.asarray(grey()).astype(np.int64)
    assert off(tiff(change(g), kind, photometric), grey()) <= 2


def test_ranges():
    assert grey_range(0, 9000, Samples(16)) == (0, 65535), "a dark photo stays dark"
    assert grey_range(0, 200, Samples(16)) == (0, 255) and grey_range(0, 0, Samples(16)) == (0, 255)
    assert grey_range(-1000, 2000, Samples(16, "int")) == (-1000, 2000), "X-rays"
    assert grey_range(0.5, 0.5, Samples(32, "float")) == (0, 1), "one level is no range"
    assert grey_range(0, 1e9, Samples(32, "float")) == (0, 1e9)


def test_nearly_black_and_not_finite():
    rows = b"".join(b"\0" + np.full((24, 3), 4095, ">u2").tobytes() for _ in range(16))
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", 24, 16, 16, 2, 0, 0, 0))
    png = lambda data: b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    assert "a sixteenth of its 16 bits" in sentence(png(rows))
    assert decode(png(b"".join(b"\0" + bytes(144) for _ in range(16))), "black").getextrema() == ((0, 0),) * 3
    assert "not finite" in sentence(tiff(np.full((4, 4), np.nan), "<f4"))
    assert "of a rare kind" in sentence(tiff(np.ones((4, 4)), "<f8"))


def test_transparent_level_of_16_bits():
    g = np.asarray(grey()).astype(int)
    data = saved(Image.fromarray((g * 257).astype(np.uint16)), "PNG")
    data = data[:33] + chunk(b"tRNS", struct.pack(">H", 0)) + data[33:]
    assert off(data, Image.fromarray(np.where(g == 0, 255, g).astype(np.uint8))) == 0


P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
PROPHOTO = ((0.79767, 0.28804, 0), (0.13519, 0.71188, 0), (0.03134, 0.00008, 0.8249))
SWAPPED = ((0.14307, 0.06061, 0.71410), (0.38515, 0.71687, 0.09708), (0.43607, 0.22249, 0.01392))  # red and blue


def profile(primaries, gamma, name=b"x"):
    "A colour profile of three primaries (X, Y, Z each) and one curve."
    fixed = lambda *v: b"".join(struct.pack(">l", round(x * 65536)) for x in v)
    curve = b"curv\0\0\0\0" + struct.pack(">LH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">L", len(name) + 1) + name + bytes(79)
    tags = {b"desc": text, b"wtpt": (0.9642, 1, 0.8249), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    tags |= dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries))
    table, body, at = struct.pack(">L", len(tags)), b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        value = value if isinstance(value, bytes) else b"XYZ \0\0\0\0" + fixed(*value)
        value += bytes(-len(value) % 4)
        table, body, at = table + tag + struct.pack(">LL", at, len(value)), body + value, at + len(value)
    head = struct.pack(">L4sL4s4s4s", at, bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


def dull():
    "Colours that lie within sRGB and well within the others."
    return Image.fromarray((np.asarray(picture()) * 0.5 + 64).astype(np.uint8))


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("primaries,gamma", [(P3, 2.2), (ADOBE, 563 / 256), (PROPHOTO, 1.8), (SWAPPED, 2.2)])
def test_profiles_are_followed(primaries, gamma, fmt):
    icc = profile(primaries, gamma, b"sRGB")  # the name does not matter
    stored = ImageCms.profileToProfile(
        dull(), ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(icc)), outputMode="RGB"
    )
    stored.info.clear()
    options = dict(lossless=True) if fmt == "WEBP" else {}
    assert off(saved(stored, fmt), dull()) > 8 and off(saved(stored, fmt, icc_profile=icc, **options), dull()) <= 4
    stored.putalpha(Image.new("L", stored.size, 255))
    assert off(saved(stored, fmt, icc_profile=icc, **options), dull()) <= 4


def test_srgb_stays_bit_for_bit():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (srgb, b"nonsense", profile(P3, 2.2)[:200], b""):
        assert off(saved(picture(), "PNG", icc_profile=icc), picture()) == 0
        assert to_srgb(icc, "RGB") is None and to_srgb(icc, "RGBA") is None
    assert off(saved(grey(), "PNG", icc_profile=profile(P3, 2.2)), grey()) == 0, (
        "a profile of colours on a grey picture"
    )


def test_lab_and_palette():
    lab = ImageCms.profileToProfile(
        dull(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert off(saved(lab, "TIFF"), dull()) <= 10
    few = dull().quantize(64)
    assert off(saved(few, "PNG"), few.convert("RGB")) == 0
    few.info["icc_profile"] = profile(PROPHOTO, 1.8)
    assert abs(np.asarray(to_rgb(few)).astype(int) - np.asarray(few.convert("RGB"))).max() > 8


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("options", [{}, dict(subsampling=0, optimize=True), dict(quality=100), dict(quality=5)])
def test_half_jpegs_are_named(options):
    data = saved(noise(), "JPEG", **options)
    n, rng = len(data), np.random.default_rng(0)
    garbled = rng.integers(0, 255, n // 3, dtype=np.uint8).tobytes()  # without 255: no marker comes about
    for bad in (
        data[: n // 2],
        data[: n // 2] + b"\xff\xd9",
        data[: n // 2] + bytes(n - n // 2),
        data[: n // 2] + data[n // 2 + n // 8 :],
        data[: n // 2] + garbled + data[n // 2 + len(garbled) // 2 :],
    ):
        assert "is damaged" in sentence(bad)


def test_progressive_and_restarts():
    slow, marked = saved(noise(), "JPEG", progressive=True), saved(noise(), "JPEG", restart_marker_blocks=2)
    assert "passes" in sentence(slow[: len(slow) // 3] + b"\xff\xd9")
    assert "restart markers" in sentence(marked[: len(marked) // 2] + b"\xff\xd9")
    assert len(read_layout(slow).scans) > 3 and read_layout(marked).scans[0].restarts > 3


def test_whole_jpegs_are_read():
    rng = random.Random(0)
    for i in range(150):
        im = (noise, picture)[i % 2](rng.randint(1, 120), rng.randint(1, 120)).convert(("RGB", "L", "CMYK")[i % 3])
        options = dict(quality=rng.randint(10, 95), optimize=i % 4 == 0, progressive=i % 5 == 0)
        options |= dict(restart_marker_blocks=rng.randint(1, 9)) if i % 7 == 0 else {}
        options |= dict(subsampling=rng.randrange(3)) if im.mode != "L" else {}
        data = saved(im, "JPEG", **options)
        want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        for kind in (data, data[:-2], data + bytes(5000)):
            if kind == data[:-2] and options["progressive"]:
                continue  # Pillow wants the end marker of these
            assert np.array_equal(np.asarray(decode(kind, f"{i} {options}")), want), (i, options)


def test_one_colour_is_no_damage():
    for size in ((1, 1), (8, 8), (700, 500)):
        data = saved(Image.new("RGB", size, "white"), "JPEG", optimize=True)
        file = JpegFile(data)
        Image.open(file).load()
        file.check()
        assert decode(data, "white").size == size


# ---------------------------------------------------------------- sizes


def test_png_with_much_text():
    data = saved(picture(), "PNG")
    longer = b"x" * 1_500_000
    pieces = (
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(longer)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(longer)),
        chunk(b"tEXt", b"parameters\0" + longer),
        chunk(b"iCCP", b"scanner\0\0" + zlib.compress(profile(P3, 2.2) + longer)),
        b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(longer[: 10**6])) for i in range(70)),
        chunk(b"zTXt", b"broken\0\0nonsense"),
    )
    for piece in pieces:
        assert off(data[:33] + piece + data[33:], picture()) == 0


def test_rotation_in_the_texts_of_a_png():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    data = saved(picture(), "PNG")
    for piece in (b"\0\0\0\0\0" + xmp, b"\0\1\0\0\0" + zlib.compress(xmp)):
        turned = decode(data[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp" + piece) + data[33:], "f")
        assert turned.size == (60, 90)


def promising(width, height):
    "A PNG of a few bytes."
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def test_one_limit_stated_truly():
    assert decode(saved(Image.new("1", (9500, 10_000)), "PNG"), "95 million").size == (2375, 2500)
    assert "12,000 x 9,000 pixels" in sentence(promising(12_000, 9000))
    for size in ((10_000, 10_001), (60_000, 60_000)):
        assert f"{MAX_PIXELS:,} pixels" in sentence(promising(*size))


def test_long_sides_are_bounded():
    im = decode(saved(Image.new("1", (2**24 + 1, 1)), "PNG"), "thread")
    assert im.height == 1 and im.width <= LONG
    assert decode(saved(Image.new("L", (LONG, 3)), "PNG"), "f").size == (LONG, 3)


def test_large_photos_come_smaller(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 2**12)
    monkeypatch.setattr(module, "_STRIP", 1000)
    im = picture(300, 200)
    want = np.asarray(im.reduce(4)).astype(int)
    for fmt, options in (("PNG", {}), ("JPEG", dict(quality=98)), ("JPEG2000", {}), ("TIFF", {})):
        got = np.asarray(decode(saved(im, fmt, **options), fmt)).astype(int)
        assert got.shape == want.shape == (50, 75, 3) and abs(got - want).mean() < 6, fmt
    clear = im.copy()
    clear.putalpha(Image.new("L", im.size, 0))
    assert decode(saved(clear, "PNG"), "clear").getextrema() == ((255, 255),) * 3
    deep = Image.fromarray((np.asarray(im.convert("L")).astype(np.uint16)) * 16)
    assert decode(saved(deep, "PNG"), "12 bits").getextrema()[0][1] > 240, "one range for all strips"
    assert "is damaged" in sentence(saved(noise(300, 200), "JPEG")[:20_000] + b"\xff\xd9")
    assert module.LARGE < LARGE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded(tmp_path):
    code = (
        "import sys; from tiny_nbdev.data.decode import read_rgb\n"
        "top = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024\n"
        "before = top(); read_rgb(sys.argv[1]); print(top() - before)"
    )
    for name, mode, most in (("large.jpg", "RGB", 150), ("large.png", "L", 250)):  # MiB; floats would take 1,000
        Image.new(mode, (10_000, 8900), 90).save(tmp_path / name, compress_level=1)
        done = subprocess.run([sys.executable, "-c", code, tmp_path / name], capture_output=True, text=True)
        assert int(done.stdout) < most, (name, done.stdout)


# ---------------------------------------------------------------- files


def test_files_that_are_none(tmp_path, monkeypatch):
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "absent.jpg", "does not exist")):
        with pytest.raises(InputError, match=words):
            read_bytes(path)
    picture().save(tmp_path / "a.png")
    assert np.array_equal(read_rgb(tmp_path / "a.png"), np.asarray(picture()))
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="GiB"):
        read_bytes(Path(tmp_path / "a.png"))
