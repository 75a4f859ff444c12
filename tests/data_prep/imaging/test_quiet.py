"""Decoders in threads change nothing global for good, and quote nothing of a file."""

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image

from data_prep.imaging.codecs import read_image
from data_prep.imaging.dicom.reader import read_dicom
from data_prep.imaging.quiet import quiet_pillow, quiet_pydicom
from data_prep.phantoms.inbreast_release import dicom_bytes

VALUE = "DOE JANE"


def dicom_with_invalid_values() -> bytes:
    """Returns a DICOM file of which pydicom warns, quoting a value."""
    data = dicom_bytes(np.zeros((4, 5), np.uint16), bits=12, spacing_mm=0.1, key="a")
    dataset = pydicom.dcmread(io.BytesIO(data))
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.SpecificCharacterSet = VALUE  # pydicom warns that it is unknown
        dataset.save_as(file)
    return file.getvalue()


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(file, "PNG")
    return file.getvalue()


@contextmanager
def unchanged() -> Iterator[None]:
    """Fails if the block leaves a warning filter or a setting of pydicom changed."""

    def state() -> tuple[object, ...]:
        return (
            list(warnings.filters),
            warnings.showwarning,
            pydicom.config.settings.reading_validation_mode,
            logging.getLogger("pydicom").level,
        )

    before, filters = state(), warnings.filters
    yield
    assert state() == before
    assert warnings.filters is filters


def test_readers_in_threads_leave_nothing_changed_and_quote_nothing(
    caplog: pytest.LogCaptureFixture, recwarn: Any
) -> None:
    dicom, image = dicom_with_invalid_values(), png()

    def read(index: int) -> None:
        if index % 2:
            read_image(image, name="a.png")
        else:
            read_dicom(dicom, name="a.dcm", max_pixels=100)

    _ = pydicom.dcmread(io.BytesIO(dicom))
    assert VALUE in str(recwarn.pop().message)
    recwarn.clear()
    caplog.clear()
    with unchanged(), ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(400)))
    assert not caplog.records
    assert not recwarn.list
    _ = pydicom.dcmread(io.BytesIO(dicom))
    assert VALUE in caplog.text  # the user's own pydicom still checks


def test_a_reader_that_ends_in_a_block_of_catch_warnings_leaves_no_filter() -> None:
    entered, ended = threading.Event(), threading.Event()

    def decode() -> None:
        with quiet_pydicom(), quiet_pillow():
            entered.set()
            ended.wait(10)

    thread = threading.Thread(target=decode)
    with unchanged():
        thread.start()
        entered.wait(10)
        with warnings.catch_warnings():
            ended.set()
            thread.join()


def test_settings_that_the_program_sets_meanwhile_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, logger = pydicom.config.settings, logging.getLogger("pydicom")
    monkeypatch.setattr(settings, "reading_validation_mode", pydicom.config.WARN)
    monkeypatch.setattr(logger, "level", logger.level)
    with quiet_pydicom():
        settings.reading_validation_mode = pydicom.config.RAISE
        logger.setLevel(logging.INFO)
    assert settings.reading_validation_mode == pydicom.config.RAISE
    assert logger.level == logging.INFO
