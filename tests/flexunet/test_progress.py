import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest

from flexunet import progress
from flexunet.cli.interrupts import quiet_interrupts
from flexunet.progress import Progress, waiting


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def standing_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Returns the seconds of the clock; set the first to move it."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_one_line_at_the_end_of_short_work(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    standing_clock(monkeypatch)
    with Progress("read", 3) as bar:
        for _ in range(3):
            bar.advance(note="last")
    assert messages(caplog) == ["read: 3/3 images, last"]


def test_a_log_gets_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = standing_clock(monkeypatch)
    with Progress("read", 4, unit="files") as bar:
        bar.advance(2)
        now[0] += progress._LINE_EVERY_S + 1
        bar.advance()
        bar.advance()
        now[0] = 0.0  # so that no line says how fast it was
    first, last = messages(caplog)
    assert first.startswith("read: 3/4 files, ")
    assert last == "read: 4/4 files"


def test_work_that_goes_on_counts_what_was_done_before(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = standing_clock(monkeypatch)
    with Progress("read", 10, done=4) as bar:
        now[0] = 2.0
        bar.advance(3)
    assert messages(caplog) == ["read: 7/10 images, 1.5 images/s"]


def test_a_log_gets_the_end_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with Progress("read", 1) as bar:
        bar.note("a.png: 1/2 rows of windows")
        bar.advance()
    assert messages(caplog) == ["read: 0/1 images, a.png: 1/2 rows of windows", "read: 1/1 images"]


def test_a_log_says_how_fast_long_work_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress("read", 6) as bar:
        time.sleep(0.6)
        bar.advance(6)
    # 6 images in a bit over 0.6 s: at most 10 in a second.
    (line,) = messages(caplog)
    found = re.fullmatch(r"read: 6/6 images, (\d+\.\d) images/s", line)
    assert found is not None
    assert 0 < float(found[1]) <= 10


def test_tracked_counts_what_was_finished(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    standing_clock(monkeypatch)
    with Progress("read", 3) as bar:
        items = bar.tracked("abc")
        assert [next(items), next(items)] == ["a", "b"]
    # The second item was handed out, and nobody asked for a third.
    assert messages(caplog) == ["read: 1/3 images"]


def test_nothing_is_shown_unless_wanted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress("read", 1, shown=False) as bar:
        bar.line("text")
        bar.advance()
    assert messages(caplog) == []


def test_lines_go_between(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress("train", 1) as bar:
        bar.line("epoch 1 loss 0.5")
        bar.advance()
    assert messages(caplog) == ["epoch 1 loss 0.5", "train: 1/1 images"]


def test_work_that_fails_does_not_claim_an_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match="broken"), Progress("read", 2) as bar:
        bar.advance()
        raise ValueError("broken")
    assert messages(caplog) == []


def text_on_terminal(script: str) -> str:
    """Returns what `script` writes to a terminal, without its control sequences."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen([sys.executable, "-c", script], stderr=theirs, env=environment)
    os.close(theirs)
    text = b""
    # A terminal whose other end is closed is an error on Linux, not an end of file.
    while select.select([ours], [], [], 20)[0]:
        try:
            text += os.read(ours, 4096)
        except OSError:
            break
    os.close(ours)
    assert child.wait() == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())


def test_a_terminal_gets_a_bar_and_lines_above_it() -> None:
    plain = text_on_terminal(
        "from flexunet.progress import Progress\n"
        "with Progress('reading', 4) as bar:\n"
        "    bar.line('epoch 1 [loss]')\n"
        "    bar.advance(4, note='noted')\n"
    )
    # Brackets of a line are not taken for markup.
    assert "epoch 1 [loss]" in plain
    assert "reading" in plain
    assert "4/4" in plain
    assert "noted" in plain


def test_a_terminal_shows_what_a_command_waits_for() -> None:
    # The second one works while another library writes to descriptor 2, as TensorFlow does.
    plain = text_on_terminal(
        "import os, time\n"
        "from flexunet.native_stderr import suppress_native_stderr\n"
        "from flexunet.progress import waiting\n"
        "with waiting('hidden', shown=False): pass\n"
        "with waiting('loading'), suppress_native_stderr(shown_on_error=True):\n"
        "    time.sleep(1.2); os.write(2, b'noise')\n"
    )
    assert "hidden" not in plain
    assert "noise" not in plain
    assert "loading" in plain
    assert "0:00:01" in plain


def test_a_log_gets_no_line_of_what_a_command_waits_for(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    with waiting("loading"):
        pass
    assert messages(caplog) == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_interrupt_inside_the_block_only(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), quiet_interrupts():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert signal.getsignal(number) == before


def test_a_closed_terminal_is_no_interrupt_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with quiet_interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_progress_is_sent_where_somebody_sees_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now, events = standing_clock(monkeypatch), list[Mapping[str, Any]]()
    assert not progress.is_watched()
    with progress.sent_by(events.append):
        assert progress.is_watched()
        with Progress("read", 10, done=2) as bar:
            for second in range(1, 9):
                now[0] = second / 4
                bar.advance(note=f"file {second}")
        with Progress("hidden", 10, shown=False) as hidden:
            hidden.advance()
    # At the start, twice a second, and at the end; nothing is logged there.
    assert [event["done"] for event in events] == [2, 5, 8, 10]
    assert [event["is_over"] for event in events] == [False, False, False, True]
    assert not caplog.messages
    assert json.loads(json.dumps(events)) == events
    with Progress.of(events[0]) as seen:
        now[0] += 4
        for event in events:
            seen.follow(event)
    assert caplog.messages == ["read: 10/10 images, 2.0 images/s, file 8"]
