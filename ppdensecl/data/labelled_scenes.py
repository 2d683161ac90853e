"""Synthetic scenes as files with all that is known of them: to try detection and segmentation where there is no data."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ppdensecl.data.synthetic import CLASSES
from ppdensecl.errors import UserError
from ppdensecl.files import replacing


def write(source, folder, part):
    """Writes the scenes of a SyntheticSource below `folder`; those of an earlier call with another `part` stay.

    images/PART_0000.png; labels/PART_0000.png, uint8, 0 the background and 1 … the classes; PART.json, boxes and visible
    outlines as COCO has them; PART.txt, lines `image label` as PaddleSeg reads. Raises UserError.
    """
    folder, images, objects, lines = Path(folder), [], [], []
    try:
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(len(source)):
            scene, name = source.scene(i), f"{part}_{i:04}.png"
            for kind, pixels in (("images", scene.picture), ("labels", scene.mask)):
                Image.fromarray(pixels).save(folder / kind / name)
            height, width = scene.mask.shape
            images.append({"id": i + 1, "file_name": name, "height": height, "width": width})
            for number, (box, label) in enumerate(zip(scene.boxes.tolist(), scene.classes.tolist()), 1):
                objects.append({"id": len(objects) + 1, "image_id": i + 1, "category_id": label, "iscrowd": 0,
                                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                                **_outlines((scene.instances == number).astype(np.uint8))})
            lines.append(f"images/{name} labels/{name}\n")
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
        annotations = json.dumps({"images": images, "annotations": objects, "categories": categories})
        for name, text in ((f"{part}.json", annotations), (f"{part}.txt", "".join(lines))):
            with replacing(folder / name) as file:
                file.write(text.encode())
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from None


def _outlines(visible):
    polygons = [outline.ravel().tolist() for outline in cv2.findContours(visible, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
                if len(outline) >= 3]
    return {"segmentation": polygons, "area": int(visible.sum())}
