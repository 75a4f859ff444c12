"""The dataset contract, and what writes it.

Writer (`data_prep`) and reader (`job`) meet in `manifest`, `records` and `sample_table`, and
nowhere else. A dataset is a folder with
    train-00000-of-00002.tfrecord ...  records of `tf.train.Example`, see `encode_example`
    samples.parquet                    a row per sample, see `sample_schema`
    dataset.json                       the manifest; written last, so that it is the commit
"""
