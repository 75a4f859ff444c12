"""Examines a source before it is prepared, and proposes the `prep` command for it.

Reads files and writes nothing into the source. All that is found is typed in `findings.py`.
"""
