"""The commands on a cluster, and the tables of all commands."""
