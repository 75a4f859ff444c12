"""Augmentation: one field for image and mask, drawn from (seed, epoch, sample) alone."""

import subprocess
import sys
import zlib
from typing import Any

import cv2
import numpy as np
import pytest

from flexunet.errors import UsageError
from flexunet.settings import parse_settings
from job.config import AugmentationConfig, TrainConfig, identity_of, values_of_identity
from job.data.augmentation.augment import augment
from job.data.augmentation.warps import distortion_field, elastic_field
from job.data.random_streams import SampleKey

KINDS = [
    name.removesuffix("_probability")
    for name in AugmentationConfig.model_fields
    if name.endswith("_probability")
]
OF_PIXELS = ("sharpening", "brightening", "contrast", "gamma", "blur", "noise")
GEOMETRIC = [kind for kind in KINDS if kind not in OF_PIXELS]


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
    # Noise is independent in each channel.
    config = only(*(kind for kind in KINDS if kind != "noise"))
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
        "import zlib, numpy as np; from job.data.augmentation.augment import *;"
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


NEW_KINDS = ("scale", "crop", "contrast", "gamma", "blur", "noise")


@pytest.mark.parametrize(
    ("dtype", "value_max", "channels", "crc"),
    [(np.uint8, 255, 3, 2357188032), (np.uint16, 4095, 1, 3090530278)],
)
def test_kinds_of_earlier_versions_give_their_pixels(
    dtype: Any, value_max: int, channels: int, crc: int
) -> None:
    """Runs of version 0.2 and before resume with these."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, value_max, (40, 48, channels), endpoint=True).astype(dtype)
    mask = rng.integers(0, 4, (40, 48)).astype(np.uint8)
    earlier = [kind for kind in KINDS if kind not in NEW_KINDS]
    found = 0
    for probability in (0.5, 1.0):
        chances: dict[str, Any] = {f"{kind}_probability": probability for kind in earlier}
        config = AugmentationConfig(enabled=True, **chances)
        for index in range(12):
            key = SampleKey(3, index % 3, index, index % 2)
            pair = augment(image, mask, key, config=config, value_max=value_max)
            found = zlib.crc32(pair[0].tobytes() + pair[1].tobytes(), found)
    assert found == crc


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_a_kind_with_its_own_stream_has_its_probability_and_leaves_the_others(kind: str) -> None:
    rng = np.random.default_rng(5)
    image = rng.integers(60, 180, (16, 16, 1), dtype=np.uint8)
    mask = image[..., 0] // 128
    values = {**only("rotation").model_dump(), f"{kind}_probability": 0.3}
    plain, config = only("rotation"), AugmentationConfig(**values)
    same = 0
    for index in range(150):
        first, second = (run(image, mask, each, index=index) for each in (plain, config))
        is_equal = np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
        same += is_equal
    # 105 expected, standard deviation 5.6; a tiny amount may change no pixel.
    assert 86 < same < 128
    again = [run(image, mask, config, index=3) for _ in range(2)]
    assert np.array_equal(again[0][0], again[1][0])


@pytest.mark.parametrize(
    ("limits", "areas"), [((2.0, 2.0), (4.0, 4.0)), ((0.5, 0.5), (0.25, 0.25)), (None, None)]
)
def test_scale_enlarges_about_a_random_point_and_mirrors_at_the_border(
    limits: tuple[float, float] | None, areas: tuple[float, float] | None
) -> None:
    values = {} if limits is None else {"scale_range": limits}
    config = only("scale", **values)
    low, high = areas or (0.7**2, 1.4**2)
    # A ramp: its slope is 1 / ratio where nothing is mirrored.
    ramp = np.broadcast_to(np.arange(101, dtype=np.uint16) * 100, (101, 101))[..., np.newaxis]
    centers = []
    for index in range(20):
        moved, mask = run(ramp, np.ones((101, 101), np.uint8), config, index=index, value_max=65535)
        assert mask.all()
        slope = np.abs(np.diff(moved[50, :, 0].astype(float)))
        assert low * 0.97 <= (100 / np.median(slope)) ** 2 <= high * 1.03
        centers.append(int(np.abs(moved[50, :, 0].astype(int) - ramp[50, :, 0]).argmin()))
    assert len(set(centers)) > 10
    if limits == (0.5, 0.5):
        assert moved.max() >= 9900
        assert moved.min() <= 100


def test_crop_shows_a_part_of_its_area_and_ratio() -> None:
    config = only("crop", crop_range=(0.4, 0.6), crop_aspects=(0.8, 1.25))
    y, x = np.mgrid[:80, :120].astype(np.uint16) * 500
    image, mask = np.stack([y, x, y], axis=-1), np.zeros((80, 120), np.uint8)
    corners = set()
    for index in range(30):
        moved, _ = run(image, mask, config, index=index, value_max=65535)
        top, left = moved[0, 0, 0] / 500, moved[0, 0, 1] / 500
        height, width = moved[-1, 0, 0] / 500 - top, moved[0, -1, 1] / 500 - left
        assert 0.38 < (height / 79) * (width / 119) < 0.62
        assert 0.78 < (width / 119) / (height / 79) < 1.28
        corners.add((int(top), int(left)))
    assert len(corners) > 20


@pytest.mark.parametrize(("dtype", "value_max"), [(np.uint8, 255), (np.uint16, 4095)])
def test_contrast_gamma_blur_and_noise_follow_their_formulas(dtype: Any, value_max: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0.3 * value_max, 0.6 * value_max, (64, 64, 2)).astype(dtype)
    mask = np.zeros((64, 64), np.uint8)
    for index in range(8):
        found = {
            kind: run(
                image, mask, only(kind, noise_range=(0.02, 0.05)), index=index, value_max=value_max
            )
            for kind in ("contrast", "gamma", "blur", "noise")
        }
        for kind, (moved, same) in found.items():
            assert (moved.shape, moved.dtype, same is mask) == (image.shape, image.dtype, True), (
                kind
            )
            assert moved.max() <= value_max
        values = image.astype(float)
        contrast = found["contrast"][0].astype(float)
        assert contrast.mean(axis=(0, 1)) == pytest.approx(values.mean(axis=(0, 1)), abs=0.6)
        assert 0.74 < contrast.std() / values.std() < 1.26
        exponents = np.log(found["gamma"][0] / value_max) / np.log(values / value_max)
        assert 0.69 < exponents.mean() < 1.51
        assert exponents.std() < 0.02
        assert found["blur"][0].std() < 0.8 * values.std()
        assert found["blur"][0].mean() == pytest.approx(values.mean(), rel=0.01)
        noise = (found["noise"][0] - values) / value_max
        assert 0.019 < noise.std() < 0.053
        assert abs(noise.mean()) < 0.003
        assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.08
    # The ends of the range stay where they are.
    ends = np.array([[[0], [value_max]]], dtype)
    assert run(ends, mask[:1, :2], only("gamma"), value_max=value_max)[0].tolist() == ends.tolist()
    bright = np.full((32, 32, 1), value_max, dtype)
    loud = run(bright, mask[:32, :32], only("noise", noise_range=(0.1, 0.1)), value_max=value_max)[
        0
    ]
    assert loud.max() == value_max  # clipped, and not wrapped around
    assert loud.min() > 0.3 * value_max


def test_a_mirror_border_has_neither_black_pixels_nor_new_classes() -> None:
    image, mask = np.full((48, 64, 3), 200, np.uint8), np.full((48, 64), 3, np.uint8)
    kinds = ("rotation", "shrink", "shear")
    black, mirrored = (
        run(image, mask, only(*kinds, border=border, rotation_angles=(30.0,)))
        for border in ("black", "mirror")
    )
    assert (black[0] == 0).any()
    assert (black[1] == 0).any()
    assert (mirrored[0] == 200).all()
    assert (mirrored[1] == 3).all()


def test_presets_switch_augmentation_on_and_single_options_win() -> None:
    strong = AugmentationConfig(preset="strong")
    assert strong.enabled
    assert strong.noise_probability > 0
    assert len(strong.rotation_angles) == 23
    own = AugmentationConfig(preset="strong", noise_probability=0.0, enabled=False)
    assert (own.enabled, own.noise_probability) == (False, 0.0)
    assert own.blur_probability == strong.blur_probability
    assert AugmentationConfig() == AugmentationConfig(preset=None)
    config = parse_settings(TrainConfig, {"augmentation": {"preset": "strong"}}, "test")
    again = parse_settings(TrainConfig, values_of_identity(identity_of(config)), "test")
    assert again.augmentation == strong


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shrink_ratios": [0.0]}, "shrink_ratios"),
        ({"scale_range": [0.0, 1]}, r"scale_range=\(0\.0, 1\.0\): .*above 0"),
        ({"gamma_range": [1.5, 0.7]}, "gamma_range=.*the smaller one first"),
        ({"noise_range": [-0.1, 0]}, "noise_range=.*0 or more"),
        ({"crop_range": [0.5, 1.5]}, "crop_range=.*at most"),
        ({"crop_aspects": [2, 1]}, "crop_aspects="),
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
    code = (
        "import sys, job.data.augmentation.augment; print({'cv2', 'tensorflow'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
