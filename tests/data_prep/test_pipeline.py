"""The `prep` command: whole datasets, exit codes, kills and refusals."""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep import cli, report_figures
from data_prep.config import HASH_KEY_VARIABLE, PrepConfig
from data_prep.imaging.geometry import Box, Geometry, apply_geometry
from data_prep.masks.rules import READING_RULES
from data_prep.phantoms.images import write_phantoms
from data_prep.pipeline import prepare
from data_prep.prep_input import pairs_of
from data_prep.shards.manifest import MANIFEST_NAME, FullScaleInfo, read_manifest
from data_prep.shards.records import decode_example, unframe_record
from data_prep.shards.sample_table import read_samples
from data_prep.sources.listings import Listings
from data_prep.sources.pairs import find_pairs, find_sources
from data_prep.splits.names import SPLITS
from flexunet.errors import ContentError, StorageError, UsageError
from flexunet.storage import open_store
from tests.faults.proxy import Fault

_INBREAST = Path(__file__).resolve().parents[3] / "shared" / "data" / "inbreast-mini"


def _make_pair(folder, name, seed):
    """Writes a noisy grey image of 16x16 and a mask with a square of 4x4."""
    for kind in ("images", "masks"):
        os.makedirs(folder / kind, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:8] = 255
    assert cv2.imwrite(str(folder / "images" / f"{name}.png"), image)
    assert cv2.imwrite(str(folder / "masks" / f"{name}.png"), mask)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for i in range(20):
        _make_pair(folder, f"case_{i}", i)
    return folder


def _prepare(source, output, **options):
    values = {"image_size": 16, "num_processes": 1} | options
    config = PrepConfig(**values)
    return prepare(find_sources(str(source)), str(output), config, progress=False)


def _command(*arguments):
    return [sys.executable, "-m", "data_prep", *map(str, arguments)]


def _run(*arguments):
    return subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=120)


def _files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not path.name.startswith(".flexunet-")
    }


def _rows(folder):
    store = open_store(str(folder))
    manifest, _ = read_manifest(store)
    return read_samples(store, manifest).to_pylist()


@pytest.mark.draws
def test_prepare_writes_what_was_read(source, tmp_path):
    manifest = _prepare(source, tmp_path / "out")
    rows = _rows(tmp_path / "out")
    # 80/15/5 % of 20
    assert {name: info.num_samples for name, info in manifest.splits.items()} == {
        "train": 16, "valid": 3, "test": 1,
    }  # fmt: skip
    assert (manifest.channels, manifest.bit_depth, manifest.value_max) == (1, 8, 255)
    assert (manifest.name, manifest.leaky) == ("source", False)
    images = {}
    for row in rows:
        record = (tmp_path / "out" / row["shard"]).read_bytes()[row["offset"] :][: row["length"]]
        features = decode_example(unframe_record(record, where="x"))
        encoded = np.frombuffer(features["image/encoded"], np.uint8)
        images[row["id"]] = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
        truth = cv2.imread(str(source / "images" / f"{row['id']}.png"), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(images[row["id"]], truth)
        assert row["sha256"] == hashlib.sha256(truth.tobytes()).hexdigest()
        assert row["pixels_per_class"] == [240, 16]
        assert features["image/filename"].decode() == row["filename"] == f"{row['id']}.png"
    train = np.stack([images[row["id"]] for row in rows if row["split"] == "train"])
    assert manifest.mean == pytest.approx((train.mean(),), rel=1e-12)
    assert manifest.std == pytest.approx((train.std(),), rel=1e-12)
    names = {"report/statistics.png", "report/rejects.csv"}
    assert names | {f"report/samples-{name}.png" for name in SPLITS} <= set(
        _files(tmp_path / "out")
    )
    assert not (tmp_path / "out" / "prep-state").exists()


@pytest.mark.draws
def test_any_number_of_processes_and_any_place_give_the_same_bytes(source, tmp_path):
    _prepare(source, tmp_path / "a", num_processes=1)
    moved = tmp_path / "elsewhere" / "source"
    shutil.copytree(source, moved)
    _prepare(moved, tmp_path / "b", num_processes=2)
    first, second = _files(tmp_path / "a"), _files(tmp_path / "b")
    assert first == second


def test_masks_of_another_colour_are_not_stored_as_empty(source, tmp_path):
    classes = ("--classes", "background=0,0,0;lesion=255,255,255")
    masks = sorted((source / "masks").iterdir())
    for path in masks:
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert cv2.imwrite(str(path), (mask // 255 * 100).astype(np.uint8))
    command = [str(source), str(tmp_path / "out"), "--image-size=16", "--num-processes=1", *classes]
    code, errors = _main(command)
    assert code == 3
    words = (
        r"case_\d+\.png: has areas .*: 16 pixels of colour 100,100,100 at .*--ignore 100,100,100"
    )
    assert re.search(words, errors.splitlines()[-1])
    assert errors.count("--skip-bad") == 1
    # With noise, the check of a single mask does not find it.
    for seed, path in enumerate(masks):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        noise = np.random.default_rng(seed).integers(-9, 9, mask.shape)
        assert cv2.imwrite(str(path), np.where(mask, 100 + noise, 0).astype(np.uint8))
    code, errors = _main(command)
    assert code == 3
    words = "all 20 masks would be read as empty, but 20 of them have pixels in colours of no class"
    assert words in errors.splitlines()[-1]
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_second_run_changes_nothing_and_says_so(source, tmp_path):
    _prepare(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    second = _run(source, tmp_path / "out", "--image-size", "16", "--num-processes", "1")
    assert (second.returncode, "finished already" in second.stderr) == (0, True)
    assert "train" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_finished_dataset_of_earlier_reading_rules_keeps_its_bytes(source, tmp_path, caplog):
    caplog.set_level("INFO")
    manifest = _prepare(source, tmp_path / "out", ignore_id=9)
    assert manifest.reading_rules == READING_RULES
    _prepare(source, tmp_path / "out", ignore_id=9)
    assert "finished already" in caplog.text
    assert "an earlier version read the masks" not in caplog.text
    path = tmp_path / "out" / MANIFEST_NAME
    values = json.loads(path.read_bytes())
    del values["reading_rules"]  # as in earlier versions
    path.write_bytes(json.dumps(values, indent=1).encode())
    before = _files(tmp_path / "out")
    assert _prepare(source, tmp_path / "out", ignore_id=9).reading_rules is None
    assert _files(tmp_path / "out") == before
    assert "an earlier version read the masks, by other rules" in caplog.text


def test_crop_and_flip_are_recorded_for_each_sample(tmp_path):
    write_phantoms(str(tmp_path / "source"), 12, 64, 1)
    options = {"crop": "breast", "flip": "left", "geometry": "pad"}
    manifest = _prepare(tmp_path / "source", tmp_path / "out", image_size=48, **options)
    assert (manifest.crop, manifest.flip) == ("breast", "left")
    flipped = []
    for row in _rows(tmp_path / "out"):
        truth = cv2.imread(str(tmp_path / "source" / "masks" / row["filename"]), 0) // 255
        crop = Box(*(row[f"crop_{name}"] for name in ("top", "left", "height", "width")))
        assert crop.width < 64
        geometry = Geometry(
            row["geometry_kind"],
            *(row[name] for name in ("source_height", "source_width")),
            *(row[name] for name in ("top", "left", "height", "width")),
            crop,
            row["is_flipped"],
        )
        record = (tmp_path / "out" / row["shard"]).read_bytes()[row["offset"] :][: row["length"]]
        features = decode_example(unframe_record(record, where="x"))
        image, mask = (
            cv2.imdecode(np.frombuffer(features[key], np.uint8), cv2.IMREAD_UNCHANGED)
            for key in ("image/encoded", "image/segmentation/class/encoded")
        )
        assert np.array_equal(mask, apply_geometry(truth, geometry, 48, 48, nearest=True))
        # The chest wall is at the left border of the image, also if it was mirrored.
        inner = image[:, row["left"] : row["left"] + row["width"]]
        assert inner[:, 0].mean() > 3 * inner[:, -1].mean()
        flipped.append(row["is_flipped"])
    assert 2 <= sum(flipped) <= 10


def test_crop_that_cuts_the_truth_is_refused(source, tmp_path):
    image = np.zeros((16, 16), np.uint8)
    image[:, :6] = 200
    for i in range(20):
        assert cv2.imwrite(str(source / "images" / f"case_{i}.png"), image)
    # The mask has columns 4 to 7, the breast 0 to 5: two columns of four pixels are lost.
    with pytest.raises(ContentError, match=r"case_0\.png: the crop .* remove 8 pixels"):
        _prepare(source, tmp_path / "out", crop="breast")


def test_dataset_of_a_version_with_fewer_options_is_still_finished(source, tmp_path):
    _prepare(source, tmp_path / "out")
    path = tmp_path / "out" / "dataset.json"
    values = json.loads(path.read_text())
    for name in ("format", "rois", "crop", "flip"):
        del values["options"][name]
    path.write_text(json.dumps(values))
    assert _prepare(source, tmp_path / "out").options == values["options"]


def test_other_options_or_files_in_the_same_place_are_named(source, tmp_path):
    _prepare(source, tmp_path / "out")
    with pytest.raises(UsageError, match="--image-size was 16, now 32"):
        _prepare(source, tmp_path / "out", image_size=32)
    _make_pair(source, "case_3", 99)
    with pytest.raises(UsageError, match="files of the source changed"):
        _prepare(source, tmp_path / "out")


@pytest.mark.draws
@pytest.mark.cluster
def test_killed_and_continued_gives_the_same_bytes(tmp_path):
    source = tmp_path / "source"
    for i in range(200):
        _make_pair(source, f"case_{i}", i)
    _prepare(source, tmp_path / "whole", shard_size=0.02)
    arguments = (source, tmp_path / "out", "--image-size=16", "--shard-size=0.02")
    num_kills = 0
    for wanted in ("scan-*.bin", "*.tfrecord"):
        process = subprocess.Popen(
            _command(*arguments, "--num-processes", "2"), stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not list((tmp_path / "out").rglob(wanted)):
            time.sleep(0.002)
        process.kill()
        num_kills += process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out" / MANIFEST_NAME).exists() or process.returncode == 0
    assert num_kills > 0
    finished = _run(*arguments, "--num-processes", "1")
    assert finished.returncode == 0, finished.stderr
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_interrupt_exits_6_and_leaves_no_process(tmp_path):
    source = tmp_path / "source"
    for i in range(300):
        _make_pair(source, f"case_{i}", i)
    process = subprocess.Popen(
        _command(source, tmp_path / "out", "--image-size=1024", "--num-processes=2"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not list((tmp_path / "out").rglob("scan-*.bin")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 6, errors
    assert "interrupted; the same command continues" in errors
    assert "Traceback" not in errors
    deadline = time.monotonic() + 10
    while _group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_lives(process.pid)
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def _group_lives(group):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["SOURCE", "OUT", "--image-size", "abc"], 2, "image-size"),
        (["SOURCE", "OUT", "--image-size", "0"], 2, "--image-size=0"),
        (["SOURCE", "OUT", "--seed", "1", "--no-such"], 2, "--no-such"),
        (["SOURCE", "OUT", "--classes", "a=1"], 2, "classes"),
        (["SOURCE", "OUT", "--fractions", "0.5,0.1,0.1"], 2, "add up to 1\n"),
        (["SOURCE", "OUT", "--fractions", "60,20,20"], 2, "add up to 1; write 0.6,0.2,0.2\n"),
        (["SOURCE", "OUT", "--fractions", "0.5,0.5"], 2, "'0.5']: give three shares: of"),
        (["SOURCE", "OUT", "--fractions", "0.5,0.5,0,0"], 2, "give three shares: of train"),
        (["SOURCE", "OUT", "--group-regex", "(", "--seed", "1"], 2, "--group-regex"),
        (["SOURCE", "OUT", "--group-regex", "a", "--group-csv", "b"], 2, "cannot be combined"),
        (["SOURCE", "OUT", "--tile", "16", "--image-size", "16"], 2, "leave out one"),
        (["SOURCE", "OUT", "--tile", "16", "--tile-overlap", "16"], 2, "less than --tile"),
        (["SOURCE", "OUT", "--tile-overlap", "4"], 2, "needs --tile"),
        (["SOURCE", "OUT", "--config", "missing.yaml"], 2, "--config missing.yaml: does not exist"),
        (["MISSING", "OUT"], 2, "MISSING: does not exist; give the folder"),
        (["MISSING", "OUT", "--format", "inbreast"], 2, "MISSING: does not exist; give the folder"),
        (["FILE", "OUT"], 2, "FILE: is a file, not a folder; give the folder"),
        (["SOURCE", "FILE"], 2, "FILE: is a file; OUTPUT must be a folder"),
        (["SOURCE", "FILE/out"], 2, "FILE is a file, not a folder; give a folder"),
        (["SOURCE", "SOURCE/images/out"], 2, "is inside the source folder"),
        (["SOURCE", "LINK/out"], 2, "is inside the source folder"),
        (["SOURCE", "SOURCE/test"], 2, "source/test, where the next prep looks for images"),
        (["SOURCE", "SOURCE/val/out"], 2, "source/val, where the next prep looks for images"),
        (["SOURCE", "/proc/no/such"], 5, "/proc/no"),
    ],
)
def test_mistakes_are_one_line_and_a_code(source, tmp_path, arguments, code, words):
    (tmp_path / "FILE").write_bytes(b"kept")
    (tmp_path / "LINK").symlink_to(source / "masks")
    names = {"SOURCE": source.name, "OUT": "out"}
    arguments = [
        re.sub(
            r"^(SOURCE|OUT|FILE|LINK|MISSING)",
            lambda m: str(tmp_path / names.get(m[0], m[0])),
            word,
        )
        for word in arguments
    ]
    code_found, errors = _main(arguments)
    assert code_found == code, errors
    assert words in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_an_output_beside_the_images_does_no_harm(source):
    for output in (source, source / "out"):
        arguments = [str(source), str(output), "--image-size", "16", "--num-processes", "1"]
        for _ in range(2):  # made, found finished
            assert _main(arguments)[0] == 0
    assert len(find_pairs(find_sources(str(source)))[0]) == 20


def _main(arguments):
    """Returns exit code and stderr of the command, run in this process."""
    import io

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(arguments)
    return code, errors.getvalue()


def test_bad_file_exits_3_and_commits_nothing(source, tmp_path):
    (source / "images" / "case_5.png").write_bytes(b"\x89PNG broken")
    code, errors = _main([str(source), str(tmp_path / "out"), "--num-processes=2"])
    assert code == 3
    assert "case_5.png" in errors
    assert "--skip-bad" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "out").glob("*.*"))


def test_missing_mask_exits_3_and_is_named(source, tmp_path):
    os.remove(source / "masks" / "case_5.png")
    code, errors = _main([str(source), str(tmp_path / "out")])
    assert (code, "images/case_5.png: no mask" in errors) == (3, True)


def test_skip_bad_lists_every_file(source, tmp_path, caplog):
    (source / "images" / "case_5.png").write_bytes(b"\x89PNG broken")
    os.remove(source / "masks" / "case_6.png")
    with pytest.raises(ContentError):
        _prepare(source, tmp_path / "out")
    manifest = _prepare(source, tmp_path / "out", skip_bad=True)
    assert manifest.num_samples == 18
    table = f"{tmp_path}/out/{report_figures.REJECTS_NAME}"
    assert f"list of skipped files: {table}" in [record.message for record in caplog.records]
    lines = Path(table).read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "file",
        f"{source}/images/case_5.png",
        f"{source}/images/case_6.png",
    ]


def test_rejects_csv_is_the_same_bytes_each_time(source, tmp_path):
    broken = {
        "1.png": b"\x89PNG broken",
        "2.png": b"II*\0",
        "3.png": b"text",
        "4.png": b"BM broken",
    }
    for name, data in broken.items():
        (source / "images" / f"case_{name}").write_bytes(data)
    tables = []
    for output in (tmp_path / "first", tmp_path / "second"):
        assert _prepare(source, output, skip_bad=True).num_samples == 16
        tables.append((output / report_figures.REJECTS_NAME).read_text())
    assert tables[0] == tables[1]
    assert len(tables[0].splitlines()) == 1 + len(broken)
    assert " at 0x" not in tables[0]


def test_skip_bad_leaves_out_names_that_storage_refuses(source, tmp_path):
    decomposed = "fu\u0308nf"  # as macOS writes the name of a u with diaeresis
    _make_pair(source, decomposed, 30)
    with pytest.raises(ContentError, match=r"normal form C; rename it \(and 1 more"):
        _prepare(source, tmp_path / "out")
    assert _prepare(source, tmp_path / "out", skip_bad=True).num_samples == 20
    listed = (tmp_path / "out" / report_figures.REJECTS_NAME).read_text()
    for kind in ("images", "masks"):
        assert f"{source}/{kind}/{decomposed}.png,its name is not allowed: " in listed


@pytest.mark.parametrize(
    ("name", "shown", "reason"),
    [
        (os.fsdecode(b"caf\xe9"), "caf\\xe9", "it is not UTF-8"),  # Latin-1, of an old archive
        ("a\u202eb", "a\\u202eb", "it contains '\\u202e', which is invisible"),
    ],
    ids=["not UTF-8", "invisible"],  # test processes send each other ids as UTF-8
)
@pytest.mark.parametrize("hash_names", [False, True])
def test_skip_bad_lists_names_that_no_terminal_shows(
    source, tmp_path, name, shown, reason, hash_names
):
    _make_pair(source, "odd", 30)
    for kind in ("images", "masks"):  # OpenCV itself dies of such a name
        os.rename(f"{source}/{kind}/odd.png", f"{source}/{kind}/{name}.png")
    with pytest.raises(ContentError) as caught:
        _prepare(source, tmp_path / "out", hash_names=hash_names)
    assert str(caught.value).startswith(f"{source}/images/{shown}.png: its name is not allowed: ")
    _prepare(source, tmp_path / "out", skip_bad=True, hash_names=hash_names)
    listed = (tmp_path / "out" / report_figures.REJECTS_NAME).read_text()
    assert listed.count(reason) == 2
    assert (f"{source}/masks/{shown}.png," in listed) is not hash_names


def test_images_that_are_links_are_read(source, tmp_path, caplog):
    """As DVC and git-annex leave them; the samples are those of the files themselves."""
    plain = _prepare(source, tmp_path / "plain")
    linked = tmp_path / "linked" / source.name
    for kind in ("images", "masks"):
        (linked / kind).mkdir(parents=True)
        for path in (source / kind).iterdir():
            (linked / kind / path.name).symlink_to(path)
    assert _prepare(linked, tmp_path / "out") == plain
    assert "symbolic" not in caplog.text


def test_source_folder_whose_name_is_not_utf8_is_read(source, tmp_path):
    odd = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    os.rename(source, odd)
    (Path(odd) / "images" / "alone.png").write_bytes(b"")
    manifest = _prepare(odd, tmp_path / "out", skip_bad=True)
    assert (manifest.name, manifest.num_samples) == ("caf\\xe9", 20)
    assert (
        "/caf\\xe9/images/alone.png,"
        in (tmp_path / "out" / report_figures.REJECTS_NAME).read_text()
    )


def test_no_sources_is_a_mistake_in_one_line(tmp_path):
    with pytest.raises(UsageError, match="no sources were given; give at least one"):
        prepare((), str(tmp_path / "out"), PrepConfig())


def test_nothing_usable_is_an_error(tmp_path):
    source = tmp_path / "source"
    _make_pair(source, "a", 1)
    (source / "images" / "a.png").write_bytes(b"")
    with pytest.raises(ContentError, match=r"none of 1 .*a\.png"):
        _prepare(source, tmp_path / "out", skip_bad=True)


def test_skip_bad_says_what_is_left_out_before_it_fails(source, tmp_path, caplog):
    for index in range(18):
        (source / "images" / f"case_{index}.png").write_bytes(b"broken")
    with pytest.raises(UsageError, match="2 groups cannot fill 3 splits"):
        _prepare(source, tmp_path / "out", skip_bad=True)
    (reported,) = [record.message for record in caplog.records if "skipped" in record.message]
    assert reported.startswith(f"skipped 18 files: {source}/images/case_0.png: ")
    assert reported.endswith("; and 13 more")
    assert reported.count("case_") == 5


def test_a_name_without_a_group_is_reported_once(source, tmp_path):
    _make_pair(source, "barrdistorted_1_0.3_23", 30)
    code, errors = _main([str(source), str(tmp_path / "out"), "--group-regex", r"case_(\d+)"])
    assert code == 3
    assert errors.count("barrdistorted_1_0.3_23") == 1
    assert "--group-preset augmented" in errors
    assert "correct --group-regex" in errors


def test_names_of_which_none_has_a_group_are_not_to_be_skipped(source, tmp_path):
    for extra in ((), ("--skip-bad",)):
        code, errors = _main(
            [str(source), str(tmp_path / "out"), "--group-regex", "_(x+)$", *extra]
        )
        assert code == 2  # an option does not fit
        (line,) = (line for line in errors.splitlines() if "no group" in line)
        assert (
            "case_0.png: no group: '_(x+)$' finds nothing in the file name (with its ending" in line
        )
        assert line.endswith("correct --group-regex (same for all 20 files)")


def test_a_table_that_has_none_of_the_files_is_a_wrong_file(source, tmp_path):
    (tmp_path / "groups.csv").write_text("file,group\nother.png,1\n")
    table = str(tmp_path / "groups.csv")
    code, errors = _main([str(source), str(tmp_path / "out"), "--group-csv", table])
    assert code == 3
    assert "case_0.png: has no row in" in errors
    assert "(same for all 20 files)" in errors


def test_rejects_csv_is_safe_in_a_spreadsheet():
    text = report_figures.rejects_csv([("=1+1.png", "@x"), ("plain.png", 'with, "both"')])
    assert text == 'file,reason\n\'=1+1.png,\'@x\nplain.png,"with, ""both"""\n'


def test_hidden_names_are_in_no_output_byte(tmp_path, monkeypatch):
    source = tmp_path / "source"
    for i in range(12):
        _make_pair(source, f"CANARY{i}", i)
    (source / "images" / "CANARY3.png").write_bytes(b"broken")
    os.remove(source / "masks" / "CANARY4.png")
    manifest = _prepare(source, tmp_path / "plain", hash_names=True, skip_bad=True)
    assert manifest.num_samples == 10
    for name, data in _files(tmp_path / "plain").items():
        assert b"CANARY" not in data, name
    # the table is compressed
    assert "CANARY" not in str(_rows(tmp_path / "plain"))
    monkeypatch.setenv(HASH_KEY_VARIABLE, "secret")
    _prepare(source, tmp_path / "keyed", hash_names=True, skip_bad=True)
    ids = [{row["id"] for row in _rows(tmp_path / name)} for name in ("plain", "keyed")]
    assert ids[0].isdisjoint(ids[1])


def test_groups_stay_whole(source, tmp_path):
    manifest = _prepare(source, tmp_path / "out", group_regex=r"case_(\d)")
    rows = _rows(tmp_path / "out")
    splits_of = {}
    for row in rows:
        splits_of.setdefault(row["group"], set()).add(row["split"])
    assert len(splits_of) == 10 == sum(info.num_groups for info in manifest.splits.values())
    assert {len(splits) for splits in splits_of.values()} == {1}


def test_small_splits_are_warned_of(source, tmp_path, caplog):
    _prepare(source, tmp_path / "few", fractions=(0.6, 0.3, 0.1))
    (warning,) = [record for record in caplog.records if "uncertain" in record.msg]
    assert warning.getMessage().startswith("split test has only 2 groups, so its results")


def test_regions_that_are_lost_in_a_smaller_mask_are_reported_and_recorded(
    source, tmp_path, caplog
):
    path = source / "masks" / "case_3.png"
    mask = np.zeros((16, 16), np.uint8)
    mask[4, 4] = mask[6, 10] = 255  # only odd rows and columns are stored
    assert cv2.imwrite(str(path), mask)
    manifest = _prepare(source, tmp_path / "out", image_size=8)
    infos = manifest.reduced.values()
    assert sum(info.num_pictures for info in infos) == 20
    assert sum(info.num_emptied for info in infos) == 1
    assert [sum(info.num_vanished[c] for info in infos) for c in (0, 1)] == [0, 2]
    reported = "2 of 21 mask regions have no pixel left at this size and are lost"
    assert reported in caplog.text
    assert "lost, and with them all foreground of 1 image: they" in caplog.text
    assert "increase --image-size or use --tile" in caplog.text
    # A finished dataset logs it again.
    caplog.clear()
    assert _prepare(source, tmp_path / "out", image_size=8) == manifest
    assert reported in caplog.text


def test_masks_that_keep_their_size_are_not_counted(source, tmp_path, caplog):
    assert _prepare(source, tmp_path / "out").reduced == {}
    assert "have no pixel" not in caplog.text
    assert "lost" not in caplog.text


def test_the_same_image_twice_stays_in_one_split(tmp_path, caplog):
    source = tmp_path / "source"
    for i in range(20):
        _make_pair(source, f"a{i}", i)
        _make_pair(source, f"b{i}", i)
    _prepare(source, tmp_path / "out")
    rows = {row["id"]: row for row in _rows(tmp_path / "out")}
    assert all(rows[f"a{i}"]["split"] == rows[f"b{i}"]["split"] for i in range(20))
    # The table shows the groups that were drawn: of a pair's names, the first.
    assert all(rows[f"b{i}"]["group"] == rows[f"a{i}"]["group"] == f"a{i}" for i in range(20))
    # So do the records: a2's and b2's both name a2.
    store = open_store(str(tmp_path / "out"))
    for row in (rows["a2"], rows["b2"]):
        record = store.get(row["shard"], row["offset"], row["length"])
        features = decode_example(unframe_record(record, where="record"))
        assert (features["image/id"], features["image/group"]) == (row["id"].encode(), b"a2")
    reported = (
        "20 groups share an image with another group and are merged with it: b0 with a0; b1 with"
    )
    assert reported in caplog.text
    assert "b12 with a12; and 15 more\n" in caplog.text


@pytest.mark.parametrize("stored", [{}, {"geometry": "pad"}, {"image_size": 512, "tile": 8}])
def test_blank_images_do_not_join_groups(tmp_path, caplog, stored):
    source = tmp_path / "source"
    for patient in range(12):
        for i in range(3):
            _make_pair(source, f"p{patient:02}_{i}", 10 * patient + i)
        blank = np.full((16, 10), 9, np.uint8)  # which is stored with a border
        for kind in ("images", "masks"):
            value = blank if kind == "images" else 0 * blank
            assert cv2.imwrite(str(source / kind / f"p{patient:02}_0.png"), value)
    options = {"group_regex": "p([0-9]+)", "num_folds": 3} | stored
    _prepare(source, tmp_path / "out", **options)
    rows = _rows(tmp_path / "out")
    assert {row["group"] for row in rows} == {f"{patient:02}" for patient in range(12)}
    reported = "12 images are blank (all pixels are equal); groups that share one are not merged"
    assert f"{reported}: p00_0.png; p01_0.png" in caplog.text
    assert "joined" not in caplog.text


def test_blank_images_in_two_ready_made_splits_are_no_leak(tmp_path):
    for number, name in enumerate(SPLITS):
        for i in range(2):
            _make_pair(tmp_path / "source" / name, f"{name}{i}", 10 * number + i)
        path = tmp_path / "source" / name / "images" / f"{name}0.png"
        assert cv2.imwrite(str(path), np.zeros((16, 16), np.uint8))
    assert not _prepare(tmp_path / "source", tmp_path / "out").leaky


def test_groups_that_are_too_few_as_they_were_joined_say_so(tmp_path):
    source = tmp_path / "source"
    for i in range(4):
        _make_pair(source, f"a{i}", 0)
    with pytest.raises(UsageError, match=r"1 group cannot fill 3 splits.*3 groups merged.*a1 with"):
        _prepare(source, tmp_path / "out")


def _make_deep(source, num_images, marked):
    """Writes noise of 12 bits; those of `marked` have one pixel of 65535."""
    for i in range(num_images):
        _make_pair(source, f"p{i:02}", i)
        pixels = np.random.default_rng(i).integers(0, 4096, (40, 40), dtype=np.uint16)
        pixels[5, 5] = 65535 if i in marked else 4095
        mask = np.zeros((40, 40), np.uint8)
        mask[9:20, 9:20] = 255
        assert cv2.imwrite(str(source / "images" / f"p{i:02}.png"), pixels)
        assert cv2.imwrite(str(source / "masks" / f"p{i:02}.png"), mask)


@pytest.mark.parametrize("stored", [{"image_size": 40}, {"image_size": 512, "tile": 16}])
def test_markers_are_clipped_reported_and_recorded(tmp_path, caplog, stored):
    _make_deep(tmp_path / "source", 12, [3])
    manifest = _prepare(tmp_path / "source", tmp_path / "out", **stored)
    assert (manifest.bit_depth, manifest.value_max) == (16, 4095)
    assert manifest.full_scale == FullScaleInfo(
        rule="found", lowest_max=4095, highest=65535, num_clipped_pictures=1, num_clipped_pixels=1
    )
    assert read_manifest(open_store(str(tmp_path / "out")))[0] == manifest
    assert "full_scale" not in manifest.options
    reported = "1 of 12 images have pixels above the full scale 4095 of the other images"
    assert reported in caplog.text
    assert "p03.png (1 pixel, up to 65535)" in caplog.text
    table = (tmp_path / "out" / "report" / "clipped.csv").read_text()
    assert table == "file,num_pixels_above,max_value\np03.png,1,65535\n"


def test_markers_in_many_images_are_reported_and_kept(tmp_path, caplog):
    _make_deep(tmp_path / "source", 12, [3, 5])
    assert _prepare(tmp_path / "source", tmp_path / "out", image_size=40).value_max == 65535
    reported = (
        "above 4095); if they are markers, give --full-scale 4095, which makes the images 16 times "
        "brighter"
    )
    assert f"{reported}: p03.png; p05.png" in caplog.text
    assert not (tmp_path / "out" / "report" / "clipped.csv").exists()
    caplog.clear()
    manifest = _prepare(tmp_path / "source", tmp_path / "given", image_size=40, full_scale=4095)
    assert (manifest.value_max, manifest.full_scale.num_clipped_pictures) == (4095, 2)
    assert "if they are markers" not in caplog.text
    assert (
        "2 of 12 images have pixels above the full scale 4095; they are clipped to" in caplog.text
    )


def test_full_scale_is_given_recorded_and_part_of_the_identity(tmp_path, caplog):
    _make_deep(tmp_path / "source", 12, [3])
    options = {"image_size": 40}
    manifest = _prepare(tmp_path / "source", tmp_path / "out", full_scale=65535, **options)
    assert (manifest.value_max, manifest.options["full_scale"]) == (65535, 65535)
    assert manifest.full_scale.rule == "given"
    assert "above the full scale" not in caplog.text
    with pytest.raises(UsageError, match="--full-scale was 65535, now None"):
        _prepare(tmp_path / "source", tmp_path / "out", **options)


def test_full_scale_of_8_bit_images_is_refused(source, tmp_path):
    with pytest.raises(UsageError, match="--full-scale 4095: only for 16-bit images"):
        _prepare(source, tmp_path / "out", full_scale=4095)
    manifest = _prepare(source, tmp_path / "out")
    assert b"full_scale" not in (tmp_path / "out" / "dataset.json").read_bytes()
    assert manifest.full_scale is None


def test_ready_made_splits_are_kept_and_leaks_named(tmp_path):
    for number, name in enumerate(("train", "valid", "test")):
        for i in range(3):
            _make_pair(tmp_path / "source" / name, f"{name}{i}", 10 * number + i)
    manifest = _prepare(tmp_path / "source", tmp_path / "good")
    assert {row["id"][:-1] == row["split"] for row in _rows(tmp_path / "good")} == {True}
    assert (manifest.leaky, manifest.split_rule) == (False, "ready-made")
    # Whose groups are known is another thing than who made the splits.
    assert manifest.group_rule == "by file"
    regex = {"group_regex": r"([a-z]+[0-9])"}
    of_names = _prepare(tmp_path / "source", tmp_path / "grouped", **regex)
    assert (of_names.split_rule, of_names.group_rule) == (
        "ready-made", "by regular expression ([a-z]+[0-9])",
    )  # fmt: skip
    _make_pair(tmp_path / "source" / "test", "test0", 1)  # the image of train1
    with pytest.raises(ContentError, match=r"train \(train1\) and test \(test0\)"):
        _prepare(tmp_path / "source", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.*"))
    assert _prepare(tmp_path / "source", tmp_path / "out", allow_leaks=True).leaky


@pytest.mark.parametrize("emptied", ["train", "valid", "test"])
@pytest.mark.parametrize("method", ["broken image", "a double"])
def test_a_ready_made_split_of_which_nothing_is_left_stops_prep(emptied, method, tmp_path):
    for number, name in enumerate(("train", "valid", "test")):
        for i in range(2):
            _make_pair(tmp_path / "source" / name, f"{name}{i}", 10 * number + i)
    folder = tmp_path / "source" / emptied
    other = tmp_path / "source" / ("test" if emptied == "train" else "train")
    for i in range(2):
        if method == "broken image":
            (folder / "images" / f"{emptied}{i}.png").write_bytes(b"\x89PNG broken")
        else:
            _make_pair(other, f"{emptied}{i}", 50 + i)
    with pytest.raises(ContentError, match=f"no pair of split {emptied} is usable"):
        _prepare(tmp_path / "source", tmp_path / "out", skip_bad=True)
    assert not list((tmp_path / "out").glob("*.*"))


def test_splits_and_folds_without_a_class_are_reported(source, tmp_path, caplog):
    blank = np.zeros((16, 16), np.uint8)
    for i in range(1, 20):
        assert cv2.imwrite(str(source / "masks" / f"case_{i}.png"), blank)
    _prepare(source, tmp_path / "out", num_folds=3)
    (row,) = [row for row in _rows(tmp_path / "out") if row["pixels_per_class"][1]]
    folds = [f"fold {k} of 3" for k in (1, 2, 3)]
    own_fold = [] if row["fold"] is None else [folds[row["fold"]]]
    has_class = {f"split {row['split']}", *own_fold}
    for place in (*(f"split {name}" for name in SPLITS), *folds):
        assert (f"{place} has no pixel of class foreground" in caplog.text) != (place in has_class)


def test_folds_cover_train_and_valid(source, tmp_path):
    manifest = _prepare(source, tmp_path / "out", num_folds=4)
    rows = _rows(tmp_path / "out")
    assert manifest.num_folds == 4
    assert {row["fold"] for row in rows if row["split"] != "test"} == {0, 1, 2, 3}
    assert {row["fold"] for row in rows if row["split"] == "test"} == {None}


def test_yaml_gives_options_and_the_command_line_wins(source, tmp_path):
    (tmp_path / "prep.yaml").write_text("image_size: 16\nseed: 5\nnum_processes: 1\n")
    code, errors = _main(
        [str(source), str(tmp_path / "out"), f"--config={tmp_path}/prep.yaml", "--seed=6"]
    )
    assert code == 0, errors
    manifest, _ = read_manifest(open_store(str(tmp_path / "out")))
    assert (manifest.image_height, manifest.seed) == (16, 6)
    (tmp_path / "prep.yaml").write_text("image_sise: 16\n")
    code, errors = _main([str(source), str(tmp_path / "x"), f"--config={tmp_path}/prep.yaml"])
    assert (code, "did you mean 'image_size'" in errors) == (2, True)


def test_full_disk_exits_5_and_continues(source, tmp_path):
    # A limit on the size of a file is the nearest to a full disk that needs no other machine.
    import resource

    def prepare_with(num_bytes):
        return subprocess.run(
            _command(source, tmp_path / "out", "--image-size=64", "--num-processes=1"),
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes)),
        )

    found = prepare_with(2_000)
    assert found.returncode == 5, found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    assert prepare_with(100_000_000).returncode == 0


def test_source_that_disappears_is_a_storage_error(source, tmp_path):
    pairs, _ = find_pairs(find_sources(str(source)))
    os.remove(source / "masks" / "case_2.png")
    config = PrepConfig()
    with pytest.raises(StorageError, match=r"case_2\.png: was deleted"):
        pairs_of([(pair, pair.id) for pair in pairs], config, Listings())


def _cpu_s():
    """Returns the seconds of CPU that ended child processes have had."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_answers_at_once_and_names_units():
    before = _cpu_s()
    found = _run("--help")
    assert found.returncode == 0
    assert _cpu_s() - before < 5  # under 1 s on a machine that does nothing else
    for word in ("pixels", "MB", "[default: 512]", "--group-preset", "skip-bad"):
        assert word in found.stdout


def test_prep_imports_nothing_heavy():
    code = (
        "import sys, data_prep.cli\n"
        "heavy = {'tensorflow', 'ray', 'pyarrow', 'matplotlib', 'cv2', 'google.cloud.storage'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.skipif(not _INBREAST.is_dir(), reason="the real mammograms are not beside the project")
def test_real_mammograms(tmp_path):
    manifest = _prepare(_INBREAST, tmp_path / "out", image_size=512, group_preset="augmented")
    # 24 pairs, of which 4 have colour
    assert (manifest.num_samples, manifest.channels) == (24, 3)
    splits_of = {}
    for row in _rows(tmp_path / "out"):
        splits_of.setdefault(row["group"], set()).add(row["split"])
    assert {len(splits) for splits in splits_of.values()} == {1}
    grey = _prepare(
        _INBREAST, tmp_path / "grey", image_size=512, group_preset="augmented", channels="grey"
    )
    assert grey.channels == 1


def test_bucket_holds_the_bytes_of_a_folder(source, tmp_path, bucket_url):
    _prepare(source, tmp_path / "out")
    remote = f"{bucket_url}/dataset"
    _prepare(source, remote)
    store = open_store(remote)
    assert {stat.name: store.get(stat.name) for stat in store.list()} == _files(tmp_path / "out")
    _prepare(source, remote)  # finished already
    with pytest.raises(UsageError, match="--seed was 1, now 2"):
        _prepare(source, remote, seed=2)


def test_bucket_is_a_source_too(source, tmp_path, bucket_url):
    store = open_store(f"{bucket_url}/source")
    for name, data in _files(source).items():
        store.put(name, data)
    _prepare(f"{bucket_url}/source", tmp_path / "remote")
    _prepare(source, tmp_path / "local")
    assert _files(tmp_path / "remote") == _files(tmp_path / "local")


def test_an_account_that_only_creates_prepares_continues_and_skips(
    source, tmp_path, faulty_bucket, caplog
):
    """The roles objectCreator and objectViewer: nothing is replaced, and nothing needs to go."""
    proxy, remote = faulty_bucket.proxy, f"{faulty_bucket.url}/dataset"
    proxy.creates_only = True
    # Refused in the last moment, when all but the commit is there.
    proxy.add(Fault("status", status=403, kinds=("put",), name="dataset.json", count=1))
    with pytest.raises(StorageError, match="permission denied"):
        _prepare(source, remote)
    store = open_store(remote)
    before = {stat.name: stat.generation for stat in store.list()}
    assert "report/statistics.png" in before

    for _ in range(2):  # continues, then finds it finished
        caplog.clear()
        _prepare(source, remote)
        (warning,) = [
            r.message for r in caplog.records if "have no permission to delete" in r.message
        ]
        assert re.match(rf"{remote}/prep-state: \d+ temporary objects remain \(0\.0 MB\)", warning)
    stats = {stat.name: stat for stat in store.list()}
    assert {name: stats[name].generation for name in before} == before
    _prepare(source, tmp_path / "out")
    kept = {name for name in stats if not name.startswith("prep-state/")}
    assert {name: store.get(name) for name in kept} == _files(tmp_path / "out")

    proxy.creates_only = False  # who may delete clears up
    _prepare(source, remote)
    assert {stat.name for stat in store.list()} == kept
