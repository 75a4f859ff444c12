"""Images and masks become a committed dataset; knows storage and records, never TensorFlow.

`config` holds the options, `pipeline` the order of the steps, `cli` the command.
"""
