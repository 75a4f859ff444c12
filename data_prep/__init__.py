"""Prepares a committed dataset from images and masks, without TensorFlow.

`config` defines the options, `pipeline` the order of the steps, `cli` the command.
"""
