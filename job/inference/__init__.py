"""Reads images of any size, predicts their masks and writes the masks."""
