"""Reads masks: from the pixels of a file to the class id of each pixel."""
