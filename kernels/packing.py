"""INT4 codes in the compressed-tensors ``pack-quantized`` layout.

A code q in [-8, 7] is stored as the nibble q + 8, eight nibbles to an int32 word along the input dimension, element 0
in the lowest nibble::

    word[row, j] = Σ_i (q[row, 8·j + i] + 8) << 4·i

The last word of a row whose length is no multiple of eight is filled with zero *bits*, as compressed-tensors does. Read
as codes those nibbles are -8, not 0, so a reader has to stop at ``in_features``.
"""

import torch
from torch import Tensor

CODES_PER_WORD = 8
MIN_CODE, MAX_CODE = -8, 7


def packed_width(in_features: int) -> int:
    """Number of int32 words that hold ``in_features`` codes."""
    return -(-in_features // CODES_PER_WORD)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack INT4 codes into int32 words.

    Args:
        codes: (out_features, in_features) int8, every value in [-8, 7].

    Returns:
        (out_features, ceil(in_features / 8)) int32, contiguous.

    Raises:
        ValueError: wrong dtype, wrong number of dimensions, or a code out of range.
    """
    if codes.dtype != torch.int8:
        raise ValueError(f"codes have dtype {codes.dtype}; INT4 codes are given as torch.int8")
    if codes.dim() != 2:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; expected (out_features, in_features)")
    if codes.numel():
        lowest, highest = (int(value) for value in codes.aminmax())
        if lowest < MIN_CODE or highest > MAX_CODE:
            raise ValueError(
                f"codes span [{lowest}, {highest}]; INT4 holds [{MIN_CODE}, {MAX_CODE}]: clamp before packing"
            )
    out_features, in_features = codes.shape
    width = packed_width(in_features)
    nibbles = codes.to(torch.int32) - MIN_CODE
    nibbles = torch.nn.functional.pad(nibbles, (0, width * CODES_PER_WORD - in_features))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    # The nibbles do not overlap, so the sum is a bitwise or and cannot carry; the top one lands in the sign bit.
    return (nibbles.view(out_features, width, CODES_PER_WORD) << shifts).sum(dim=-1, dtype=torch.int32)


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """Unpack int32 words into INT4 codes.

    Args:
        packed: (out_features, ceil(in_features / 8)) int32, as written by :func:`pack_int4`.
        in_features: number of codes per row; the fill of the last word is dropped.

    Returns:
        (out_features, in_features) int8 in [-8, 7], contiguous.

    Raises:
        ValueError: wrong dtype, or a width that does not belong to ``in_features``.
    """
    if packed.dtype != torch.int32:
        raise ValueError(f"packed weight has dtype {packed.dtype}; the pack-quantized layout uses torch.int32")
    if packed.dim() != 2 or packed.shape[1] != packed_width(in_features):
        raise ValueError(
            f"packed weight has shape {tuple(packed.shape)}; in_features={in_features} needs"
            f" (out_features, {packed_width(in_features)}), eight codes to a word"
        )
    # Bytes, not words: the widest temporary is then the result itself. Every host that torch supports is little-endian.
    pairs = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).view(torch.int8).flatten(1)
    return nibbles[:, :in_features] + MIN_CODE
