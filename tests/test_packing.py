"""INT4 packing against compressed-tensors, bit for bit, and its refusals."""

import pytest
import torch

from kompakt.kernels.packing import pack_int4, packed_width, unpack_int4

SHAPES = [(1, 1), (3, 7), (2, 8), (5, 9), (65, 33), (4, 576), (1, 100), (0, 16)]


def random_codes(out_features: int, in_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    return torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape):
    codes = random_codes(*shape)
    packed = pack_int4(codes)
    assert packed.shape == (shape[0], packed_width(shape[1])) and packed.dtype == torch.int32
    assert torch.equal(unpack_int4(packed, shape[1]), codes)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0]])
def test_bits_equal_compressed_tensors(shape):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(*shape)
    packed = pack_int4(codes)
    assert torch.equal(packed, helpers.pack_to_int32(codes, 4))
    assert torch.equal(unpack_int4(packed, shape[1]), helpers.unpack_from_int32(packed, 4, torch.Size(shape)))


def test_every_code_in_every_nibble():
    codes = torch.arange(-8, 8, dtype=torch.int8)[:, None].expand(16, 8).contiguous()
    packed = pack_int4(codes)
    assert packed[:, 0].tolist() == [(0x11111111 * n + 2**31) % 2**32 - 2**31 for n in range(16)]
    assert torch.equal(unpack_int4(packed, 8), codes)


def test_element_zero_is_the_lowest_nibble_and_fill_is_zero_bits():
    assert pack_int4(torch.tensor([[-7, -8, -6]], dtype=torch.int8)).item() == 0x201


def test_strided_inputs():
    codes = random_codes(12, 40)
    assert torch.equal(pack_int4(codes.t()), pack_int4(codes.t().contiguous()))
    packed = pack_int4(codes)
    wide = torch.stack((packed, packed), dim=-1)[..., 0]
    assert not wide.is_contiguous() and torch.equal(unpack_int4(wide, 40), codes)


@pytest.mark.parametrize("bad", [-9, 8, 127, -128])
def test_codes_out_of_range_are_refused(bad):
    codes = torch.zeros(2, 9, dtype=torch.int8)
    codes[1, 8] = bad
    with pytest.raises(ValueError, match=rf"{bad}.*\[-8, 7\]"):
        pack_int4(codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_int4(torch.zeros(2, 8)), "torch.int8"),
        (lambda: pack_int4(torch.zeros(8, dtype=torch.int8)), "out_features, in_features"),
        (lambda: unpack_int4(torch.zeros(2, 1, dtype=torch.int64), 8), "torch.int32"),
        (lambda: unpack_int4(torch.zeros(2, 1, dtype=torch.int32), 9), r"in_features=9 needs \(out_features, 2\)"),
        (lambda: unpack_int4(torch.zeros(2, dtype=torch.int32), 8), "in_features=8"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
