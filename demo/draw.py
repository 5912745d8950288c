"""Drawing the shapes world: signed distances of the shapes, their geometric attributes, textures and masks.

The local frame of an object has its centre at 0 and its radius at 1; u goes right, v down.
"""
from __future__ import annotations

from functools import lru_cache

import numpy as np

from .world import ATTRIBUTES, BACKGROUNDS, COLORS, INDIVIDUALS, SHAPES, SIZE, VERSION, Scenes

_TABLE_HALF, _TABLE_N = 2.4, 320  # the distance table covers [-2.4, 2.4]^2 of the local frame


def _polygon(points: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) to a closed polygon [K, 2]."""
    d2, inside = np.full(u.shape, np.inf), np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0)):
        ex, ey, wx, wy = bx - ax, by - ay, u - ax, v - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        d2 = np.minimum(d2, (wx - t * ex) ** 2 + (wy - t * ey) ** 2)
        inside ^= ((ay > v) != (by > v)) & (wx < ex * (v - ay) / (ey if ey else 1.0))  # even-odd rule
    return np.where(inside, -1, 1) * np.sqrt(d2)


@lru_cache(maxsize=1)
def glyphs() -> np.ndarray:
    """The individuals as cells, [individuals, 6 rows, 5 columns] bool: mirrored, with a long outline, no lone cell, and
    no two much alike."""
    rng, kept = np.random.default_rng([VERSION, 65]), []
    while len(kept) < len(INDIVIDUALS):
        half = rng.random((6, 3)) < 0.55
        cells = np.concatenate([half, half[:, 1::-1]], 1)
        near = np.pad(cells, 1)
        lone = cells & ~(near[:-2, 1:-1] | near[2:, 1:-1] | near[1:-1, :-2] | near[1:-1, 2:])
        outline = sum(np.abs(np.diff(near.astype(int), axis=axis)).sum() for axis in (0, 1))
        apart = min(((cells != other).sum() for other in kept), default=99)
        if 13 <= cells.sum() <= 20 and outline >= 28 and not lone.any() and apart >= 8:
            kept.append(cells)
    return np.stack(kept)


def _glyph(cells: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the filled cells [6, 5] of a glyph, each a square with side 0.34."""
    side = 0.34
    out = np.full(u.shape, np.inf)
    for row, column in np.argwhere(cells):
        x, y = np.abs(u - (column - 2) * side) - side / 2, np.abs(v - (row - 2.5) * side) - side / 2
        out = np.minimum(out, np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0))
    return out - 0.03  # cells overlap a little and have soft corners


@lru_cache(maxsize=1)
def _distance_tables() -> np.ndarray:
    """Signed distance of every noun in its local frame, [nouns, N, N] float32: one lookup serves all."""
    axis = np.linspace(-_TABLE_HALF, _TABLE_HALF, _TABLE_N)
    u, v = np.meshgrid(axis, axis)

    def ring(turns, radii):  # polygon from polar coordinates, first point on top
        return np.stack([np.sin(turns) * radii, -np.cos(turns) * radii], 1)

    k, a = 2 * np.pi, 0.34
    t = np.linspace(0, k, 64, endpoint=False)
    heart = np.stack([16 * np.sin(t) ** 3,
                      2.5 - 13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)], 1) / 15.5
    cross = np.array([(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a),
                      (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)])
    # The part of an outer circle outside a smaller one that is shifted right: two arcs, ending at the same tips.
    toward, apart, outer, inner = np.arctan2(-0.18, 0.52), np.hypot(0.52, 0.18), 1.02, 0.84
    half = np.arccos((outer**2 + apart**2 - inner**2) / (2 * outer * apart))
    half2 = np.pi - np.arccos((inner**2 + apart**2 - outer**2) / (2 * inner * apart))
    t1, t2 = toward + np.linspace(half, k - half, 40), toward + np.linspace(k - half2, half2, 40)
    crescent = np.concatenate([outer * np.stack([np.cos(t1), np.sin(t1)], 1),
                               np.array([0.52, -0.18]) + inner * np.stack([np.cos(t2), np.sin(t2)], 1)[1:-1]])
    shapes = {
        "circle": np.hypot(u, v) - 0.95,
        "square": _polygon(0.84 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), u, v),
        "triangle": _polygon(ring(np.arange(3) * k / 3, 1.15) + (0, 0.22), u, v),
        "diamond": _polygon(np.array([(0, -1.12), (0.78, 0), (0, 1.12), (-0.78, 0)]), u, v),
        "star": _polygon(ring(np.arange(10) * k / 10, np.where(np.arange(10) % 2, 0.48, 1.12)), u, v),
        "cross": _polygon(cross, u, v),
        "heart": _polygon(heart, u, v),
        "crescent": _polygon(crescent + (0.16, -0.05), u, v),
    }
    return np.stack([*(shapes[s] for s in SHAPES), *(_glyph(g, u, v) for g in glyphs())]).astype(np.float32)


def _distance(shape: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Bilinear lookup: shape [N], u and v [N, H, W] -> signed distance [N, H, W] in radii."""
    scale = np.float32((_TABLE_N - 1) / (2 * _TABLE_HALF))
    gu, gv = (np.clip((c + np.float32(_TABLE_HALF)) * scale, 0, _TABLE_N - 1.001) for c in (u, v))
    iu, iv = gu.astype(np.int32), gv.astype(np.int32)
    fu, fv = gu - iu, gv - iv
    flat, at = _distance_tables().ravel(), (shape.astype(np.int32)[:, None, None] * _TABLE_N + iv) * _TABLE_N + iu
    top = flat[at] * (1 - fu) + flat[at + 1] * fu
    return top * (1 - fv) + (flat[at + _TABLE_N] * (1 - fu) + flat[at + _TABLE_N + 1] * fu) * fv


def _attribute_distance(name: str, shape: np.ndarray, u: np.ndarray, v: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """Signed distance, in radii, of shapes [N] under one attribute. phase is [N, 1, 1] in 0..1."""
    k = np.float32(2 * np.pi)
    if name == "spiky":      # twelve sharp teeth all round
        tooth = np.abs((np.arctan2(v, u) * 12 / k + phase) % 1 * 2 - 1)
        reach = np.clip(1.6 * np.hypot(u, v) - 0.3, 0, 1)  # teeth converge at the centre: fade them out there
        return _distance(shape, u * 1.22, v * 1.22) / 1.22 - (0.38 * tooth - 0.05) * reach
    if name == "wavy":       # the whole body sways like a flag in the wind
        return 0.8 * _distance(shape, u + 0.2 * np.sin(k * (v / 0.86 + phase)), v)
    if name == "melted":     # everything below the middle runs down in drips of unequal length
        drip = (0.5 + 0.5 * np.cos(k * (u / 0.62 + phase))) ** 2 * (0.75 + 0.25 * np.cos(k * (u / 1.9 + phase)))
        w = (v + 0.55) / 0.9  # the body moves up and shrinks a little, to leave room
        return 0.75 * _distance(shape, u / 0.95, np.where(w > 0, w / (1 + 0.95 * drip), w) - 0.35)
    if name == "ringed":     # a smaller body inside a ring of its own outline
        d = _distance(shape, u * 1.6, v * 1.6) / 1.6
        return np.minimum(d, np.abs(d - 0.29) - 0.11)
    if name == "sliced":     # cut along a diagonal, the halves slide apart
        c, s = np.cos(0.75 + 0.3 * (phase - 0.5)), np.sin(0.75 + 0.3 * (phase - 0.5))
        across = v * c - u * s
        slide = np.where(across > 0, 0.26, -0.26)
        gap = np.where(across > 0, 0.11, -0.11)
        return np.maximum(_distance(shape, u - slide * c + gap * s, v - slide * s - gap * c), 0.1 - np.abs(across))
    d = _distance(shape, u, v)
    if name == "hollow":     # an outline
        return np.abs(d + 0.13) - 0.13
    if name == "mosaic":     # tiles with the background showing between them
        tile = 0.44
        du, dv = (np.abs((c / tile + phase) % 1 - 0.5) * tile for c in (u, v))
        return np.maximum(d, np.maximum(du, dv) - 0.5 * tile + 0.075)
    if name == "bitten":     # three bites out of the lower left, where every shape has a body
        bites = [0.3 - np.hypot(u - x, v - y) for x, y in ((-0.16, 0.72), (-0.5, 0.44), (-0.78, 0.08))]
        beyond = (v - 0.44) * 0.64 - (u + 0.5) * 0.77
        return np.maximum.reduce([d, *bites, beyond])
    return d


def _object(s: Scenes, j: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage [B, 64, 64] in 0..1 and RGB [B, 64, 64, 3] of object j, at 2x2 samples a pixel."""
    n, ss = len(s), 2 * SIZE
    axis = (np.arange(ss, dtype=np.float32) + 0.5) / 2
    columns = (np.cos(s.angle), np.sin(s.angle), s.radius, s.phase, s.x, s.y)
    cos, sin, r, phase, x, y = (a[:, j].astype(np.float32)[:, None, None] for a in columns)
    px, py = (axis[None, None, :] - x) / r, (axis[None, :, None] - y) / r
    u, v = px * cos + py * sin, py * cos - px * sin
    d = np.empty((n, ss, ss), np.float32)
    for a in np.unique(s.attribute[:, j]):
        i = np.flatnonzero(s.attribute[:, j] == a)
        d[i] = _attribute_distance(ATTRIBUTES[a], s.shape[i, j], u[i], v[i], phase[i])
    cover = np.clip(0.5 - d * r * 2, 0, 1)  # a soft edge one sub-pixel wide

    stripe = np.clip(0.5 + 5 * np.sin((px + py) * np.float32(2 * np.pi / 0.62)), 0, 1)
    row = np.floor(py / 0.4)  # rows of dots, every second one shifted by half a step
    dot = np.clip((0.29 - np.hypot((px / 0.46 + 0.5 * (row % 2)) % 1 - 0.5, (py / 0.4 - row - 0.5) * 0.87)) * 10, 0, 1)
    t = s.texture[:, j, None, None]
    shade = np.where(t == 1, stripe, np.where(t == 2, dot, 0)).astype(np.float32)
    ink = np.array(list(COLORS.values()), np.float32)[s.color[:, j]][:, None, None]

    def pool(z):
        return z.reshape(n, SIZE, 2, SIZE, 2).mean((2, 4))
    alpha = pool(cover)
    # Shade and coverage are pooled together so that an edge keeps the colour of its inside.
    inside = np.where(alpha > 0, pool(shade * cover) / np.maximum(alpha, 1e-6), 0)
    return alpha, ink * (1 - 0.5 * inside[..., None])  # the texture's ink is the colour at half brightness


def render(s: Scenes, chunk: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [B, 64, 64, 3] uint8 and the visible coverage of each object [B, 2, 64, 64] float32.
    Object 0 is drawn over object 1."""
    images, masks = np.empty((len(s), SIZE, SIZE, 3), np.uint8), np.zeros((len(s), 2, SIZE, SIZE), np.float32)
    for at in range(0, len(s), chunk):
        part = s[at:at + chunk]
        canvas = np.broadcast_to(np.array(list(BACKGROUNDS.values()), np.float32)[part.background][:, None, None],
                                 (len(part), SIZE, SIZE, 3)).copy()
        pair = np.flatnonzero(part.count == 2)
        for j, rows in ((1, pair), (0, np.arange(len(part)))):
            if len(rows):
                alpha, ink = _object(part[rows], j)
                canvas[rows] += (ink - canvas[rows]) * alpha[..., None]
                masks[at + rows, 1] *= 1 - alpha if j == 0 else 1
                masks[at + rows, j] = alpha
        images[at:at + chunk] = np.rint(canvas)
    return images, masks
