"Folders, .zip and .tar read alike; what is broken or dishonest is refused."

import io
import os
import tarfile
import zipfile

import pytest
from test_benchmarks import pack, refuses

from tiny_nbdev.data.archives import MAX_BYTES, Archive


@pytest.fixture
def home(tmp_path):
    home = tmp_path
    (home / "some" / "a").mkdir(parents=True)
    (home / "some" / "a" / "x.txt").write_text("hello")
    (home / "some" / "a" / ".DS_Store").write_bytes(b"?")
    (home / "some" / "b.bin").write_bytes(bytes(9))
    os.symlink(home / "some", home / "some" / "a" / "circle")
    return tmp_path


def test_three_ways_to_pack(home):
    sources = [Archive(home / "some")] + [
        Archive(pack(home / "some", home / f"some{s}")) for s in (".zip", ".tar", ".tgz")
    ]
    with tarfile.open(home / "dot.tar", "w") as t:
        i = tarfile.TarInfo("./x/y.bin")
        i.size = 1
        t.addfile(i, io.BytesIO(b"x"))
    assert dict(Archive(home / "dot.tar").read(["x/y.bin"])) == {"x/y.bin": b"x"}, "as `tar -cf dot.tar .` names it"
    for s in sources:
        pre = "" if s.kind == "folder" else "some/"
        assert s.names == (f"{pre}a/x.txt", f"{pre}b.bin"), s.names
        assert s.text(f"{pre}a/x.txt") == "hello" and dict(s.read(s.names)) == {
            f"{pre}a/x.txt": b"hello",
            f"{pre}b.bin": bytes(9),
        }
    was = sources[0].stamp()
    (home / "some" / "b.bin").write_bytes(bytes(10))
    assert Archive(home / "some").stamp() != was


def test_what_is_refused(home):
    pack(home / "some", home / "some.tgz")
    with zipfile.ZipFile(home / "evil.zip", "w") as z:
        z.writestr("../../evil.jpg", b"x")
    with tarfile.open(home / "evil.tar", "w") as t:
        i = tarfile.TarInfo("/etc/evil.jpg")
        i.size = 1
        t.addfile(i, io.BytesIO(b"x"))
    with zipfile.ZipFile(home / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("train/n1/x.jpg", bytes(MAX_BYTES + 1))
    (home / "cut.tgz").write_bytes((home / "some.tgz").read_bytes()[:-40])
    (home / "no.zip").write_bytes(b"PK nonsense")
    refuses(lambda: Archive(home / "evil.zip"), "../../evil.jpg", "points outside")
    refuses(lambda: Archive(home / "evil.tar"), "/etc/evil.jpg", "points outside")
    refuses(lambda: Archive(home / "bomb.zip"), "train/n1/x.jpg", "64 MiB")
    for name in ("cut.tgz", "no.zip"):
        refuses(lambda: Archive(home / name), name, "download or copy it again")
    refuses(lambda: Archive(home / "nothing"), "does not exist")
    refuses(lambda: Archive(home / "some" / "b.bin"), "neither a folder nor")
