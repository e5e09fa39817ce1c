import pytest
import torch

from diffaccel.kernels.int2_weight import Int2Weight, quantize_int2
from diffaccel.kernels.int4_linear import int4_linear, int4_linear_ref

GROUPS = (32, 64, None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def by_hand(packed):
    """The codes again, one at a time."""
    N, K = packed.shape
    quarter = -(-K // 4)
    codes = torch.zeros(N, K)
    for n in range(N):
        for k in range(K):
            level = 2 * (int(packed.pairs[n, k % quarter]) >> 2 * (k // quarter) & 3) - 3
            codes[n, k] = level * (1 if packed.group is None else int(packed.multiplier[n, k // packed.group]))
    return codes


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("K", [1, 2, 33, 130, 192])
def test_codes_are_what_the_format_says(K, group):
    packed = quantize_int2(torch.randn(5, K), group)
    assert torch.equal(packed.codes().float(), by_hand(packed)) and packed.shape == (5, K)
    assert torch.equal(packed.dequantize(), by_hand(packed) * packed.scale[:, None])
    assert packed.pairs.shape == (5, -(-K // 4))


def test_is_as_good_as_four_levels_can_be():
    """Max's four uniform levels for a gaussian: 9.25 dB; groups follow their data a little better."""
    weight = torch.randn(64, 1152)
    for group, least in ((32, 9.5), (64, 9.3), (None, 9.1)):
        packed = quantize_int2(weight, group)
        noise = (weight - packed.dequantize()).square().sum()
        assert 10 * torch.log10(weight.square().sum() / noise) > least
        assert packed.nbytes <= weight.numel() * (0.25 + 1 / (group or 1e9)) + 4 * 64


@pytest.mark.parametrize("group", GROUPS)
def test_special_channels(group):
    weight = torch.randn(6, 70)
    weight[0], weight[1], weight[2] = 0, 0.3, -0.3
    weight[3, 5], weight[4, 6] = torch.nan, torch.inf
    back = quantize_int2(weight, group).dequantize()
    assert back[0].abs().max() < 1e-25 and back[3:5].isnan().all() and back[5].isfinite().all()
    torch.testing.assert_close(back[1:3], weight[1:3])


def test_computes_as_int4():
    x, weight = torch.randn(7, 96), torch.randn(9, 96)
    packed = quantize_int2(weight, 32)
    y = int4_linear(x, packed.expanded(), activations="float")
    torch.testing.assert_close(y, x @ packed.dequantize().t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(int4_linear_ref(x, packed.expanded(), activations="float"), y)
    assert isinstance(packed, Int2Weight) and packed.expanded().nbytes > packed.nbytes


def test_wrong_input_is_refused():
    for wrong, message in [
        ((torch.randn(4),), r"float weight \[N, K\]"),
        ((torch.ones(2, 2).int(),), r"float weight \[N, K\]"),
        ((torch.randn(4, 64), 48), "multiple of 32"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize_int2(*wrong)
