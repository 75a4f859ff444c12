"""The shared base of all packages (errors, settings, storage, command line), and the Python API.

Names of the API are imported when they are first used. Knows no images, no TensorFlow and no Ray.
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

__version__: str  # that of the installed package; pyproject.toml alone says it
_NOT_INSTALLED = "0+unknown"  # a version of which every other is the later one

# name of the API -> the module that defines it
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
        from importlib import metadata  # takes longer than all the rest

        try:
            return metadata.version("flexunet")
        except metadata.PackageNotFoundError:  # `hasattr` and `import *` must not fail by that
            return _NOT_INSTALLED
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
