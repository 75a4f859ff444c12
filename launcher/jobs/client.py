"""Ray's job server: how it is reached without trusting it, and what becomes of a job.

Whoever reaches a job server that asks for no token can run code on its cluster, so one of another
machine is refused. This module must not know what a job does.
"""

import http.client
import ipaddress
import logging
import os
import re
from typing import Any
from urllib.parse import urlsplit

from flexunet.errors import FlexUNetError, UsageError
from flexunet.settings import Settings, option
from launcher.cluster.connection import PASSED_ON

STOP_TIMEOUT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"

_TIMEOUT_S = (10.0, 90.0)  # to connect, and to be answered: an agent may have to start
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


def printable(text: str) -> str:
    """Returns `text` of a server without what could write elsewhere on a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


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
        target = first_line(response.headers.get("location", ""))
        raise UsageError(f"--address {address} leads to {target}; give that")
    if code == 404 and has_job:
        raise UnknownJobError(f"{first_line(response.text)}; `flexunet status` lists all jobs")
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
        f"--address {address}: no access ({first_line(str(error))}); set RAY_AUTH_TOKEN_PATH to a "
        "file with the token of the cluster"
    )


def first_line(text: str) -> str:
    """Returns the first line of a server's text that is not blank, made printable."""
    return next(iter(_lines(text)), "")


def _last_line(text: str) -> str:
    return next(reversed(_lines(text)), "")


def _lines(text: str) -> list[str]:
    """Returns the lines with words: Ray ends a traceback within its answer with a line of '.'."""
    lines = [printable(line).strip(". ") for line in text.splitlines()]
    return [line[:_MAX_DETAIL_WIDTH] for line in lines if line]
