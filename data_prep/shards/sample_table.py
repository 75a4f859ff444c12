"""Writes and reads the sample table: one row per sample, with its record's location and geometry.

Defines the columns of `samples.parquet`, and the checks of a reader.
"""

import io
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import google_crc32c

from data_prep.shards.manifest import MANIFEST_NAME, Manifest
from data_prep.shards.records import RECORD_OVERHEAD
from flexunet.errors import ContentError

if TYPE_CHECKING:
    import pyarrow

    from flexunet.storage import ObjectStore

SAMPLES_NAME = "samples.parquet"
_CROP_COLUMNS = ("crop_top", "crop_left", "crop_height", "crop_width")
# Added after version 0.1.0; null if nothing was cropped, flipped or cut into tiles.
_LATER_COLUMNS = (*_CROP_COLUMNS, "is_flipped", "picture")


def sample_schema() -> "pyarrow.Schema":
    """Returns the schema of `samples.parquet`; imports pyarrow here because it takes 0.5 s.

    `offset` is the position of the record header in the shard and `length` that of the whole
    record, both in bytes. `top`, `left`, `height` and `width` are the position of the source image
    in the stored image, in pixels. `crop_top` ... are the stored part of the source, in its pixels,
    null for all of it; `is_flipped` is whether it is mirrored left to right. `picture` is the id of
    the image that a tile was cut from, null without tiles; all tiles of an image have its group,
    split and `off_map_pixels`. `sha256` is `sha256_of_pixels` of the stored image. `fold` is null
    for samples without a fold.
    """
    import pyarrow as pa

    int64, text = pa.int64(), pa.string()
    columns = [
        *((name, text) for name in ("split", "shard")),
        *((name, int64) for name in ("offset", "length")),
        *((name, text) for name in ("id", "group", "filename")),
        *((name, int64) for name in ("source_height", "source_width")),
        *((name, pa.float64()) for name in ("spacing_y_mm", "spacing_x_mm")),
        ("geometry_kind", text),
        *((name, int64) for name in ("top", "left", "height", "width")),
        ("pixels_per_class", pa.list_(int64)),
        ("off_map_pixels", int64),
        ("sha256", text),
        ("fold", int64),
        *((name, int64) for name in _CROP_COLUMNS),
        ("is_flipped", pa.bool_()),
        ("picture", text),
    ]
    nullable = {"spacing_y_mm", "spacing_x_mm", "fold", *_LATER_COLUMNS}
    return pa.schema([pa.field(name, kind, name in nullable) for name, kind in columns])


def samples_to_parquet(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Returns the bytes of `samples.parquet`; equal rows give equal bytes."""
    import pyarrow.parquet

    table = _table_of(rows).combine_chunks()
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _table_of(rows: Iterable[Mapping[str, Any]]) -> "pyarrow.Table":
    # Through JSON, because pyarrow imports pandas (2 s) to convert a Python list.
    import pyarrow.json

    schema = sample_schema()
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if not lines:
        return schema.empty_table()
    options = pyarrow.json.ParseOptions(
        explicit_schema=schema, unexpected_field_behavior="error", newlines_in_values=False
    )
    return pyarrow.json.read_json(io.BytesIO(lines), parse_options=options).cast(schema)


def read_samples(store: "ObjectStore", manifest: Manifest) -> "pyarrow.Table":
    """Returns the sample table, checked against `manifest`.

    Raises:
        ContentError: it is missing, or its size, checksum, columns, number of rows or a record's
            location is wrong.
    """
    import pyarrow as pa
    import pyarrow.parquet

    where = f"{store.url}/{SAMPLES_NAME}"
    stat = store.stat(SAMPLES_NAME)
    if stat is None:
        raise ContentError(f"{where} is missing; prepare the dataset again")
    if stat.size != manifest.samples_num_bytes:
        expected = f"{manifest.samples_num_bytes} as in {MANIFEST_NAME}"
        raise ContentError(f"{where}: {stat.size} bytes, not {expected}; prepare the dataset again")
    data = store.get(SAMPLES_NAME)
    if google_crc32c.value(data) != manifest.samples_crc32c:
        raise ContentError(
            f"{where}: checksum differs from {MANIFEST_NAME}; prepare the dataset again"
        )
    try:
        # read_table would import pandas, which takes 2 s.
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data)).read()
    except pa.ArrowException as error:
        raise ContentError(
            f"{where}: not a parquet table ({error}); prepare the dataset again"
        ) from error
    for field in sample_schema():
        if field.name not in table.column_names and field.name in _LATER_COLUMNS:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    if not table.schema.equals(sample_schema()):
        raise ContentError(f"{where}: columns differ from this format; prepare the dataset again")
    _check_locations(table, manifest, where)
    return table


def _check_locations(table: "pyarrow.Table", manifest: Manifest, where: str) -> None:
    records = dict.fromkeys((shard.name for shard in manifest.shards), 0)
    sizes = {shard.name: (shard.num_bytes, shard.split) for shard in manifest.shards}
    columns = (table[name].to_pylist() for name in ("id", "shard", "split", "offset", "length"))
    for sample_id, shard, split, offset, length in zip(*columns, strict=True):
        size, shard_split = sizes.get(shard, (0, ""))
        inside = offset >= 0 and length >= RECORD_OVERHEAD and offset + length <= size
        if not inside or split != shard_split:
            raise ContentError(
                f"{where}: sample {sample_id!r} is outside its shard {shard!r}; prepare the "
                "dataset again"
            )
        records[shard] += 1
    if records != {shard.name: shard.num_records for shard in manifest.shards}:
        raise ContentError(
            f"{where}: the {table.num_rows} rows do not match the records of the shards; prepare "
            "the dataset again"
        )
