"""Image files: found by id, measured from their headers, decoded to a size; and ways in which they can be broken."""

from __future__ import annotations

import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_index import make_index
from numpy.typing import NDArray
from PIL import Image

from retinaflow.data.image_folders import images_under, locate_files
from retinaflow.data.image_headers import depth_notice, header_size
from retinaflow.data.images import UnreadableImageError, attach_files, decode
from retinaflow.data.index import AnnotationIndex
from retinaflow.errors import DataError, SettingError

HEIGHT, WIDTH = 48, 80
RGB = (200, 90, 30)


def encoded(kind: str) -> bytes:
    """An image of HEIGHT x WIDTH in one colour, grey where the kind knows no colour."""
    mode = {"grey": "L", "cmyk": "CMYK", "alpha": "RGBA"}.get(kind, "RGB")
    if kind == "16 bit":
        image = Image.fromarray(np.full((HEIGHT, WIDTH), 100 * 257, dtype=np.uint16))
    else:
        image = Image.new("RGB", (WIDTH, HEIGHT), RGB).convert(mode)
        image = image.quantize(4) if kind == "palette" else image
    buffer = io.BytesIO()
    image.save(buffer, {"jpeg": "JPEG", "grey": "JPEG", "cmyk": "JPEG", "webp": "WEBP"}.get(kind, "PNG"))
    return buffer.getvalue()


def folder_of(tmp_path: Path, **files: bytes) -> tuple[AnnotationIndex, Path]:
    """An index whose images i0000, i0001, ... are the given files, in order, and their folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (suffix, content) in enumerate(files.items()):
        (folder / f"i{number:04d}.{suffix.split('_')[0]}").write_bytes(content)
    return make_index([[0]] * len(files), classes=1), folder


@pytest.mark.parametrize(
    ("kind", "colour"),
    [
        ("jpeg", RGB),
        ("png", RGB),
        ("webp", RGB),
        ("palette", RGB),
        ("alpha", RGB),
        # 0.299 x 200 + 0.587 x 90 + 0.114 x 30 = 116
        ("grey", (116, 116, 116)),
        ("cmyk", RGB),
        ("16 bit", (100, 100, 100)),
    ],
)
@pytest.mark.parametrize("target", [(HEIGHT, WIDTH), (32, 96), (96, 160), (12, 20)], ids=str)
def test_every_kind_of_file_becomes_rgb_pixels_of_exactly_the_asked_height_and_width(
    kind: str, colour: tuple[int, int, int], target: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "image"
    path.write_bytes(encoded(kind))
    pixels = decode(path, (HEIGHT, WIDTH), target)
    assert pixels.shape == (*target, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - colour).max() <= 4


def test_sizes_are_height_and_width_from_the_headers_of_files_found_by_id(tmp_path: Path) -> None:
    index, folder = folder_of(tmp_path, jpg=encoded("jpeg"), PNG=encoded("png"), webp=encoded("webp"), txt=b"")
    index = index.take(np.arange(3))
    complete, bad = attach_files(index, [folder])
    assert complete.sizes.tolist() == [[HEIGHT, WIDTH]] * 3
    assert bad == []
    assert [complete.file_of(image).name for image in range(3)] == ["i0000.jpg", "i0001.PNG", "i0002.webp"]
    assert complete.file_of(0).is_file()


def test_files_in_several_folders_are_found_and_the_first_folder_counts(tmp_path: Path) -> None:
    for name, kind in (("one", "jpeg"), ("two/deep", "png")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "i0000.jpg").write_bytes(encoded(kind))
    (tmp_path / "two" / "deep" / "i0001.png").write_bytes(encoded("png"))
    (tmp_path / "two" / "deep" / "i0001.jpg").write_bytes(encoded("jpeg"))
    index = make_index([[0], [0]], classes=1)
    complete, _ = attach_files(index, [tmp_path / "one", tmp_path / "two" / "deep"])
    # Of two files with one id in a folder, the first by name counts: i0001.jpg.
    assert complete.files.tolist() == ["one/i0000.jpg", "two/deep/i0001.jpg"]
    other, _ = attach_files(index, [tmp_path / "two" / "deep", tmp_path / "one"])
    assert other.files.tolist()[0] == "two/deep/i0000.jpg"


def test_no_images_need_no_files(tmp_path: Path) -> None:
    complete, bad = attach_files(make_index([], classes=1), [tmp_path])
    assert len(complete) == 0
    assert bad == []


BROKEN = {
    "cut JPEG": (encoded("jpeg")[:-60], "the JPEG is cut short"),
    "header only": (encoded("jpeg")[:200], "Truncated File Read"),
    "zero bytes": (b"", "not an image file"),
    "text": (b"<html>not found</html>", "not an image file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_unreadable_file_stops_with_its_path_and_reason_or_is_skipped_and_listed(name: str, tmp_path: Path) -> None:
    content, reason = BROKEN[name]
    index, folder = folder_of(tmp_path, jpg_0=encoded("jpeg"), jpg_1=content, jpg_2=encoded("jpeg"))
    with pytest.raises(ValueError, match=rf"1 of 3 image files cannot be read; .*i0001\.jpg: ({reason})\. Replace"):
        attach_files(index, [folder])
    complete, bad = attach_files(index, [folder], on_bad_image="skip")
    assert complete.image_ids.tolist() == ["i0000", "i0002"]
    assert complete.boxes.tolist() == index.boxes[[0, 2]].tolist()
    assert [image.image_id for image in bad] == ["i0001"]
    assert bad[0].reason == reason


def test_a_missing_file_stops_with_the_count_or_is_skipped_and_listed(tmp_path: Path) -> None:
    index, folder = folder_of(tmp_path, jpg_0=encoded("jpeg"), jpg_1=encoded("jpeg"))
    (folder / "i0000.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images have a file under .*images; i0000 has none"):
        attach_files(index, [folder])
    complete, bad = attach_files(index, [folder], on_bad_image="skip")
    assert complete.image_ids.tolist() == ["i0001"]
    assert [(image.image_id, image.reason) for image in bad] == [("i0000", "no file")]


def test_a_wrong_folder_is_refused_even_when_images_may_be_skipped(tmp_path: Path) -> None:
    index, folder = folder_of(tmp_path, jpg_0=b"", jpg_1=b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"0 of 2 images have a file under .*empty.*Check images="):
        attach_files(index, [tmp_path / "empty"], on_bad_image="skip")
    with pytest.raises(ValueError, match="2 of 2 image files cannot be read"):
        attach_files(index, [folder], on_bad_image="skip")
    with pytest.raises(SettingError, match=r"images=.*nowhere: no such folder"):
        attach_files(index, [tmp_path / "nowhere"])


@pytest.mark.parametrize("name", ["zero bytes", "text", "missing"])
def test_a_decoding_error_names_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    if name != "missing":
        path.write_bytes(BROKEN[name][0])
    with pytest.raises(ValueError, match=r"broken\.jpg: (not a readable image|the image cannot be read)"):
        decode(path, (HEIGHT, WIDTH), (32, 32))


@pytest.mark.parametrize("kind", ["jpeg", "cmyk", "png"])
@pytest.mark.parametrize("target", [(HEIGHT, WIDTH), (12, 20), (6, 10)], ids=str)
def test_a_file_of_another_shape_than_its_size_is_refused_and_a_scaled_one_fits(
    kind: str, target: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "replaced.png"
    path.write_bytes(encoded(kind))
    for size in ((WIDTH, HEIGHT), (HEIGHT, WIDTH + 40), (200, 50)):
        with pytest.raises(
            UnreadableImageError, match=rf"pixels, but {size[1]} x {size[0]} is its size in size_table="
        ):
            decode(path, size, target)
    # The sizes of originals, of which smaller or larger copies are read.
    for size in ((2 * HEIGHT, 2 * WIDTH), (3 * HEIGHT + 1, 3 * WIDTH - 1), (HEIGHT // 2, WIDTH // 2)):
        assert decode(path, size, target).shape == (*target, 3)


def pattern() -> NDArray[np.uint8]:
    """A smooth image of 256 x 512 whose red grows to the right and whose green grows downwards."""
    y, x = np.mgrid[0:256, 0:512]
    return np.stack([x / 2, y / 1.0, np.full_like(x, 60)], axis=2).astype(np.uint8)


@pytest.mark.parametrize("target", [(256, 512), (128, 256), (96, 160), (64, 128), (32, 64), (32, 32)], ids=str)
def test_decoding_at_reduced_size_gives_what_decoding_and_shrinking_gives(
    target: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(pattern()).save(path)
    expected = cv2.resize(pattern(), target[::-1], interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(decode(path, (256, 512), target).astype(int) - expected).mean() < 1.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_thin_lines_do_not_vanish_when_an_image_is_made_smaller(kind: str, tmp_path: Path) -> None:
    lines = np.zeros((512, 512, 3), dtype=np.uint8)
    lines[:, ::8] = 255
    path = tmp_path / "lines"
    Image.fromarray(lines).save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
    for side in (64, 100, 128, 200):
        # One pixel in eight is white.
        assert abs(decode(path, (512, 512), (side, side)).mean() - 255 / 8) < 3, side


def test_a_jpeg_may_have_a_film_behind_it_and_a_thumbnail_before_it(tmp_path: Path) -> None:
    film = bytes(20_000)
    buffer = io.BytesIO()
    # A thumbnail in the EXIF segment is a JPEG of its own, with an end of its own.
    Image.fromarray(pattern()).save(buffer, "JPEG", quality=95, exif=b"Exif\x00\x00" + encoded("jpeg"))
    whole = buffer.getvalue()
    index, folder = folder_of(tmp_path, jpg=whole + film)
    complete, _ = attach_files(index, [folder])
    assert complete.sizes.tolist() == [[256, 512]]
    for target in ((256, 512), (128, 256)):
        pixels = decode(complete.file_of(0), (256, 512), target)
        np.testing.assert_array_equal(pixels, decode(_written(tmp_path / "whole.jpg", whole), (256, 512), target))
    for cut in (whole[:-3000], whole[:-3000] + film):
        (folder / "i0000.jpg").write_bytes(cut)
        with pytest.raises(ValueError, match=r"i0000\.jpg: the JPEG is cut short"):
            attach_files(index, [folder])
        with pytest.raises(ValueError, match=r"i0000\.jpg: the JPEG is cut short"):
            decode(folder / "i0000.jpg", (256, 512), (256, 512))


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_exif_rotation_is_ignored_in_the_size_and_in_the_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    index, folder = folder_of(tmp_path, jpg=b"")
    Image.fromarray(pattern()).save(folder / "i0000.jpg", exif=exif, quality=95)
    complete, _ = attach_files(index, [folder])
    assert complete.sizes.tolist() == [[256, 512]]
    pixels = decode(complete.file_of(0), (256, 512), (256, 512))
    assert np.abs(pixels.astype(int) - pattern()).mean() < 4


# Damage that headers show, or that decoding shows


def noise(kind: str) -> bytes:
    """A detailed image, so that a part of the file is a part of the pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "JPEG"])
@pytest.mark.parametrize("rest", [0.5, 0.99])
def test_a_cut_file_of_any_type_is_found_when_headers_are_read(kind: str, rest: float, tmp_path: Path) -> None:
    whole, reason = noise(kind), f"the {kind} is cut short"
    if kind == "WEBP":
        reason = "could not create decoder object"
    path = _written(tmp_path / "whole", whole)
    assert header_size(path) == (256, 256)
    assert header_size(_written(path, whole + bytes(9000))) == (256, 256), "what follows the image is no damage"
    assert header_size(_written(path, whole[: int(len(whole) * rest)])) == reason


@pytest.mark.parametrize("target", [(256, 256), (128, 128), (60, 60), (32, 32)])
@pytest.mark.parametrize("damage", ["missing", "zeros"])
def test_a_jpeg_without_its_middle_is_refused_at_every_size(
    damage: str, target: tuple[int, int], tmp_path: Path
) -> None:
    whole = noise("JPEG")
    third = len(whole) // 3
    middle = b"" if damage == "missing" else bytes(third)
    path = _written(tmp_path / "a.jpg", whole[:third] + middle + whole[2 * third :])
    assert header_size(path) == (256, 256)
    with pytest.raises(UnreadableImageError, match=r"a\.jpg: the JPEG is damaged: Corrupt JPEG data"):
        decode(path, (256, 256), target)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("size", [(256, 512), (255, 511), (97, 131)])
def test_a_jpeg_at_reduced_size_has_the_pixels_of_opencv(factor: int, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(pattern()[: size[0], : size[1]]).save(path)
    flag = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}[factor]
    expected = cv2.cvtColor(cv2.imdecode(np.fromfile(path, np.uint8), flag), cv2.COLOR_BGR2RGB)
    height, width = expected.shape[:2]
    # A side of less than size / factor, so that this factor is taken; the last columns are cut off by no resizing.
    pixels = decode(path, (height * factor, width * factor), (height, width))
    np.testing.assert_array_equal(pixels, expected)


def test_a_named_pipe_among_images_is_no_image(tmp_path: Path) -> None:
    index, folder = folder_of(tmp_path, jpg_0=encoded("jpeg"))
    (folder / "i0000.jpg").unlink()
    os.mkfifo(folder / "i0000.jpg")
    with pytest.raises(DataError, match=r"i0000 has none, for example \(i0000\.jpg is no regular file\)"):
        attach_files(index, [folder])
    assert header_size(folder / "i0000.jpg") == "no regular file"
    assert list(images_under(folder)) == []


@pytest.mark.parametrize("suffix", ["tif", "gif", "HEIC"])
def test_an_image_of_a_type_that_is_not_read_is_the_reason(suffix: str, tmp_path: Path) -> None:
    index, folder = folder_of(tmp_path, jpg_0=encoded("jpeg"), **{f"{suffix}_1": b"x"})
    rule = rf"i0001 has none, for example \(i0001\.{suffix} is not read: an image must be one of \.jpg"
    with pytest.raises(DataError, match=rule):
        attach_files(index, [folder])
    _, bad = attach_files(index, [folder], on_bad_image="skip")
    assert bad[0].reason.startswith(f"i0001.{suffix} is not read")


def test_files_left_out_of_a_folder_are_counted_with_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "a.jpg",
        "deep/b.png",
        "c.tif",
        "d.gif",
        "outputs/p.png",
        "run/mlruns/p.png",
        ".hidden/h.jpg",
        "n.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded("jpeg"))
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "e.jpg").write_bytes(encoded("jpeg"))
    (tmp_path / "converted" / "retinaflow.yaml").write_text("exhaustive: true\n")
    assert [path.name for path in images_under(tmp_path)] == ["a.jpg", "b.png"]
    out = capsys.readouterr().out
    assert "2 files that are none of .jpg, .jpeg, .png, .webp, .bmp are left out, c.tif for example" in out
    assert "3 folders of results are left out, converted for example" in out


def test_files_are_found_at_any_depth_in_either_unicode_form_and_not_among_results(tmp_path: Path) -> None:
    for name in ("camera 1/day/e\u0301.jpg", "outputs/x.jpg", "b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded("jpeg"))
    found = locate_files(np.array(["b", "x", "\u00e9"]), [tmp_path])
    assert found.files.tolist() == ["b.jpg", "", "camera 1/day/e\u0301.jpg"]
    (tmp_path / "camera 2").mkdir()
    (tmp_path / "camera 2" / "\u00e9.png").write_bytes(encoded("png"))
    with pytest.raises(DataError, match=r"an image id must stand for one file, but .* is camera 1/.* and camera 2/"):
        locate_files(np.array(["\u00e9"]), [tmp_path])


def test_an_image_of_another_split_is_not_taken(tmp_path: Path) -> None:
    for name in ("train/a.jpg", "validation/a.jpg", "validation/b.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(encoded("jpeg"))
    folders = [tmp_path / "images", tmp_path / "images" / "train"]
    assert locate_files(np.array(["a", "b"]), folders).files.tolist() == ["train/a.jpg", ""]


def test_two_files_of_an_id_in_one_folder_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "a.png", "b.jpg"):
        (tmp_path / name).write_bytes(encoded("jpeg"))
    assert locate_files(np.array(["a", "b"]), [tmp_path]).files.tolist() == ["a.jpg", "b.jpg"]
    assert "1 image ids have more than one file; the first by name is used: a.jpg, not a.png" in capsys.readouterr().out


@pytest.mark.parametrize(("largest", "bits"), [(4095, 12), (1000, 10), (65535, None), (40000, None)])
def test_images_of_more_than_8_bits_are_reported_where_only_the_lower_part_is_used(
    largest: int, bits: int | None, tmp_path: Path
) -> None:
    pixels = np.linspace(0, largest, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for path in paths[::2]:
        Image.fromarray(pixels).save(path)
    for path in paths[1::2]:
        Image.fromarray((pixels >> 8).astype(np.uint8)).save(path)
    notice = depth_notice(np.array([*(path.name for path in paths), "a.jpg"]), tmp_path)
    if bits is None:
        assert notice is None
    else:
        assert (
            f"have 16 bits per value, of which at most {bits} are used (the largest value is {largest:,}, in" in notice
        )
        assert f"0 to {largest >> 8} of 255" in notice
    assert depth_notice(np.zeros(0, dtype="<U1"), tmp_path) is None
