from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from msvae.shards.audit.walk import Member, walk

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def members(path: Path) -> list[Member]:
    with path.open("rb") as tar:
        return list(walk(lambda offset, length: os.pread(tar.fileno(), length, offset), path.stat().st_size))


def of_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


@pytest.mark.parametrize("form", FORMATS)
def test_members_equal_those_of_tarfile(tmp_path, write_tar, form):
    long_name = "feld/" * 15 + "blatt_" * (10 if form == "ustar" else 40)
    contents = [(f"{long_name}{i}.npy", bytes(size)) for i, size in enumerate((0, 1, 511, 512, 513, 70_000))]
    path = write_tar(tmp_path / "a.tar", [("kurz.json", b"{}"), ("übergröße.png", b"1"), *contents], FORMATS[form])
    assert members(path) == of_tarfile(path)
    assert len(members(path)) == 8


def test_a_folder_written_by_gnu_tar_is_read(tmp_path):
    folder = tmp_path / "tiles"
    folder.mkdir()
    for i in range(3):
        (folder / f"{'x' * 120}{i}.npy").write_bytes(bytes(1000 * i))
    for form in ("gnu", "posix", "ustar", "v7"):
        names = folder if form in ("gnu", "posix") else None
        if names is None:
            for path in folder.iterdir():
                path.rename(folder / path.name[-20:])
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", f"--format={form}", "-cf", path, "-C", tmp_path, "tiles"], check=True)
        assert members(path) == of_tarfile(path)
        assert len(members(path)) == 3


def test_sizes_beyond_octal_digits_are_read(tmp_path):
    path, size = tmp_path / "a.tar", 9 * 2**30
    header = tarfile.TarInfo("large.bin")
    header.size = size
    after = tarfile.TarInfo("after.npy")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with path.open("wb") as tar:
            first = header.tobuf(form)
            tar.write(first)
            tar.seek(len(first) + size)
            tar.write(after.tobuf(form) + bytes(1024))
        assert members(path) == [
            Member("large.bin", len(first), size),
            Member("after.npy", len(first) + size + 512, 0),
        ]


@pytest.mark.parametrize(
    ("kind", "message"),
    [(tarfile.SYMTYPE, "is a link"), (tarfile.LNKTYPE, "is a link"), (tarfile.FIFOTYPE, "is of tar type b'6'")],
)
def test_members_that_loaders_skip_are_refused(tmp_path, kind, message):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        header = tarfile.TarInfo("a.mask.png")
        header.type, header.linkname = kind, "b.mask.png"
        tar.addfile(header)
    with pytest.raises(ValueError, match=message):
        members(path)


def test_sparse_files_are_refused(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"x" * 4096)
    os.truncate(tmp_path / "a.npy", 10_000_000)
    for form in ("gnu", "posix"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", f"--format={form}", "--sparse", "-cf", path, "-C", tmp_path, "a.npy"], check=True)
        with pytest.raises(ValueError, match=r"without --sparse"):
            members(path)


@pytest.mark.parametrize("form", FORMATS)
def test_every_truncation_is_an_error(tmp_path, write_tar, form):
    """At every block, one byte around it, and in the end marks; `tarfile` reports no error for most of them."""
    path = write_tar(tmp_path / "a.tar", [("ä" * 60 + "/" + "b" * 60 + ".npy", bytes(700)), ("c.png", b"x" * 512)])
    content = path.read_bytes()
    last = of_tarfile(path)[-1]
    least = last.offset + last.size_bytes + 1024
    cut = tmp_path / "cut.tar"
    for block in range(0, least, 512):
        for size in {max(block - 1, 0), block, block + 1}:
            if size < least:
                cut.write_bytes(content[:size])
                with pytest.raises(ValueError, match=r"truncated.*restore"):
                    members(cut)
    cut.write_bytes(content[:least])
    assert members(cut) == of_tarfile(path)


def test_no_flipped_bit_in_a_header_passes(tmp_path, write_tar):
    path = write_tar(tmp_path / "a.tar", [("a.npy", bytes(700)), ("b.png", b"x")], tarfile.USTAR_FORMAT)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    sound, flipped = members(path), tmp_path / "flipped.tar"
    start = sound[1].offset - 512
    for byte in [*range(start, start + 160), *range(start + 256, start + 266), start + 511]:
        changed = content.copy()
        changed[byte] ^= 1
        flipped.write_bytes(changed.tobytes())
        with pytest.raises(ValueError, match=f"the header at byte {start:,}"):
            members(flipped)


def test_concatenated_tars_are_refused(tmp_path, write_tar):
    one = write_tar(tmp_path / "a.tar", [("a.npy", b"1")]).read_bytes()
    (tmp_path / "joined.tar").write_bytes(one + one)
    with pytest.raises(ValueError, match="continues after its end"):
        members(tmp_path / "joined.tar")


def test_absurd_sizes_in_headers_cost_no_memory_and_no_time(tmp_path):
    """Names and records of gigabytes, negative lengths and endless records."""

    def extended(kind: bytes, size: int, records: bytes = b"") -> io.BytesIO:
        header = tarfile.TarInfo("././@LongLink")
        header.type, header.size = kind, size
        return io.BytesIO(header.tobuf(tarfile.GNU_FORMAT) + records.ljust(512, b"\0") + bytes(1024))

    for kind, size, records in (
        (b"L", 2**40, b""),
        (b"x", 2**33, b""),
        (b"x", 20, b"0 path=a\n"),
        (b"x", 20, b"99999999999 path=a\n"),
        (b"x", 20, b"-4 path=a\n"),
        (b"x", 20, b"12 path=abcd"),
        (b"x", 20, b"13 size=-100\n"),
        (b"g", 20, b"12 path=abc\n"),
    ):
        tar = extended(kind, size, records)
        with pytest.raises(ValueError, match=r"header (at|before) byte"):
            list(walk(lambda offset, length, tar=tar: tar.getbuffer()[offset : offset + length].tobytes(), 2048))


def test_a_size_with_a_sign_is_refused(tmp_path, write_tar):
    path = write_tar(tmp_path / "a.tar", [("a.npy", bytes(1000))], tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes())
    content[124:136] = b"-0000001750\0"
    content[148:156] = b" " * 8
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="has the size"):
        members(path)
