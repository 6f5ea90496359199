"""The real numbers that packed weights stand for, each rounded once to a 16-bit dtype.

Each scheme defines a number as a short expression in codes and scales. Here that expression is evaluated in float64,
where it is exact (bitsandbytes' int8 excepted, see there), and the result is rounded by ``rounding.round_to``: the
stored value is the one nearest to the scheme's number. The original libraries round to float32 or float16 on the way,
and so may differ from it in the last place, where that makes a tie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from loreg.algebra.rounding import finite, round_to, widen
from loreg.errors import BadInput, Unsupported
from loreg.quantised.scheme import Packed, run_of

TILE_ELEMENTS = 1 << 20
"""Numbers that are in float64 at once."""

Read = Callable[[str], Tensor]
"""A stored tensor by its name; float8_e8m0fnu as uint8."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """A packed weight as (rows, columns) real numbers: ``tile(a, b)`` gives rows [a, b) in float64.

    ``shape``: what the scheme says that the weight's is; ``unit``: of how many rows a tile must be made.
    """

    shape: tuple[int, ...]
    tile: Callable[[int, int], Tensor]
    unit: int = 1

    def rounded(self, name: str, dtype: torch.dtype) -> Tensor:
        """All of them in ``dtype``, of shape ``shape``. Raises BadInput, naming ``name``, where one is not finite."""
        rows, columns = prod(self.shape[:-1]), self.shape[-1]
        out = torch.empty(rows, columns, dtype=dtype)
        step = max(1, TILE_ELEMENTS // max(1, columns) // self.unit) * self.unit
        for first in range(0, rows, step):
            last = min(rows, first + step)
            tile = round_to(self.tile(first, last), dtype)
            for at in (~finite(tile)).nonzero()[:1].tolist():
                raise BadInput(
                    f"Weight {name!r} stands for a number at {[first + at[0], at[1]]} that is no finite {dtype}: the "
                    "checkpoint is damaged, or needs bfloat16."
                )
            out[first:last] = tile
        return out.view(self.shape)


def shape_of(packed: Packed, stored: Mapping[str, tuple[int, ...]], read: Read) -> tuple[int, ...]:
    """The shape of what ``packed`` stands for, (…, out, in), from the shapes of its parts. Raises BadInput."""
    if packed.kind == "bnb4":
        return _State.parse(read(packed.parts["state"]), packed.name).shape
    if packed.kind == "gptq":
        words, outputs = stored["qweight"]
        return outputs, 32 * words // packed.options["bits"]
    if packed.kind == "awq":
        inputs, words = stored["qweight"]
        return 8 * words, inputs
    return stored["weight"]


def numbers(packed: Packed, read: Read) -> Numbers:
    """What ``packed`` stands for. Raises BadInput for parts that contradict each other."""
    kinds = {"bnb4": _bnb4, "bnb8": _bnb8, "gptq": _gptq, "awq": _awq, "fp8": _fp8}
    return kinds[packed.kind](packed, {role: read(name) for role, name in packed.parts.items()})


# The 16 values of each 4-bit type, as float32 (QLoRA, Dettmers et al. 2023, appendix E; bitsandbytes
# functional.get_4bit_type). The high nibble comes first.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(sign * x / 12 for sign in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3))


@dataclass(frozen=True, slots=True)
class _State:
    """What bitsandbytes stores beside 4-bit codes, as JSON in bytes."""

    shape: tuple[int, ...]
    blocksize: int
    quant_type: str
    nested_blocksize: int
    nested_offset: float

    @classmethod
    def parse(cls, raw: Tensor, name: str) -> _State:
        """Raises BadInput, naming the weight."""
        try:
            document = json.loads(bytes(raw.tolist()))
            shape, blocksize = tuple(document["shape"]), document["blocksize"]
            nested, offset = document.get("nested_blocksize", 1), float(document.get("nested_offset", 0.0))
            if not shape or not all(type(size) is int and size > 0 for size in (*shape, blocksize, nested)):
                raise ValueError(f"sizes {[*shape, blocksize, nested]}")
            return cls(shape, blocksize, document["quant_type"], nested, offset)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"Weight {name!r} has a quant_state that cannot be read: {error!r}.") from error


def _bnb4(packed: Packed, parts: dict[str, Tensor]) -> Numbers:
    """bitsandbytes' 4 bits: code[q]·absmax, one absmax for each run of ``blocksize`` numbers, row-major."""
    state = _State.parse(parts["state"], packed.name)
    code = torch.tensor(_NF4 if packed.options["type"] == "nf4" else _FP4, dtype=torch.float32)
    same = parts["quant_map"].shape == code.shape and torch.allclose(parts["quant_map"], code, 0, 1e-6)
    if state.quant_type != packed.options["type"] or not same:
        raise Unsupported(f"Weight {packed.name!r} has codes of its own, expected those of {packed.options['type']}.")
    count = prod(state.shape)
    data, scales = parts["weight"].reshape(-1).view(torch.uint8), parts["absmax"].reshape(-1)
    _expect(packed, "bytes", data.numel(), -(-count // 2))
    _expect(packed, "scales", scales.numel(), -(-count // state.blocksize))
    if "nested_absmax" in parts:
        scales = _nested(packed, scales, parts, state)
    wide_code, wide_scales, columns = code.double(), scales.double(), state.shape[-1]

    def tile(first: int, last: int) -> Tensor:
        begin, end = first * columns, last * columns
        pairs = data[begin // 2 : -(-end // 2)]
        codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[begin % 2 :][: end - begin]
        blocks = torch.arange(begin, end) // state.blocksize
        return (wide_code[codes.int()] * wide_scales[blocks]).view(-1, columns)

    return Numbers(state.shape, tile)


def _nested(packed: Packed, codes: Tensor, parts: dict[str, Tensor], state: _State) -> Tensor:
    """absmax of "double quantisation": code₂[q₂]·absmax₂ + offset, one float32 product, then one float32 sum.

    That order is ``functional.dequantize_4bit``'s, and the float32 that comes of it is what scales the weights.
    """
    table, outer = parts["nested_quant_map"].reshape(-1), parts["nested_absmax"].reshape(-1)
    _expect(packed, "nested codes", table.numel(), 256)
    _expect(packed, "nested scales", outer.numel(), -(-codes.numel() // state.nested_blocksize))
    blocks = torch.arange(codes.numel()) // state.nested_blocksize
    products = table[codes.int()] * outer[blocks]
    return products + torch.tensor(state.nested_offset, dtype=torch.float32)


def _expect(packed: Packed, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise BadInput(f"Weight {packed.name!r} is damaged: it has {found} {what}, expected {expected}.")


def _bnb8(packed: Packed, parts: dict[str, Tensor]) -> Numbers:
    """bitsandbytes' LLM.int8: q·SCB/127, SCB the largest magnitude of a row (Dettmers et al. 2022, section 2.1).

    The product is exact. The quotient is rounded once to float64, which changes no later rounding to 16 bits: a
    quotient by 127 of a number of 32 bits is a midpoint, or further from it than 2⁻³³ of itself.
    """
    if "format" in parts and int(parts["format"]) != 0:
        raise Unsupported(f"Weight {packed.name!r} is laid out for one GPU, expected rows: save it again as rows.")
    data, scales = parts["weight"], parts["SCB"].double()[:, None]

    def tile(first: int, last: int) -> Tensor:
        return data[first:last].double() * scales[first:last] / 127

    return Numbers(tuple(data.shape), tile)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """(n, k) int32 words to (n·32/bits, k) codes, int32: each column is a run of bits, the low ones first.

    That is AutoGPTQ's layout at every width: at 3 bits a code may lie across two words.
    """
    run = run_of(bits)
    wide = words.view(-1, run, words.shape[1]).long() & 0xFFFFFFFF
    codes = []
    for k in range(32 * run // bits):
        word, shift = divmod(k * bits, 32)
        code = wide[:, word] >> shift
        if shift + bits > 32:
            code = code | wide[:, word + 1] << (32 - shift)
        codes.append(code & (2**bits - 1))
    return torch.stack(codes, dim=1).view(-1, words.shape[1]).int()


def _gptq(packed: Packed, parts: dict[str, Tensor]) -> Numbers:
    """GPTQ: scale·(q - zero), scale and zero of the output's row and the input's group, g_idx.

    ``gptq`` (v1) stores zero - 1, ``gptq_v2`` zero itself. A stored zero of all ones means 2^bits to some v1 kernels
    and 0 to others (auto_gptq 0.7.1: qlinear_cuda.py, qlinear_cuda_old.py), so it is refused.
    """
    bits, offset = packed.options["bits"], packed.options["offset"]
    words, scales = parts["qweight"], parts["scales"].double().T
    # The words of a row of qzeros are one run, as those of a column of qweight are.
    zeros = _unpacked(parts["qzeros"].T.contiguous(), bits) + offset
    if bool((zeros == 2**bits).any()):
        raise Unsupported(
            f"Weight {packed.name!r} has a zero point that libraries read as 0 or as {2**bits}: use the model that "
            "it was quantised from."
        )
    inputs, outputs, groups = 32 * words.shape[0] // bits, words.shape[1], scales.shape[1]
    index = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // packed.options["group"]
    _check_groups(packed, index, groups)

    def tile(first: int, last: int) -> Tensor:
        codes = _unpacked(words[:, first:last].contiguous(), bits).T.double()
        numbers: Tensor = (codes - zeros[first:last][:, index]) * scales[first:last][:, index]
        return numbers

    return Numbers((outputs, inputs), tile)


def _check_groups(packed: Packed, index: Tensor, groups: int) -> None:
    """Each group has the same number of inputs, the last one perhaps fewer: a dummy g_idx of zeros is none."""
    inside = int(index.min()) >= 0 and int(index.max()) < groups
    sizes = torch.bincount(index, minlength=groups).tolist() if inside else [0]
    if len(set(sizes[:-1])) > 1 or not 0 < sizes[-1] <= sizes[0]:
        raise BadInput(
            f"Weight {packed.name!r} has a g_idx that does not put its inputs into {groups} groups of one size: it "
            "is damaged, or a placeholder."
        )


_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word holds the code of each of its eight columns (AutoAWQ, modules/linear/gemm.py)."""


def _awq(packed: Packed, parts: dict[str, Tensor]) -> Numbers:
    """AWQ's gemm layout: scale·(q - zero), eight outputs interleaved in each word, groups of consecutive inputs."""
    words, scales = parts["qweight"], parts["scales"].double().T
    shifts = 4 * torch.tensor(_AWQ_NIBBLES)

    def codes(part: Tensor) -> Tensor:
        return (part[:, :, None] >> shifts & 15).flatten(1).T

    zeros, inputs = codes(parts["qzeros"]), words.shape[0]
    index = torch.arange(inputs) // (inputs // scales.shape[1])

    def tile(first: int, last: int) -> Tensor:
        here = codes(words[:, first // 8 : -(-last // 8)])
        return (here - zeros[first:last][:, index]) * scales[first:last][:, index]

    return Numbers((8 * words.shape[1], inputs), tile, unit=8)


def _fp8(packed: Packed, parts: dict[str, Tensor]) -> Numbers:
    """float8 with scales: w·scale, one for each block; blocks at the end of a row or column may be cut short.

    "scale_inv" is the inverse of what the weight was multiplied by, and so multiplies here (DeepSeek-V3, inference/
    kernel.py, weight_dequant; vLLM's and compressed-tensors' weight_scale is the same number).
    """
    data, scale = parts["weight"], parts["scale"]
    if scale.dtype == torch.uint8:  # float8_e8m0fnu: a power of two, 255 is NaN
        scale = torch.where(scale == 255, torch.nan, torch.exp2(scale.double() - 127))
    height, width = packed.options["block"]
    rows, columns = data.shape[-2:]
    flat = data.reshape(-1, columns)
    grid = scale.double().reshape(-1, 1) if scale.ndim < 2 else scale.double().reshape(-1, scale.shape[-1])
    per_matrix, across = -(-rows // height), torch.arange(columns) // width

    def tile(first: int, last: int) -> Tensor:
        wide = torch.empty(last - first, columns, dtype=torch.float64)
        widen(flat[first:last], wide)
        if grid.numel() == 1:
            return wide * grid
        row = torch.arange(first, last)
        return wide * grid[row // rows * per_matrix + row % rows // height][:, across]

    return Numbers(tuple(data.shape), tile)
