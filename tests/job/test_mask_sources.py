"""A mask is kept only if it is of the image that is there now."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from flexunet.errors import StorageError, UsageError
from flexunet.process_pool import InlineExecutor, Workers
from flexunet.storage import (
    Forbidden,
    NotFound,
    ObjectMeta,
    PreconditionFailed,
    join_url,
    open_store,
)
from job.infer import main
from job.inference import chunk, mask_sources, pipeline
from job.inference.mask_sources import MaskSource, plan_masks, read_sources, write_sources
from job.inference.options import InferConfig
from job.inference.pipeline import InferResult, infer
from tests.conftest import FaultyBucket

QUIET = InferConfig(progress=False, batch_size=1)
OVERWRITE = QUIET.model_copy(update={"overwrite": True})
SIDE = 32


def image(*, is_left: bool) -> bytes:
    """Returns a BMP file with a disc on one side; both sides take as many bytes."""
    y, x = np.mgrid[:SIDE, :SIDE]
    inside = (y - 16) ** 2 + (x - (10 if is_left else 22)) ** 2 <= 36
    noise = np.random.default_rng(3).integers(20, 90, (SIDE, SIDE))
    return bytes(cv2.imencode(".bmp", (noise + 120 * inside).astype(np.uint8))[1])


LEFT, RIGHT = image(is_left=True), image(is_left=False)


class Case:
    """A folder of images, its masks, and the run that predicts them."""

    def __init__(self, run: Path, images: str, output: str) -> None:
        self.arguments = str(run), images, output
        self.images, self.output = open_store(images), open_store(output)

    def put(self, *names: str, data: bytes = LEFT) -> None:
        for name in names:
            self.images.put(name, data)

    def infer(self, config: InferConfig = QUIET, **options: Any) -> tuple[int, int]:
        """Returns how many masks were written, and how many were kept."""
        found = self.result(config, **options)
        return found.num_written, found.num_kept

    def result(self, config: InferConfig = QUIET, **options: Any) -> InferResult:
        return infer(*self.arguments, config, **options)

    def sides(self, *names: str) -> list[str]:
        """Returns the side on which the mask of each image has its disc."""
        return [self._side(name) for name in names]

    def _side(self, name: str) -> str:
        data = np.frombuffer(self.output.get(f"{name}.png"), np.uint8)
        mask = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
        assert mask is not None
        assert mask.any()
        return "left" if np.argmax(mask.any(0)) < SIDE // 2 - 2 else "right"

    def records(self) -> list[str]:
        names = [stat.name for stat in self.output.list()]
        return [name for name in names if name.startswith("inference-images-")]


@pytest.fixture(params=["folder", "bucket"])
def case(
    request: pytest.FixtureRequest, trained_run: Path, tmp_path: Path, bucket_url: str
) -> Case:
    base = bucket_url if request.param == "bucket" else str(tmp_path)
    return Case(trained_run, join_url(base, "images"), join_url(base, "masks"))


@pytest.fixture
def local_case(trained_run: Path, tmp_path: Path) -> Case:
    return Case(trained_run, str(tmp_path / "images"), str(tmp_path / "masks"))


def _job_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """TensorFlow may warn of its own, depending on the tests before."""
    return [record.message for record in caplog.records if record.name.startswith("job.")]


def test_a_replaced_image_is_predicted_again(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.put("a.bmp", "b.bmp", "c.bmp")
    assert case.infer() == (3, 0)
    assert case.infer() == (0, 3)
    assert case.sides("a", "b", "c") == ["left", "left", "left"]
    case.put("a.bmp", data=RIGHT)  # as many bytes
    assert len(LEFT) == len(RIGHT)
    case.put("c.bmp", data=RIGHT + b"\0")  # more bytes, which the reader does not mind
    caplog.clear()
    with caplog.at_level("INFO", logger="job.inference"):
        assert case.infer() == (2, 1)
    assert _job_messages(caplog) == [
        f"{case.output.url}: 2 images changed after the mask was made, first a.bmp; predicted again"
    ]
    assert case.sides("a", "b", "c") == ["right", "left", "right"]
    assert case.infer() == (0, 3)
    assert case.records() == ["inference-images-000002.json"]


def test_an_image_of_another_name_or_size_is_another_image(local_case: Case) -> None:
    """Also where the time is the same, as an archive may give all files one time."""
    folder = Path(local_case.images.url)
    local_case.put("a.bmp")
    local_case.infer()
    stat = (folder / "a.bmp").stat()
    (folder / "a.bmp").rename(folder / "a.tif")
    assert local_case.infer() == (1, 0)
    assert local_case.infer() == (0, 1)
    local_case.put("a.tif", data=LEFT + b"\0")
    os.utime(folder / "a.tif", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert local_case.infer() == (1, 0)


def test_an_image_that_is_written_again_unchanged(case: Case) -> None:
    """A bucket has checksums; in a folder the modification time counts."""
    case.put("a.bmp", "b.bmp")
    case.infer()
    case.put("a.bmp")
    assert case.infer() == ((1, 1) if case.images.local_root else (0, 2))


def test_a_second_folder_of_images_is_refused(local_case: Case, tmp_path: Path) -> None:
    local_case.put("a.bmp", "b.bmp")
    local_case.infer()
    for name in ("a.bmp", "c.bmp"):
        second = Case(Path(local_case.arguments[0]), str(tmp_path / name), local_case.output.url)
        second.put(name, data=RIGHT)
        message = (
            rf"has masks of images from {tmp_path}/images, and this call has images from "
            rf"{tmp_path}/{name}; give another OUTPUT \(for example .*-{name}\), or --overwrite "
            "to replace masks of the same name"
        )
        with pytest.raises(UsageError, match=message):
            second.infer()
        assert local_case.infer() == (0, 2)
    # Both: the masks of the first folder stay and are named.
    found = second.result(OVERWRITE)
    assert (found.num_written, found.gone) == (1, ("a.png", "b.png"))
    # They are never taken for masks of the second folder, also where all else is the same.
    shutil.copy2(tmp_path / "images" / "a.bmp", tmp_path / "c.bmp" / "a.bmp")
    assert second.infer() == (1, 1)


def test_masks_of_images_that_are_gone_are_named(
    local_case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    local_case.put("a.bmp", "b.bmp", "c.bmp")
    local_case.infer()
    path = os.path.join(local_case.images.url, "b.bmp")
    os.rename(path, path + ".away")
    assert local_case.result().gone == ("b.png",)
    assert main([*local_case.arguments, "--no-progress"]) == 0
    shown = capsys.readouterr().out
    assert "0 written, 2 kept" in shown
    assert "1 mask has no image in IMAGES any more, first b.png; delete if not needed\n" in shown
    os.rename(path + ".away", path)
    assert local_case.infer() == (0, 3)
    local_case.images.delete("b.bmp")
    local_case.output.delete("b.png")
    assert local_case.result().gone == ()


@contextmanager
def dying(num_images: int) -> Iterator[Workers]:
    """Yields workers of a call that dies after it has predicted so many images."""

    class Dying(InlineExecutor):
        def submit(self, *arguments: Any, **options: Any) -> Any:
            nonlocal num_images
            if num_images == 0:
                raise KeyboardInterrupt
            num_images -= 1
            done = super().submit(*arguments, **options)
            done.result()
            return done

    yield Workers(Dying(), lambda: 1)


@pytest.mark.parametrize("config", [QUIET, OVERWRITE], ids=["changed", "overwrite"])
@pytest.mark.parametrize("num_images", [0, 1])
def test_a_call_that_is_killed_never_makes_an_old_mask_look_new(
    local_case: Case, num_images: int, config: InferConfig
) -> None:
    case = local_case
    case.put("a.bmp", "b.bmp")
    case.infer()
    case.put("a.bmp", "b.bmp", data=RIGHT)
    with pytest.raises(KeyboardInterrupt):
        case.infer(config, open_workers=lambda: dying(num_images))
    assert case.sides("a", "b") == ["right" if num_images else "left", "left"]
    assert case.infer() == (2 - num_images, num_images)
    assert case.sides("a", "b") == ["right", "right"]


def test_a_call_that_is_killed_between_its_records_keeps_no_mask_of_another_run(
    local_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_case.put("a.bmp")
    local_case.infer()
    other = OVERWRITE.model_copy(update={"flips": "both"})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("job.inference.pipeline.claim_output", killed)
        local_case.infer(other)
    assert local_case.infer() == (1, 0)


def test_masks_of_an_earlier_version_are_predicted_again(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    case.put("a.bmp", "b.bmp", "c.bmp")
    case.infer()
    case.output.delete("c.png")
    for name in case.records():
        case.output.delete(name)
    caplog.clear()
    assert case.infer() == (3, 0)
    assert _job_messages(caplog) == [
        f"{case.output.url}: no record of the image of 2 masks (earlier versions of flexunet wrote "
        "none), first a.png; predicted again"
    ]
    assert case.infer() == (0, 3)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{}",
        b"[]",
        b'{"masks": {"a.png": [1]}}',
        b'{"masks": 3}',
        b'{"masks": {"a.png": ["a", Infinity, 1, 1, 0]}}',
        b"\xff",
        b"[" * 9999,
    ],
)
def test_a_damaged_record_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    store = open_store(str(tmp_path))
    store.put("inference-images-000007.json", damage)
    assert read_sources(store, ["inference-images-000007.json"]) == {}
    assert caplog.messages == [f"{tmp_path}/inference-images-000007.json: damaged, not used"]


def test_an_unreadable_image_leaves_no_mask_of_the_image_before(local_case: Case) -> None:
    local_case.put("a.bmp", "b.bmp")
    local_case.infer()
    local_case.put("a.bmp", data=b"no picture")
    result = local_case.result()
    assert [name for name, _ in result.unreadable] == ["a.bmp"]
    names = [stat.name for stat in local_case.output.list() if stat.name.endswith(".png")]
    assert names == ["b.png", "overlays/b.png"]
    assert local_case.infer() == (0, 1)


def test_an_overlay_of_the_image_before_is_deleted(local_case: Case) -> None:
    local_case.put("a.bmp", "b.bmp")
    local_case.infer()
    local_case.put("a.bmp", data=RIGHT)
    assert local_case.infer(QUIET.model_copy(update={"overlays": False})) == (1, 1)
    names = [stat.name for stat in local_case.output.list("overlays/")]
    assert names == ["overlays/b.png"]


def test_an_account_that_may_not_replace_objects(
    trained_run: Path, faulty_bucket: FaultyBucket, caplog: pytest.LogCaptureFixture
) -> None:
    base = faulty_bucket.url
    case = Case(trained_run, join_url(base, "images"), join_url(base, "masks"))
    case.put("a.bmp")
    case.infer()
    case.put("b.bmp")
    faulty_bucket.proxy.creates_only = True
    assert case.infer() == (1, 1)
    assert case.infer() == (0, 2)
    assert len(case.records()) == 2  # the newest counts
    faulty_bucket.proxy.creates_only = False
    case.put("a.bmp", data=RIGHT)
    faulty_bucket.proxy.creates_only = True
    with pytest.raises(Forbidden, match=r"objectUser .*; or give another OUTPUT: this mask is out"):
        case.infer()
    case.put("c.bmp")
    faulty_bucket.proxy.creates_only = False
    case.images.delete("a.bmp")
    case.put("a.bmp", data=b"no picture")
    faulty_bucket.proxy.creates_only = True
    assert case.infer() == (1, 1)
    assert "these credentials cannot delete 2 objects out of date, first a.png" in caplog.text


def test_two_calls_that_begin_at_once_do_not_share_a_record(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    source = MaskSource("a.bmp", 1, 2, None, 0)
    write_sources(store, [], {"a.png": source})
    with pytest.raises(PreconditionFailed):
        write_sources(store, [], {"a.png": source})


def test_a_number_that_other_calls_used_and_deleted_is_not_taken_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    source = MaskSource("a.bmp", 1, 2, None, 0)
    write_sources(store, [], {"a.png": source})
    listed = ["inference-images-000001.json"]
    write_sources(store, listed, {"b.png": source})
    write_sources(store, [*listed, "inference-images-000002.json"], {"c.png": source})
    with pytest.raises(PreconditionFailed, match=r"000003.json after inference-images-000002"):
        write_sources(store, listed, {"d.png": source})
    assert [each.name for each in store.list()] == ["inference-images-000003.json"]


@contextmanager
def repeated() -> Iterator[Workers]:
    """Yields workers that predict each part twice, as if the first one had died at its end."""

    class Repeated(InlineExecutor):
        def submit(self, fn: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
            fn(*arguments, **options)
            return super().submit(fn, *arguments, **options)

    yield Workers(Repeated(), lambda: 1)


def test_an_account_that_may_not_replace_objects_can_repeat_a_part(
    trained_run: Path, faulty_bucket: FaultyBucket, caplog: pytest.LogCaptureFixture
) -> None:
    base = faulty_bucket.url
    case = Case(trained_run, join_url(base, "images"), join_url(base, "masks"))
    case.put("a.bmp", "b.bmp", "c.bmp")
    faulty_bucket.proxy.creates_only = True
    assert case.infer(open_workers=repeated) == (3, 0)
    assert "overlay" not in caplog.text
    assert case.infer() == (0, 3)
    # A stopped call has left an overlay, and then the image has changed.
    case.put("d.bmp")
    case.output.put("overlays/d.png", b"of the image before")
    assert case.infer() == (1, 3)
    assert (
        f"{case.output.url}: these credentials cannot replace 1 overlay of an earlier call, first "
        "overlays/d.png; delete them or give another OUTPUT"
    ) in caplog.messages
    with pytest.raises(Forbidden) as refused:
        chunk._put_mask(case.output, "d.png", b"another mask", was_listed=False)
    assert "out of date" not in str(refused.value)


@contextmanager
def interrupted(at: int, other: Callable[[], Any]) -> Iterator[Workers]:
    """Yields workers that predict `at` images, then let another call run, then go on."""

    class Interrupted(InlineExecutor):
        def submit(self, *arguments: Any, **options: Any) -> Any:
            nonlocal at
            if at == 0:
                other()
            at -= 1
            done = super().submit(*arguments, **options)
            with suppress(StorageError):
                done.result()
            return done

    yield Workers(Interrupted(), lambda: 1)


OTHER = OVERWRITE.model_copy(update={"flips": "both"})


@pytest.mark.parametrize("at", [1, 2])
def test_a_call_stops_if_another_run_takes_over_its_output(local_case: Case, at: int) -> None:
    """At its next part, and also if the other call begins during the last part."""
    case = local_case
    case.put("a.bmp", "b.bmp", "c.bmp")
    masks = {}

    def other() -> None:
        assert case.infer(OTHER) == (3, 0)
        masks.update({each.name: each.generation for each in case.output.list()})

    message = "another infer took over OUTPUT; .* run it again with --overwrite"
    with pytest.raises(StorageError, match=message) as stopped:
        case.infer(open_workers=lambda: interrupted(at, other))
    assert stopped.value.exit_code == 5
    assert {each.name: each.generation for each in case.output.list()} == masks
    assert case.infer(OTHER.model_copy(update={"overwrite": False})) == (0, 3)


def test_a_call_stops_if_another_one_begins_during_its_last_mask(
    local_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_case.put("a.bmp")
    put = chunk._put_mask
    calls: list[str] = []

    def late(*arguments: Any, **options: Any) -> None:
        if not calls:
            calls.append("other")
            assert local_case.infer(OTHER) == (1, 0)
        put(*arguments, **options)

    monkeypatch.setattr(chunk, "_put_mask", late)
    with pytest.raises(StorageError, match="took over OUTPUT"):
        local_case.infer()


def test_calls_of_the_same_run_for_single_images_share_one_output(
    local_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = local_case
    case.put("a.bmp", "b.bmp", "c.bmp")
    run, images, output = case.arguments

    def single(name: str) -> InferResult:
        return infer(run, f"{images}/{name}.bmp", output, QUIET)

    write = mask_sources.write_sources
    begun: list[str] = []

    def late(*arguments: Any) -> None:
        if not begun:  # both have listed OUTPUT, and the other one is first
            begun.append("b")
            assert single("b").num_written == 1
        write(*arguments)

    monkeypatch.setattr(pipeline, "write_sources", late)
    predict = pipeline._predict_all

    def during(*arguments: Any) -> Any:
        if "c" not in begun:
            begun.append("c")
            assert single("c").num_written == 1
        return predict(*arguments)

    monkeypatch.setattr(pipeline, "_predict_all", during)
    assert single("a").num_written == 1
    assert case.infer() == (0, 3)


def test_a_call_that_others_always_outrun_ends_with_a_remedy(
    local_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_case.put("a.bmp")

    def outrun(*_: Any) -> None:
        raise PreconditionFailed("exists")

    monkeypatch.setattr(pipeline, "write_sources", outrun)
    with pytest.raises(StorageError, match="another infer is writing here; wait"):
        local_case.infer()


def test_a_record_that_another_call_deletes_after_the_list_is_read_again(
    local_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_case.put("a.bmp")
    local_case.infer()
    read, calls = mask_sources.read_sources, []

    def deleted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise NotFound("inference-images-000001.json: no such file")
        return read(*arguments)

    monkeypatch.setattr(pipeline, "read_sources", deleted)
    assert local_case.infer() == (0, 1)


def test_the_record_of_many_images_is_small(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    names = [f"patient-{index:05d}/image" for index in range(2_000)]
    images = [
        ObjectMeta(f"{name}.png", 10**7, 1_732_000_000_123_456_789, 2**32 - 1) for name in names
    ]
    plan = plan_masks(images, {}, {}, overwrite=False)
    assert len(plan.todo) == len(images)
    write_sources(store, [], plan.sources)
    (record,) = store.list()
    assert record.size / len(images) < 120
    found = read_sources(store, [record.name])
    assert found == plan.sources
    objects = {name: ObjectMeta(name, 1, 5, None) for name in found}
    plan = plan_masks(images, objects, found, overwrite=False)
    assert (plan.todo, plan.gone) == ((), ())
    assert plan.sources == found  # nothing to write


def test_names_that_are_not_utf8_are_recorded(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    name = os.fsdecode(b"caf\xe9.png")
    sources = {name: MaskSource(name, 1, 2, None, 0)}
    write_sources(store, [], sources)
    assert read_sources(store, ["inference-images-000001.json"]) == sources
    assert list(json.loads(store.get("inference-images-000001.json"))) == ["columns", "masks"]
