"""Which samples belong together, and the split and fold of each.

Reads names and digests only; it must not know pictures or storage.
"""
