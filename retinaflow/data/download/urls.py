"""Where the files of Open Images lie, below two base addresses.

Paths as the download page of Open Images V7 names them (storage.googleapis.com/openimages/web/download_v7.html) and
those of the image copies at github.com/cvdfoundation/open-images-dataset, whose longer side is at most 1024 pixels.
Boxes of the validation and test images have not changed since V5, those of the training images since V6.
"""

from __future__ import annotations

SPLITS = ("train", "validation", "test")
CLASSES = "v5/class-descriptions-boxable.csv"
HIERARCHY = "2018_04/bbox_labels_600_hierarchy.json"
BOXES = {
    "train": "v6/oidv6-train-annotations-bbox.csv",
    "validation": "v5/validation-annotations-bbox.csv",
    "test": "v5/test-annotations-bbox.csv",
}
LABELS = {split: f"v5/{split}-annotations-human-imagelabels-boxable.csv" for split in SPLITS}
ORIGINALS = {
    "train": "2018_04/train/train-images-boxable-with-rotation.csv",
    "validation": "2018_04/validation/validation-images-with-rotation.csv",
    "test": "2018_04/test/test-images-with-rotation.csv",
}
"""Address, size and MD5 of each original, with its author and licence."""
IMAGE = "{split}/{image_id}.jpg"
