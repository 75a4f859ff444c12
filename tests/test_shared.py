"""A folder that several test processes share is made again after a failure."""

from pathlib import Path

import pytest

from tests.shared import made_once


def test_what_failed_is_made_anew(tmp_path_factory: pytest.TempPathFactory) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        made_once(tmp_path_factory, "made-anew", fail)
    folder = made_once(tmp_path_factory, "made-anew", lambda folder: (folder / "whole").touch())
    assert [each.name for each in folder.iterdir()] == ["whole"]
    assert made_once(tmp_path_factory, "made-anew", fail) == folder
