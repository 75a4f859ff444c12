"""Classifies errors of the cloud client as transient or not, and finds a remedy for the user."""

import os
import re
import ssl
import urllib.parse
from collections.abc import Iterator
from typing import Any

from flexunet.errors import StorageError
from flexunet.storage.base import Forbidden, NotFound, Unavailable

_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
# OpenSSL's reasons for a handshake that always fails; a lost connection has other reasons.
_REFUSED_TLS = re.compile("CERTIFICATE|CIPHER|HANDSHAKE|HTTP|PROTOCOL|UNKNOWN_CA|VERSION")


def is_transient(error: Exception) -> bool:
    """Returns whether a request that failed with `error` may succeed on a retry."""
    import requests
    import urllib3
    from google.auth.exceptions import GoogleAuthError, TransportError

    if _refused_tls(error) is not None:
        return False
    if isinstance(error, TransportError):
        # A refused token stays refused; google-auth wraps a network error in its arguments.
        return bool(error.args) and isinstance(error.args[0], OSError)
    if isinstance(error, GoogleAuthError):
        return bool(error.retryable)
    response = getattr(error, "response", None)
    status = getattr(error, "code", None) or getattr(response, "status_code", None)
    if status is not None:
        return status in _TRANSIENT_STATUS
    return isinstance(
        error,
        ConnectionError
        | requests.ConnectionError
        | requests.Timeout
        | requests.exceptions.ChunkedEncodingError
        | urllib3.exceptions.ProtocolError
        | urllib3.exceptions.TimeoutError,
    )


def _causes(error: Exception) -> Iterator[Any]:
    """Yields `error` and the errors that it wraps: google-auth, requests and urllib3 nest them."""
    found: Any = error
    while isinstance(found, Exception):
        yield found
        inner = getattr(found, "reason", None)
        found = inner if isinstance(inner, Exception) else next(iter(found.args), None)


def _refused_tls(error: Exception) -> ssl.SSLError | None:
    """Returns the permanent TLS error behind `error`, None if there is none.

    `requests` raises the same class for a lost connection, where a retry may help.
    """
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError) and _REFUSED_TLS.search(cause.reason or ""):
            return cause
    return None


def _describe_tls_error(error: Exception) -> str | None:
    """Returns the problem and remedy of a TLS error, None for other errors."""
    refused = _refused_tls(error)
    if refused is None:
        # `requests` has no separate class for this error.
        is_lacking = type(error) is OSError and "certificate" in str(error)
        return f"{error}; check REQUESTS_CA_BUNDLE" if is_lacking else None
    requests_sent = (getattr(cause, "request", None) for cause in _causes(error))
    urls = (request.url for request in requests_sent if request is not None)
    server = urllib.parse.urlsplit(next(urls, "")).netloc or "the server"
    if isinstance(refused, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {server} is not trusted: {refused.verify_message}; check the "
            "address and this machine's clock, or set REQUESTS_CA_BUNDLE to a file with the "
            "certificate of its authority"
        )
    return f"TLS between {server} and this machine failed ({refused.reason}); check the address"


def describe_cloud_error(
    error: Exception, action: str, url: str, bucket: str, missing: str
) -> StorageError | None:
    """Returns a StorageError for an error of the client library, None if it is a bug.

    Args:
        missing: the thing that a 404 means, "object" or "bucket".
    """
    import requests
    from google.api_core import exceptions as api
    from google.auth.exceptions import TransportError
    from google.cloud.storage import exceptions as cloud

    tls = _describe_tls_error(error)
    if tls is not None:
        return StorageError(f"cannot {action} {url}: {tls}")
    text = _shortened(error)
    if isinstance(error, api.RetryError) or is_transient(error):
        return Unavailable(
            f"cannot {action} {url}: {text}; check the network and the server, then try again"
        )
    if isinstance(error, api.NotFound):
        if missing == "bucket" or "bucket does not exist" in text:
            return StorageError(
                f"cannot {action} {url}: bucket {bucket!r} does not exist; create it or fix the URL"
            )
        return NotFound(f"{url} does not exist")
    credentials = _describe_credentials_error(error)
    if credentials is not None:
        return StorageError(f"cannot {action} {url}: {credentials}")
    if isinstance(error, api.Forbidden):
        return Forbidden(
            f"cannot {action} {url}: permission denied; grant these credentials "
            f"roles/storage.objectUser on bucket {bucket!r} ({text})"
        )
    known = (
        api.GoogleAPIError, cloud.DataCorruption, cloud.InvalidResponse, TransportError,
        requests.RequestException, ConnectionError,
    )  # fmt: skip
    return StorageError(f"cannot {action} {url}: {text}") if isinstance(error, known) else None


def _describe_credentials_error(error: Exception) -> str | None:
    """Returns the problem and remedy of a credentials error, None for other errors."""
    from google.api_core.exceptions import Unauthorized
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError

    text = _shortened(error)
    key_file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if isinstance(error, DefaultCredentialsError) and key_file:
        return (
            f"GOOGLE_APPLICATION_CREDENTIALS={key_file} contains no credentials ({text}); give the "
            "path of a key file, or unset it"
        )
    if isinstance(error, DefaultCredentialsError):
        return (
            "no Google Cloud credentials; run `gcloud auth application-default login` or set "
            "GOOGLE_APPLICATION_CREDENTIALS"
        )
    if isinstance(error, Unauthorized | GoogleAuthError) and not isinstance(error, TransportError):
        return (
            "the credentials were rejected; renew them with `gcloud auth application-default "
            f"login` ({text})"
        )
    return None


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
