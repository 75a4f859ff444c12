"""Provides errors, settings, storage and the command line to all packages, and the Python API.

API names are imported on first use. This package has no image code, no TensorFlow and no Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexunet.errors import (
        ContentError,
        DivergedError,
        FlexUNetError,
        LockedError,
        StoppedError,
        StorageError,
        UsageError,
    )
    from flexunet.storage import ObjectStore, open_store

__all__ = [
    "ContentError",
    "DivergedError",
    "FlexUNetError",
    "LockedError",
    "ObjectStore",
    "StoppedError",
    "StorageError",
    "UsageError",
    "__version__",
    "open_store",
]

__version__: str  # of the installed package; defined in pyproject.toml only
_NOT_INSTALLED = "0+unknown"  # compares lower than every real version

# API name -> module that defines it
_MODULES = {
    "ContentError": "flexunet.errors",
    "DivergedError": "flexunet.errors",
    "FlexUNetError": "flexunet.errors",
    "LockedError": "flexunet.errors",
    "StoppedError": "flexunet.errors",
    "StorageError": "flexunet.errors",
    "ObjectStore": "flexunet.storage",
    "UsageError": "flexunet.errors",
    "open_store": "flexunet.storage",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # slow to import

        try:
            return metadata.version("flexunet")
        except metadata.PackageNotFoundError:  # `hasattr` and `import *` must still work
            return _NOT_INSTALLED
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
