"""Follows a submitted job until it ends, over a stream that may break."""

import asyncio
import logging
import time
from typing import Any

import click

from flexunet.errors import FlexUNetError, StoppedError, UsageError
from launcher.jobs.client import UnknownJobError, first_line

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # a shell's exit code for Ctrl-C; flexunet itself never uses it

_PATIENCE_S = 600.0  # without an answer; moving a head takes minutes
_LOOK_EVERY_S = 3.0

_QUIET_S = 60.0  # without data; the only sign of a lost connection
_QUIET_AT_END_S = 10.0

_MAX_STREAMS_AT_END = 3


def follow(client: Any, job_id: str) -> int:
    """Shows the log of a job until it ends; returns its exit code, see `exit_code_of`.

    Reconnects after a lost connection, and shows nothing twice. Ctrl-C stops following, returns
    `INTERRUPTED` and does not stop the job.

    Raises:
        UnknownJobError: there is no such job.
        FlexUNetError: the job server did not answer for too long, or no longer knows the job.
    """
    try:
        details = asyncio.run(_Follower(client, job_id).run())
    except KeyboardInterrupt:
        logger.warning("stopped following; job %s continues", job_id)
        return INTERRUPTED
    logger.info("job %s: %s", job_id, described_end(details))
    return exit_code_of(details)


def wait(client: Any, job_id: str) -> Any:
    """Returns the details of a job after it has ended; raises the same errors as `follow`."""
    observer = _Observer(client, job_id)
    while (details := observer.look()) is None or not details.status.is_terminal():
        time.sleep(_LOOK_EVERY_S / 3)
    return details


def exit_code_of(details: Any) -> int:
    """Returns the exit code of an ended job, as a shell would.

    128 + N: signal N ended it; 6: it was stopped (Ray keeps no exit code of stopped jobs);
    1: it could not start, or its machine was lost.
    """
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return StoppedError.exit_code
    code = details.driver_exit_code
    if not code:
        return FlexUNetError.exit_code
    return 128 - code if code < 0 else int(code)


def described_end(details: Any) -> str:
    """Returns a text on how and when a job ended: `failed with exit code 3 after 12 s`."""
    words = details.status.lower()
    code = details.driver_exit_code
    if details.status == "FAILED" and not code:
        words += f" ({first_line(details.message or 'Ray gives no reason')})"
    elif code and code < 0:
        words += f" by signal {-code}"
    elif code:
        words += f" with exit code {code}"
    words += f" after {seconds_of(details):.0f} s"
    return words + ("; the head has no `flexunet` on its PATH" if code == 127 else "")


def seconds_of(details: Any) -> float:
    """Returns the duration of a job, so far if it still runs."""
    end = details.end_time / 1000 if details.end_time else time.time()
    return max(0.0, end - (details.start_time or 0) / 1000)


class _Observer:
    """Queries the state of a job; tolerates a job server that does not answer for a while."""

    def __init__(self, client: Any, job_id: str) -> None:
        self._client, self._job_id = client, job_id
        self._is_known = False
        self._silent_since: float | None = None

    def look(self) -> Any | None:
        """Returns the details of the job, None if the server does not answer now."""
        try:
            details = self._client.get_job_info(self._job_id)
        except UnknownJobError as error:
            if not self._is_known:
                raise
            raise FlexUNetError(
                f"the cluster no longer knows job {self._job_id}: its head was restarted; submit "
                "the command again to continue"
            ) from error
        except UsageError:
            raise
        except FlexUNetError as error:
            self._be_patient(error)
            return None
        self._is_known, self._silent_since = True, None
        return details

    def _be_patient(self, error: FlexUNetError) -> None:
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
            logger.warning("retrying; the job itself may continue: %s", error)
        if now - self._silent_since > _PATIENCE_S:
            raise FlexUNetError(
                f"no answer for {_PATIENCE_S:g} s ({error}); job {self._job_id} may still run: "
                "check later with `flexunet status`"
            ) from error


class _Follower:
    """Shows a growing log; its stream may break, so only the job's state shows that it ended."""

    def __init__(self, client: Any, job_id: str) -> None:
        self._client, self._job_id = client, job_id
        self._observer = _Observer(client, job_id)
        self._num_shown = 0  # characters
        self._last_sign = 0.0

    async def run(self) -> Any:
        """Returns the details of the job after it has ended and its log was shown."""
        stream: asyncio.Task[None] | None = None
        num_at_end = 0
        while True:
            if stream is None:
                self._last_sign = time.monotonic()
                stream = asyncio.create_task(self._show())
            await asyncio.wait([stream], timeout=_LOOK_EVERY_S)
            is_whole = _is_whole(stream)
            details = await asyncio.to_thread(self._observer.look)
            is_over = details is not None and details.status.is_terminal()
            if is_over and is_whole:
                return details
            if not stream.done() and not self._is_quiet(is_over):
                continue
            stream.cancel()
            stream = None
            num_at_end += is_over
            if num_at_end == _MAX_STREAMS_AT_END:
                logger.warning("the rest of the log could not be read")
                return details
            await asyncio.sleep(_LOOK_EVERY_S / 3)

    async def _show(self) -> None:
        position = 0
        async for text in self._client.tail_job_logs(self._job_id):
            self._last_sign = time.monotonic()
            new = text[max(0, self._num_shown - position) :]
            position += len(text)
            self._num_shown += len(new)
            click.echo(new, nl=False)

    def _is_quiet(self, is_over: bool) -> bool:
        limit = _QUIET_AT_END_S if is_over else _QUIET_S
        return time.monotonic() - self._last_sign > limit


def _is_whole(stream: "asyncio.Task[None]") -> bool:
    """Returns whether the server ended the stream; raises errors except lost connections."""
    import aiohttp

    if not stream.done():
        return False
    error = stream.exception()
    # A BrokenPipeError is about stdout; errors of the stream have aiohttp's classes.
    is_dropped = isinstance(error, (aiohttp.ClientError, RuntimeError, OSError))
    if error is not None and (isinstance(error, BrokenPipeError) or not is_dropped):
        raise error
    return error is None
