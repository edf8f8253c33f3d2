"""Audio files as bytes: the borders of joined files, and headers that state a wrong length.

Streams are written before their length is known, recorders stop half-way, and `cat a.mp3 b.mp3` is a common way to join
recordings. In all of these cases, libsndfile reads no more samples than the header states. So every length that could be too
small is replaced by "unknown" before libsndfile sees it, and joined files are read part by part.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_UNKNOWN = b"\xff\xff\xff\xff"
_UNKNOWN_FROM = 0x7FFF0000
"""Sizes from here on, about 2 GB, mean "unknown": programs that write streams state 2 GiB or 4 GiB, or a little less."""
_ID3 = re.compile(rb"ID3..[\x00-\xff]([\x00-\x7f]{4})", re.DOTALL)
_BEGINNINGS = [
    re.compile(pattern, re.DOTALL) for pattern in (rb"RIFF.{4}WAVE", rb"FORM.{4}AIF[FC]", rb"fLaC[\x00\x80]\x00\x00\x22")
]
"""Separate patterns: a search for fixed first letters is ten times as fast as one for alternatives."""
_NIST = re.compile(rb"NIST_1A\n.{0,1000}?\nsample_count -i (\d+)\n", re.DOTALL)
"""The header of a SPHERE file, up to its number of samples of a channel."""
_OGG_PAGE = re.compile(rb"OggS\x00(.).{20}(.)", re.DOTALL)
_OGG_BEGINS, _OGG_ENDS = 2, 4
"""The flags of a page that begins and of one that ends a stream."""
_MP3_SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")
"""The first two bytes of a layer III frame: MPEG 2.5, 2 or 1, with or without a checksum."""
_MP3_KBITS = (
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
"""Bit rates of layer III in kbit/s by index: MPEG 2 and 2.5, then MPEG 1 (ISO/IEC 11172-3 and 13818-3)."""
_MP3_COUNT = re.compile(rb"Xing|Info|VBRI")
_MP3_COUNT_WITHIN = 4096
"""Bytes from the first frame within which a file has its count of frames, if it has one."""
_MP3_COUNT_BYTES = 156


@dataclass(frozen=True, slots=True)
class Stated:
    """The length of a file by its own account."""

    samples: int = 0
    """Number of samples of a channel; 0: not stated."""
    share: float = 1.0
    """Part of the stated bytes of sound that the file has."""
    cut: bool = False
    """Whether the file ends inside a page."""
    ended: bool = True
    """Whether the last page says that it is the last, in a container of pages."""


def split_joined(data: memoryview) -> list[memoryview]:
    """Return the files that `data` joins, most often one. Chained Ogg streams are separate files.

    MP3 files of one rate and number of channels stay together: decoders read all of them.
    """
    if bytes(data[:4]) == b"OggS":
        starts = list(_ogg_chains(data))
    else:
        kind = next((pattern for pattern in _BEGINNINGS if pattern.match(data, after_id3(data))), None)
        starts = [match.start() for match in kind.finditer(data)] if kind else list(_mp3_streams(data))
    return [data[start:end] for start, end in zip([0, *starts[1:]], [*starts[1:], len(data)], strict=True)]


def forget_length(data: memoryview) -> memoryview:
    """Change the header of one wav, FLAC or AU file in place, so that it is read to its end. Return the part to read."""
    start = after_id3(data)
    if bytes(data[:4]) == b"RIFF" and bytes(data[8:12]) == b"WAVE":
        _forget_wav_length(data)
    elif bytes(data[start : start + 4]) == b"fLaC":
        # STREAMINFO ends its first 18 bytes with 36 bits for the number of samples; 0 is "unknown" (RFC 9639).
        if len(data) < start + 26:
            return data
        data[start + 21] &= 0xF0
        data[start + 22 : start + 26] = bytes(4)
        if bytes(data[-128:-125]) == b"TAG":  # ID3v1, which the decoder mistakes for a damaged frame
            return data[:-128]
    elif bytes(data[:4]) in (b".snd", b"dns.") and len(data) >= 12:
        data[8:12] = _UNKNOWN
    return data


def stated_length(data: memoryview) -> Stated:
    """Return the length of one file by its own account, before `forget_length` changes it."""
    if bytes(data[:4]) == b"OggS":
        return _ogg_end(data)
    place = _stated_bytes(data)
    if place and 0 < place[1] < _UNKNOWN_FROM:
        return Stated(share=min(1.0, (len(data) - place[0]) / place[1]))
    if match := _NIST.match(data):
        return Stated(samples=int(match.group(1)))
    start = after_id3(data)
    if bytes(data[start : start + 4]) == b"fLaC":
        return Stated(samples=int.from_bytes(data[start + 21 : start + 26], "big") & (1 << 36) - 1)
    return Stated()


def after_id3(data: memoryview, start: int = 0) -> int:
    """Return the offset after the ID3v2 tags at `start`; `start` if there are none."""
    end = start
    while match := _ID3.match(data, end):
        size = 0
        for byte in match.group(1):
            size = size << 7 | byte
        end = match.end() + size
    return end


def take_mp3_count(data: memoryview) -> tuple[int, slice, bytes] | None:
    """Clear the count of frames in the header of an MP3 file; return None if there is no such header.

    Return the count (0 for a header without one), and the place and the bytes that were cleared. With these bytes restored,
    decoders also cut off the silence that the encoder added at both ends.
    """
    start = after_id3(data)
    match = _MP3_COUNT.search(data, start, start + _MP3_COUNT_WITHIN)
    if match is None:
        return None
    place = slice(match.end(), min(match.end() + _MP3_COUNT_BYTES, len(data)))
    kept = bytes(data[place])
    # Xing: flags, of which 1 means a count of frames, then the count. VBRI: version, delay and quality in 2 bytes each, a size in
    # 4, then the count.
    counted = match.group() == b"VBRI" or bool(kept[3:4] and kept[3] & 1)
    at = 10 if match.group() == b"VBRI" else 4
    data[place] = bytes(len(kept))
    return (int.from_bytes(kept[at : at + 4], "big") if counted else 0), place, kept


def _ogg_chains(data: memoryview) -> Iterator[int]:
    """Yield the offset of each page that begins a stream after one that does not: simultaneous streams begin together."""
    began, at = False, 0
    while match := _OGG_PAGE.search(data, at):
        begins = bool(match.group(1)[0] & _OGG_BEGINS)
        if begins and not began:
            yield match.start()
        began = begins
        at = _after_page(data, match)


def _mp3_streams(data: memoryview) -> Iterator[int]:
    """Yield the offsets at which MP3 frames change rate or number of channels: decoders stop there. None for other files."""
    at, kind = 0, None
    if _mp3_frame(data, after_id3(data)) is None:
        return
    while match := _MP3_SYNC.search(data, frames := after_id3(data, at)):
        begins = match.start()
        frame = _mp3_frame(data, begins)
        # Two bytes of sound or of a tag can look like a frame header; a second header in the right place is unlikely.
        if frame and (begins != frames or frame[0] != kind):
            after = _mp3_frame(data, begins + frame[1])
            frame = frame if after and after[0] == frame[0] else None
        if frame is None:
            at = begins + 1
            continue
        if frame[0] != kind:
            yield at if begins == frames else begins
            kind = frame[0]
        at = begins + frame[1]


def _mp3_frame(data: memoryview, at: int) -> tuple[tuple[int, bool], int] | None:
    """Return ((rate in Hz, whether it is mono), size in bytes) of the layer III frame at `at`; None if there is none."""
    header = bytes(data[at : at + 4])
    if len(header) < 4 or not _MP3_SYNC.match(header):
        return None
    version, bits, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if bits in (0, 15) or rate == 3:
        return None
    hz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    size = (144 if version == 3 else 72) * 1000 * _MP3_KBITS[version == 3][bits] // hz + (header[2] >> 1 & 1)
    return (hz, header[3] >> 6 == 3), size


def _forget_wav_length(data: memoryview) -> None:
    """Make the length of the data chunk unknown, unless other chunks follow it."""
    for name, at, size in _chunks(data, "<"):
        if name == b"data":
            rest = bytes(data[at + size + size % 2 :])
            if rest.strip(b"\0") and not re.match(rb"[ -~]{4}", rest):
                data[at - 4 : at] = _UNKNOWN
            return


def _stated_bytes(data: memoryview) -> tuple[int, int] | None:
    """Return the offset of the sound and its stated size in bytes, in wav, AIFF, 8SVX, RF64, W64 and AU; None for others."""
    kind = bytes(data[:4])
    if kind in (b".snd", b"dns.") and len(data) >= 12:
        offset, size = struct.unpack_from(">II" if kind == b".snd" else "<II", data, 4)
        return offset, size
    if kind == b"riff":  # W64: names of 16 bytes, sizes of 8 that include them both, chunks at multiples of 8
        at = 40
        while at + 24 <= len(data):
            size = int.from_bytes(data[at + 16 : at + 24], "little")
            if bytes(data[at : at + 4]) == b"data":
                return at + 24, size - 24
            at += max(24, size + -size % 8)
        return None
    long = 0
    for name, at, size in _chunks(data, ">" if kind == b"FORM" else "<") if kind in (b"RIFF", b"RF64", b"FORM") else ():
        if name == b"ds64":  # the sizes of RF64: of the file, then of the data chunk
            long = int.from_bytes(data[at + 8 : at + 16], "little")
        if name in (b"data", b"SSND", b"BODY"):
            return at, long if kind == b"RF64" else size
    return None


def _chunks(data: memoryview, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, offset of the content and stated size in bytes of each chunk. order: "<" (RIFF) or ">" (FORM)."""
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from(f"{order}4sI", data, at)
        yield name, at + 8, size
        at += 8 + size + size % 2


def _ogg_end(data: memoryview) -> Stated:
    flags, at = 0, 0
    while match := _OGG_PAGE.search(data, at):
        flags, at = match.group(1)[0], _after_page(data, match)
    cut = at > len(data) or bytes(data[at : at + 4]) == b"OggS"
    return Stated(cut=cut, ended=bool(flags & _OGG_ENDS))


def _after_page(data: memoryview, page: re.Match[bytes]) -> int:
    """Return the offset of the end of an Ogg page, which may be cut off."""
    segments = data[page.end() : page.end() + page.group(2)[0]]
    return page.end() + page.group(2)[0] + sum(segments)
