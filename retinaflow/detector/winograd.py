"""3 x 3 convolutions with a quarter of the multiplications: F(4 x 4, 3 x 3) of Lavin and Gray 2016, "Fast Algorithms
for Convolutional Neural Networks", section 4, forward and backward.

A map is cut into tiles of 6 x 6 that overlap by 2; each gives 4 x 4 of the output. With the paper's matrices B, G and
A a tile d and a filter g give Y = A^T [(G g G^T) * (B^T d B)] A, where * multiplies element by element. Over all
channels and tiles that is one matrix product for each of the 36 elements, and all else is small. The gradients are the
adjoint of the same steps, so they too cost a quarter. A transform is one matrix product as well, with a Kronecker
matrix such as (B x B)^T ``[36, 36]``.

Several maps that share their weights (the levels of a pyramid) are one call, so that filters are transformed once and
small maps do not make small products.

Rounding: in float32 values and gradients differ from those of a plain convolution by about 1e-5 of the largest one.
Memory, while a call lasts: 36 / 16 of the maps forward, twice that backward; kept in between are the maps and weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

OUTPUT, TILE = 4, 6
"""Side of the output of a tile, and of a tile."""
OF_MAPS, OF_FILTERS = 3, 12
"""How many multiplications of a matrix product one of a transform counts for."""
_BLOCK = 2**21
"""Elements of transformed outputs that are held at a time, 8 MiB in float32, but at least 64 channels."""
_B_T = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
_G = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
_A_T = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)


def convolve(maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """``conv2d`` with padding 1 of every map: ``[B, in, h, w]`` -> ``[B, out, h, w]``, channels-last, differentiable.

    weight: ``[out, in, 3, 3]``, bias: ``[out]``; all of one floating dtype, on one device.
    """
    return list(_Convolution.apply(weight, bias, *maps))


def tile_count(shape: Sequence[int]) -> int:
    """Tiles of a map ``[B, C, h, w]``."""
    return int(shape[0]) * -(-int(shape[2]) // OUTPUT) * -(-int(shape[3]) // OUTPUT)


def cost(shapes: Sequence[Sequence[int]], inputs: int, outputs: int) -> tuple[int, int]:
    """Multiplications of a forward pass over maps of these shapes: by a plain convolution, and by this one.

    Transforms are bound by memory, and count :data:`OF_MAPS` and :data:`OF_FILTERS` times: with that the two compare
    about as measured times do (``benchmarks/winograd.py``).
    """
    tiles = sum(map(tile_count, shapes))
    plain = 9 * sum(int(s[0]) * int(s[2]) * int(s[3]) for s in shapes) * inputs * outputs
    maps = OF_MAPS * tiles * (TILE**4 * inputs + OUTPUT**2 * TILE**2 * outputs)
    filters = OF_FILTERS * 9 * TILE**2 * inputs * outputs
    return plain, TILE**2 * tiles * inputs * outputs + maps + filters


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *maps: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, *maps)
        return _forward(maps, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *maps = ctx.saved_tensors
        of_weight, of_bias, *of_maps = ctx.needs_input_grad
        found_weight, found_maps = _backward(maps, weight, gradients, of_weight=of_weight, of_maps=any(of_maps))
        found_bias = torch.stack([one.sum((0, 2, 3)) for one in gradients]).sum(0) if of_bias else None
        return (found_weight, found_bias, *found_maps)


def _forward(maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    out_channels, shapes = weight.shape[0], [m.shape for m in maps]
    transformed = _transformed_inputs(maps)
    whole = [_room(shape, out_channels, weight) for shape in shapes]
    inverse = _kronecker(_A_T, weight)
    for block in _blocks(out_channels, transformed.shape[1]):
        products = torch.bmm(transformed, _transformed_filters(weight[block]).transpose(1, 2))
        values = torch.mm(inverse, products.flatten(1)).view(OUTPUT, OUTPUT, transformed.shape[1], -1)
        if bias is not None:
            values += bias[block]
        for room, part in zip(whole, _by_map(values, shapes), strict=True):
            _as_tiles(room.permute(0, 2, 3, 1))[..., block] = part
    return tuple(_cut(room, shape) for room, shape in zip(whole, shapes, strict=True))


def _backward(
    maps: Sequence[Tensor], weight: Tensor, gradients: Sequence[Tensor], *, of_weight: bool, of_maps: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    out_channels, shapes = weight.shape[0], [m.shape for m in maps]
    whole = [_padded(gradient) for gradient in gradients]
    transformed = _transformed_inputs(maps) if of_weight else None
    tiles = sum(map(tile_count, shapes))
    inner = weight.new_zeros(TILE**2, tiles, weight.shape[1]) if of_maps else None
    found = torch.empty_like(weight) if of_weight else None
    forward, back = _kronecker(_A_T, weight).T.contiguous(), _kronecker(_G, weight).T.contiguous()
    for block in _blocks(out_channels, tiles):
        values = torch.cat([_as_tiles(one)[..., block].flatten(2, 4) for one in whole], dim=2)
        products = torch.mm(forward, values.view(OUTPUT**2, -1)).view(TILE**2, tiles, -1)
        del values
        if inner is not None:
            inner.baddbmm_(products, _transformed_filters(weight[block]))
        if found is not None and transformed is not None:
            filters = torch.bmm(products.transpose(1, 2), transformed)
            found[block] = torch.mm(back, filters.flatten(1)).view(3, 3, -1, weight.shape[1]).permute(2, 3, 0, 1)
    del transformed
    return found, [None] * len(maps) if inner is None else _untransformed_inputs(inner, shapes)


def _transformed_inputs(maps: Sequence[Tensor]) -> Tensor:
    """``[36, tiles of all maps, in]``."""
    tiles, channels = sum(tile_count(m.shape) for m in maps), maps[0].shape[1]
    cut = maps[0].new_empty(TILE, TILE, tiles, channels)
    for one, room in zip(maps, _by_map(cut, [m.shape for m in maps]), strict=True):
        down, across = _grid(one.shape)
        below, right = OUTPUT * down - one.shape[2] + 1, OUTPUT * across - one.shape[3] + 1
        framed = functional.pad(one.permute(0, 2, 3, 1), (0, 0, 1, right, 1, below))
        room.copy_(framed.unfold(1, TILE, OUTPUT).unfold(2, TILE, OUTPUT).permute(4, 5, 0, 1, 2, 3))
    return torch.mm(_kronecker(_B_T, cut), cut.view(TILE**2, -1)).view(TILE**2, tiles, channels)


def _untransformed_inputs(inner: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor | None]:
    """The adjoint of :func:`_transformed_inputs`: tiles are added up where they overlap."""
    back = _kronecker(_B_T, inner).T.contiguous()
    cut = torch.mm(back, inner.flatten(1)).view(TILE, TILE, *inner.shape[1:])
    found: list[Tensor | None] = []
    for part, shape in zip(_by_map(cut, shapes), shapes, strict=True):
        batch, channels, height, width = shape
        down, across = _grid(shape)
        framed = inner.new_zeros(batch, OUTPUT * (down + 1), OUTPUT * (across + 1), channels)
        room = _as_tiles(framed)
        # The last two rows and columns of a tile are the first two of the next one.
        room[:, :, :, :down, :across] = part[:OUTPUT, :OUTPUT]
        room[:2, :, :, 1:, :across] += part[OUTPUT:, :OUTPUT]
        room[:, :2, :, :down, 1:] += part[:OUTPUT, OUTPUT:]
        room[:2, :2, :, 1:, 1:] += part[OUTPUT:, OUTPUT:]
        found.append(framed[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2))
    return found


def _transformed_filters(weight: Tensor) -> Tensor:
    """``[36, out, in]``."""
    by_place = weight.permute(2, 3, 0, 1).reshape(9, -1)
    return torch.mm(_kronecker(_G, weight), by_place).view(TILE**2, *weight.shape[:2])


@functools.cache
def _kronecker_of(rows: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.tensor(rows, dtype=torch.float64)
    return torch.kron(matrix, matrix).to(device=device, dtype=dtype)


def _kronecker(rows: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    return _kronecker_of(rows, like.dtype, like.device)


def _blocks(channels: int, tiles: int) -> Iterator[slice]:
    """Output channels, as many at a time as make a block."""
    width = max(64, _BLOCK // (TILE**2 * tiles))
    return (slice(start, min(start + width, channels)) for start in range(0, channels, width))


def _grid(shape: Sequence[int]) -> tuple[int, int]:
    return -(-int(shape[2]) // OUTPUT), -(-int(shape[3]) // OUTPUT)


def _by_map(values: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """``[i, j, tiles of all maps, C]`` -> for each map a view ``[i, j, B, down, across, C]``."""
    parts = torch.split(values, [tile_count(shape) for shape in shapes], dim=2)
    return [torch.unflatten(part, 2, (shape[0], *_grid(shape))) for part, shape in zip(parts, shapes, strict=True)]


def _room(shape: Sequence[int], channels: int, like: Tensor) -> Tensor:
    """``[B, channels, 4 down, 4 across]``, channels-last."""
    size = (shape[0], channels, *(OUTPUT * side for side in _grid(shape)))
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _as_tiles(room: Tensor) -> Tensor:
    """``[B, 4 down, 4 across, C]`` -> a view ``[4, 4, B, down, across, C]``."""
    return torch.unflatten(torch.unflatten(room, 2, (-1, OUTPUT)), 1, (-1, OUTPUT)).permute(2, 4, 0, 1, 3, 5)


def _padded(gradient: Tensor) -> Tensor:
    down, across = _grid(gradient.shape)
    below, right = OUTPUT * down - gradient.shape[2], OUTPUT * across - gradient.shape[3]
    last = gradient.permute(0, 2, 3, 1)
    return functional.pad(last, (0, 0, 0, right, 0, below)) if below or right else last


def _cut(room: Tensor, shape: Sequence[int]) -> Tensor:
    if room.shape[2:] == tuple(shape[2:]):
        # Itself, not a view of all of it: what comes next may work in place.
        return room
    return room[:, :, : shape[2], : shape[3]].contiguous(memory_format=torch.channels_last)


PAYS_FROM = 1.1
"""How many times cheaper it must be."""
SMALLEST = 3e7
"""Multiplications of a forward pass below which it is not tried, for a call's fixed cost: 6e7 still gained a fifth."""


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` of kernel 3, stride 1 and padding 1, which keeps the size of a map: ``[B, in, h, w]`` ->
    ``[B, out, h, w]``.

    While it trains in float32 on a CPU it may compute by :func:`convolve`, which rounds differently. Everywhere else
    (evaluation, autocast, a GPU, ``torch.compile``, export) it is ``nn.Conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """input: ``[B, in, h, w]`` float."""
        return self.on_levels([input])[0]

    def on_levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The same for several maps at once, which may differ in height and width."""
        if self._pays(maps):
            return convolve(maps, self.weight, self.bias)
        return [super(Conv3x3, self).forward(one) for one in maps]

    def _pays(self, maps: Sequence[Tensor]) -> bool:
        if not (
            self.training
            and torch.is_grad_enabled()
            and all(one.device.type == "cpu" and one.dtype == self.weight.dtype == torch.float32 for one in maps)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        ):
            return False
        plain, fast = cost([one.shape for one in maps], self.in_channels, self.out_channels)
        return plain >= SMALLEST and plain >= PAYS_FROM * fast


def use_conv3x3(module: nn.Module) -> None:
    """Replace every plain convolution of that kind below a module by a :class:`Conv3x3` of the same parameters."""
    for name, child in module.named_children():
        if type(child) is nn.Conv2d and _is_plain(child):
            with torch.device("meta"):
                replacement = Conv3x3(child.in_channels, child.out_channels, bias=child.bias is not None)
            replacement.weight, replacement.bias = child.weight, child.bias
            module.add_module(name, replacement)
        else:
            use_conv3x3(child)


def _is_plain(layer: nn.Conv2d) -> bool:
    return (
        layer.kernel_size == (3, 3)
        and layer.stride == layer.padding == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )
