"""Preparation from bucket to bucket: the bytes of a folder, few requests, no half results."""

import gzip
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare_source
from data_prep.shards.manifest import MANIFEST_NAME
from data_prep.shards.mask_sample import NUM_SAMPLED
from data_prep.shards.sample_table import SAMPLES_NAME
from data_prep.shards.staging import read_index
from flexunet.errors import StorageError, UsageError
from flexunet.storage import open_store
from tests.conftest import FaultyBucket
from tests.faults.proxy import BUCKET, Fault, FaultProxy, Kind

_NUM_IMAGES = 32  # 8 chunks in 4 batches
_OPTIONS = {"image_size": 16, "shard_size": 0.006}


def _prepare(source: str, output: str) -> None:
    config = PrepConfig(num_processes=1, **_OPTIONS)
    prepare_source(source, output, config, progress=False)


def _objects(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {stat.name: store.get(stat.name) for stat in store.list()}


# The bytes of figures are compared, too.
pytestmark = pytest.mark.draws


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a local source of noisy images with one square each."""
    root = tmp_path_factory.mktemp("bucket") / "source"
    for i in range(_NUM_IMAGES):
        image = np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)
        mask = np.zeros((16, 16), np.uint8)
        mask[4:8, 4 : 5 + i % 8] = 255
        for kind, pixels in (("images", image), ("masks", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(root / kind / f"case_{i:02d}.png"), pixels)
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, bytes]:
    """Returns the objects of the dataset that one thread makes from the folder."""
    output = str(folder.parent / "out")
    _prepare(str(folder), output)
    return _objects(output)


@pytest.fixture
def source(folder: Path, faulty_bucket: FaultyBucket) -> str:
    """Returns the URL of a copy of the folder."""
    url = f"{faulty_bucket.url}/source"
    store = open_store(url)
    for path in folder.rglob("*.png"):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    faulty_bucket.proxy.clear()
    return url


def _downloads(proxy: FaultProxy) -> Counter[str]:
    """Returns how often each source file was requested."""
    return Counter(e.name for e in proxy.log if e.kind == "get" and "/source/" in e.name)


def test_a_bucket_gets_the_bytes_of_a_folder_with_few_downloads(
    source: str, expected: dict[str, bytes], faulty_bucket: FaultyBucket
) -> None:
    proxy, output = faulty_bucket.proxy, f"{faulty_bucket.url}/out"
    _prepare(source, output)
    downloads = _downloads(proxy)
    # The masks are a sample as well, from which their encoding is found.
    times = {kind: {n for name, n in downloads.items() if f"/{kind}/" in name}
             for kind in ("images", "masks")}  # fmt: skip
    assert len(downloads) == 2 * _NUM_IMAGES == 2 * NUM_SAMPLED
    assert times == {"images": {1}, "masks": {2}}
    assert proxy.count("list") <= 5
    # One request per staged object, and at most one per staged object and shard.
    assert (proxy.count("put", "scan-"), proxy.count("stat", "scan-")) == (8, 0)
    assert proxy.count("get", "scan-") <= 8 * sum(name.endswith(".tfrecord") for name in expected)
    assert _objects(output) == expected

    proxy.clear()  # finished already: recognized by listings
    _prepare(source, output)
    assert _downloads(proxy) == Counter()
    assert proxy.count("list") <= 3
    assert sum(proxy.count(kind) for kind in ("put", "session", "delete")) == 0

    # Names and sizes stay the same.
    store = open_store(source)
    data = bytearray(store.get("masks/case_00.png"))
    data[-20] ^= 1
    store.put("masks/case_00.png", bytes(data))
    proxy.clear()
    with pytest.raises(UsageError, match="the files of the source changed"):
        _prepare(source, output)
    assert _downloads(proxy) == Counter()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("get", "source/images/case_17"),
        ("put", "out/prep-state/scan-[0-7]"),  # about half of them
        ("put", r"out/train-.*\.tfrecord"),
    ],
)
def test_after_a_refused_request_nothing_looks_whole_and_the_rest_is_kept(
    kind: Kind, name: str, source: str, expected: dict[str, bytes], faulty_bucket: FaultyBucket
) -> None:
    proxy, output = faulty_bucket.proxy, f"{faulty_bucket.url}/out"
    proxy.add(Fault("status", status=403, kinds=(kind,), name=name))
    with pytest.raises(StorageError, match="permission denied"):
        _prepare(source, output)
    staged = _staged_images(output)
    assert not {MANIFEST_NAME, SAMPLES_NAME} & _objects(output).keys()
    proxy.clear()
    _prepare(source, output)
    is_chosen = kind == "put" and "train" in name  # and the choice of the first command is kept
    num_sampled = 0 if is_chosen else NUM_SAMPLED
    assert _downloads(proxy).total() == 2 * (_NUM_IMAGES - staged) + num_sampled
    assert _objects(output) == expected


def _staged_images(output: str) -> int:
    """Returns how many images are in staged objects that a later run keeps."""
    staging = open_store(f"{output}/prep-state")
    names = [stat.name for stat in staging.list() if stat.name.startswith("scan-")]
    return sum(len(read_index(staging, name) or ()) for name in names)


@pytest.mark.cluster
def test_killed_processes_are_continued_with_the_same_bytes(
    source: str, expected: dict[str, bytes], faulty_bucket: FaultyBucket
) -> None:
    proxy, output = faulty_bucket.proxy, f"{faulty_bucket.url}/out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in _OPTIONS.items()]
    command = [sys.executable, "-m", "data_prep", source, output, "--num-processes=2", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        proxy.stop_after(4, process.kill)
        process.communicate(timeout=60)
    assert process.returncode < 0
    proxy.clear()
    assert 0 < _staged_images(output) < _NUM_IMAGES
    assert MANIFEST_NAME not in _objects(output)
    _prepare(source, output)
    assert _objects(output) == expected


def test_objects_that_the_server_decompresses_are_compared_by_reading_them(
    folder: Path, source: str, expected: dict[str, bytes], faulty_bucket: FaultyBucket
) -> None:
    from google.cloud import storage

    proxy, output = faulty_bucket.proxy, f"{faulty_bucket.url}/out"
    client = storage.Client(project="p", client_options={"api_endpoint": proxy.address})
    packed = [f"case_{i:02d}.png" for i in (3, 4, 30)]
    for name in (f"images/{each}" for each in packed):
        url = f"{source}/{name}".removeprefix(f"gs://{BUCKET}/")
        blob = client.bucket(BUCKET).blob(url)
        blob.content_encoding = "gzip"
        blob.upload_from_string(gzip.compress((folder / name).read_bytes()))
    proxy.clear()
    _prepare(source, output)
    # The manifest has a digest of the listed sizes.
    assert _objects(output) | {MANIFEST_NAME: b""} == expected | {MANIFEST_NAME: b""}
    proxy.clear()
    _prepare(source, output)  # finished already
    pairs = {f"{kind}/{name}" for kind in ("images", "masks") for name in packed}
    assert {name.partition("/source/")[2] for name in _downloads(proxy)} == pairs
