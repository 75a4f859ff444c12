"""Pixels: decoding, resizing, tiles, masks."""
