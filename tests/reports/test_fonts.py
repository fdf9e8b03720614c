"""Class names in any script, as far as this machine has letters for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from io import BytesIO

import matplotlib as mpl
import pytest
from PIL import ImageFont

from retinaflow.reports import figure_style
from retinaflow.reports.figure_style import class_figure

CHINESE = "红细胞"
needs_chinese = pytest.mark.skipif(
    "DejaVu" in figure_style.font_file(CHINESE).name, reason="no font of this machine has Chinese letters"
)


@pytest.fixture
def chosen_before() -> Iterator[None]:
    """What was chosen as font is chosen again afterwards."""
    before = mpl.rcParams["font.family"]
    yield
    mpl.rcParams["font.family"] = before


@pytest.mark.parametrize("text", ["Rose 0.51", "Größe, Клетка, Κύτταρο …", ""])
def test_european_names_are_written_in_matplotlibs_own_font(text: str) -> None:
    assert figure_style.font_file(text).name == "DejaVuSans.ttf"


def test_a_letter_that_no_font_has_does_not_stop() -> None:
    assert figure_style.font_file("\U000e0fff").name == "DejaVuSans.ttf"


@needs_chinese
def test_chinese_names_find_a_font_that_has_them_and_pillow_opens_it() -> None:
    font = ImageFont.truetype(str(figure_style.font_file(f"{CHINESE} 0.50")), 20)
    first, second = (bytes(font.getmask(letter)) for letter in CHINESE[:2])
    assert first != second


@needs_chinese
def test_figures_write_chinese_names_without_a_warning() -> None:
    figure, axes = class_figure(CHINESE, right=0.9)
    axes.set_xlabel(CHINESE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(BytesIO(), format="png")


@pytest.mark.usefixtures("chosen_before")
def test_a_font_that_the_user_chose_is_kept() -> None:
    mpl.rcParams["font.family"] = ["serif"]
    figure_style.use_installed_fonts()
    assert mpl.rcParams["font.family"] == ["serif"]
