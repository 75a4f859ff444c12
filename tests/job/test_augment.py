"""Augmentation: one field for image and mask, drawn from (seed, epoch, sample) alone."""

import subprocess
import sys
from typing import Any

import cv2
import numpy as np
import pytest

from flexunet.errors import UsageError
from flexunet.settings import parse_settings
from job.config import AugmentationConfig
from job.data.augment import augment, distortion_field, elastic_field
from job.data.random_streams import SampleKey

KINDS = [
    name.removesuffix("_probability")
    for name in AugmentationConfig.model_fields
    if name.endswith("_probability")
]
GEOMETRIC = [kind for kind in KINDS if kind not in ("sharpening", "brightening")]


def only(*kinds: str, **values: Any) -> AugmentationConfig:
    chances: dict[str, Any] = {f"{kind}_probability": float(kind in kinds) for kind in KINDS}
    return AugmentationConfig(enabled=True, **chances, **values)


def sample(height: int = 96, width: int = 128, channels: int = 1, bits: int = 8) -> tuple[Any, Any]:
    """Returns a picture of its own mask: two ellipses of 0 and the largest value."""
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(mask, (width // 3, height // 3), (width // 6, height // 5), 20, 0, 360, 1, -1)
    cv2.ellipse(
        mask, (2 * width // 3, 2 * height // 3), (width // 8, height // 9), 0, 0, 360, 1, -1
    )
    image = mask.astype(np.uint16 if bits > 8 else np.uint8) * (2**bits - 1)
    return np.repeat(image[..., np.newaxis], channels, axis=-1), mask


def run(image: Any, mask: Any, config: AugmentationConfig, **values: Any) -> tuple[Any, Any]:
    options = {"seed": 7, "epoch": 2, "index": 5, "value_max": 255, **values}
    value_max = options.pop("value_max")
    return augment(image, mask, SampleKey(**options), config=config, value_max=value_max)


@pytest.mark.parametrize("channels", [2, 4, 5, 64])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_augment_treats_each_channel_as_a_grey_image(channels: int, dtype: Any) -> None:
    _, mask = sample(48, 64)
    value_max = int(np.iinfo(dtype).max)
    rng = np.random.default_rng(channels)
    image = rng.integers(0, value_max, (48, 64, channels), endpoint=True).astype(dtype)
    config = only(*KINDS)
    found, found_mask = run(image, mask, config, value_max=value_max)
    assert (found.shape, found.dtype) == (image.shape, image.dtype)
    for channel in {0, 1, channels - 1}:
        grey, grey_mask = run(image[..., channel, np.newaxis], mask, config, value_max=value_max)
        # OpenCV rounds one channel and four at different places.
        difference = np.abs(found[..., channel].astype(int) - grey[..., 0])
        assert difference.max() <= 1
        assert np.array_equal(found_mask, grey_mask)


@pytest.mark.parametrize(("channels", "bits"), [(1, 8), (3, 8), (1, 12), (3, 16)])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in GEOMETRIC), tuple(GEOMETRIC)])
def test_augment_moves_image_and_mask_by_one_field(
    kinds: tuple[str, ...], channels: int, bits: int
) -> None:
    image, mask = sample(channels=channels, bits=bits)
    moved_image, moved_mask = run(image, mask, only(*kinds), value_max=2**bits - 1)
    assert (moved_image.shape, moved_image.dtype) == (image.shape, image.dtype)
    assert (moved_mask.shape, moved_mask.dtype) == (mask.shape, mask.dtype)
    assert (moved_mask != mask).mean() > 0.003
    # Linear and nearest interpolation may differ on the pixels of an edge, and nowhere else.
    bright = (moved_image[..., 0] > (2**bits - 1) / 2).astype(np.uint8)
    assert (bright != moved_mask).mean() < 0.003
    inner = cv2.erode(moved_mask, np.ones((3, 3))) == cv2.dilate(moved_mask, np.ones((3, 3)))
    assert (bright == moved_mask)[inner].all()
    assert (moved_image == moved_image[..., :1]).all()


def test_augment_without_a_draw_returns_its_arguments() -> None:
    image, mask = sample()
    for config in (AugmentationConfig(), only()):
        same_image, same_mask = run(image, mask, config)
        assert same_image is image
        assert same_mask is mask


def test_augment_never_writes_into_its_arguments() -> None:
    image, mask = sample()
    image_before, mask_before = image.copy(), mask.copy()
    run(image, mask, only(*KINDS))
    assert (image == image_before).all()
    assert (mask == mask_before).all()


def test_augment_is_a_function_of_seed_epoch_and_sample() -> None:
    image, mask = sample()
    config = only("deformation", "distortion", "rotation")
    first = run(image, mask, config)
    again = run(image, mask, config)
    assert (first[0] == again[0]).all()
    assert (first[1] == again[1]).all()
    for other in ({"seed": 8}, {"epoch": 3}, {"index": 6}, {"copy": 1}):
        assert (run(image, mask, config, **other)[0] != first[0]).any(), other


def test_augment_gives_the_same_pixels_in_another_process() -> None:
    code = (
        "import zlib, numpy as np; from job.data.augment import *;"
        "i = np.arange(64 * 48, dtype='u2').reshape(64, 48, 1); m = (i[..., 0] % 3).astype('u1');"
        "c = AugmentationConfig(enabled=True, deformation_probability=1, hflip_probability=1);"
        "i, m = augment(i, m, SampleKey(1, 2, 3), config=c, value_max=65535);"
        "print(zlib.crc32(i.tobytes() + m.tobytes()))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert found[0] == found[1]


def test_one_more_kind_leaves_the_draws_of_the_others() -> None:
    image, mask = sample()
    some = only("rotation", "distortion")
    # A deformation of strength 0 draws its noise and moves nothing.
    more = only("rotation", "distortion", "deformation", "brightening", deformation_alpha=0.0)
    for index in range(4):
        plain, bright = (run(image, mask, config, index=index) for config in (some, more))
        assert (plain[1] == bright[1]).all()


def test_probabilities_are_met() -> None:
    image, mask = sample(16, 16)
    config = AugmentationConfig(**{**only().model_dump(), "hflip_probability": 0.3})
    changed = [run(image, mask, config, index=index)[0] is not image for index in range(2000)]
    # 600 expected, standard deviation 20.5.
    assert 520 < sum(changed) < 680


@pytest.mark.parametrize("shape", [(6, 8), (7, 5), (6, 6)])
def test_flips_and_half_turns_are_exact(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 2**16, (*shape, 1), dtype=np.uint16)
    mask = rng.integers(0, 5, shape, dtype=np.uint8)
    half_turn = only("rotation", rotation_angles=(180.0,))
    for config, axes in ((only("hflip"), (1,)), (only("vflip"), (0,)), (half_turn, (0, 1))):
        moved_image, moved_mask = run(image, mask, config, value_max=65535)
        assert (moved_image == np.flip(image, axes)).all()
        assert (moved_mask == np.flip(mask, axes)).all()


def test_a_quarter_turn_is_anticlockwise_and_exact() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    mask = rng.integers(0, 5, (9, 9), dtype=np.uint8)
    moved_image, moved_mask = run(image, mask, only("rotation", rotation_angles=(90.0,)))
    assert (moved_image == np.rot90(image)).all()  # numpy turns anticlockwise
    assert (moved_mask == np.rot90(mask)).all()


def test_shrink_leaves_a_black_frame() -> None:
    image = np.full((100, 60, 1), 200, np.uint8)
    moved, mask = run(image, np.ones((100, 60), np.uint8), only("shrink", shrink_ratios=(0.5,)))
    assert mask.sum() == 50 * 30
    assert (moved[26:74, 16:44] == 200).all()
    assert not moved[:24].any()
    assert not moved[:, :14].any()


def test_shear_shifts_each_row_by_its_distance_from_the_middle() -> None:
    mask = np.zeros((41, 41), np.uint8)
    mask[:, 20] = 1
    _, moved = run(mask[..., np.newaxis], mask, only("shear", shear_factors=(0.5,)))
    # Row 10 is 10 above the middle: it comes from 5 pixels further left, so the line goes right.
    assert [int(moved[row].argmax()) for row in (10, 20, 30)] == [25, 20, 15]


def test_barrel_magnifies_and_pincushion_shrinks_inside_the_circle() -> None:
    mask = np.zeros((101, 101), np.uint8)
    cv2.circle(mask, (50, 50), 20, 1, -1)
    image = mask[..., np.newaxis] * 255
    areas = {}
    for kind, amount in (("barrel", 0.5), ("pincushion", -0.5)):
        values = {f"{kind}_radius": 0.4, f"{kind}_amount": amount}
        _, moved = run(image, mask, only(kind, **values))
        areas[kind] = int(moved.sum())
    # Where d * sin(pi d / 80.8)**amount is 20: d = 22.75 pixels for 0.5, 14.7 for -0.5.
    assert areas["barrel"] == pytest.approx(np.pi * 22.75**2, rel=0.02)
    assert areas["pincushion"] == pytest.approx(np.pi * 14.7**2, rel=0.02)


def test_barrel_takes_one_of_its_centres() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 1), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    config = only("barrel", barrel_radius=0.2, barrel_centers=(0.25, 0.25, 0.75, 0.75))
    quarters = set()
    for index in range(12):
        y, x = np.nonzero((run(image, mask, config, index=index)[0] != image)[..., 0])
        quarters.add((round(x.mean() / 16), round(y.mean() / 16)))
    assert quarters == {(1, 1), (3, 3)}


def test_elastic_field_has_the_strength_of_the_reference() -> None:
    # Smoothed over three channels as the reference does: 26.5 * sqrt(0.0495**2 * 2 + 0.0499**2).
    field = elastic_field(512, 512, 1300, 8, np.random.default_rng(0))
    assert field.std() == pytest.approx(2.27, rel=0.1)
    assert abs(field.mean()) < 0.3
    # Neighbours at a distance of sigma are correlated by exp(-1/4).
    for part in field:
        assert np.corrcoef(part[:, :-8].ravel(), part[:, 8:].ravel())[0, 1] == pytest.approx(
            0.78, abs=0.06
        )
    assert abs(np.corrcoef(field[0].ravel(), field[1].ravel())[0, 1]) < 0.15


def test_distortion_field_reaches_its_largest_shift() -> None:
    field = distortion_field(200, 300, 6.0, 40, np.random.default_rng(0))
    assert field.shape == (2, 200, 300)
    assert np.abs(field).max(axis=(1, 2)) == pytest.approx([6, 6], rel=0.05)
    assert np.abs(np.diff(field, axis=2)).max() < 0.5


def test_random_fields_repeat_the_edge() -> None:
    image = np.full((64, 64, 1), 100, np.uint8)
    moved, mask = run(image, np.ones((64, 64), np.uint8), only("deformation", "distortion"))
    assert (moved == 100).all()
    assert mask.all()


def test_sharpening_is_the_three_by_three_kernel_and_leaves_the_mask() -> None:
    image = np.full((5, 5, 1), 100, np.uint16)
    image[2, 2] = 110
    mask = np.ones((5, 5), np.uint8)
    moved, same = run(image, mask, only("sharpening", sharpening_k=0.5), value_max=140)
    # The middle: 110 * 5 - 8 * 100 * 0.5 = 150, cut to 140; a neighbour: 100 - 0.5 * 10 = 95.
    assert moved[2, 2, 0] == 140
    assert moved[1:4, 1:4].ravel().tolist() == [95] * 4 + [140] + [95] * 4
    assert moved[0, 0, 0] == 100
    assert same is mask


@pytest.mark.parametrize(
    ("dtype", "value_max", "expected"),
    [(np.uint8, 255, [10, 130, 255]), (np.uint16, 4095, [161, 281, 401])],
)
def test_brightening_is_alpha_x_plus_beta_levels(
    dtype: Any, value_max: int, expected: list[int]
) -> None:
    # 1.2 x + 10 * value_max / 255; 4095 / 255 * 10 = 160.6, so 160.6, 280.6, 400.6.
    image = np.array([[[0], [100], [200]]] * 3, dtype)
    if value_max == 255:
        image[:, 2] = 230
    moved, _ = run(image, np.zeros((3, 3), np.uint8), only("brightening"), value_max=value_max)
    assert moved[0, :, 0].tolist() == expected
    assert moved.dtype == dtype


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shrink_ratios": [0.0]}, "shrink_ratios"),
        ({"rotation_angles": []}, "rotation_angles is empty"),
        ({"barrel_centers": [0.5]}, "barrel_centers=.*pairs x,y"),
        ({"hflip_probability": 1.5}, r"hflip_probability=1\.5"),
        ({"pincushion_amount": 0.5}, r"pincushion_amount=0\.5"),
        ({"hflip_probabilty": 1}, "did you mean"),
    ],
)
def test_augmentation_config_refuses_impossible_values(values: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_settings(AugmentationConfig, values, "config.yaml")


def test_augment_is_imported_without_cv2_and_tensorflow() -> None:
    code = "import sys, job.data.augment; print({'cv2', 'tensorflow'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
