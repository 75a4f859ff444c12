"""The `flexunet` command, and its commands on a Ray cluster."""
