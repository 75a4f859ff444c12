"""Ray's job server: how it is reached without trusting it, and what becomes of a job.

Whoever reaches a job server that asks for no token can run code on its cluster, so one of another
machine is refused. This module must not know what a job does.
"""

import asyncio
import http.client
import ipaddress
import logging
import os
import re
import time
from typing import Any
from urllib.parse import urlsplit

import click

from flexunet.errors import FlexUNetError, StoppedError, UsageError
from flexunet.settings import Settings, option
from launcher.cluster import PASSED_ON

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # exit code of a shell for Ctrl-C: neither the job's nor one of ours
STOP_TIMEOUT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"

_TIMEOUT_S = (10.0, 90.0)  # to connect, and to be answered: an agent may have to start
_PATIENCE_S = 600.0  # without an answer; a head that moves needs minutes
_LOOK_EVERY_S = 3.0
_QUIET_S = 60.0  # after which a stream may be dead: nothing else tells of a lost connection
_QUIET_AT_END_S = 10.0
_MAX_STREAMS_AT_END = 3
_MAX_DETAIL_WIDTH = 200  # characters of Ray's own words in an error
_JOB_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"  # a part of a URL, and of a file name on the head


class JobsConfig(Settings):
    """Which job server."""

    address: str = option(..., "Job server of the cluster, as http://HOST:8265.")
    insecure: bool = option(
        False, "Use a job server on another machine although it asks nobody for a token."
    )


class NoAnswerError(FlexUNetError):
    """The job server does not answer; this says nothing of its jobs."""


class UnknownJobError(UsageError):
    """The cluster has no job of that id."""


def connect(config: JobsConfig) -> Any:
    """Returns Ray's client of a job server, which was asked first whether it wants a token.

    The token is the one of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. A server that
    asks for none is sent none.

    Raises:
        UsageError: the address is malformed, no job server answers there, it is open to everyone,
            or it wants another token.
        NoAnswerError: nothing answers there.
    """
    address = _checked(config.address)
    is_open = _is_open(address)
    if is_open and not (config.insecure or _is_loopback(address)):
        raise UsageError(
            f"--address {address}: this job server asks for no token, so whoever reaches it can "
            "run code there; start the cluster with RAY_AUTH_MODE=token, or give --insecure if "
            "nobody else can reach it"
        )
    # Else variables that are set for another cluster would overrule the address that was looked at.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    os.environ["RAY_AUTH_MODE"] = "disabled" if is_open else "token"
    return _client(address)


def checked_job_id(job_id: str) -> str:
    """Returns `job_id`.

    Raises:
        UsageError: it cannot be the id of a job.
    """
    if not re.fullmatch(_JOB_ID, job_id):
        raise UsageError(
            f"{job_id!r}: a job is named by at most 100 letters, digits, '.', '_' and '-', and "
            "begins with a letter or digit"
        )
    return job_id


def start(client: Any, *, job_id: str, entrypoint: str, stop_timeout_s: int) -> None:
    """Starts a job whose processes have `stop_timeout_s` from SIGTERM to SIGKILL.

    Args:
        entrypoint: a shell command; the machine of the cluster's head runs it.

    Raises:
        UsageError: there is, or was, a job of this id: Ray keeps its log.
        FlexUNetError: the job server failed or went away.
    """
    known = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables = {STOP_TIMEOUT_VARIABLE: str(stop_timeout_s)} | known
    try:
        client.submit_job(
            entrypoint=entrypoint, submission_id=job_id, runtime_env={"env_vars": variables}
        )
    except NoAnswerError as error:
        raise NoAnswerError(
            f"{error}; `flexunet status` tells whether job {job_id} runs"
        ) from error
    except FlexUNetError as error:
        if "already exists" not in str(error):
            raise
        raise UsageError(
            f"the cluster has a job {job_id} already ({client.get_job_info(job_id).status.lower()}"
            "); give another --name, or none: a run is continued by its own name, whatever the "
            "job's"
        ) from error


def follow(client: Any, job_id: str) -> int:
    """Shows the log of a job until it has ended; returns its exit code, see `exit_code_of`.

    A connection that is lost is made again, and what was shown is not shown twice. Ctrl-C leaves
    the job alone and gives `INTERRUPTED`.

    Raises:
        UnknownJobError: there is no such job.
        FlexUNetError: the job server was silent for too long, or has forgotten the job.
    """
    try:
        details = asyncio.run(_Follower(client, job_id).run())
    except KeyboardInterrupt:
        logger.warning("no longer followed; job %s goes on", job_id)
        return INTERRUPTED
    logger.info("job %s: %s", job_id, described_end(details))
    return exit_code_of(details)


def wait(client: Any, job_id: str) -> Any:
    """Returns the details of a job when it has ended; raises what `follow` does."""
    observer = _Observer(client, job_id)
    while (details := observer.look()) is None or not details.status.is_terminal():
        time.sleep(_LOOK_EVERY_S / 3)
    return details


def exit_code_of(details: Any) -> int:
    """Returns the exit code of a job that has ended, as a shell would.

    128 + N: it was ended by signal N; 6: it was stopped, and Ray keeps no exit code of such jobs;
    1: it could not be started or its machine was lost.
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
    """Returns in words how and after how long a job ended: `failed with exit code 3 after 12 s`."""
    words = details.status.lower()
    code = details.driver_exit_code
    if details.status == "FAILED" and not code:
        words += f" ({_first_line(details.message or 'Ray gives no reason')})"
    elif code and code < 0:
        words += f" by signal {-code}"
    elif code:
        words += f" with exit code {code}"
    words += f" after {seconds_of(details):.0f} s"
    return words + ("; the head has no `flexunet` on its PATH" if code == 127 else "")


def seconds_of(details: Any) -> float:
    """Returns how long a job has run, or ran."""
    end = details.end_time / 1000 if details.end_time else time.time()
    return max(0.0, end - (details.start_time or 0) / 1000)


def printable(text: str) -> str:
    """Returns `text` of a server without what could write elsewhere on a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# Connecting


def _checked(address: str) -> str:
    """Returns `address` without a slash at its end."""
    name = f"--address {address}"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{name}: {error}; give http://HOST:8265") from error
    if "@" in parts.netloc:
        raise UsageError("--address: no password or token belongs there; set RAY_AUTH_TOKEN_PATH")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UsageError(f"{name}: not the URL of a job server; give http://HOST:8265")
    if parts.query or parts.fragment or re.search(r"[\s\\]", address):
        raise UsageError(f"{name}: not the URL of a job server alone; give http://HOST:8265")
    return address.rstrip("/")


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_open(address: str) -> bool:
    """Returns whether the job server answers those who show no token."""
    import requests

    try:
        response = requests.get(
            f"{address}/api/version", auth=_as_it_is, timeout=_TIMEOUT_S, allow_redirects=False
        )
    except (OSError, ValueError) as error:
        raise _no_answer(address, error) from error
    if response.status_code == 401:
        return False
    _check(response, address)
    try:
        is_ray = "ray_version" in response.json()
    except (ValueError, TypeError):
        is_ray = False
    if not is_ray:
        raise _no_job_server(address)
    return True


def _as_it_is(request: Any) -> Any:
    # Else requests takes a password from ~/.netrc, in place of the token.
    return request


def _client(address: str) -> Any:
    from ray.dashboard.modules import dashboard_sdk
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's client with our errors; it waits for no server for ever, and is led to no other."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            options |= {"auth": _as_it_is, "timeout": _TIMEOUT_S, "allow_redirects": False}
            try:
                response = super()._do_request(method, endpoint, **options)
            except OSError as error:
                raise _no_answer(address, error) from error
            except AuthenticationError as error:
                raise _bad_token(address, error) from error
            _check(response, address, has_job="/api/jobs/" in endpoint)
            return response

    for module in (dashboard_sdk.__name__, JobSubmissionClient.__module__):
        logging.getLogger(module).setLevel(logging.ERROR)
    try:
        return Client(address)
    except AuthenticationError as error:
        raise _bad_token(address, error) from error
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _no_job_server(address) from error


def _check(response: Any, address: str, *, has_job: bool = False) -> None:
    """Raises where the answer is none."""
    code = response.status_code
    if response.is_redirect:
        target = _first_line(response.headers.get("location", ""))
        raise UsageError(f"--address {address} leads to {target}; give that")
    if code == 404 and has_job:
        raise UnknownJobError(f"{_first_line(response.text)}; `flexunet status` lists all jobs")
    if code >= 500 or (code >= 400 and has_job):
        raise FlexUNetError(f"--address {address}: error {code}: {_last_line(response.text)}")
    if code >= 300:
        raise _no_job_server(address)


def _no_answer(address: str, error: BaseException) -> FlexUNetError:
    while error.__context__ is not None:
        error = error.__context__  # requests wraps what has happened four times
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, OSError):
        return _no_job_server(address)  # what answers speaks another language
    return NoAnswerError(
        f"--address {address}: no job server answers ({_last_line(str(error))}); start the cluster "
        "with `ray start --head`, or correct the address (Ray's usual port is 8265)"
    )


def _no_job_server(address: str) -> UsageError:
    return UsageError(
        f"--address {address}: no job server of Ray's; give the one of the cluster's head, as "
        "http://HOST:8265"
    )


def _bad_token(address: str, error: Exception) -> UsageError:
    return UsageError(
        f"--address {address}: no access ({_first_line(str(error))}); set RAY_AUTH_TOKEN_PATH to a "
        "file with the token of the cluster"
    )


def _first_line(text: str) -> str:
    return next(iter(_lines(text)), "")


def _last_line(text: str) -> str:
    return next(reversed(_lines(text)), "")


def _lines(text: str) -> list[str]:
    """Returns the lines with words: Ray ends a traceback within its answer with a line of '.'."""
    lines = [printable(line).strip(". ") for line in text.splitlines()]
    return [line[:_MAX_DETAIL_WIDTH] for line in lines if line]


# Following


class _Observer:
    """Asks how a job is; a job server that does not answer is asked again."""

    def __init__(self, client: Any, job_id: str) -> None:
        self._client, self._job_id = client, job_id
        self._is_known = False
        self._silent_since: float | None = None

    def look(self) -> Any | None:
        """Returns the details of the job, None when the server does not answer now."""
        try:
            details = self._client.get_job_info(self._job_id)
        except UnknownJobError as error:
            if not self._is_known:
                raise
            raise FlexUNetError(
                f"the cluster has forgotten job {self._job_id}: its head was started anew; submit "
                "the command again, it continues"
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
            logger.warning("asking again, as the job goes on without us: %s", error)
        if now - self._silent_since > _PATIENCE_S:
            raise FlexUNetError(
                f"no answer for {_PATIENCE_S:g} s ({error}); job {self._job_id} may go on: ask "
                "later with `flexunet status`"
            ) from error


class _Follower:
    """Shows a log that only grows. Its stream may break, so the job alone tells of its end."""

    def __init__(self, client: Any, job_id: str) -> None:
        self._client, self._job_id = client, job_id
        self._observer = _Observer(client, job_id)
        self._num_shown = 0  # characters
        self._last_sign = 0.0

    async def run(self) -> Any:
        """Returns the details of the job when it has ended and its log was shown."""
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
    """Returns whether the server has ended the stream; raises errors other than of connections."""
    import aiohttp

    if not stream.done():
        return False
    error = stream.exception()
    # A BrokenPipeError is of our own output; the stream's are of aiohttp's classes.
    is_dropped = isinstance(error, (aiohttp.ClientError, RuntimeError, OSError))
    if error is not None and (isinstance(error, BrokenPipeError) or not is_dropped):
        raise error
    return error is None
