"""The GPU bodies: emulated on small shapes, lowered without a plugin, compiled for absent H100s."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_kernels.linear_logprob import LogprobStats, api, linear_logprob, pallas_gpu, reference, tiles

MIB = 2**20
KERNEL = "__gpu$xla.gpu.triton"


@pytest.fixture(scope="module", autouse=True)
def emulated_kernels():
    """Not a TPU's, as elsewhere in this folder."""


@pytest.fixture
def emulated(monkeypatch):
    """The bodies by emulation, with sizes by which small problems have several parts, chunks and tiles."""
    body = {
        name: functools.partial(getattr(pallas_gpu, name), interpret=True) for name in ("forward", "backward")
    }
    monkeypatch.setitem(api.BODIES, "pallas_gpu", types.SimpleNamespace(**body))
    monkeypatch.setattr(
        pallas_gpu, "TILES", {2: pallas_gpu.Tile(32, 64, 16, 4, 2), 4: pallas_gpu.Tile(16, 32, 16, 4, 2)}
    )
    for name, value in {"PROGRAMS": 1, "LEAST_PARTS": 3, "COLUMNS": 100, "ALIGNED": 8, "SIZES": 2}.items():
        monkeypatch.setattr(pallas_gpu, name, value)


def problem(rows, width, vocab, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(rows, width)), dtype)
    head = jnp.asarray(2 * rng.normal(size=(vocab, width)) / width**0.5, dtype)
    return hidden, head, jnp.asarray(rng.integers(0, vocab, rows), jnp.int32), rng


CASES = {
    # rows, width, vocab; then what else
    "whole tiles": ((64, 32, 192), {}),
    "every option": ((70, 40, 250), {"options": True, "active": 0.6}),
    "less than a tile": ((5, 12, 7), {"options": True}),
    "few rows wanted": ((70, 40, 97), {"active": 0.1}),
    "no row wanted": ((20, 16, 40), {"active": 0.0}),
    "bfloat16": ((70, 48, 250), {"dtype": jnp.bfloat16, "options": True}),
    "float16, no entropy": ((20, 16, 40), {"dtype": jnp.float16, "entropy": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_emulated_kernels_equal_the_reference(emulated, name):
    """Results and all gradients; rows that are not wanted hold NaN and get exactly 0."""
    (rows, width, vocab), how = CASES[name]
    dtype = how.get("dtype", jnp.float32)
    hidden, head, targets, rng = problem(rows, width, vocab, dtype)
    options, bias = {}, None
    if "options" in how:
        bias = jnp.asarray(rng.normal(size=vocab), jnp.float32)
        options = {"temperature": jnp.asarray(rng.uniform(0.5, 2, rows), jnp.float32), "softcap": 5.0}
    active = jnp.asarray(rng.random(rows) < how.get("active", 1))
    g = LogprobStats(*jnp.where(active, jnp.asarray(rng.normal(size=(3, rows)), jnp.float32), 0))

    def loss(fn, hidden, head, bias):
        stats = fn(hidden, head, targets, bias=bias, **options)
        wanted = [jnp.where(active, value, 0) for value in stats]
        total = sum(
            jnp.vdot(x, y) for x, y, used in zip(wanted, g, (True, how.get("entropy", True), True)) if used
        )
        return total, wanted

    def gradients(fn, hidden):
        wanted = (0, 1) if bias is None else (0, 1, 2)
        run = jax.value_and_grad(functools.partial(loss, fn), wanted, has_aux=True)
        (_, stats), gradients = jax.jit(run)(hidden, head, bias)
        return stats, gradients

    dirty = jnp.where(active[:, None], hidden, jnp.nan)
    kernel = functools.partial(linear_logprob, active=active, implementation="pallas_gpu")
    stats, mine = gradients(kernel, dirty)
    expected, theirs = gradients(reference.linear_logprob, hidden)
    for one, other in zip(stats, expected):
        np.testing.assert_allclose(one, other, atol=5e-6)
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype and not np.asarray(mine[0], np.float32)[~active].any()
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        # beside the rounding of the results, half-precision gradients of logits are multiplied
        tolerance = {jnp.float32: 4e-6, jnp.float16: 1e-3, jnp.bfloat16: 8e-3}[dtype]
        np.testing.assert_allclose(one, other, atol=tolerance * max(np.abs(other).max(), 1e-30))


def test_a_constant_head_has_no_gradient(emulated):
    hidden, head, targets, _ = problem(10, 16, 40)
    x = tiles.Operands(hidden, head, targets, jnp.ones(10, bool))
    rows = tiles.Coefficients(*(jnp.ones(10),) * 3, None)
    run = jax.jit(
        functools.partial(pallas_gpu.backward, interpret=True), static_argnames=("softcap", "head_gradient")
    )
    both, alone = (run(x, rows, softcap=None, head_gradient=wanted) for wanted in (True, False))
    assert alone[1:] == (None, None) and both[1].shape == head.shape and both[2] is None
    np.testing.assert_array_equal(both[0], alone[0])


@pytest.mark.parametrize("count,size", [(0, 32), (32, 32), (33, 64), (70, 96), (97, 112), (100, 112)])
def test_products_take_the_rows_that_are_wanted(emulated, monkeypatch, count, size):
    """Of 7 blocks of 16 rows: the quarters are 2, 4, 6 and 7."""
    monkeypatch.setattr(pallas_gpu, "SIZES", 4)

    def backward(size, x, *rest, **how):
        return jnp.full(x.hidden.shape, size, jnp.float32), None, None

    monkeypatch.setattr(pallas_gpu, "_backward", backward)
    hidden, head, targets, rng = problem(100, 8, 9)
    active = jnp.zeros(100, bool).at[rng.permutation(100)[:count]].set(True)
    rows = tiles.Coefficients(*(jnp.ones(100),) * 3, None)
    x = tiles.Operands(hidden, head, targets, active)
    dhidden, _, _ = pallas_gpu.backward(x, rows, softcap=None, head_gradient=False)
    np.testing.assert_array_equal(dhidden, jnp.where(active, size, 0)[:, None] * jnp.ones(8))


def test_blocks_behind_the_wanted_rows_are_not_computed(emulated, monkeypatch):
    """Emulated memory is NaN until it is written."""
    monkeypatch.setattr(pallas_gpu, "_place", lambda x: jnp.arange(112))
    hidden, head, targets, rng = problem(100, 16, 40)
    active = jnp.zeros(100, bool).at[rng.permutation(100)[:20]].set(True)
    sums = pallas_gpu.forward(tiles.Operands(hidden, head, targets, active), softcap=None, interpret=True)
    for value in sums:
        assert jnp.isfinite(value[:32]).all() and jnp.isnan(value[32:]).all()


def shapes(rows, width, vocab, dtype=jnp.bfloat16):
    struct = jax.ShapeDtypeStruct
    return struct((rows, width), dtype), struct((vocab, width), dtype), struct((rows,), jnp.int32)


def policy_gradient(hidden, head, targets, *, argnums=(0, 1), **how):
    """Of a loss that needs the log-prob and the entropy."""

    def loss(hidden, head):
        stats = linear_logprob(hidden, head, targets, **how)
        return jnp.sum(jnp.exp(stats.logp) - 0.01 * stats.entropy)

    return jax.grad(loss, argnums)(hidden, head)


def test_a_gpu_gets_the_kernels():
    """Without any plugin: one kernel forward, and backward one for each number of rows."""

    def text(platform):
        trace = jax.jit(policy_gradient).trace(*shapes(2048, 256, 10_000))
        return trace.lower(lowering_platforms=(platform,)).as_text()

    gpu = text("cuda")
    assert gpu.count(KERNEL) == 1 + pallas_gpu.SIZES
    assert not re.search(r"tensor<(1024x10000|10000x1024)x", gpu)
    assert KERNEL not in text("cpu") and KERNEL not in text("tpu")


def test_a_mesh_of_gpus_gets_the_kernels():
    """Each device on its rows and its part of the vocabulary; types of `shard_map` are checked."""
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"))
    how = {"mesh": mesh, "row_axes": ("fsdp",), "vocab_axis": "tensor", "embed_axis": "fsdp"}
    trace = jax.jit(functools.partial(policy_gradient, **how)).trace(*shapes(512, 128, 1000))
    text = trace.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(KERNEL) == 1 + len({64, 128, 192, 256} - {64, 192})
    assert "tensor<128x500xbf16>" in text and "tensor<256x500xbf16>" in text


H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 } runtime_version { major: 13 minor: 0 patch: 0 }
"""


def compile_for_h100(fn, *arguments, **how):
    """By the real compiler, for chips that are described."""
    absent = "jax-cuda13-plugin is absent: pip install -c constraints.txt -e '.[cuda-aot]'"
    pytest.importorskip("jax_plugins.xla_cuda13", reason=absent)
    chips = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x4").devices
    mesh = (
        Mesh(np.array(chips).reshape(2, 2), ("fsdp", "tensor"))
        if how
        else Mesh(np.array(chips[:1]), ("one",))
    )
    specs = [P("fsdp"), P("tensor", "fsdp"), P("fsdp")] if how else [P()] * len(arguments)
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs, strict=True)
    ]
    fn = functools.partial(fn, mesh=mesh, **how) if how else fn
    return jax.jit(fn).lower(*arguments).compile()


@pytest.mark.aot
@pytest.mark.parametrize("argnums", [(0, 1), 0], ids=["head trained", "head frozen"])
def test_compiles_for_h100_in_memory_of_the_rows_and_a_chunk(argnums):
    """A batch whose logits are 4.6 GiB in float32: temporaries are the hidden gradient in float32, the wanted
    rows, and of a chunk of the vocabulary dz, the head and its gradient."""
    rows, width, vocab = 8192, 4096, 151_936
    step = functools.partial(policy_gradient, argnums=argnums)
    compiled = compile_for_h100(step, *shapes(rows, width, vocab))
    text = compiled.as_text()
    assert KERNEL in text and not re.search(rf"\[({rows},{vocab}|{vocab},{rows})\]", text)
    chunk = 2 * pallas_gpu.COLUMNS * (rows + 2 * width)
    limit = rows * width * (4 + 2) + chunk + 16 * MIB
    assert compiled.memory_analysis().temp_size_in_bytes <= limit


@pytest.mark.aot
@pytest.mark.parametrize("width,vocab,dtype", [(100, 97, jnp.bfloat16), (1000, 32_001, jnp.float32)])
def test_compiles_for_h100_where_nothing_is_a_multiple_of_a_tile(width, vocab, dtype):
    def step(hidden, head, targets, bias, temperature, active):
        how = {"softcap": 30.0, "bias": bias, "temperature": temperature, "active": active}
        # by name, as so few logits would be kept
        return policy_gradient(hidden, head, targets, **how, implementation="pallas_gpu")

    rows = 301
    more = [jax.ShapeDtypeStruct(*x) for x in (((vocab,), dtype), ((rows,), jnp.float32), ((rows,), bool))]
    assert KERNEL in compile_for_h100(step, *shapes(rows, width, vocab, dtype), *more).as_text()


@pytest.mark.aot
def test_compiles_for_four_h100():
    """Rows over two chips, the vocabulary over two: the head is gathered once, its gradient scattered."""
    how = {"row_axes": ("fsdp",), "vocab_axis": "tensor", "embed_axis": "fsdp"}
    text = compile_for_h100(policy_gradient, *shapes(8192, 4096, 151_936), **how).as_text()
    assert KERNEL in text
    sent = [len(re.findall(rf" {op}(?:-start)?\(", text)) for op in ("all-gather", "reduce-scatter")]
    assert sent == [1, 1]
