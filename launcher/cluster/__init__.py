"""The Ray cluster: its connection, its resources, its nodes."""
