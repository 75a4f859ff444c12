"""Object names: unsafe ones are refused, and none leaves its folder."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexunet.errors import ContentError
from flexunet.storage import (
    LocalStore,
    checked_name,
    local_path,
)
from flexunet.storage.names import _character_problem


@pytest.mark.parametrize(
    "name",
    [
        "", "/a", "a/", "a//b", "..", "a/../b", "a/..", ".", "./a", "a\\b", "C:a", "a\0b", "a\nb",
        "a\x7f", "e\u0301", "a\u202eb", "a\u200bb", "a\u2066b", "\ufeffa",
        "a\u2028b", "\udc80", "x" * 256, "/".join(["x" * 200] * 6),
        ".flexunet-tmp-1",
    ],
)  # fmt: skip
def test_unsafe_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ContentError, match="is not allowed") as caught:
        LocalStore(str(tmp_path)).put(name, b"")
    assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "a/b.c", "..a", "a..", ".a", "a b", "é", "x" * 255, "ab:c"])
def test_safe_name_is_kept(name: str) -> None:
    assert checked_name(name) == name


def test_a_character_of_ascii_is_safe_if_it_is_printable() -> None:
    for character in map(chr, range(128)):
        assert (_character_problem(character) is None) == character.isprintable()


PARTS = st.sampled_from(["..", ".", "", "a", "é", "\\", "\0", "C:", "~", "...", " ", "/"])


@given(st.lists(PARTS | st.text("./\\a\u0301é~:\n", max_size=5), max_size=6).map("/".join))
def test_no_name_leaves_the_folder(name: str) -> None:
    root = "/nonexistent/root"
    try:
        path = local_path(root, name)
    except ContentError:
        return
    assert os.path.normpath(path) == path
    assert path.startswith(root + "/")
