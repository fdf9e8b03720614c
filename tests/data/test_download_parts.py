"""Fetching from a bucket: patience, politeness and verification, against a server that misbehaves; choosing images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from bucket_server import Bucket, serving

from retinaflow.data.download import http, images
from retinaflow.data.download.http import Fetcher, MissingFileError, UnreachableError
from retinaflow.data.download.images import RemoteImage, fetch_images
from retinaflow.data.download.selection import choose_images
from retinaflow.data.download.tables import filtered, write_lines


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)
    with serving() as bucket:
        bucket.files["a"] = bytes(range(256)) * 40
        yield bucket


FAULTS = {
    "busy": [503],
    "too many": [429, 429],
    "truncated": ["truncate"],
    "stalled": ["stall"],
    "reset": ["reset"],
    "wrong MD5": ["wrong md5"],
    "one after the other": [500, "truncate", "reset"],
}


@pytest.mark.parametrize("errors", FAULTS.values(), ids=FAULTS)
def test_a_fault_that_passes_is_waited_out(bucket: Bucket, errors: list[object]) -> None:
    bucket.errors["a"] = list(errors)
    assert Fetcher(retries=3, timeout=0.3).read(f"{bucket.url}/a") == bucket.files["a"]
    assert bucket.asked["a"] == len(errors) + 1


@pytest.mark.parametrize("fault", [503, "truncate", "wrong md5"])
def test_a_fault_that_stays_is_told_with_its_reason(bucket: Bucket, fault: object) -> None:
    bucket.errors["a"] = [fault] * 9
    with pytest.raises(UnreachableError, match=r"/a: not read in 3 tries; the last one: (status 503|\w+Error|the MD5)"):
        Fetcher(retries=2, timeout=1).read(f"{bucket.url}/a")
    assert bucket.asked["a"] == 3


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_is_not_there_is_asked_for_once(bucket: Bucket, status: int) -> None:
    bucket.errors["a"] = [status]
    with pytest.raises(MissingFileError, match=f"status {status}"):
        Fetcher().read(f"{bucket.url}/a")
    assert bucket.asked["a"] == 1


def test_another_status_ends_at_once(bucket: Bucket) -> None:
    bucket.errors["a"] = [401]
    with pytest.raises(UnreachableError, match="status 401"):
        Fetcher().read(f"{bucket.url}/a")
    assert bucket.asked["a"] == 1


def test_what_the_caller_finds_wrong_is_tried_again(bucket: Bucket) -> None:
    with pytest.raises(UnreachableError, match="the last one: no image"):
        Fetcher(retries=1).read(f"{bucket.url}/a", verify=lambda data: "no image")
    assert bucket.asked["a"] == 2


def test_retry_after_is_kept_to_in_seconds_and_as_a_date(bucket: Bucket) -> None:
    bucket.errors["a"] = [(503, "0.4")]
    start = time.monotonic()
    Fetcher().read(f"{bucket.url}/a")
    assert time.monotonic() - start >= 0.4
    assert 25 < http._retry_after(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert http._retry_after("soon") == http._retry_after("-5") == 0
    assert http._retry_after("1e9") == http.LONGEST_RETRY_AFTER


def test_a_stream_that_breaks_goes_on_where_it_broke(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_BLOCK", 100)
    lines = [f"row {number}".encode() for number in range(2000)]
    bucket.files["t"] = b"\r\n".join(lines)
    bucket.errors["t"] = ["truncate", "stall", 503, "reset"]
    seen: list[int] = []
    assert list(Fetcher(timeout=0.3).lines(f"{bucket.url}/t", seen=seen.append)) == lines
    assert sum(seen) == len(bucket.files["t"])
    assert len(bucket.ranges) == 2
    assert all(asked != "bytes=0-" for asked in bucket.ranges)


def test_a_stream_of_unknown_length_that_ends_in_mid_line_was_cut(bucket: Bucket) -> None:
    bucket.files["t"] = b"a,1\nb,2\nc,345\n"
    bucket.errors["t"] = ["truncate, no length"]
    assert list(Fetcher().lines(f"{bucket.url}/t")) == [b"a,1", b"b,2", b"c,345"]
    assert bucket.ranges == ["bytes=7-"]
    bucket.errors["t"] = ["no length"]
    assert list(Fetcher().lines(f"{bucket.url}/t")) == [b"a,1", b"b,2", b"c,345"]
    assert bucket.ranges == ["bytes=7-"]
    bucket.files["t"] = b"a,1\nb,2"
    assert list(Fetcher().lines(f"{bucket.url}/t")) == [b"a,1", b"b,2"]
    bucket.errors["t"] = ["truncate, no length", 503]
    with pytest.raises(
        UnreachableError, match="the last one: 3 bytes of an unknown number were received, which end within"
    ):
        list(Fetcher(retries=0).lines(f"{bucket.url}/t"))


def test_a_file_that_changes_while_it_streams_is_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_BLOCK", 100)
    bucket.files["t"] = b"row\n" * 500
    bucket.errors["t"] = ["truncate", "wrong md5"]
    with pytest.raises(ValueError, match="the file must not change while it is read"):
        list(Fetcher().lines(f"{bucket.url}/t"))


@pytest.fixture
def gaps(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RemoteImage]:
    """Five images that the server does not have, where three are too many."""
    monkeypatch.setattr(images, "MAX_FAILURES", 3)
    return [RemoteImage(name, f"{bucket.url}/{name}.jpg", tmp_path / f"{name}.jpg") for name in "bcdef"]


def refuse(bucket: Bucket) -> None:
    """Let each of the five images be asked for once in vain."""
    bucket.files |= {f"{name}.jpg": b"" for name in "bcdef"}
    bucket.errors = {f"{name}.jpg": [401] for name in "bcdef"}


def test_a_wrong_address_ends_soon(bucket: Bucket, gaps: list[RemoteImage]) -> None:
    with pytest.raises(UnreachableError, match=r"first 3 images all failed; check images_url\. on_bad_image=skip"):
        fetch_images(gaps, Fetcher(), connections=1)
    assert len(fetch_images(gaps, Fetcher(), connections=1, skip=True).missing) == 5
    refuse(bucket)
    with pytest.raises(UnreachableError, match=r"check images_url\. One of them: .* status 401"):
        fetch_images(gaps, Fetcher(), connections=1, skip=True)


def test_after_an_earlier_attempt_what_is_left_may_be_what_cannot_be_had(
    bucket: Bucket, gaps: list[RemoteImage]
) -> None:
    gaps[2].target.write_bytes(b"of an earlier attempt")
    fetched = fetch_images(gaps, Fetcher(), connections=2)
    assert sorted(name for name, _ in fetched.missing) == ["b", "c", "e", "f"]
    refuse(bucket)
    assert len(fetch_images(gaps, Fetcher(), connections=2, skip=True).failed) == 4
    refuse(bucket)
    with pytest.raises(UnreachableError, match="first 3 images all failed"):
        fetch_images(gaps, Fetcher(), connections=2)


def test_rows_are_filtered_by_columns_of_any_order(tmp_path: Path) -> None:
    rows = [b"\xef\xbb\xbfSource,ImageID,LabelName,X", b"s,1,/m/a,0.1", b"s,2,/m/b,0.2", b"s,1,/m/b,0.3", b"cut"]
    wanted = {"LabelName": frozenset({"/m/b"}), "ImageID": frozenset({"1"})}
    write_lines(filtered(rows, wanted, name="t"), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == b"Source,ImageID,LabelName,X\ns,1,/m/b,0.3\n"
    with pytest.raises(ValueError, match="t line 1: the header must name ImageID, LabelName"):
        list(filtered([b"<html>", b"ImageID"], {"LabelName": frozenset()}, name="t"))


def test_every_class_gets_its_number_or_all_there_are() -> None:
    rng = np.random.default_rng(0)
    pairs = np.unique(np.stack([rng.integers(0, 400, 2000), rng.geometric(0.4, 2000) - 1], axis=1), axis=0)
    image, classes = pairs.T
    chosen = choose_images(image, classes, 400, per_class=20, seed=1)
    for index in np.unique(classes):
        own = image[classes == index]
        assert np.isin(own, chosen).sum() >= min(20, len(own))
    assert (chosen == choose_images(image, classes, 400, per_class=20, seed=1)).all()
    assert len(chosen) != 400
    assert not np.array_equal(chosen, choose_images(image, classes, 400, per_class=20, seed=2))


def test_images_of_the_rare_class_count_for_the_frequent_one() -> None:
    # Class 1 is on images 0 and 1, class 0 on all ten: two images do for two of each.
    image, classes = np.r_[0, 1, np.arange(10)], np.r_[1, 1, np.zeros(10, dtype=int)]
    assert choose_images(image, classes, 10, per_class=2, seed=0).tolist() == [0, 1]
    assert len(choose_images(image[:0], classes[:0], 0, per_class=2, seed=0)) == 0
