import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abtrain.comm.buckets import Bucket, pack, unpack

HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]

shapes = st.lists(st.integers(0, 5), max_size=3)
capacities = st.one_of(st.integers(0, 200), st.just(2**30))


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Tensor:
    """Tensors of any bits, some of them not contiguous."""
    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    count = math.prod(shape) * dtype.itemsize
    bits = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    tensor = bits.view(dtype).view(shape)
    return tensor.transpose(0, -1) if tensor.dim() > 1 and draw(st.booleans()) else tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    def bits(t: Tensor) -> Tensor:
        return t.contiguous().view(-1).view(torch.uint8)

    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@settings(deadline=None)  # the first draws of a kind of tensor are slow
@given(st.lists(tensors(), max_size=8), capacities)
def test_round_trip_keeps_shapes_dtypes_order_and_bits(sent: list[Tensor], capacity: int) -> None:
    received = unpack(pack(sent, capacity, widen=False), like=sent)
    assert len(received) == len(sent)
    assert all(same_bits(a, b) for a, b in zip(received, sent, strict=True))


@settings(deadline=None)  # the first draws of a kind of tensor are slow
@given(st.lists(tensors(dtypes=[*HALF, torch.float32]), max_size=8), capacities)
def test_half_precision_travels_widened_and_comes_back_exactly(sent: list[Tensor], capacity: int) -> None:
    buckets = pack(sent, capacity)
    assert all(bucket.flat.dtype == torch.float32 for bucket in buckets)
    received = unpack(buckets, like=sent)
    assert [t.dtype for t in received] == [t.dtype for t in sent]
    for a, b in zip(received, sent, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@settings(deadline=None)  # the first draws of a kind of tensor are slow
@given(st.lists(tensors(), max_size=8), capacities, st.booleans())
def test_layout(sent: list[Tensor], capacity: int, widen: bool) -> None:
    buckets = pack(sent, capacity, widen)
    assert sorted(i for bucket in buckets for i in bucket.indices) == list(range(len(sent)))
    for bucket in buckets:
        assert bucket.flat.is_contiguous() and bucket.flat.dim() == 1
        assert list(bucket.indices) == sorted(bucket.indices)
        assert bucket.flat.numel() == sum(sent[i].numel() for i in bucket.indices)
        filled = [i for i in bucket.indices if sent[i].numel()]
        assert bucket.flat.nbytes <= capacity or len(filled) <= 1


def test_tensors_fill_a_bucket_before_the_next_is_opened() -> None:
    weights = [torch.ones(10), torch.ones(20), torch.ones(30), torch.ones(5)]
    assert [bucket.indices for bucket in pack(weights, capacity_bytes=40 * 4)] == [(0, 1), (2, 3)]


def test_kinds_do_not_break_each_others_buckets() -> None:
    mixed = [torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(2), torch.ones(2, dtype=torch.float16)]
    assert [bucket.indices for bucket in pack(mixed)] == [(0, 2, 3), (1,)]
    assert [bucket.indices for bucket in pack(mixed, widen=False)] == [(0, 2), (1,), (3,)]


def test_a_bucket_is_a_copy() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    bucket = pack([weight])[0]
    bucket.flat.zero_()
    assert not bucket.flat.requires_grad
    assert weight.tolist() == [1, 1, 1]


def test_sums_of_half_precision_keep_small_terms() -> None:
    big, small = torch.tensor([1024.0], dtype=torch.float16), torch.tensor([0.25], dtype=torch.float16)
    buckets = [pack([big])[0], pack([small])[0]]
    total = Bucket(buckets[0].flat + 4 * buckets[1].flat, (0,))
    assert unpack([total], like=[big])[0].item() == 1025.0


def test_nothing_needs_no_buckets() -> None:
    assert pack([]) == []
    assert unpack([], like=[]) == []
