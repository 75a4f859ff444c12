"""Where pairs of picture and mask are found: the layouts of source folders.

Reads names, and the annotations of a release; it must not know how datasets are stored.
"""
