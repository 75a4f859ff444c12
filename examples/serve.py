"""Serves an export over HTTP with Ray Serve: an image in, its mask out, in the colours of classes.

    pip install "ray[serve]" tensorflow opencv-python-headless
    python examples/serve.py EXPORT
    curl --data-binary @image.png http://127.0.0.1:8000/ --output mask.png

Needs no FlexUNet. An example: it has no authentication, so keep it on 127.0.0.1 or behind a proxy
that has; a replica that is killed loses its requests. It does not remove small regions.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

WHOLE = {"geometry": "stretch", "crop": "none", "flip": "none", "window_overlap": None}


@serve.deployment(max_ongoing_requests=32)
class Segmentation:
    """Predicts masks; requests that arrive together are one batch of the network."""

    def __init__(self, folder: str) -> None:
        import tensorflow as tf  # in the replicas only

        values = json.loads(Path(folder, "metadata.json").read_text())
        if values["preprocessing"] != WHOLE:
            raise ValueError(f"this example resizes whole images: {values['preprocessing']}")
        self.input, self.network = values["input"], tf.saved_model.load(f"{folder}/savedmodel")
        self.colors = np.array([each["color"] for each in values["classes"]], np.uint8)
        thresholds = values["postprocessing"]["thresholds"].values()
        self.weights = np.array([1, *((1 - each) / each for each in thresholds)], np.float32)

    async def __call__(self, request: Request) -> Response:
        """Returns the mask of the image in the body as a PNG file, at the size of the image."""
        body = np.frombuffer(await request.body(), np.uint8)
        channels = self.input["shape"][-1]
        kind = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
        kind |= cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION  # masks fit stored pixels
        image = cv2.imdecode(body, kind) if body.size else None
        kind, largest = self.input["dtype"], self.input["value_max"]
        if image is None or image.dtype != kind or image.max() > largest:
            return Response(f"send an image file of {kind} pixels up to {largest}\n", 400)
        size = self.input["network_height"], self.input["network_width"]
        probabilities = await self.predict(resized(image, size).reshape(*size, channels))
        planes = [resized(plane, image.shape[:2]) for plane in np.moveaxis(probabilities, -1, 0)]
        if len(planes) == 1:  # a sigmoid: the probability of class 1
            planes.insert(0, 1 - planes[0])
        ids = np.argmax(np.stack(planes, axis=-1) * self.weights, axis=-1)
        mask = cv2.cvtColor(self.colors[ids], cv2.COLOR_RGB2BGR)
        return Response(cv2.imencode(".png", mask)[1].tobytes(), media_type="image/png")

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01)
    async def predict(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Returns the probabilities (H, W, K) of each image (H, W, C) of network size."""
        return list(self.network.serve(np.stack(images))["probabilities"].numpy())


def resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns an image of another (height, width), as `flexunet infer` resizes it."""
    smaller = min(size[0], plane.shape[0]), min(size[1], plane.shape[1])
    plane = cv2.resize(plane, smaller[::-1], interpolation=cv2.INTER_AREA)
    return cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", help="folder that flexunet export wrote, with savedmodel/")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    folder = str(Path(options.export).resolve())
    serve.run(Segmentation.bind(folder), name="segmentation", blocking=True)
