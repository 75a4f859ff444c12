"""`prep --format inbreast`: whole releases, counts beside published ones, no patient data."""

import contextlib
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.datadict import DicomDictionary

from data_prep import cli
from data_prep.config import PrepConfig, identity_of
from data_prep.imaging.geometry import apply_geometry, fit
from data_prep.phantoms.inbreast_release import write_release
from data_prep.pipeline import prepare
from data_prep.prep_input import sources_of
from data_prep.shards.manifest import MANIFEST_NAME, read_manifest
from data_prep.shards.records import decode_example, unframe_record
from data_prep.shards.sample_table import read_samples
from data_prep.sources import inbreast
from flexunet.errors import ContentError, UsageError
from flexunet.settings import parse_settings
from flexunet.storage import open_store

SIZE = 64
TEXT = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"}
# The reader looks at these two; another value than theirs is refused, see below.
READ = {"PhotometricInterpretation", "BurnedInAnnotation"}
CANARY = "CANARY^JANE DOES"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Returns a copy, for each test, of a release of 12 patients with 42 images."""
    folder = tmp_path_factory.mktemp("inbreast") / "release"
    assert write_release(str(folder), 12, SIZE, 1) == 42
    return folder


def _prepare(source, output, **options):
    values = {"format": "inbreast", "image_size": 32, "num_processes": 1} | options
    config = parse_settings(PrepConfig, values, "test")
    sources = sources_of(str(source), config)
    return prepare(sources, str(output), config, progress=False)


def _samples(folder):
    """Yields (row, image, mask) of every sample."""
    store = open_store(str(folder))
    manifest, _ = read_manifest(store)
    for row in read_samples(store, manifest).to_pylist():
        record = store.get(row["shard"], row["offset"], row["length"])
        features = decode_example(unframe_record(record, where="x"))
        images = [
            cv2.imdecode(np.frombuffer(features[key], np.uint8), cv2.IMREAD_UNCHANGED)
            for key in ("image/encoded", "image/segmentation/class/encoded")
        ]
        yield row, *images


def _run(*arguments):
    command = [sys.executable, "-m", "data_prep", *map(str, arguments), "--format", "inbreast"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_prepare_writes_what_the_release_holds(release, tmp_path):
    manifest = _prepare(release, tmp_path / "out", geometry="pad", rois=("mass", "cluster"))
    assert (manifest.channels, manifest.bit_depth, manifest.value_max) == (1, 16, 2**14 - 1)
    assert (manifest.split_rule, manifest.group_rule) == ("drawn", "by patient of the release")
    assert sum(info.num_groups for info in manifest.splits.values()) == 12
    num_foreground = 0
    for row, image, mask in _samples(tmp_path / "out"):
        number, patient = row["id"].split("_")[:2]
        assert row["group"] == patient
        source = pydicom.dcmread(release / "AllDICOMs" / row["filename"])
        assert (row["source_height"], row["source_width"]) == source.pixel_array.shape
        # 0.07 mm of 4084 rows, on 64 rows.
        assert row["spacing_y_mm"] == row["spacing_x_mm"] == pytest.approx(0.07 * 4084 / 64)
        place = fit(source.pixel_array.shape, (32, 32), kind="pad")
        shown = apply_geometry(source.pixel_array, place, 32, 32, nearest=False)
        # 12 bits become 14: 4095 -> 16383.
        scale = 16383 / (2**source.BitsStored - 1)
        assert np.array_equal(image, np.floor(shown * scale + 0.5))
        truth = np.zeros(source.pixel_array.shape, np.uint8)
        with contextlib.suppress(FileNotFoundError):
            for roi in inbreast.read_rois(
                (release / "AllXML" / f"{number}.xml").read_bytes(), name="x"
            ):
                if roi.kind in ("mass", "cluster") and roi.is_outline:
                    inbreast.fill_polygon(truth, roi.points)
        assert np.array_equal(mask, apply_geometry(truth, place, 32, 32, nearest=True))
        num_foreground += bool(mask.any())
    assert num_foreground >= 8


def test_command_prints_what_was_found_beside_what_was_published(release, tmp_path, capsys):
    arguments = [str(release), str(tmp_path / "out"), "--format", "inbreast", "--image-size", "16"]
    assert cli.main([*arguments, "--num-processes", "1"]) == 0
    said = capsys.readouterr().out
    # 12 patients, nine with four views and three with two; 42 * 107 / 410 = 11 with a mass, and
    # 42 * 9 / 410 = 1 with a second one. The first two are of one patient.
    lines = [[cell.strip() for cell in line.split("│")] for line in said.splitlines()]
    rows = {line[1]: line[2:-1] for line in lines if len(line) == 8}
    assert rows["all"] == ["", "", "42", "12", "410 images, 115 cases"]
    files = len(list((release / "AllXML").iterdir()))
    assert rows["no annotation"][:3] == ["", "", str(42 - files)]
    assert 0 < int(rows["no annotation"][3]) <= 12
    assert "A patient may have several cases" in " ".join(said.split())
    assert rows["mass"] == ["12", "0", "11", "10", "116 in 107 images"]
    assert set(rows) == {"all", "no annotation", *inbreast.KINDS}
    assert max(map(len, said.split("found in the release")[1].splitlines())) <= 80
    assert cli.main([*arguments, "--num-processes", "1"]) == 0  # finished already
    assert capsys.readouterr().out == said
    # A dataset of an earlier version, which took the published cases for patients.
    counts = tmp_path / "out" / inbreast.COUNTS_NAME
    counts.write_text(counts.read_text().replace('"410 images, 115 cases"', "410 of 115 patients"))
    assert "410 of" in counts.read_text()
    assert cli.main([*arguments, "--num-processes", "1"]) == 0
    assert capsys.readouterr().out == said


def test_a_release_without_its_format_is_reported(release, tmp_path, capsys):
    assert cli.main([str(release), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("looks like INbreast; give --format inbreast\n")
    (tmp_path / "AllXML").mkdir()
    assert cli.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "no files in images/ and masks/" in capsys.readouterr().err


def test_what_is_left_out_is_reported(release, tmp_path):
    source = tmp_path / "release"
    shutil.copytree(release, source)
    images = sorted((source / "AllDICOMs").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:-10])
    shutil.copy(images[1], images[1].with_stem(images[1].stem + "_2"))
    (source / "AllXML" / "99.xml").write_bytes(b"x")
    with pytest.raises(ContentError, match="several images have its number"):
        _prepare(source, tmp_path / "out")
    manifest = _prepare(source, tmp_path / "out", skip_bad=True)
    assert manifest.num_samples == 40
    rejects = (tmp_path / "out" / "report" / "rejects.csv").read_text()
    assert "bytes of pixels, but" in rejects
    assert "no image with this number" in rejects
    counts = (tmp_path / "out" / inbreast.COUNTS_NAME).read_text()
    assert counts.splitlines()[1] == 'all,,,40,12,"410 images, 115 cases"'


def test_options_that_do_not_fit_are_refused(release, tmp_path):
    for options, message in (
        ({"group_regex": "x"}, "--format inbreast groups by patient"),
        ({"classes": "a=0,0,0;b=1,1,1;c=2,2,2"}, "give two --classes"),
        ({"rois": ("mess",)}, "rois"),
        ({"rois": ()}, "rois"),
        ({"format": "pairs", "rois": ("cluster",)}, "--rois needs --format inbreast"),
    ):
        with pytest.raises(UsageError, match=message):
            _prepare(release, tmp_path / "out", **options)


def test_the_class_is_named_after_the_rois(release, tmp_path):
    classes = {
        "mass": "mass",
        "calcification": "calcification",
        "spiculated,mass": "spiculated+mass",
    }
    for rois, name in classes.items():
        arguments = ["--format", "inbreast", "--rois", rois]
        config = cli.read_config(None, _options(*arguments))
        assert config.classes == f"background=0,0,0;{name}=255,255,255"
        assert identity_of(config)["classes"] == config.classes
    (tmp_path / "prep.yaml").write_text("format: inbreast\nrois: [cluster]\n")
    config = cli.read_config(str(tmp_path / "prep.yaml"), {})
    assert config.classes == "background=0,0,0;cluster=255,255,255"
    named = "none=0,0,0;lesion=9,9,9"
    config = cli.read_config(None, _options(*arguments, "--classes", named))
    assert config.classes == named
    manifest = _prepare(release, tmp_path / "out", rois=("mass", "cluster"))
    assert [each.name for each in manifest.classes] == ["background", "mass+cluster"]
    assert manifest.options["classes"] == "background=0,0,0;mass+cluster=255,255,255"


def _options(*arguments):
    """Returns the options that the command line `arguments` gives, without its own."""
    with cli.command.make_context("prep", ["source", "output", *arguments]) as context:
        own = ("source", "output", "config_file")
        return {name: value for name, value in context.params.items() if name not in own}


# No patient data beyond the hash


def _plant(path):
    """Writes the canary into every text field that a DICOM file can have, and some more."""
    dataset = pydicom.dcmread(path)
    with pydicom.config.disable_value_validation():
        for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
            if vr in TEXT and keyword not in READ and tag >> 16 not in (0x0000, 0x0002):
                dataset.add_new(tag, vr, CANARY)
        block = dataset.private_block(0x0011, CANARY, create=True)
        block.add_new(1, "LO", CANARY)
        item = pydicom.Dataset()
        item.PatientName = CANARY
        dataset.RequestAttributesSequence = [item]
        dataset.file_meta.ImplementationVersionName = CANARY
        dataset.file_meta.SourceApplicationEntityTitle = CANARY
        dataset.preamble = CANARY.encode().ljust(128, b"\0")
        dataset.save_as(path, enforce_file_format=True)


def _plant_in_list(path):
    text = path.read_text()
    text = text.replace("<dict>", f"<!-- {CANARY} --><dict><key>{CANARY}</key><string/>", 1)
    path.write_text(text.replace("Unnamed", CANARY).replace("Point 1", CANARY))


def _everything(folder):
    """Returns all bytes below `folder`, and what its compressed files hold."""
    parts = []
    for path in sorted(Path(folder).rglob("*")):
        parts.append(str(path.relative_to(folder)).encode())
        if path.is_file():
            parts.append(path.read_bytes())
    for row, *_ in _samples(folder) if (Path(folder) / MANIFEST_NAME).exists() else ():
        parts.append(repr(row).encode())
    return b"\n".join(parts)


def _png_kinds(data):
    """Returns the kinds of chunks of every PNG in `data`."""
    kinds, start = set(), data.find(b"\x89PNG\r\n\x1a\n")
    while start >= 0:
        position, kind = start + 8, b""
        while kind != b"IEND":
            length, kind = struct.unpack_from(">I4s", data, position)
            kinds.add(kind)
            position += 12 + length
        start = data.find(b"\x89PNG\r\n\x1a\n", position)
    return kinds


@pytest.mark.parametrize("options", [[], ["--hash-names"]])
def test_no_text_of_the_source_is_in_any_output_byte(tmp_path, options):
    source, output = tmp_path / "release", tmp_path / "out"
    assert write_release(str(source), 4, 48, 1) == 14
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in (source / "AllDICOMs").iterdir():
            _plant(path)
    for path in (source / "AllXML").iterdir():
        _plant_in_list(path)
    images = sorted((source / "AllDICOMs").iterdir())
    planted = images[0].read_bytes()
    assert planted.count(CANARY.encode()) > 1500
    # Broken files too, as errors like to quote what they did not understand.
    images[0].write_bytes(planted[: len(planted) // 2])
    images[1].write_bytes(planted[:-40])
    images[2].write_bytes(planted.replace(b"MONOCHROME2", CANARY.encode()[:11]))
    (source / "AllXML" / images[3].name.split("_")[0]).with_suffix(".xml").write_text(
        f'<plist version="1.0"><dict><key>Images</key><integer>{CANARY}</integer></dict></plist>'
    )
    common = [source, output, "--image-size", "16", "--num-processes", "1"]
    failed = _run(*common, *options)
    assert failed.returncode == 3
    staged = _everything(output)
    result = _run(*common, *options, "--skip-bad")
    assert result.returncode == 0, result.stderr
    found = _everything(output)
    assert b".tfrecord" in found
    said = (failed.stderr + result.stderr + failed.stdout + result.stdout).encode()
    for part in ("CANARY", "JANE", "DOES"):
        for where in (staged, found, said):
            assert part.encode() not in where
    # Pixels are compressed, so that text could hide beside them: there is nothing beside them.
    assert _png_kinds(b"".join(p.read_bytes() for p in output.glob("*.tfrecord"))) == {
        b"IHDR", b"IDAT", b"IEND",
    }  # fmt: skip
    assert (tmp_path / "out" / "report" / "rejects.csv").read_text().count("\n") == 5


def test_a_canary_is_found_where_it_is(tmp_path):
    """The search above can fail."""
    (tmp_path / "a").write_bytes(b"xx" + CANARY.encode())
    assert b"JANE" in _everything(tmp_path)
    text = struct.pack(">I4s", 3, b"tEXt") + b"abc" + bytes(4)
    assert b"tEXt" in _png_kinds(b"\x89PNG\r\n\x1a\n" + text + struct.pack(">I4s", 0, b"IEND"))
