import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import imagecodecs
import pytest

from job.doctor import (
    EXTRAS,
    Check,
    GpuEvidence,
    bucket_check,
    core_check,
    dicom_check,
    disk_check,
    extras_check,
    main,
    memory_check,
    python_check,
    verdict,
    why_no_gpu,
)

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("version", "system", "state"),
    [
        ((3, 11, 9), "Linux", "ok"),
        ((3, 13, 0), "Linux", "ok"),
        ((3, 10, 1), "Linux", "failed"),
        ((3, 14, 0), "Linux", "failed"),
        ((3, 12, 0), "Windows", "failed"),
    ],
)
def test_python_check_knows_what_is_supported(
    version: tuple[int, ...], system: str, state: str
) -> None:
    check = python_check(version, system)
    assert check.state == state
    assert check.exit_code == (2 if state == "failed" else 0)


def evidence(
    *,
    visible_devices: str | None = None,
    has_driver: bool = True,
    has_libcuda: bool = True,
    is_cuda_build: bool = True,
    has_cuda_libraries: bool = True,
) -> GpuEvidence:
    return GpuEvidence(
        visible_devices=visible_devices,
        has_driver=has_driver,
        has_libcuda=has_libcuda,
        is_cuda_build=is_cuda_build,
        has_cuda_libraries=has_cuda_libraries,
    )


@pytest.mark.parametrize(
    ("found", "reason", "remedy"),
    [
        (evidence(has_driver=False, has_libcuda=False), "no NVIDIA driver", "on the CPU"),
        (evidence(has_libcuda=False), "libcuda.so.1 is missing", "--gpus all"),
        (evidence(visible_devices=""), "hidden by CUDA_VISIBLE_DEVICES=''", "unset"),
        (evidence(visible_devices="-1"), "hidden by CUDA_VISIBLE_DEVICES='-1'", "unset"),
        (evidence(is_cuda_build=False, visible_devices="0"), "built for CPUs", "--extra gpu"),
        (evidence(has_cuda_libraries=False), "cuDNN", "flexunet[gpu]"),
        (evidence(), "driver and libraries are installed", "TF_CPP_MIN_LOG_LEVEL=0"),
        # Libraries do not help a machine without a driver: the first cause is named.
        (
            evidence(has_driver=False, has_libcuda=False, has_cuda_libraries=False),
            "no NVIDIA driver",
            "on the CPU",
        ),
    ],
)
def test_why_no_gpu_names_the_first_cause(found: GpuEvidence, reason: str, remedy: str) -> None:
    actual_reason, actual_remedy = why_no_gpu(found)
    assert reason in actual_reason
    assert remedy in actual_remedy


def test_cores_and_memory_of_this_machine_are_positive() -> None:
    assert float(core_check().found) > 0
    assert float(memory_check().found.split()[0]) > 0


def test_disk_check_finds_the_place_of_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    check = disk_check("disk", str(tmp_path / "not" / "yet"))
    assert check.found.endswith(f"free in {tmp_path}")


def test_bucket_check_writes_and_leaves_nothing(tmp_path: Path) -> None:
    assert bucket_check(str(tmp_path)).state == "ok"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_bucket_check_says_what_is_wrong_and_how_bad(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    no_folder = bucket_check(str(tmp_path / "file"))
    assert (no_folder.state, no_folder.exit_code) == ("failed", 2)
    assert no_folder.found == f"{tmp_path}/file is a file, not a folder; give a folder"
    unwritable = bucket_check("/proc/none")
    assert (unwritable.state, unwritable.exit_code) == ("failed", 5)
    assert "/proc/none" in unwritable.found
    unsupported = bucket_check("s3://bucket")
    assert (unsupported.state, unsupported.exit_code) == ("failed", 2)


def test_dicom_check_names_what_can_be_read_and_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compressed = "JPEG (baseline, extended, lossless), JPEG-LS, JPEG 2000"
    assert dicom_check() == Check("DICOM", "ok", f"uncompressed, RLE, {compressed}")
    remedy = "to read them: pip install 'flexunet[dicom]'"
    monkeypatch.setattr(imagecodecs.JPEGLS, "available", False)
    found = f"uncompressed, RLE; not {compressed} (imagecodecs lacks decoders)"
    assert dicom_check() == Check("DICOM", "note", found, remedy)
    (tmp_path / "imagecodecs.py").write_text("raise OSError('libjpeg.so: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "imagecodecs")
    assert dicom_check().found.endswith("(imagecodecs cannot be imported: OSError)")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert dicom_check().found.endswith("(imagecodecs is not installed)")


def test_extras_check_knows_all_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"])
    for name, extra in EXTRAS.items():
        monkeypatch.setitem(
            EXTRAS, name, replace(extra, is_installed=lambda name=name: name != "tfio")
        )
    missing = "tfio (tensorflow-io, with TensorFlow 2.17)"
    found = f"gpu, dicom, encoders, onnx, mlflow; not installed: {missing}"
    remedy = "only if you need one: pip install 'flexunet[NAME]'"
    assert extras_check() == Check("extras", "ok", found, remedy)
    monkeypatch.delitem(EXTRAS, "tfio")
    assert extras_check() == Check("extras", "ok", "gpu, dicom, encoders, onnx, mlflow")


def test_verdict_names_what_stands_in_the_way() -> None:
    ok = Check("Python", "ok", "3.12")
    note = Check("GPU", "note", "none")
    failed = Check("storage", "failed", "gs://a: no such bucket", exit_code=2)
    assert verdict([ok]) == "Training can run here."
    assert verdict([ok, note]) == "Training can run here; see the notes: GPU."
    assert verdict([ok, note, failed]) == "Training cannot run here: storage failed."


def test_doctor_reports_this_machine_and_a_bad_bucket(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["can_train"] is True
    names = [check["name"] for check in report["checks"]]
    assert names == [
        "Python",
        "TensorFlow",
        "GPU",
        "precision",
        "cores",
        "memory",
        "disk (cache)",
        "disk (here)",
        "Ray",
        "DICOM",
        "extras",
    ]
    assert main(["--bucket", "/proc/none"]) == 5
    table = capsys.readouterr().out
    assert "/proc/none" in table
    assert table.endswith("Training cannot run here: storage failed.\n")


def test_doctor_reports_a_wrong_option_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--buckets", "x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
