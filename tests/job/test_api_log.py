"""What the log of the API shows, and that it is the program's own again afterwards."""

import logging
from collections.abc import Iterator

import pytest

from job.api.log import each_with_log, shown_log

NAMES = ("tensorflow", "flexunet", "data_prep", "job")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Checks that the levels and handlers are the program's own again."""
    before = [logging.getLogger(name).level for name in NAMES]
    yield
    assert [logging.getLogger(name).level for name in NAMES] == before
    assert [logging.getLogger(name).handlers for name in NAMES] == [[]] * 4


def test_a_nested_call_shows_each_line_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with shown_log(True):
        with shown_log(True):
            logging.getLogger("job").info("inside")
        logging.getLogger("job").info("outside")
    assert capsys.readouterr().err == "inside\noutside\n"


def test_calls_in_two_threads_end_in_any_order(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    first, second = shown_log(True), shown_log(True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    logging.getLogger("job").info("one is still at work")
    second.__exit__(None, None, None)
    assert capsys.readouterr().err == "one is still at work\n"


def test_each_item_is_made_inside_the_log() -> None:
    tensorflow = logging.getLogger("tensorflow")
    before = tensorflow.level
    levels = each_with_log((tensorflow.level for _ in range(2)), is_shown=False)
    assert next(levels) == logging.ERROR
    assert tensorflow.level == before
    assert list(levels) == [logging.ERROR]
