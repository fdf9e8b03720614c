"""Which images to fetch, so that every chosen class gets its number of them.

A greedy pass, rarest class first: each class is filled up with random images of its own, after the images are counted
that were chosen for rarer classes and hold it too. So a frequent class, which is on many images of rare classes, needs
few images of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.data.class_groups import select_classes
from retinaflow.data.download import urls
from retinaflow.data.download.images import RemoteImage
from retinaflow.data.download.request import Request
from retinaflow.data.download.tables import fetch_originals, image_classes, images_of
from retinaflow.data.openimages import is_plain_id
from retinaflow.errors import DataError, shown
from retinaflow.progress import report
from retinaflow.taxonomy import Taxonomy


def choose_images(
    image: NDArray[np.int64], class_index: NDArray[np.int64], count: int, *, per_class: int, seed: int
) -> NDArray[np.int64]:
    """Chosen images, ascending: each class has ``per_class`` of them, or all there are.

    ``image [N]`` (0..count - 1) and ``class_index [N]`` are distinct pairs. A pure function of its arguments.
    """
    order = np.random.default_rng(seed).permutation(count)
    rank = np.empty(count, dtype=np.int64)
    rank[order] = np.arange(count)
    classes, of_pair, sizes = np.unique(class_index, return_inverse=True, return_counts=True)
    chosen = np.zeros(count, dtype=bool)
    for row in np.lexsort((classes, sizes)):
        own = image[of_pair == row]
        missing = per_class - int(chosen[own].sum())
        if missing > 0:
            free = own[~chosen[own]]
            chosen[free[np.argsort(rank[free])[:missing]]] = True
    return np.flatnonzero(chosen)


def images_to_fetch(request: Request, boxes: Path, taxonomy: Taxonomy, classes: Sequence[str]) -> list[str]:
    """The ids of the images to fetch from a split, by its filtered box table."""
    if request.ids is not None:
        return images_of(boxes)
    assert request.config.class_group is not None
    names, image, class_index = image_classes(boxes, tuple(classes))
    # A Taxi is a Car too: an image counts for the classes of its boxes and for their ancestors.
    asked = select_classes(request.config.class_group, taxonomy)
    position = pd.Index(taxonomy.ids).get_indexer(pd.Index(classes))
    counts_for = taxonomy.is_ancestor[:, asked].copy()
    counts_for[asked, range(len(asked))] = True
    rows, columns = counts_for[position[class_index]].nonzero()
    pairs = pd.DataFrame({"image": image[rows], "class": columns}).drop_duplicates()
    chosen = choose_images(
        pairs["image"].to_numpy(),
        pairs["class"].to_numpy(),
        len(names),
        per_class=request.config.per_class,
        seed=request.config.seed,
    )
    return [str(name) for name in names[chosen]]


def remote_images(request: Request, split: str, ids: Sequence[str]) -> list[RemoteImage]:
    """URL and target file of each image of a split. Images that the table of originals lacks are left out."""
    unsafe = [image_id for image_id in ids if not is_plain_id(image_id)]
    if unsafe:
        raise DataError(f"{urls.BOXES[split]}: an id must be a plain file name, but got {shown(unsafe[0])}")
    base, folder = request.config.images_url.rstrip("/"), request.folder / "images"
    if not request.config.originals:
        paths = {image_id: urls.IMAGE.format(split=split, image_id=image_id) for image_id in ids}
        return [RemoteImage(image_id, f"{base}/{path}", folder / f"{image_id}.jpg") for image_id, path in paths.items()]
    found = fetch_originals(request, split, ids)
    return [RemoteImage(name, url, folder / f"{name}.jpg", size, md5) for name, (url, size, md5) in found.items()]


def without_url(request: Request, images: Sequence[RemoteImage], chosen: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Image id -> reason, for each image that is asked for and has no URL; they are reported."""
    reasons = dict.fromkeys(request.ids or (), "in no box table of these splits")
    for split, ids in chosen.items():
        reasons |= dict.fromkeys(ids, f"not in {urls.ORIGINALS[split]}")
    for image in images:
        reasons.pop(image.image_id, None)
    for reason, count in Counter(reasons.values()).items():
        example = min(image_id for image_id in reasons if reasons[image_id] == reason)
        report(f"{count:,} images are {reason}, {example} for example")
    return reasons
