"""Groups samples that belong together, and assigns splits and folds.

Reads names and digests only, no images and no storage.
"""
