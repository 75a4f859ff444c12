"""Builds encoders whose weights others have trained, and reads these weights."""
