"""From an image to its mask."""
