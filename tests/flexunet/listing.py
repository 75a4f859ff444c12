"""What the tests of storage look at."""

from flexunet.storage import Store


def names(store: Store, prefix: str = "") -> list[str]:
    return [stat.name for stat in store.list(prefix)]
