"""Implements Adam, its learning rate schedule, and the loss scale of float16."""
