"""Connects to Ray's job server without trusting it, and starts jobs.

Anyone who can reach a job server without a token can run code on its cluster. Such a server is
rejected if it is on another machine. This module must not depend on what a job does.
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
from launcher.cluster.connection import passed_on

STOP_TIMEOUT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"

_TIMEOUT_S = (10.0, 90.0)  # to connect, and to answer: an agent may have to start
_MAX_DETAIL_WIDTH = 200  # characters of Ray's message in an error

_JOB_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"  # part of a URL, and of a file name on the head


class JobsConfig(Settings):
    """The job server's options."""

    address: str = option(..., "Job server of the cluster, such as http://HOST:8265.")
    insecure: bool = option(
        False, "Use a job server on another machine although it requires no token."
    )


class NoAnswerError(FlexUNetError):
    """The job server does not answer; the state of its jobs is unknown."""


class UnknownJobError(UsageError):
    """The cluster has no job of this id."""


def connect(config: JobsConfig) -> Any:
    """Returns Ray's client of a job server, after checking whether the server requires a token.

    The token is that of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. It is not sent to
    a server that requires none.

    Raises:
        UsageError: the address is malformed, the server is not a job server, it is open to
            everyone, or it requires another token.
        NoAnswerError: nothing answers at the address.
    """
    address = _checked(config.address)
    is_open = _is_open(address)
    if is_open and not (config.insecure or _is_loopback(address)):
        raise UsageError(
            f"--address {address}: this job server requires no token, so anyone who can reach it "
            "can run code there; start the cluster with RAY_AUTH_MODE=token, or give --insecure if "
            "nobody else can reach it"
        )
    # Otherwise variables for another cluster would override the address that was checked.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    os.environ["RAY_AUTH_MODE"] = "disabled" if is_open else "token"
    return _client(address)


def checked_job_id(job_id: str) -> str:
    """Returns `job_id` if it is valid.

    Raises:
        UsageError: it cannot be the id of a job.
    """
    if not re.fullmatch(_JOB_ID, job_id):
        raise UsageError(
            f"{job_id!r}: not a job name; use at most 100 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        )
    return job_id


def start(client: Any, *, job_id: str, entrypoint: str, stop_timeout_s: int) -> None:
    """Starts a job whose processes have `stop_timeout_s` from SIGTERM to SIGKILL.

    Args:
        entrypoint: a shell command; it runs on the machine of the cluster's head.

    Raises:
        UsageError: a job of this id exists or existed: Ray keeps its log.
        FlexUNetError: the job server failed or became unreachable.
    """
    variables = {STOP_TIMEOUT_VARIABLE: str(stop_timeout_s)} | passed_on()
    try:
        client.submit_job(
            entrypoint=entrypoint, submission_id=job_id, runtime_env={"env_vars": variables}
        )
    except NoAnswerError as error:
        raise NoAnswerError(
            f"{error}; `flexunet status` shows whether job {job_id} runs"
        ) from error
    except FlexUNetError as error:
        if "already exists" not in str(error):
            raise
        raise UsageError(
            f"job {job_id} already exists ({client.get_job_info(job_id).status.lower()}); give "
            "another --name, or none: a run resumes by its own name, not by the job's"
        ) from error


def printable(text: str) -> str:
    """Returns `text` of a server with control characters replaced, to protect the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _checked(address: str) -> str:
    """Returns `address`, checked, without a trailing slash."""
    name = f"--address {address}"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{name}: {error}; give http://HOST:8265") from error
    if "@" in parts.netloc:
        raise UsageError("--address: contains a password or token; set RAY_AUTH_TOKEN_PATH instead")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UsageError(f"{name}: not the URL of a job server; give http://HOST:8265")
    if parts.query or parts.fragment or re.search(r"[\s\\]", address):
        raise UsageError(f"{name}: has more than the URL of a job server; give http://HOST:8265")
    return address.rstrip("/")


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_open(address: str) -> bool:
    """Returns whether the job server answers without a token."""
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
    # Otherwise requests would send a password from ~/.netrc instead of the token.
    return request


def _client(address: str) -> Any:
    from ray.dashboard.modules import dashboard_sdk
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's client with a timeout, without redirects, and with this project's errors."""

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
    """Raises an error if the response is not a success."""
    code = response.status_code
    if response.is_redirect:
        target = first_line(response.headers.get("location", ""))
        raise UsageError(f"--address {address}: redirects to {target}; give that address")
    if code == 404 and has_job:
        raise UnknownJobError(f"{first_line(response.text)}; `flexunet status` lists all jobs")
    if code >= 500 or (code >= 400 and has_job):
        detail = _last_line(response.text)
        raise FlexUNetError(f"--address {address}: the server answers error {code}: {detail}")
    if code >= 300:
        raise _no_job_server(address)


def _no_answer(address: str, error: BaseException) -> FlexUNetError:
    while error.__context__ is not None:
        error = error.__context__  # requests wraps the original error four times
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, OSError):
        return _no_job_server(address)  # the server does not speak HTTP
    return NoAnswerError(
        f"--address {address}: no job server answers ({_last_line(str(error))}); start the cluster "
        "with `ray start --head`, or correct the address (Ray's usual port is 8265)"
    )


def _no_job_server(address: str) -> UsageError:
    return UsageError(
        f"--address {address}: not a Ray job server; give the one of the cluster's head, such as "
        "http://HOST:8265"
    )


def _bad_token(address: str, error: Exception) -> UsageError:
    return UsageError(
        f"--address {address}: no access ({first_line(str(error))}); set RAY_AUTH_TOKEN_PATH to a "
        "file with the token of the cluster"
    )


def first_line(text: str) -> str:
    """Returns the first non-blank line of a server's text, made printable."""
    return next(iter(_lines(text)), "")


def _last_line(text: str) -> str:
    return next(reversed(_lines(text)), "")


def _lines(text: str) -> list[str]:
    """Returns the lines with text: Ray ends a traceback in its answer with a line of '.'."""
    lines = [printable(line).strip(". ") for line in text.splitlines()]
    return [line[:_MAX_DETAIL_WIDTH] for line in lines if line]
