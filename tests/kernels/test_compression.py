"""compress against its definition in float64, where XXᵀ is made: values, gradients, isolation and bad shapes."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from support.tolerance import TARGETS, assert_as_exact_as_plain, poisoned_memory, require
from torch import Tensor
from torch.nn import functional as F

from alure.kernels import (
    DotLinearCompression,
    InteractionCompression,
    InteractionLayer,
    compress,
    compress_int8,
    jagged_attention,
)
from alure.kernels.compression.interaction import InteractionPlan, compress_interaction

# batch, n, d, k, r, hidden
SHAPES = {
    "small": (3, 16, 64, 2, 8, 16),
    "odd": (2, 37, 45, 3, 5, 9),
    "one of each": (1, 1, 1, 1, 1, 1),
    "k beyond n": (2, 2, 17, 5, 3, 4),
    "hundreds": (1, 401, 96, 2, 24, 8),
    "most products": (1, 270, 100, 4, 60, 4),
}
BACKENDS = [*TARGETS, pytest.param("native", "cpu", id="native")]
ON_CPU = ["reference", "triton", "native"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
Leaves = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def random_leaves(batch: int, n: int, d: int, k: int, r: int, hidden: int, seed: int = 0) -> Leaves:
    """x and every parameter, no longer at their initial zeros and ones, in float64."""
    generator = torch.Generator().manual_seed(seed)
    c = DotLinearCompression.initialize(n, d, k, r, hidden, generator)
    shapes = {f.name: getattr(c, f.name).shape for f in fields(c)}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    scaled = {name: w / w.shape[0] ** 0.5 if w.dim() == 2 else w for name, w in drawn.items()}
    return {"x": torch.randn(batch, n, d, generator=generator, dtype=torch.float64), **scaled}


def cast(leaves: Leaves, dtype: torch.dtype, device: str = "cpu") -> Leaves:
    return {name: x.detach().to(device, dtype).requires_grad_() for name, x in leaves.items()}


def run(leaves: Leaves, backend: str = "auto") -> Tensor:
    return compress(leaves["x"], parameters(leaves), backend=backend)


def parameters(leaves: Leaves) -> DotLinearCompression:
    return DotLinearCompression(**{name: x for name, x in leaves.items() if name != "x"})


def norm(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def definition(leaves: Leaves) -> Tensor:
    """E = Norm(Z + gate ⊙ reshape(MLP(Norm(flatten D)))) with D = (XXᵀ)Y, each embedding over its length."""
    x, c = leaves["x"], parameters(leaves)
    z = torch.einsum("kn,bnd->bkd", c.linear, x)
    d = (x @ x.mT) @ c.mix
    hidden = F.gelu(norm(d.flatten(1)) @ c.hidden_weight + c.hidden_bias, approximate="tanh")
    update = (hidden @ c.output_weight + c.output_bias).reshape(z.shape)
    e = norm(z + c.gate * update)
    return e / e.norm(dim=-1, keepdim=True)


def with_gradients(leaves: Leaves, function: Callable[[Leaves], Tensor]) -> Leaves:
    out = function(leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(out, list(leaves.values()), direction.to(out))
    return {"out": out.detach()} | {f"d_{name}": g for name, g in zip(leaves, gradients)}


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_definition(shape: str) -> None:
    leaves = cast(random_leaves(*SHAPES[shape]), torch.float64)
    exact = with_gradients(leaves, definition)
    for name, x in with_gradients(leaves, lambda given: run(given, "reference")).items():
        torch.testing.assert_close(x, exact[name], rtol=1e-9, atol=1e-11)


@DTYPES
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_plain(shape: str, backend: str, device: str, dtype: torch.dtype) -> None:
    require(backend, device)
    if backend == "native" and dtype == torch.float16:
        pytest.skip("native takes float32 and bfloat16")
    given = cast(random_leaves(*SHAPES[shape]), dtype)
    assert_as_exact_as_plain(
        with_gradients(cast(given, dtype, device), lambda leaves: run(leaves, backend)),
        with_gradients(cast(given, torch.float64), definition),
        with_gradients(given, definition),
        dtype,
    )


def test_gradcheck() -> None:
    leaves = cast(random_leaves(2, 4, 3, 2, 2, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda *values: run(dict(zip(leaves, values))), tuple(leaves.values()))


@pytest.mark.parametrize("backend", ON_CPU)
def test_opcheck(backend: str) -> None:
    require(backend, "cpu")
    leaves = cast(random_leaves(2, 5, 6, 3, 2, 3), torch.float32)
    ops = torch.ops.alure
    torch.library.opcheck(ops.compress_dot_linear.default, (*leaves.values(), backend))
    detached = [x.detach() for x in leaves.values()]
    torch.library.opcheck(ops.compress_dot_linear_int8.default, (*detached, backend))
    grad, hidden = torch.randn(2, 3, 6), torch.randn(2, 3)
    torch.library.opcheck(ops.compress_dot_linear_backward.default, (grad, *detached, hidden, backend))
    if backend != "native":
        torch.library.opcheck(ops.normalize.default, (torch.randn(2, 3, 6, requires_grad=True), backend))
        torch.library.opcheck(ops.normalize_int8.default, (torch.randn(2, 3, 6), backend))
        torch.library.opcheck(ops.normalize_backward.default, (grad, torch.randn(2, 3, 6)))


def test_compiles_without_graph_breaks() -> None:
    leaves = cast(random_leaves(2, 5, 6, 3, 2, 3), torch.float32)
    compiled = with_gradients(leaves, torch.compile(run, fullgraph=True, backend="aot_eager"))
    for name, x in with_gradients(leaves, run).items():
        torch.testing.assert_close(compiled[name], x)


def test_starts_as_the_linear_compression() -> None:
    generator = torch.Generator().manual_seed(0)
    c = DotLinearCompression.initialize(n=30, d=8, k=2, r=4, hidden=16, generator=generator)
    x = torch.randn(5, 30, 8, generator=generator)
    torch.testing.assert_close(compress(x, c), F.normalize(c.linear @ x, dim=-1))
    again = DotLinearCompression.initialize(30, 8, 2, 4, 16, torch.Generator().manual_seed(0))
    assert all(torch.equal(getattr(c, f.name), getattr(again, f.name)) for f in fields(c))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, 1.0, 1e4])
def test_length_one_or_zero(scale: float, backend: str, device: str) -> None:
    """Embeddings have length 1; a zero vector stays zero; nothing is NaN, nor any gradient."""
    require(backend, device)
    leaves = cast(random_leaves(3, 7, 10, 2, 3, 4), torch.float32, device)
    leaves |= {name: torch.zeros_like(leaves[name]).requires_grad_() for name in ("output_weight", "output_bias")}
    leaves["x"] = (leaves["x"].detach() * scale).requires_grad_()
    found = with_gradients(leaves, lambda given: run(given, backend))
    for name, x in found.items():
        assert x.isfinite().all(), name
    lengths = found["out"].norm(dim=-1).cpu()
    if scale in (0.0, 1e-30):  # 1e-30: below what float32 squares
        assert (lengths <= 1.0001).all()
        assert scale or not found["out"].any()
    else:
        torch.testing.assert_close(lengths, torch.ones(3, 2), rtol=1e-4, atol=0)


def random_interaction(d: int, k: int, heads: int, layers: int, seed: int = 0) -> InteractionCompression:
    return InteractionCompression.initialize(d, k, heads, layers, generator=torch.Generator().manual_seed(seed))


def interaction_to(c: InteractionCompression, dtype: torch.dtype, device: str = "cpu") -> InteractionCompression:
    layers = tuple(
        InteractionLayer(**{f.name: getattr(layer, f.name).to(device, dtype) for f in fields(layer)})
        for layer in c.layers
    )
    return replace(c, seeds=c.seeds.to(device, dtype), layers=layers)


def interaction_definition(x: Tensor, c: InteractionCompression) -> Tensor:
    """Pre-norm transformer layers by scaled_dot_product_attention."""
    tokens = c.seeds.expand(x.shape[0], -1, -1)
    for index, layer in enumerate(c.layers):
        queries = norm(tokens)
        keys = norm(x) if index == 0 else queries
        q, k, v = (
            (y @ w).unflatten(-1, (c.num_heads, -1)).transpose(1, 2)
            for y, w in ((queries, layer.query), (keys, layer.key), (keys, layer.value))
        )
        tokens = tokens + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ layer.output
        h = norm(tokens)
        tokens = tokens + (F.silu(h @ layer.gate) * (h @ layer.up)) @ layer.down
    return F.normalize(tokens, dim=-1)


@pytest.mark.parametrize(("n", "d", "k", "heads", "layers"), [(9, 8, 2, 2, 3), (1, 6, 4, 1, 1), (50, 20, 1, 5, 2)])
def test_interaction_is_its_definition(n: int, d: int, k: int, heads: int, layers: int) -> None:
    c = interaction_to(random_interaction(d, k, heads, layers), torch.float64)
    x = torch.randn(3, n, d, dtype=torch.float64)
    torch.testing.assert_close(compress(x, c, backend="reference"), interaction_definition(x, c), rtol=1e-6, atol=1e-6)
    order = torch.randperm(n)  # the n vectors are a set
    torch.testing.assert_close(compress(x[:, order], c, backend="reference"), compress(x, c, backend="reference"))


@DTYPES
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_interaction_as_exact_as_plain(backend: str, device: str, dtype: torch.dtype) -> None:
    require(backend, device)
    if backend == "native" and dtype == torch.float16:
        pytest.skip("native takes float32 and bfloat16")
    c = interaction_to(random_interaction(32, 3, 2, 2), dtype)
    x = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_as_exact_as_plain(
        {"out": compress(x.to(device), interaction_to(c, dtype, device), backend=backend)},
        {"out": interaction_definition(x.double(), interaction_to(c, torch.float64))},
        {"out": interaction_definition(x, c)},
        dtype,
    )


def test_interaction_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    c = interaction_to(InteractionCompression.initialize(4, 2, 2, 2, 3, generator), torch.float64)
    names = [f.name for f in fields(InteractionLayer)]
    values = [getattr(layer, name).requires_grad_() for layer in c.layers for name in names]
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, seeds: Tensor, *weights: Tensor) -> Tensor:
        step = len(names)
        layers = tuple(InteractionLayer(*weights[i * step : (i + 1) * step]) for i in range(len(c.layers)))
        return compress(x, InteractionCompression(seeds, layers, c.num_heads), backend="reference")

    assert torch.autograd.gradcheck(function, (x, c.seeds.requires_grad_(), *values))


def both_forms(n: int, d: int) -> list[DotLinearCompression | InteractionCompression]:
    dot_linear = parameters({name: x.float() for name, x in random_leaves(1, n, d, 2, 3, 4).items()})
    return [dot_linear, random_interaction(d, 2, 2, 2)]


@pytest.mark.parametrize("form", [0, 1], ids=["dot_linear", "interaction"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_users_do_not_touch(form: int, backend: str) -> None:
    """Changing user A leaves user B bit-identical, and a user alone is the user in a batch."""
    require(backend, "cpu")
    c = both_forms(11, 8)[form]
    x = torch.randn(4, 11, 8, generator=torch.Generator().manual_seed(2))
    out = compress(x, c, backend=backend)
    for value in (1e6, float("nan")):
        changed = x.clone()
        changed[1] = value
        assert torch.equal(compress(changed, c, backend=backend)[[0, 2, 3]], out[[0, 2, 3]])
    torch.testing.assert_close(compress(x[2:3], c, backend=backend)[0], out[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [0, 1], ids=["dot_linear", "interaction"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_no_users_and_strided_input(form: int, backend: str) -> None:
    require(backend, "cpu")
    c = both_forms(11, 8)[form]
    assert compress(torch.zeros(0, 11, 8), c, backend=backend).shape == (0, 2, 8)
    assert [x.shape for x in compress_int8(torch.zeros(0, 11, 8), c, backend=backend)] == [(0, 2, 8), (0, 2)]
    x = torch.randn(8, 3, 11, generator=torch.Generator().manual_seed(3)).permute(1, 2, 0)
    assert not x.is_contiguous()
    same = compress(x.contiguous(), c, backend=backend)
    torch.testing.assert_close(compress(x, c, backend=backend), same, rtol=1e-5, atol=1e-6)


def test_attention_is_the_ops_own() -> None:
    """The seeds of each user see that user's n vectors and no others."""
    c = random_interaction(8, 2, 2, 1)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(4))
    offsets, key_offsets = torch.tensor([0, 2, 4, 6]), torch.tensor([0, 5, 10, 15])
    queries, keys, layer = norm(c.seeds.repeat(3, 1)), norm(x.flatten(0, 1)), c.layers[0]
    q, k, v = (y.unflatten(1, (2, 4)) for y in (queries @ layer.query, keys @ layer.key, keys @ layer.value))
    attended = jagged_attention(q, k, v, offsets, key_offsets, backend="reference").flatten(1) @ layer.output
    silent_ffn = replace(c, layers=(replace(layer, down=torch.zeros_like(layer.down)),))
    expected = c.seeds + attended.view(3, 2, 8)
    torch.testing.assert_close(compress_interaction(x, silent_ffn, None, "reference"), expected)


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "2-d x": ({"x": torch.zeros(5, 6)}, r"x: expected shape \[batch, n, d\], got \[5, 6\]"),
    "integer x": ({"x": torch.zeros(2, 5, 6, dtype=torch.int64)}, r"x: expected float16, .*got torch.int64"),
    "other n": ({"x": torch.zeros(2, 4, 6)}, r"linear: expected shape \[3, 4\] for x of shape \[2, 4, 6\]"),
    "other d": ({"x": torch.zeros(2, 5, 7)}, r"output_weight: expected shape \[3, 21\]"),
    "hidden weight": ({"hidden_weight": torch.zeros(11, 3)}, r"hidden_weight: expected shape \[10, 3\]"),
    "gate": ({"gate": torch.zeros(3, 1)}, r"gate: expected shape \[3, 6\]"),
    "1-d linear": ({"linear": torch.zeros(5)}, r"linear, mix, hidden_bias: expected shapes"),
    "mixed dtype": ({"mix": torch.zeros(5, 2, dtype=torch.float16)}, r"mix: expected torch.float32 like x, got"),
}


def test_parameters_of_neither_form_are_refused() -> None:
    with pytest.raises(TypeError, match=r"compression: expected DotLinearCompression or .*, got NoneType"):
        compress(torch.zeros(2, 5, 6), None)
    plan = InteractionPlan.of(2, 5, random_interaction(8, 2, 2, 1))
    with pytest.raises(ValueError, match="plan: the dot-linear form has none"):
        compress(torch.zeros(2, 5, 6), DotLinearCompression.initialize(5, 6, 3, 2, hidden=3), plan=plan)


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    changes, message = BAD[case]
    leaves = {name: x.float() for name, x in random_leaves(2, 5, 6, 3, 2, 3).items()} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        run(leaves)


def test_bad_interaction() -> None:
    x = torch.zeros(2, 5, 8)
    c = random_interaction(8, 2, 2, 1)
    with pytest.raises(ValueError, match=r"layers\[0\].up: expected shape \[8, 16\]"):
        compress(x, replace(c, layers=(replace(c.layers[0], up=torch.zeros(9, 16)),)))
    with pytest.raises(ValueError, match="layers: expected at least one"):
        compress(x, replace(c, layers=()))
    with pytest.raises(ValueError, match=r"num_heads: expected a divisor of d \(8\), got 3"):
        compress(x, replace(c, num_heads=3))
    with pytest.raises(ValueError, match=r"seeds: expected shape \[2, 8\]"):
        compress(x, replace(c, seeds=torch.zeros(2, 9)))
    with pytest.raises(ValueError, match="num_heads: expected a divisor"):
        InteractionCompression.initialize(8, 2, 3)
    with pytest.raises(ValueError, match="num_layers: expected at least 1"):
        InteractionCompression.initialize(8, 2, 2, 0)


def test_backends_name_their_limits() -> None:
    require("triton", "cpu")
    leaves = {name: x.float() for name, x in random_leaves(2, 5, 200, 3, 61, 3).items()}
    with pytest.raises(ValueError, match=r"'triton' holds r \+ k up to 32 with d = 200 in torch.float32, got 64; use"):
        run(leaves, "triton")
    assert run(leaves).shape == (2, 3, 200)
    with pytest.raises(ValueError, match=r"'triton' holds d up to 256 in torch\.float32, got 257"):
        run({name: x.float() for name, x in random_leaves(1, 2, 257, 1, 1, 1).items()}, "triton")
    doubles = random_leaves(2, 5, 6, 3, 2, 3)
    with pytest.raises(ValueError, match=r"'triton' computes in float32, got float64"):
        run(doubles, "triton")
    with pytest.raises(ValueError, match=r"'native' takes float32 and bfloat16, got torch\.float64"):
        run(doubles, "native")


def selecting(x: Tensor) -> DotLinearCompression:
    """Parameters whose embeddings are the rows of x [B, n, d], normalised: W_L = 1, gate = 0."""
    n, d = x.shape[1:]
    zeros = cast(random_leaves(1, n, d, n, 2, 3), x.dtype, str(x.device))
    return replace(
        parameters({name: leaf.detach() for name, leaf in zeros.items()}),
        linear=torch.eye(n, dtype=x.dtype, device=x.device),
        gate=torch.zeros(n, d, dtype=x.dtype, device=x.device),
    )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_codes_agree_to_the_bit(backend: str, device: str, dtype: torch.dtype) -> None:
    """Every backend gives v / step rounded half to even, with step = max |v| / 127 in float32."""
    require(backend, device)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, 6, 37, generator=generator)
    v[0, 0] = torch.arange(37) * 14.0 - 250
    v[0, 0, :2] = torch.tensor([254.0, -254.0])  # step 2: odd values are ties
    v[0, 1] = torch.randint(-127, 128, (37,), generator=generator) * 2.0**-60
    v[0, 1, 3] = 127 * 2.0**-60
    v[0, 2] = torch.arange(-18, 19) + 0.5
    v[0, 2, 5] = -127.0  # step 1: all are ties
    v[0, 3] = 0.0
    v[0, 4] = 1e-44  # too small to divide by
    x = v.to(device, dtype)
    codes, scales = compress_int8(x, selecting(x), backend=backend)
    values = v.to(dtype).float().numpy()
    step = np.abs(values).max(-1, keepdims=True) / np.float32(127)
    divisor = np.where(step >= np.finfo(np.float32).tiny, step, np.float32(np.inf))
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert np.array_equal(codes.cpu().numpy(), np.rint(values / divisor))
    embeddings = compress(x.float(), selecting(x.float()), backend="reference").cpu()
    found = codes.cpu() * scales.cpu()[..., None]
    assert ((found - embeddings).abs() <= scales.cpu()[..., None] * 0.5001 + 1e-20).all()


@pytest.mark.parametrize("form", [0, 1], ids=["dot_linear", "interaction"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_int8_stands_for_the_embeddings(form: int, backend: str) -> None:
    require(backend, "cpu")
    c = both_forms(11, 8)[form]
    x = torch.randn(4, 11, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    codes, scales = compress_int8(x, c, backend=backend)
    assert not scales.requires_grad
    embeddings = compress(x, c, backend=backend).detach()
    assert (codes.abs().amax(-1) == 127).all()
    assert ((codes * scales[..., None] - embeddings).abs() <= scales[..., None] * 0.501).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_marks_what_is_not_finite(backend: str, device: str, bad: float) -> None:
    require(backend, device)
    x = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0)).to(device)
    good, good_scales = compress_int8(x, selecting(x), backend=backend)
    x[1, :, 4] = bad
    codes, scales = compress_int8(x, selecting(x), backend=backend)
    assert scales[1].isnan().all()
    assert not codes[1].any()
    assert torch.equal(codes[[0, 2]], good[[0, 2]])
    assert torch.equal(scales[[0, 2]], good_scales[[0, 2]])
