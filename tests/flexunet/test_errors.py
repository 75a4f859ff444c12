"""Messages are the same each time."""

import io
import pickle

import pytest

from flexunet.errors import ContentError, FlexUNetError, UsageError


@pytest.mark.parametrize("kind", [FlexUNetError, UsageError, ContentError])
def test_error_quotes_no_address_of_an_object(kind: type[FlexUNetError]) -> None:
    error = kind(f"a.tif: cannot identify image file {io.BytesIO()!r}; replace the file")
    assert str(error) == "a.tif: cannot identify image file <_io.BytesIO>; replace the file"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301
    nested = f"<Pool of <Connection object at 0x7f00aB> at 0x7f00>, {len}"
    assert str(kind(nested)) == f"<Pool of <Connection>>, {len}"


def test_error_keeps_numbers_and_files_that_look_like_addresses() -> None:
    assert str(ContentError("mask 0x10a, 640x480, at 0xy.png")) == "mask 0x10a, 640x480, at 0xy.png"
    assert str(ContentError("a at 0x7f.png: cut off")) == "a at 0x7f.png: cut off"
