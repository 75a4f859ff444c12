"""The manifest: written, read, and refused where it is wrong."""

import hashlib
import json

import pytest

from data_prep.shards.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SHARD_PATTERN,
    Manifest,
    parse_manifest,
    read_manifest,
    shard_name,
)
from flexunet.errors import ContentError, UsageError
from flexunet.storage import open_store
from tests.data_prep.shards.manifests import manifest_values


def test_shard_name_matches_its_pattern():
    assert shard_name("train", 0, 8) == "train-00000-of-00008.tfrecord"
    assert SHARD_PATTERN.fullmatch(shard_name("test", 3, 12))


def test_manifest_survives_writing_and_is_named_by_its_digest(tmp_path):
    manifest = Manifest.model_validate(manifest_values())
    store = open_store(str(tmp_path))
    store.put(MANIFEST_NAME, manifest.to_json())
    found, digest = read_manifest(store)
    assert found == manifest
    assert digest == hashlib.sha256(manifest.to_json()).hexdigest()


def test_manifest_of_a_version_that_counted_no_regions_is_read():
    values = json.loads(Manifest.model_validate(manifest_values()).to_json())
    del values["reduced"]
    assert parse_manifest(json.dumps(values).encode(), "here").reduced == {}


def test_read_manifest_says_how_to_make_a_dataset(tmp_path):
    with pytest.raises(
        UsageError, match=r"dataset\.json is missing; give --data the folder that flexunet prep"
    ):
        read_manifest(open_store(str(tmp_path)))


def test_read_manifest_refuses_a_huge_file(tmp_path):
    with open(tmp_path / MANIFEST_NAME, "wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ContentError, match="67108865 bytes"):
        read_manifest(open_store(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"mean": [1.0, 2.0]}, "mean and std must have 1"),
        ({"splits": {"train": {"num_samples": 2, "num_groups": 1}}}, "do not add up"),
        ({"surprise": 1}, "surprise"),
        ({"classes": [{"id": 1, "name": "x", "color": [0, 0, 0]}]}, "class ids must be"),
    ],
)
def test_parse_manifest_names_the_problem(changes, problem):
    values = {"format_version": 1} | manifest_values(**changes)
    with pytest.raises(ContentError, match=problem):
        parse_manifest(json.dumps(values).encode(), "here")


@pytest.mark.parametrize("name", ["../train-00000-of-00001.tfrecord", "x", "test-00000-of-1.x"])
def test_parse_manifest_refuses_shard_names_that_lead_elsewhere(name):
    values = {"format_version": 1} | manifest_values()
    values["shards"][0]["name"] = name
    with pytest.raises(ContentError, match="shard name"):
        parse_manifest(json.dumps(values).encode(), "here")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff"])
def test_parse_manifest_refuses_what_is_not_json(data):
    with pytest.raises(ContentError, match="here"):
        parse_manifest(data, "here")


@pytest.mark.parametrize(
    ("earlier", "rule"),
    [
        ({"split_rule": "by file"}, "by file"),
        ({"split_rule": "by group, preset augmented"}, "by preset augmented"),
        ({"split_rule": "by group, patient of the release"}, "by patient of the release"),
        (
            {
                "split_rule": "ready-made",
                "options": {"group_preset": None, "group_regex": None, "group_csv": None},
            },
            "by file",
        ),
        (
            {
                "split_rule": "ready-made",
                "options": {"group_preset": None, "group_regex": None, "group_csv": "a.csv"},
            },
            "by table",
        ),
        ({"split_rule": "ready-made"}, "not recorded"),
        ({"split_rule": "ready-made", "options": {}}, "not recorded"),
    ],
)
def test_groups_of_earlier_manifests_are_read_from_what_they_say(earlier, rule):
    data = json.dumps({**manifest_values(**earlier), "format_version": 1}).encode()
    assert parse_manifest(data, "x").group_rule == rule
