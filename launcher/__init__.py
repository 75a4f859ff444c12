"""The `flexunet` command, and the same job on many machines."""
