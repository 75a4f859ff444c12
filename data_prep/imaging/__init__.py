"""Pictures and masks in memory: decoded, fitted to a size, and read as class ids.

Pure functions on bytes and pixels; they must not know data sets, groups or storage.
"""
