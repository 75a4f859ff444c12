"""The sample table: written, read, and checked against the manifest."""

import google_crc32c
import pytest

from data_prep.shards.manifest import Manifest
from data_prep.shards.sample_table import SAMPLES_NAME, read_samples, samples_to_parquet
from flexunet.errors import ContentError
from flexunet.storage import open_store
from tests.data_prep.shards.manifests import manifest_values


def _row(**changes):
    values = {
        "split": "train",
        "shard": "train-00000-of-00001.tfrecord",
        "offset": 0,
        "length": 100,
        "id": "a1",
        "group": "17",
        "filename": "a1.png",
        "source_height": 8,
        "source_width": 12,
        "spacing_y_mm": None,
        "spacing_x_mm": None,
        "geometry_kind": "stretch",
        "top": 0,
        "left": 0,
        "height": 4,
        "width": 6,
        "pixels_per_class": [20, 4],
        "off_map_pixels": 0,
        "sha256": "00",
        "fold": None,
        "crop_top": None,
        "crop_left": None,
        "crop_height": None,
        "crop_width": None,
        "is_flipped": False,
        "picture": None,
    }
    return values | changes


def _stored(tmp_path, rows, **changes):
    store = open_store(str(tmp_path))
    data = samples_to_parquet(rows)
    store.put(SAMPLES_NAME, data)
    sizes = {"samples_num_bytes": len(data), "samples_crc32c": google_crc32c.value(data)}
    return store, Manifest.model_validate(manifest_values(**sizes, **changes))


def test_samples_survive_writing_and_have_stable_bytes(tmp_path):
    rows = [
        _row(fold=2, spacing_y_mm=0.07, spacing_x_mm=0.07, crop_top=3, is_flipped=True, picture="a")
    ]
    assert samples_to_parquet(rows) == samples_to_parquet(rows)
    store, manifest = _stored(tmp_path, rows)
    assert read_samples(store, manifest).to_pylist() == rows


def test_read_samples_refuses_another_checksum(tmp_path):
    store, manifest = _stored(tmp_path, [_row()])
    data = bytearray(store.get(SAMPLES_NAME))
    data[len(data) // 2] ^= 1
    store.put(SAMPLES_NAME, bytes(data))
    with pytest.raises(ContentError, match="checksum differs"):
        read_samples(store, manifest)


def test_read_samples_refuses_another_size(tmp_path):
    store, manifest = _stored(tmp_path, [_row()])
    store.put(SAMPLES_NAME, b"short")
    with pytest.raises(ContentError, match="5 bytes"):
        read_samples(store, manifest)


@pytest.mark.parametrize(
    "change",
    [{"offset": 1}, {"offset": -1}, {"length": 0}, {"shard": "other"}, {"split": "test"}],
)
def test_read_samples_refuses_records_outside_their_shard(tmp_path, change):
    store, manifest = _stored(tmp_path, [_row(**change)])  # the shard has 100 bytes
    with pytest.raises(ContentError, match="'a1' is outside"):
        read_samples(store, manifest)


def test_read_samples_refuses_missing_rows(tmp_path):
    store, manifest = _stored(tmp_path, [])
    with pytest.raises(ContentError, match="0 rows"):
        read_samples(store, manifest)


def test_read_samples_refuses_other_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / SAMPLES_NAME
    pyarrow.parquet.write_table(pa.table({"id": ["a"]}), path)
    data = path.read_bytes()
    sizes = {"samples_num_bytes": len(data), "samples_crc32c": google_crc32c.value(data)}
    manifest = Manifest.model_validate(manifest_values(**sizes))
    with pytest.raises(ContentError, match="columns differ"):
        read_samples(open_store(str(tmp_path)), manifest)


def test_read_samples_reads_a_table_without_the_later_columns(tmp_path):
    import pyarrow.parquet

    whole = _row()
    added = {f"crop_{name}" for name in ("top", "left", "height", "width")}
    added |= {"is_flipped", "picture"}
    store, _ = _stored(tmp_path, [whole])
    table = pyarrow.parquet.ParquetFile(tmp_path / SAMPLES_NAME).read()
    old = table.drop_columns(sorted(added))
    pyarrow.parquet.write_table(old, tmp_path / SAMPLES_NAME, compression="zstd")
    data = (tmp_path / SAMPLES_NAME).read_bytes()
    sizes = {"samples_num_bytes": len(data), "samples_crc32c": google_crc32c.value(data)}
    manifest = Manifest.model_validate(manifest_values(**sizes))
    (row,) = read_samples(store, manifest).to_pylist()
    assert row == whole | dict.fromkeys(added)
