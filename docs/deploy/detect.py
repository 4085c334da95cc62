"""Detections of an exported model with onnxruntime, Pillow and NumPy alone: python detect.py model.onnx photo.jpg"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def resized(image: Image.Image, about: dict) -> Image.Image:
    """As in training: to a square, or the short side to `size` where the long side then is at most `max_size`."""
    if about["square"]:
        return image.resize((about["size"], about["size"]), Image.Resampling.BILINEAR)
    short, long = sorted(image.size)
    size = about["size"]
    if long / short * size > about["max_size"]:
        size = round(about["max_size"] * short / long)
    sides = (size if side == short else int(size * side / short) for side in image.size)
    return image.resize(tuple(sides), Image.Resampling.BILINEAR)


def detect(session: onnxruntime.InferenceSession, image: Image.Image, threshold: float = 0.5) -> list[dict]:
    about = json.loads(session.get_modelmeta().custom_metadata_map["detr"])
    upright = ImageOps.exif_transpose(image).convert("RGB")
    pixels = np.asarray(resized(upright, about)).transpose(2, 0, 1)[None]
    sizes = np.array([pixels.shape[2:]])
    if about["side"]:  # of the only images that it takes
        pixels = np.pad(pixels, [(0, 0), (0, 0), *((0, about["side"] - length) for length in pixels.shape[2:])])
    inputs = {"images": pixels, "sizes": sizes}
    names = [each.name for each in session.get_inputs()]  # without sizes where no padding is possible
    outputs = session.run(["scores", "labels", "boxes"], {name: inputs[name] for name in names})
    scores, labels, boxes = (output[0] for output in outputs)
    boxes = boxes * [*upright.size, *upright.size]  # from parts of the image to its pixels
    classes = about["categories"]
    found = zip(scores.tolist(), labels.tolist(), boxes.round(1).tolist(), strict=True)
    return [{"name": classes[i]["name"], "score": score, "box": box} for score, i, box in found if score >= threshold]


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    for one in detect(session, Image.open(sys.argv[2])):
        print(one)
