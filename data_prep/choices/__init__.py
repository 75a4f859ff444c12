"""Chooses options of `prep` that the user leaves out, from the files of the source."""
