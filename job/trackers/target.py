"""Finds out where a run is tracked: from its options, else from MLflow's environment variables."""

import importlib.util
import os
import re
from dataclasses import dataclass

from flexunet.errors import UsageError
from flexunet.paths import scheme_of
from job.config import DATABRICKS, TrainConfig

_DATABASES = ("sqlite", "mysql", "postgresql", "mssql")
# The user and the password end at the last @ of an address, because a password may have any
# character. With a ? before that @ nobody knows where the host is, so all of the address goes.
_SECRET = re.compile(r"(?<=://)[^/\s]\S*\?\S*@\S*|(?<=://)[^/\s]\S*@|(?<=://)@|\?[^\s'\")]*")


@dataclass(frozen=True)
class Target:
    """The tracking server or folder of a run, and its experiment there.

    Attributes:
        uri: may have a password, if it is from the environment; see `without_secrets`.
        experiment: name; None: the default experiment of MLflow.
        experiment_id: used instead of the name.
    """

    uri: str
    experiment: str | None = None
    experiment_id: str | None = None

    @property
    def is_folder(self) -> bool:
        """Whether MLflow writes files itself, without a server."""
        return self.uri not in DATABRICKS and scheme_of(self.uri) in ("", "file")

    @property
    def shown(self) -> str:
        """The address for messages."""
        return without_secrets(self.uri)


def find_target(config: TrainConfig) -> Target | None:
    """Returns where the run of `config` is tracked; None without a tracker. Contacts nobody.

    Raises:
        UsageError: MLflow is not installed, or no address is given.
    """
    if config.tracker is None:
        return None
    if importlib.util.find_spec("mlflow") is None:
        raise UsageError(
            "--tracker mlflow: the package mlflow-skinny is not installed; install "
            "flexunet[mlflow], or give --tracker none"
        )
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UsageError(
            "--tracker mlflow: no server is given; give --tracking-uri http://HOST:5000 or a "
            "folder, set MLFLOW_TRACKING_URI, or give --tracker none"
        )
    is_database = scheme_of(uri).split("+")[0] in _DATABASES
    if is_database and importlib.util.find_spec("sqlalchemy") is None:
        raise UsageError(
            f"--tracker mlflow: {without_secrets(uri)} is a database, which needs the package "
            "mlflow itself; install it, or give the address of a tracking server or a folder"
        )
    if config.experiment is not None:
        return Target(uri, config.experiment)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or None
    return Target(uri, name, None if name else os.environ.get("MLFLOW_EXPERIMENT_ID") or None)


def without_secrets(text: str) -> str:
    """Returns `text` without users, passwords and queries of the addresses in it."""
    return _SECRET.sub("", text)
