"""Defines the dataset format, and writes datasets.

The writer (`data_prep`) and the reader (`job`) share only `manifest`, `records` and `sample_table`.
A dataset is a folder with
    train-00000-of-00002.tfrecord ...  records of `tf.train.Example`, see `encode_example`
    samples.parquet                    a row per sample, see `sample_schema`
    dataset.json                       the manifest; written last, which commits the dataset
"""
