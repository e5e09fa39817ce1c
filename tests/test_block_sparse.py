"""Block-sparse attention against float64, on every path."""

import warnings

import pytest
import torch

from diffaccel.kernels import _candidates, block_choice, block_cpp, block_flex, block_sparse
from diffaccel.kernels.block_sparse import (
    BlockPattern,
    block_sparse_attention,
    block_sparse_attention_ref,
    path_for,
)

# rtol, atol against float64. Outputs are averages of unit normal values.
TOLERANCE = {
    torch.float32: (1e-5, 2e-6),
    torch.float64: (1e-12, 1e-12),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
# B, H, Hkv, N, M, heads of the mask, block size: 1, odd, exact multiples, N != M, grouped heads.
SHAPES = [
    (1, 2, 2, 1, 1, 1, 16),
    (2, 3, 3, 1, 50, 3, 16),
    (1, 2, 2, 64, 64, 1, 16),
    (2, 4, 4, 77, 130, 4, 16),
    (2, 4, 2, 100, 77, 4, 32),
    (1, 4, 1, 65, 33, 1, 32),
    (2, 6, 2, 200, 200, 6, 64),
]
MASKS = ["none", "key padding", "bool", "additive", "additive per head"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFACCEL_CACHE", str(tmp_path))
    monkeypatch.delenv("DIFFACCEL_KERNELS", raising=False)


def inputs(B, H, Hkv, N, M, D=16, Dv=16, dtype=torch.float32):
    """q, k, v with the strides diffusers gives."""
    sizes = ((H, N, D), (Hkv, M, D), (Hkv, M, Dv))
    return [torch.randn(B, n, h, d).to(dtype).transpose(1, 2) for h, n, d in sizes]


def random_blocks(heads, N, M, block_size, density=0.5):
    keep = torch.rand(heads, -(-N // block_size), -(-M // block_size)) < density
    keep[0, -1] = False  # queries without a key
    return keep


def random_mask(kind, B, H, N, M, dtype):
    if kind == "none":
        return None
    if kind == "key padding":
        return torch.rand(B, 1, 1, M) < 0.7
    if kind == "bool":
        mask = torch.rand(B, 1, N, M) < 0.7
        mask[0, :, N // 2] = False
        return mask
    return torch.randn(*((N, M) if kind == "additive" else (1, H, N, M))).to(dtype)


def expected(q, k, v, keep, block_size, mask=None, **options):
    mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    return block_sparse_attention_ref(
        q.double(), k.double(), v.double(), keep, block_size=block_size, attn_mask=mask,
        enable_gqa=q.shape[1] != k.shape[1], **options,
    )  # fmt: skip


def check(result, reference, dtype):
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(result.double(), reference, rtol=rtol, atol=atol)


def test_reference_by_hand():
    q, k, v = inputs(1, 1, 1, 4, 4)
    keep = torch.tensor([[[True, False], [False, False]]])
    result = block_sparse_attention_ref(q, k, v, keep, block_size=2)
    weights = torch.softmax(q[:, :, :2] @ k[:, :, :2].mT / 4, -1)
    torch.testing.assert_close(result[:, :, :2], weights @ v[:, :, :2])
    assert (result[:, :, 2:] == 0).all()


@pytest.mark.parametrize("path", ["cpp", "blocks", "dense"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("B", "H", "Hkv", "N", "M", "heads", "size"), SHAPES)
def test_matches_float64(B, H, Hkv, N, M, heads, size, kind, path):
    q, k, v = inputs(B, H, Hkv, N, M, Dv=24)
    keep, mask = random_blocks(heads, N, M, size), random_mask(kind, B, H, N, M, q.dtype)
    pattern = BlockPattern.from_mask(keep, size)
    result = block_sparse_attention(q, k, v, pattern, attn_mask=mask, enable_gqa=Hkv != H, path=path)
    assert result.shape == (B, H, N, 24) and result.transpose(1, 2).is_contiguous()
    check(result, expected(q, k, v, keep, size, mask), q.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", ["cpp", "blocks", "dense"])
def test_dtypes_and_scale(dtype, path):
    q, k, v = inputs(2, 4, 4, 150, 150, dtype=dtype)
    keep = random_blocks(4, 150, 150, 32)
    result = block_sparse_attention(q, k, v, keep, block_size=32, scale=0.3, path=path)
    assert result.dtype == dtype
    check(result, expected(q, k, v, keep, 32, scale=0.3), dtype)


def test_ranges_are_read_in_place_and_merged():
    keep = torch.zeros(3, 4, 4, dtype=torch.bool)
    keep[:2, :2, :2] = True  # the same range for two heads and two rows
    keep[:2, 2, 3] = True
    keep[2, 1, ::2] = True  # no range
    pattern = BlockPattern.from_mask(keep, 8)
    assert pattern.ranges.tolist() == [
        [0, 2, 0, 2, 0, 2], [0, 2, 2, 3, 3, 4], [0, 2, 3, 4, 0, 0], [2, 3, 0, 1, 0, 0], [2, 3, 2, 4, 0, 0],
    ]  # fmt: skip
    assert pattern.rows.tolist() == [[2 * 4 + 1, 2, 0]]
    assert pattern.density == keep.double().mean().item() and not pattern.whole
    q, k, v = inputs(2, 3, 3, 32, 32)
    check(block_sparse_attention(q, k, v, pattern, path="blocks"), expected(q, k, v, keep, 8), q.dtype)


def test_equal_heads_become_one_and_full_is_dense():
    pattern = BlockPattern.from_mask(torch.ones(5, 3, 4, dtype=torch.bool), 16)
    assert pattern.keep.shape == (1, 3, 4) and pattern.whole and pattern.density == 1
    q, k, v = inputs(1, 5, 5, 40, 60)
    assert str(path_for(q, k, v, pattern)) == "dense (every block is kept)"
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(block_sparse_attention(q, k, v, pattern), dense)


def poisoned(q, k, v, size, density=0.7):
    """Keys and values that no query keeps are NaN: the second and the last, partial, block."""
    keep = random_blocks(q.shape[1], q.shape[2], k.shape[2], size, density)
    keep[..., [1, -1]] = False
    reference = expected(q, k, v, keep, size)
    for x in (k, v):
        x[:, :, size : 2 * size] = float("nan")
        x[:, :, size * (keep.shape[-1] - 1) :] = float("nan")
    return keep, reference


def test_dropped_blocks_are_never_read():
    q, k, v = inputs(2, 2, 2, 130, 130)
    keep, reference = poisoned(q, k, v, 32)
    for path in ("blocks", "cpp"):
        check(block_sparse_attention(q, k, v, keep, block_size=32, path=path), reference, q.dtype)


def test_last_block_does_not_leak():
    """What lies in memory behind the last key is NaN."""
    q, k, v = inputs(1, 2, 2, 50, 64)
    keep = torch.tensor([[[True, False, True, True], [False, True, False, True]] * 2])
    for x in (k, v):
        x[:, :, 50:] = float("nan")
    k, v = k[:, :, :50], v[:, :, :50]
    for path in ("blocks", "cpp"):
        check(block_sparse_attention(q, k, v, keep, block_size=16, path=path), expected(q, k, v, keep, 16), q.dtype)


@pytest.mark.parametrize("path", ["cpp", "blocks", "dense"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "N", "orders", "heads", "size"),
    [(1, 1, 1, 17, 1, 1, 16), (2, 4, 2, 77, 4, 4, 16), (2, 4, 2, 77, 1, 4, 32), (1, 2, 2, 64, 2, 1, 16)],
)
def test_reordered_tokens(B, H, Hkv, N, orders, heads, size, kind, path):
    q, k, v = inputs(B, H, Hkv, N, N, Dv=24)
    keep, mask = random_blocks(heads, N, N, size), random_mask(kind, B, H, N, N, q.dtype)
    order = torch.rand(orders, N).argsort(-1)
    pattern = BlockPattern.from_mask(keep, size, order)
    assert len(pattern.order) == orders
    result = block_sparse_attention(q, k, v, pattern, attn_mask=mask, enable_gqa=Hkv != H, path=path)
    assert result.shape == (B, H, N, 24) and result.transpose(1, 2).is_contiguous()
    check(result, expected(q, k, v, keep, size, mask, order=order), q.dtype)
    by_hand = expected(*(x[:, :, order[0]] for x in (q, k, v)), keep, size)[:, :, order[0].argsort()]
    if orders == 1 and kind == "none":
        check(result, by_hand, q.dtype)


def test_the_natural_order_is_dropped_unless_shapes_must_stay():
    keep, natural = torch.ones(2, 3, 3, dtype=torch.bool), torch.arange(40).expand(2, 40)
    assert BlockPattern.from_mask(keep, 16, natural).order is None
    kept = BlockPattern.from_mask(keep, 16, natural, merge=False)
    assert kept.order.shape == (2, 40) and kept.keep.shape == (2, 3, 3) and kept.density == 1


def test_cpp_threads_share_the_work(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    q, k, v = inputs(1, 3, 3, 200, 200)
    keep = random_blocks(3, 200, 200, 16)
    check(block_sparse_attention(q, k, v, keep, block_size=16, path="cpp"), expected(q, k, v, keep, 16), q.dtype)


def test_cpp_falls_back_where_it_cannot_be_compiled(monkeypatch, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is not C++")
    monkeypatch.setattr(block_cpp, "_SOURCE", broken)
    monkeypatch.setattr(block_flex, "FAILED", {})
    monkeypatch.setattr(block_choice, "FAILED", block_flex.FAILED)
    monkeypatch.setattr(block_sparse, "FAILED", block_flex.FAILED)
    block_cpp._library.cache_clear()
    q, k, v = inputs(1, 2, 2, 64, 64)
    keep = random_blocks(2, 64, 64, 16)
    try:
        with pytest.warns(RuntimeWarning, match="cpp failed"):
            result = block_sparse_attention(q, k, v, keep, block_size=16, path="cpp")
    finally:
        block_cpp._library.cache_clear()
    check(result, expected(q, k, v, keep, 16), q.dtype)
    pattern = BlockPattern.from_mask(keep, 16)
    assert str(path_for(q, k, v, pattern, path="cpp")) == "gathered blocks (cpp failed: RuntimeError)"
    monkeypatch.setattr(block_cpp, "compiler", lambda: None)
    block_flex.FAILED.clear()
    assert str(path_for(q, k, v, pattern, path="cpp")) == "gathered blocks (no C++ compiler)"


def test_all_heads_masked_gives_zeros():
    q, k, v = inputs(2, 2, 2, 40, 40)
    nothing = torch.zeros(2, 3, 3, dtype=torch.bool)
    mask = torch.zeros(2, 1, 1, 40, dtype=torch.bool)
    for path in ("blocks", "cpp", "dense"):
        assert (block_sparse_attention(q, k, v, nothing, block_size=16, path=path) == 0).all()
        assert (block_sparse_attention(q, k, v, ~nothing, block_size=16, attn_mask=mask, path=path) == 0).all()


@pytest.mark.parametrize("kind", ["none", "additive"])
def test_gradients(kind):
    q, k, v = (x.double().requires_grad_() for x in inputs(2, 2, 1, 40, 52))
    keep, mask = random_blocks(2, 40, 52, 16), random_mask(kind, 2, 2, 40, 52, torch.float64)
    weight = torch.randn(2, 2, 40, 16, dtype=torch.float64)
    results = []
    for call in (block_sparse_attention, block_sparse_attention_ref):
        out = call(q, k, v, keep, block_size=16, attn_mask=mask, enable_gqa=True)
        results.append(torch.autograd.grad((out * weight).sum(), (q, k, v)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def op_arguments(q, k, v, pattern, mask, path):
    p = pattern
    return (
        q, k, v, p.keep, p.kv_num_blocks, p.kv_indices, p.ranges, p.rows, p.order, p.inverse, mask,
        p.block_size, None, path,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "key padding"])
def test_opcheck(kind):
    q, k, v = inputs(2, 2, 1, 40, 52, Dv=8)
    pattern = BlockPattern.from_mask(random_blocks(2, 40, 52, 16), 16)
    mask = random_mask(kind, 2, 2, 40, 52, q.dtype)
    op = torch.ops.diffaccel.block_sparse_attention.default
    torch.library.opcheck(op, op_arguments(q, k, v, pattern, mask, "blocks"))


def test_outer_compile_sees_one_op():
    q, k, v = inputs(1, 2, 2, 64, 64)
    pattern = BlockPattern.from_mask(random_blocks(1, 64, 64, 16), 16)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def block(q, k, v):
        return block_sparse_attention(q + 0, k, v, pattern, path="blocks") * 2

    with torch.no_grad():
        result = torch.compile(block, backend=backend, fullgraph=True)(q, k, v)
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert ["block_sparse_attention" in str(target) for target in called] == [False, True, False]
    check(result / 2, expected(q, k, v, pattern.keep, 16), q.dtype)


needs_flex = pytest.mark.skipif(
    not block_flex.has_compiler() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="flex on CPU needs a C++ compiler and AVX2",
)


@needs_flex
def test_flex_one_compile_for_lengths_densities_and_an_outer_graph():
    """One class of arguments, thus one compilation (about 6 s), for everything in this test."""
    before = set(block_flex.COMPILED)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for N, density in [(160, 0.5), (160, 0.3), (301, 0.5), (90, 0.6)]:
        q, k, v = inputs(2, 2, 2, N, N)
        keep, reference = poisoned(q, k, v, 32, density)
        pattern = BlockPattern.from_mask(keep, 32, merge=False)  # equal heads would be a class of their own
        assert str(path_for(q, k, v, pattern, path="flex")) == "flex (compiled)"
        result = block_sparse_attention(q, k, v, pattern, path="flex")
        assert str(path_for(q, k, v, pattern, path="flex")) == "flex (compiled)"
        check(result, reference, q.dtype)
    assert len(set(block_flex.COMPILED) - before) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled + 1
    with torch.compiler.set_stance("fail_on_recompile"):
        check(block_sparse_attention(q, k, v, pattern, path="flex"), reference, q.dtype)
    _candidates.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path_for(q, k, v, pattern)
    (choice,) = _candidates.choices("block_sparse_attention")
    assert set(choice.seconds) == {"cpp", "blocks", "flex", "dense", "baseline"}, "what is compiled already takes part"
    torch.library.opcheck(
        torch.ops.diffaccel.block_sparse_attention.default,
        op_arguments(*inputs(2, 2, 2, 90, 90), pattern, None, "flex"),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_flex
def test_flex_with_a_mask_and_grouped_heads():
    q, k, v = inputs(2, 4, 2, 100, 77)
    keep, mask = random_blocks(4, 100, 77, 32), random_mask("additive per head", 2, 4, 100, 77, q.dtype)
    pattern = BlockPattern.from_mask(keep, 32)
    result = block_sparse_attention(q, k, v, pattern, attn_mask=mask, enable_gqa=True, path="flex")
    assert path_for(q, k, v, pattern, mask, "flex").name == "flex"
    check(result, expected(q, k, v, keep, 32, mask), q.dtype)


def test_on_cpu_the_path_is_measured():
    q, k, v = inputs(2, 4, 2, 100, 77)
    keep, mask = random_blocks(4, 100, 77, 32), random_mask("bool", 2, 4, 100, 77, q.dtype)
    pattern = BlockPattern.from_mask(keep, 32)
    check(
        block_sparse_attention(q, k, v, pattern, attn_mask=mask, enable_gqa=True),
        expected(q, k, v, keep, 32, mask), q.dtype,
    )  # fmt: skip
    assert path_for(q, k, v, pattern, mask).name in ("blocks", "dense")


def test_without_a_compiler_blocks_run_and_say_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    q, k, v = inputs(1, 2, 2, 40, 40)
    keep = random_blocks(1, 40, 40, 16)
    pattern = BlockPattern.from_mask(keep, 16)
    assert str(path_for(q, k, v, pattern, path="flex")) == "gathered blocks (no C++ compiler)"
    check(block_sparse_attention(q, k, v, pattern, path="flex"), expected(q, k, v, keep, 16), q.dtype)


def test_a_failing_flex_is_replaced_and_remembered(monkeypatch):
    monkeypatch.setattr(block_flex, "has_compiler", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(block_flex, "flex_attention", lambda *args, **options: 1 / 0)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    q, k, v = inputs(1, 3, 3, 40, 44, D=20)
    keep = random_blocks(1, 40, 44, 16)
    pattern = BlockPattern.from_mask(keep, 16)
    with pytest.warns(RuntimeWarning, match="runs on gathered blocks"):
        result = block_sparse_attention(q, k, v, pattern, path="flex")
    check(result, expected(q, k, v, keep, 16), q.dtype)
    assert str(path_for(q, k, v, pattern, path="flex")) == "gathered blocks (flex failed: ZeroDivisionError)"


def test_environment_chooses(monkeypatch):
    q, k, v = inputs(1, 2, 2, 40, 40)
    pattern = BlockPattern.from_mask(random_blocks(1, 40, 40, 16), 16)
    monkeypatch.setenv("DIFFACCEL_KERNELS", "block_sparse_attention=dense")
    assert str(path_for(q, k, v, pattern)) == "dense (set by DIFFACCEL_KERNELS)"
    monkeypatch.setenv("DIFFACCEL_KERNELS", "block_sparse_attention=quick")
    with pytest.raises(ValueError, match="unknown path 'quick'"):
        block_sparse_attention(q, k, v, pattern)


@pytest.mark.parametrize("kind", ["none", "key padding", "additive per head"])
def test_triton_where_asked_for(kind, monkeypatch):
    pytest.importorskip("triton")
    q, k, v = inputs(1, 2, 1, 40, 50, Dv=24)
    keep, mask = random_blocks(2, 40, 50, 16), random_mask(kind, 1, 2, 40, 50, q.dtype)
    pattern = BlockPattern.from_mask(keep, 16)
    monkeypatch.setenv("DIFFACCEL_KERNELS", "block_sparse_attention=triton")
    assert str(path_for(q, k, v, pattern, mask)) == "Triton kernel (set by DIFFACCEL_KERNELS)"
    result = block_sparse_attention(q, k, v, pattern, attn_mask=mask, enable_gqa=True)
    check(result, expected(q, k, v, keep, 16, mask), q.dtype)


def test_what_triton_cannot_do_is_named():
    q, k, v = inputs(1, 2, 2, 40, 40)
    doubles, wide = [x.double() for x in (q, k, v)], inputs(1, 2, 2, 40, 40, Dv=320)
    for tensors, size, reason in [
        (doubles, 16, "no Triton kernel for torch.float64"),
        (wide, 16, "no Triton kernel for heads larger than 256"),
        ((q, k, v), 8, "no Triton kernel for blocks of 8"),
    ]:
        pattern = BlockPattern.from_mask(random_blocks(1, 40, 40, size), size)
        assert str(path_for(*tensors, pattern, path="triton")) == f"gathered blocks ({reason})"
    pattern = BlockPattern.from_mask(random_blocks(1, 40, 40, 16), 16)
    result = block_sparse_attention(q, k, v, pattern, scale=-0.3, path="triton")
    check(result, expected(q, k, v, pattern.keep, 16, scale=-0.3), q.dtype)


def test_candidates_on_cuda(monkeypatch):
    monkeypatch.setattr(block_choice, "triton_refused", lambda *arguments: None)
    monkeypatch.setattr(block_choice, "refused", lambda *arguments: None)
    q, k, v = inputs(1, 5, 5, 40, 40)
    call = (q, k, v, BlockPattern.from_mask(random_blocks(1, 40, 40, 16), 16), None, None)
    assert block_choice.candidates(*call) == ("triton", "flex", "dense")
    monkeypatch.setattr(block_choice, "_MASK_ELEMENTS", 40 * 40 - 1)
    assert block_choice.candidates(*call) == ("triton", "flex", "blocks")
    monkeypatch.setattr(block_choice, "_FLEX_TRIALS", 0)  # enough was compiled
    assert block_choice.candidates(*call) == ("triton", "blocks")
    monkeypatch.setattr(block_choice, "triton_refused", lambda *arguments: "old card")
    assert block_choice.candidates(*call) == ("blocks",)


@pytest.mark.parametrize("rows", ["all", "sampled"])
def test_only_correct_candidates_are_used(rows, monkeypatch):
    class CompilationError(Exception):
        pass

    def broken(*arguments):
        raise CompilationError("out of registers")

    def wrong(q, k, v, pattern, attn_mask, scale):
        return block_choice.dense(q, k, v, pattern, attn_mask, 0.1)

    q, k, v = inputs(1, 2, 2, 72, 72)
    pattern = BlockPattern.from_mask(random_blocks(2, 72, 72, 16), 16)
    mask = random_mask("additive per head", 1, 2, 72, 72, q.dtype)
    if rows == "sampled":
        monkeypatch.setattr(block_choice, "_MASK_ELEMENTS", 72 * 72)
    monkeypatch.setattr(block_choice, "RUN", block_choice.RUN | {"triton": broken, "flex": wrong})
    _candidates.forget()
    with pytest.warns(RuntimeWarning) as warned:
        chosen = block_choice.fastest(("triton", "flex", "dense"), q, k, v, pattern, mask, None)
    assert str(chosen) == "dense (measured)"
    messages = [str(warning.message) for warning in warned]
    assert any("candidate triton failed" in m and "CompilationError: out of registers" in m for m in messages)
    assert any("candidate flex is wrong" in m for m in messages)


def test_nothing_is_timed_during_capture(monkeypatch):
    for module in (_candidates, block_choice):
        monkeypatch.setattr(module, "may_measure", lambda device: False)
    q, k, v = inputs(1, 2, 2, 88, 88)
    pattern = BlockPattern.from_mask(random_blocks(2, 88, 88, 16), 16)
    assert (
        str(block_choice.fastest(("triton", "dense"), q, k, v, pattern, None, None)) == "Triton kernel (not measured)"
    )


def test_mistakes_are_named():
    q, k, v = inputs(1, 4, 2, 40, 40)
    keep = torch.ones(1, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="enable_gqa"):
        block_sparse_attention(q, k, v, keep, block_size=16)
    with pytest.raises(ValueError, match="needs block_size"):
        block_sparse_attention(q, k, v, keep, enable_gqa=True)
    with pytest.raises(ValueError, match=r"the pattern must be \[4 or 1, 5, 5\] for blocks of 8 tokens"):
        block_sparse_attention(q, k, v, keep, block_size=8, enable_gqa=True)
    with pytest.raises(ValueError, match="must be bool"):
        BlockPattern.from_mask(keep.float(), 16)
