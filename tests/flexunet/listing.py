"""What the tests of storage look at."""

from flexunet.storage import ObjectStore


def names(store: ObjectStore, prefix: str = "") -> list[str]:
    return [stat.name for stat in store.list(prefix)]
