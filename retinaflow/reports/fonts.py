"""Fonts for class names in any script: matplotlib's own, then installed ones that have more letters."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import matplotlib as mpl
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

_OWN = "DejaVu Sans"
_OTHERS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "Yu Gothic", "Meiryo", "Malgun Gothic", "PingFang SC"),
    *("PingFang HK", "Hiragino Sans", "Apple SD Gothic Neo", "Nanum Gothic", "Arial Unicode MS", "Nirmala UI"),
    *("Noto Sans", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans Bengali", "Noto Sans Tamil"),
)
"""Families of Linux, Windows and macOS for scripts that DejaVu Sans lacks."""


@lru_cache
def families() -> tuple[str, ...]:
    """The installed font families, in the order in which they are searched for a letter."""
    installed = set(fontManager.get_font_names())
    return (_OWN, *(name for name in _OTHERS if name in installed))


def use_in_figures() -> None:
    """Let figures use :func:`families` from now on, unless a family was chosen before."""
    if mpl.rcParams["font.family"] == mpl.rcParamsDefault["font.family"]:
        mpl.rcParams["font.family"] = list(families())
        # Many have no bold letters; these warnings would only fill the log.
        logging.getLogger("matplotlib.font_manager").addFilter(lambda record: "font weight" not in record.getMessage())


@lru_cache(maxsize=4096)
def file_for(text: str) -> Path:
    """The first font file that has every letter of a text; matplotlib's own if none has."""
    files = [Path(findfont(FontProperties(family=[name]))) for name in families()]
    wanted = {ord(letter) for letter in text if not letter.isspace()}
    return next((file for file in files if wanted <= _letters(file)), files[0])


@lru_cache
def _letters(file: Path) -> frozenset[int]:
    return frozenset(FT2Font(str(file)).get_charmap())
