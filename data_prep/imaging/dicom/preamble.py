"""Recognizes DICOM files with or without a preamble, and names the format of other files.

A DICOM file starts with 128 free bytes, `DICM` and the file meta information (group 0002). Some
programs write less: the file meta information first, or only the data set (group 0008), as it is
sent over a network. Only little endian is recognized, and at most two elements are read.
"""

import struct

PREAMBLE_BYTES = 128
SIGNATURE_BYTES = PREAMBLE_BYTES + 4  # read by `is_dicom`
_MAGIC = b"DICM"
_META_GROUP, _FIRST_GROUP, _PIXEL_GROUP = 0x0002, 0x0008, 0x7FE0
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_IMPLICIT, _EXPLICIT = b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.1\0"  # padded to even lengths
_KINDS = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 codestream"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"\x1f\x8b", "packed with gzip; unpack it"),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"BZh", "packed with bzip2; unpack it"),
    (b"\xfd7zXZ", "packed with xz; unpack it"),
    (b"%PDF", "a PDF document"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file with git lfs pull"),
    (b"<", "an XML or HTML document"),
    (b"{", "a JSON document"),
)


def is_dicom(data: bytes) -> bool:
    """Returns whether `data` starts with the preamble of a DICOM file and `DICM`."""
    return data[PREAMBLE_BYTES:SIGNATURE_BYTES] == _MAGIC


def is_bare(data: bytes) -> bool:
    """Returns whether `data` is DICOM without a preamble: file meta information or a data set."""
    return not is_dicom(data) and _syntax_of(data) is not None


def has_meta(data: bytes) -> bool:
    """Returns whether bare `data` (see `is_bare`) starts with file meta information."""
    return data[:2] == struct.pack("<H", _META_GROUP)


def with_preamble(data: bytes) -> bytes:
    """Returns bare `data` (see `is_bare`) as a file with preamble and meta information.

    A data set without meta information does not state its transfer syntax; it is implicit or
    explicit little endian.
    """
    meta = b""
    if not has_meta(data):
        syntax = _syntax_of(data) or b""
        meta = struct.pack("<HH2sH", _META_GROUP, 0x0010, b"UI", len(syntax)) + syntax
    return bytes(PREAMBLE_BYTES) + _MAGIC + meta + data


def describe_other(data: bytes) -> str:
    """Returns the kind of `data` that is not DICOM, and a remedy."""
    if not data:
        return "it is empty; replace it"
    if not any(data[: 2**16]):
        return "it starts with zeros only; replace it"
    for signature, kind in _KINDS:
        if data.startswith(signature):
            return f"it is {kind}" + ("" if ";" in kind else "; replace it")
    return (
        f"neither DICM at byte {PREAMBLE_BYTES} nor an element of group 0002 or 0008 at its "
        "beginning; replace it"
    )


def _syntax_of(data: bytes) -> bytes | None:
    """Returns the transfer syntax of the first element, None if `data` is not DICOM.

    A second element with a higher tag must follow, so that other files are not taken for DICOM.
    """
    try:
        group, element = struct.unpack_from("<HH", data)
        if group not in (_META_GROUP, _FIRST_GROUP):
            return None
        syntax, end = _end_of_element(data)
        following = struct.unpack_from("<HH", data, end)
    except struct.error:  # too short
        return None
    if syntax == _IMPLICIT and group == _META_GROUP:  # meta information is always explicit
        return None
    is_higher = (group, element) < following and following[0] <= _PIXEL_GROUP
    return syntax if is_higher else None


def _end_of_element(data: bytes) -> tuple[bytes, int]:
    """Returns the transfer syntax of the first element, and its end."""
    kind = data[4:6]
    if kind in _LONG_VRS:
        return _EXPLICIT, 12 + int(struct.unpack_from("<I", data, 8)[0])
    if kind in _SHORT_VRS:
        return _EXPLICIT, 8 + int(struct.unpack_from("<H", data, 6)[0])
    return _IMPLICIT, 8 + int(struct.unpack_from("<I", data, 4)[0])
