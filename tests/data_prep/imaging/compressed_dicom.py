"""DICOM files that other programs compressed, and the same with a change; tests read them.

pydicom writes RLE, CharLS (pyjpegls) JPEG-LS, OpenJPEG JPEG 2000, GDCM lossless JPEG and Pillow
baseline JPEG: none of them is what reads the files, but for the libraries within.
"""

import io
import struct

import imagecodecs
import numpy as np
import pydicom
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate, generate_frames

from data_prep.imaging.dicom.reader import read_dicom
from data_prep.phantoms.inbreast_release import dicom_bytes

HEIGHT, WIDTH = 40, 50
LOSSLESS = [
    *(uid.RLELossless, uid.JPEGLossless, uid.JPEGLosslessSV1),
    *(uid.JPEGLSLossless, uid.JPEG2000Lossless),
]
# By how much of the full scale a value may be off.
LOSSY = {
    uid.JPEGBaseline8Bit: 0.03,
    uid.JPEGExtended12Bit: 0.03,
    uid.JPEGLSNearLossless: 3 / 255,
    uid.JPEG2000: 0.03,
}
BITS = {uid.JPEGBaseline8Bit: (8,), uid.JPEGExtended12Bit: (8, 12)}
TABLE = [
    (syntax, bits)
    for syntax in (*LOSSLESS, *LOSSY)
    for bits in BITS.get(syntax, (8, 10, 12, 14, 16))
]
DECODED = [syntax for syntax in (*LOSSLESS, *LOSSY) if syntax != uid.RLELossless]


def pixels_of(bits):
    """Returns (H, W) uint16: a slope with noise, 0 and the largest value."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    top = 2**bits - 1
    noise = np.random.default_rng(bits).integers(0, top // 20 + 1, y.shape)
    pixels = (0.9 * top * (y + x) / (HEIGHT + WIDTH) + noise).astype(np.uint16)
    pixels[0, 0], pixels[-1, -1] = 0, top
    return pixels


def dataset_of(pixels, bits, photometric="MONOCHROME2"):
    data = dicom_bytes(pixels, bits, spacing_mm=0.07, key="x", photometric=photometric)
    dataset = pydicom.dcmread(io.BytesIO(data))
    if bits == 8:
        dataset.BitsAllocated = 8
        dataset.PixelData = pixels.astype(np.uint8).tobytes()
        dataset["PixelData"].VR = "OB"
    return dataset


def saved(dataset):
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _jpeg(pixels, bits):
    if bits != 8:
        return imagecodecs.jpeg8_encode(pixels, level=98, bitspersample=bits)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=98)
    # Extended differs from baseline in the marker: it may have more tables.
    return buffer.getvalue()


def by_gdcm(dataset, syntax, folder):
    import gdcm

    plain, packed = str(folder / "plain.dcm"), str(folder / "packed.dcm")
    dataset.save_as(plain, enforce_file_format=True)
    reader, change, writer = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
    )
    reader.SetFileName(plain)
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(packed)
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return pydicom.dcmread(packed)


def compressed(syntax, bits, folder, photometric="MONOCHROME2"):
    """Returns the file of `pixels_of(bits)` as another program compresses it."""
    pixels = pixels_of(bits)
    dataset = dataset_of(pixels, bits, photometric)
    if syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        dataset = by_gdcm(dataset, syntax, folder)
    elif syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        dataset.PixelData = encapsulate([_jpeg(pixels, bits)])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    else:
        options = {
            uid.JPEGLSNearLossless: {"jls_error": min(255, 3 * 2 ** max(0, bits - 8))},
            uid.JPEG2000: {"j2k_psnr": [50]},
        }
        dataset.compress(syntax, **options.get(syntax, {}))
    assert dataset.file_meta.TransferSyntaxUID == syntax
    return saved(dataset)


def changed(data, change):
    dataset = pydicom.dcmread(io.BytesIO(data))
    change(dataset)
    return saved(dataset)


def frame_of(data):
    return next(generate_frames(pydicom.dcmread(io.BytesIO(data)).PixelData, number_of_frames=1))


def with_frame(data, frame):
    """Returns the file with another codestream: one, or a list of fragments."""
    fragments = frame if isinstance(frame, list) else [frame]

    def change(dataset):
        items = b"".join(
            struct.pack("<4sI", b"\xfe\xff\x00\xe0", len(each)) + each for each in fragments
        )
        dataset.PixelData = struct.pack("<4sI", b"\xfe\xff\x00\xe0", 0) + items
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True

    return changed(data, change)


def read(data, max_pixels=10**4):
    return read_dicom(data, name="a.dcm", max_pixels=max_pixels)
