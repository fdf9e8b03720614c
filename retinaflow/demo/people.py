"""The people of the generated demo set: men and women, what they wear, and their hats.

A person is three parts: body, torso garment (shirt or coat) and hat, so clothing boxes lie inside person boxes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retinaflow.demo.shapes import PAINTS, Color, Pen, arc, pick, shade

SKINS: tuple[Color, ...] = ((250, 214, 184), (234, 186, 148), (198, 144, 104), (150, 100, 70), (104, 70, 50))
HAIRS: tuple[Color, ...] = ((44, 34, 30), (96, 62, 38), (150, 100, 50), (214, 176, 100), (150, 146, 144), (160, 70, 40))
HATS: tuple[Color, ...] = ((226, 200, 140), (150, 108, 70), (92, 92, 100), (48, 46, 52), (236, 230, 216), (170, 50, 56))
HEAD_Y, HEAD_RADIUS = 0.19, 0.135


@dataclass(frozen=True)
class Look:
    """The colours of one person."""

    skin: Color
    hair: Color
    cloth: Color
    trim: Color


def person(pen: Pen, rng: np.random.Generator, *, kind: str, torso: str, hat: str, parts: tuple[int, int, int]) -> None:
    """A person from the front; ``parts`` are the ids of body, torso garment and hat."""
    body, garment, on_head = (pen.of(part) for part in parts)
    look = Look(pick(rng, SKINS, spread=8), pick(rng, HAIRS, spread=10), pick(rng, PAINTS), pick(rng, PAINTS))
    woman = kind == "Woman"
    if woman:
        body.box(-0.17, 0.07, 0.17, 0.42, shade(look.hair, 0.85), round_by=0.14, edge=0.01)
    legs(body, rng, look=look, skirt=woman and rng.random() < 0.65)
    if torso == "Coat":
        coat(body, garment, rng, look=look, waist=0.1 if woman else 0.14)
    else:
        shirt(body, garment, rng, look=look, waist=0.1 if woman else 0.14)
    head(body, rng, look=look, woman=woman)
    if hat == "Sun hat":
        sun_hat(on_head, rng)
    elif hat == "Fedora":
        fedora(on_head, rng)


def legs(pen: Pen, rng: np.random.Generator, *, look: Look, skirt: bool) -> None:
    """Trousers, or a skirt over bare legs, and shoes."""
    cloth = pick(rng, ((52, 66, 104), (60, 60, 66), (120, 100, 80), (84, 90, 70), (150, 60, 90)))
    for side in (-1, 1):
        tone = look.skin if skirt else cloth
        pen.polygon(
            [(side * 0.015, 0.6), (side * 0.125, 0.6), (side * 0.115, 0.96), (side * 0.035, 0.96)], tone, edge=0.01
        )
        pen.box(min(side * 0.02, side * 0.15), 0.94, max(side * 0.02, side * 0.15), 1.0, (54, 42, 40), round_by=0.03)
    if skirt:
        pen.polygon([(-0.11, 0.58), (0.11, 0.58), (0.2, 0.8), (-0.2, 0.8)], cloth, edge=0.012)


def sleeves(garment: Pen, body: Pen, *, look: Look, color: Color, until: float) -> None:
    """Both arms; the share ``until`` of each belongs to the garment, the rest is bare."""
    for side in (-1, 1):
        x1, y1, x2, y2 = side * 0.145, 0.36, side * 0.22, 0.62
        xm, ym = x1 + until * (x2 - x1), y1 + until * (y2 - y1)
        body.line(x1, y1, x2, y2, 0.06, look.skin)
        body.ellipse(x2, y2 + 0.015, 0.036, 0.036, look.skin)
        garment.line(x1, y1, xm, ym, 0.085, color, edge=0.01)


def shirt(body: Pen, garment: Pen, rng: np.random.Generator, *, look: Look, waist: float) -> None:
    """A short shirt to the hips, closed, plain or with hoops; short or long sleeves."""
    sleeves(garment, body, look=look, color=look.cloth, until=0.45 if rng.random() < 0.6 else 0.95)
    garment.polygon([(-0.15, 0.33), (0.15, 0.33), (waist + 0.02, 0.63), (-waist - 0.02, 0.63)], look.cloth, edge=0.012)
    if rng.random() < 0.45:
        for y in np.arange(0.4, 0.6, 0.08):
            half = 0.15 + (waist + 0.02 - 0.15) * (y - 0.33) / 0.3 - 0.008
            garment.box(-half, float(y), half, float(y) + 0.036, look.trim)
    body.polygon(arc(0, 0.325, 0.06, 0.05, start=0, sweep=180, steps=9), look.skin)


def coat(body: Pen, garment: Pen, rng: np.random.Generator, *, look: Look, waist: float) -> None:
    """A coat to the knees, flared, with lapels over a light shirt, a row of buttons, perhaps a belt."""
    sleeves(garment, body, look=look, color=look.cloth, until=0.95)
    outline = [
        (-0.165, 0.33),
        (0.165, 0.33),
        (waist + 0.03, 0.57),
        (waist + 0.1, 0.85),
        (-waist - 0.1, 0.85),
        (-waist - 0.03, 0.57),
    ]
    garment.polygon(outline, look.cloth, edge=0.012)
    body.polygon([(-0.055, 0.32), (0.055, 0.32), (0.0, 0.5)], (244, 240, 232))
    for side in (-1, 1):
        lapel = [(side * 0.05, 0.31), (side * 0.13, 0.36), (side * 0.09, 0.42), (0.0, 0.53)]
        garment.polygon(lapel, shade(look.cloth, 0.78), edge=0.012)
    garment.line(0.0, 0.52, 0.0, 0.85, 0.014, shade(look.cloth, 0.5))
    if rng.random() < 0.5:
        garment.box(-waist - 0.035, 0.58, waist + 0.035, 0.625, shade(look.cloth, 0.5))
    for y in (0.56, 0.66, 0.75):
        garment.ellipse(0.04, y, 0.015, 0.015, shade(look.cloth, 0.4) if sum(look.cloth) > 300 else (220, 200, 150))


def head(pen: Pen, rng: np.random.Generator, *, look: Look, woman: bool) -> None:
    """Neck, face and the hair on top: parted for women, short and perhaps with a beard for men."""
    pen.box(-0.045, 0.27, 0.045, 0.35, shade(look.skin, 0.86))
    pen.ellipse(0, HEAD_Y, HEAD_RADIUS * 0.92, HEAD_RADIUS, look.skin, edge=0.01)
    if not woman and rng.random() < 0.45:
        pen.polygon(arc(0, HEAD_Y + 0.01, 0.118, 0.128, start=10, sweep=160, steps=13), look.hair)
        pen.ellipse(0, HEAD_Y + 0.02, 0.082, 0.062, look.skin)
    if woman:
        for side in (-1, 1):
            hair = [
                (0.0, 0.05),
                (side * 0.11, 0.08),
                (side * 0.15, 0.2),
                (side * 0.14, 0.36),
                (side * 0.1, 0.36),
                (side * 0.095, 0.17),
            ]
            pen.polygon(hair, look.hair, edge=0.008)
    else:
        crown = arc(0, HEAD_Y - 0.01, 0.135, 0.14, start=172, sweep=196, steps=15)
        fringe = arc(0, HEAD_Y + 0.01, 0.105, rng.uniform(0.06, 0.095), start=180, sweep=180, steps=9)[::-1]
        pen.polygon(np.concatenate([crown, fringe]), look.hair, edge=0.008)
    for side in (-1, 1):
        pen.ellipse(side * 0.048, HEAD_Y + 0.005, 0.015, 0.019, (34, 30, 34))
    mouth = np.concatenate([arc(0, HEAD_Y + 0.055, 0.045, 0.03, start=0, sweep=180, steps=9), [[0.0, HEAD_Y + 0.062]]])
    pen.polygon(mouth, (176, 66, 66))


def sun_hat(pen: Pen, rng: np.random.Generator) -> None:
    """A very wide, drooping brim under a round dome; some have a ribbon."""
    straw = pick(rng, HATS)
    brim = [(-0.31, 0.15), (-0.2, 0.07), (0.2, 0.07), (0.31, 0.15), (0.16, 0.115), (0.0, 0.105), (-0.16, 0.115)]
    pen.polygon(brim, shade(straw, 0.9), edge=0.012)
    pen.polygon(arc(0, 0.085, 0.145, 0.15, start=180, sweep=180, steps=15), straw, edge=0.012)
    if rng.random() < 0.6:
        pen.box(-0.143, 0.045, 0.143, 0.085, pick(rng, PAINTS))


def fedora(pen: Pen, rng: np.random.Generator) -> None:
    """A short brim, turned up at its ends, under a tall crown with a dent and a broad band."""
    felt = pick(rng, HATS)
    brim = [(-0.215, 0.05), (-0.15, 0.075), (0.15, 0.075), (0.215, 0.05), (0.18, 0.115), (0.0, 0.13), (-0.18, 0.115)]
    crown = [
        (-0.135, 0.09),
        (-0.115, -0.08),
        (-0.05, -0.105),
        (0.0, -0.07),
        (0.05, -0.105),
        (0.115, -0.08),
        (0.135, 0.09),
    ]
    pen.polygon(crown, felt, edge=0.012)
    pen.polygon(
        [(-0.134, 0.08), (-0.127, 0.01), (0.127, 0.01), (0.134, 0.08)],
        shade(felt, 0.45) if sum(felt) > 240 else (190, 60, 60),
    )
    pen.polygon(brim, shade(felt, 0.92), edge=0.012)
