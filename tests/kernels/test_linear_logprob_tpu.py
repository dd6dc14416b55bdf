"""The TPU kernels: emulated on small shapes, lowered, compiled for chips that are not there."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import emulated, races_found
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_kernels.linear_logprob import LogprobStats, linear_logprob, pallas_tpu, reference, tiles
from jaxrl_kernels.linear_logprob.blocks import CHIPS, Plan, Tile, plan

MIB = 2**20


def problem(rows, width, vocab, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(rows, width)), dtype)
    head = jnp.asarray(2 * rng.normal(size=(vocab, width)) / width**0.5, dtype)
    targets = jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)
    return hidden, head, targets, rng


CASES = {
    # rows, width, vocab, tile; then what else
    "plain": ((64, 64, 300, Tile(16, 128)), {}),
    "every option": ((70, 96, 517, Tile(16, 256)), {"options": True, "active": True}),
    "two cores, one with a tile less": ((70, 96, 650, Tile(16, 256)), {"cores": 2, "active": True}),
    "less than a tile": ((5, 32, 97, Tile(64, 512)), {}),
    "races": ((80, 64, 520, Tile(16, 128)), {"cores": 2, "active": True, "races": True}),
    "no entropy": ((40, 32, 256, Tile(16, 128)), {"entropy": False, "options": True}),
    "a head [D, V]": ((40, 48, 300, Tile(16, 128)), {"vocab_dim": 1, "options": True}),
    "bfloat16": ((40, 128, 300, Tile(16, 128)), {"dtype": jnp.bfloat16}),
}


@pytest.mark.parametrize("name", CASES)
def test_emulated_kernels_equal_the_reference(name):
    """In memory that is NaN until written, where reading out of bounds raises; steps of a core in order."""
    (rows, width, vocab, tile), how = CASES[name]
    dtype = how.get("dtype", jnp.float32)
    hidden, head, targets, rng = problem(rows, width, vocab, dtype)
    scale = bias = softcap = None
    if "options" in how:
        scale, bias = (jnp.asarray(rng.uniform(0.5, 2, n), jnp.float32) for n in (rows, vocab))
        softcap = 5.0
    active = jnp.ones(rows, bool)
    if "active" in how:  # blocks without a row, with all of them, and with some
        active = jnp.asarray((np.arange(rows) // tile.rows % 2 == 0) & (rng.random(rows) < 0.8))
    using = Plan(tile, tile, 100, how.get("cores", 1))
    vocab_dim = how.get("vocab_dim", 0)
    turn = jnp.transpose if vocab_dim else jnp.asarray
    x = tiles.Operands(hidden, turn(head), targets, active, scale, bias)
    temperature = 1.0 if scale is None else 1 / scale

    def definition(hidden, head, bias):
        return reference.linear_logprob(
            hidden, head, targets, temperature=temperature, softcap=softcap, bias=bias
        )

    expected, vjp = jax.vjp(definition, hidden, head, bias)
    g = [jnp.where(active, jnp.asarray(rng.normal(size=rows), jnp.float32), 0) for _ in range(3)]
    if not how.get("entropy", True):
        g[1] = jnp.zeros(rows)
    gradients = vjp(LogprobStats(*g))
    coefficients = tiles.coefficients(
        expected, LogprobStats(*g), active, scale, with_entropy=how.get("entropy", True)
    )
    detect_races = "races" in how
    forward, backward = (
        emulated(f, detect_races=detect_races) for f in (pallas_tpu.forward, pallas_tpu.backward)
    )
    stats = tiles.finish(forward(x, softcap=softcap, vocab_dim=vocab_dim, using=using))
    run = functools.partial(backward, x, coefficients, softcap=softcap, vocab_dim=vocab_dim)
    both, hidden_alone = (run(head_gradient=wanted, using=using) for wanted in (True, False))
    assert not detect_races or not races_found()
    for mine, theirs in zip(stats, expected):
        np.testing.assert_allclose(mine[active], theirs[active], atol=5e-6)
    tolerance = 8e-3 if dtype == jnp.bfloat16 else 2e-6  # gradients are returned in their dtype
    dhidden, dhead, dbias = both
    for mine, theirs in zip((dhidden, turn(dhead), dbias), gradients, strict=True):
        if theirs is not None:
            theirs = np.asarray(theirs, np.float32)
            np.testing.assert_allclose(
                np.asarray(mine, np.float32), theirs, atol=tolerance * np.abs(theirs).max()
            )
    np.testing.assert_allclose(both[0].astype(float), hidden_alone[0].astype(float), atol=tolerance)
    assert hidden_alone[1:] == (None, None)


@pytest.mark.parametrize("rows", [1, 16, 17, 47, 300])
def test_blocks_are_enough_for_the_pipeline(rows):
    """At least three row blocks for the buffer that is read and written, however few rows there are."""
    tile = pallas_tpu._fit(Tile(256, 256), rows, 97, pallas_tpu.LEAST_BLOCKS)
    x = tiles.Operands(jnp.ones((rows, 8)), jnp.ones((97, 8)), jnp.zeros(rows, int), jnp.zeros(rows, bool))
    padded = pallas_tpu._pad(x, tile.rows, 1, pallas_tpu.LEAST_BLOCKS)
    assert padded.hidden.shape[0] >= 3 * tile.rows and tile.columns == 128
    order, count = pallas_tpu._visits(padded, tile, 1, pallas_tpu.LEAST_BLOCKS)
    assert count == 3 and sorted(order[:, 0].tolist()) == list(range(len(order)))


def test_visits_share_active_blocks_between_cores():
    active = jnp.zeros((7, 4), bool).at[jnp.array([1, 4, 6]), 2].set(True).reshape(-1)
    x = tiles.Operands(jnp.ones((28, 8)), jnp.ones((9, 8)), jnp.zeros(28, int), active)
    order, count = pallas_tpu._visits(pallas_tpu._pad(x, 4, 2), Tile(4, 128), 2)
    assert count == 2 and {1, 4, 6} <= set(order[:2].reshape(-1).tolist())


@pytest.mark.parametrize(
    "width,tile",
    [
        (512, Tile(512, 2048)),
        (2048, Tile(512, 2048)),
        (5120, Tile(256, 768)),
        (16384, Tile(128, 256)),
        (65536, Tile(32, 128)),
    ],
)
def test_tiles_shrink_with_the_width(monkeypatch, width, tile):
    chip = CHIPS["v6e"]
    table = {2048: Tile(512, 2048), 4096: Tile(512, 1024)}
    monkeypatch.setitem(CHIPS, "v4", type(chip)(100, table, table))
    assert plan(width) == Plan(tile, tile, 100, 1)  # of no known chip, as the default device is a CPU


def shapes(rows, width, vocab, dtype=jnp.bfloat16, sharding=None):
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    return struct((rows, width), dtype), struct((vocab, width), dtype), struct((rows,), jnp.int32)


def policy_gradient(hidden, head, targets, **how):
    """Of a loss that needs the log-prob and the entropy."""

    def loss(hidden, head):
        stats = linear_logprob(hidden, head, targets, **how)
        return jnp.sum(jnp.exp(stats.logp) - 0.01 * stats.entropy)

    return jax.value_and_grad(loss, (0, 1))(hidden, head)


def test_a_tpu_gets_the_kernels():
    """Without any plugin: two kernels, and no array of rows × vocabulary."""
    lowered = jax.jit(policy_gradient).trace(*shapes(4096, 256, 5000)).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    assert text.count("tpu_custom_call") == 2 and not re.search(r"tensor<(4096x5000|5000x4096)x", text)
    elsewhere = jax.jit(policy_gradient).trace(*shapes(4096, 256, 5000)).lower(lowering_platforms=("cpu",))
    assert "tpu_custom_call" not in elsewhere.as_text()


TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}


def devices(monkeypatch, name):
    """Descriptions of chips that the real compiler compiles for."""
    pytest.importorskip("libtpu", reason="libtpu is absent: pip install -c constraints.txt -e '.[tpu]'")
    for variable, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(variable, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def compile_for_one(monkeypatch, chip, fn, *arguments):
    mesh = Mesh(np.array(devices(monkeypatch, TOPOLOGIES[chip])[:1]), ("one",))
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))  # noqa: E731
    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(*jax.tree.map(place, arguments)).compile()


@pytest.mark.aot
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_in_the_memory_of_the_hidden_gradient(monkeypatch, chip):
    """One chip, a batch whose logits would be 4.6 GiB: temporaries are the float32 hidden gradient, one for
    each core that gathers it, and 16 MiB at most."""
    rows, width, vocab = 8192, 2048, 151_936
    compiled = compile_for_one(monkeypatch, chip, policy_gradient, *shapes(rows, width, vocab))
    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 2
    assert not re.search(rf"\[({rows},{vocab}|{vocab},{rows})\]", text)
    cores = 2 if chip == "v5p" else 1
    assert compiled.memory_analysis().temp_size_in_bytes <= cores * rows * width * 4 + 16 * MIB


@pytest.mark.aot
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "7x"])
@pytest.mark.parametrize("width,dtype", [(5120, jnp.bfloat16), (8192, jnp.bfloat16), (4096, jnp.float32)])
def test_compiles_for_widths_beyond_the_table(monkeypatch, chip, width, dtype):
    compile_for_one(monkeypatch, chip, policy_gradient, *shapes(2048, width, 151_936, dtype))


@pytest.mark.aot
@pytest.mark.parametrize("width,vocab,dtype", [(96, 97, jnp.bfloat16), (1000, 32_001, jnp.float32)])
def test_compiles_where_nothing_is_a_multiple_of_a_tile(monkeypatch, width, vocab, dtype):
    tpu = {"implementation": "pallas_tpu"}  # few logits would be kept

    def loss(hidden, head, targets, bias, temperature, active):
        how = {"softcap": 30.0, "bias": bias, "temperature": temperature, "active": active} | tpu
        return policy_gradient(hidden, head, targets, **how)

    rows = 301
    more = [
        jax.ShapeDtypeStruct(s, t) for s, t in (((vocab,), dtype), ((rows,), jnp.float32), ((rows,), bool))
    ]
    compile_for_one(monkeypatch, "v5e", loss, *shapes(rows, width, vocab, dtype), *more)
    frozen = lambda h, w, y: jax.grad(lambda h: linear_logprob(h, w, y, **tpu).logp.sum())(h)  # noqa: E731
    compile_for_one(monkeypatch, "v5e", frozen, *shapes(rows, width, vocab, dtype))


@pytest.mark.aot
@pytest.mark.parametrize("name,count", [("v5e:16x16", 256), ("v5p:8x8x8", 512)])
def test_compiles_for_a_pod(monkeypatch, name, count):
    """Rows over 'fsdp', the vocabulary over 8 chips: temporaries are those of one chip, the gathered shard of
    the head and its gradient, and what is sent is what the design says."""
    chips = np.array(devices(monkeypatch, name)).reshape(-1, 8)
    assert chips.size == count
    mesh = Mesh(chips, ("fsdp", "tensor"))
    rows, width, vocab = 2048 * len(chips), 4096, 151_936
    cut = [P("fsdp"), P("tensor", "fsdp"), P("fsdp")]
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(shapes(rows, width, vocab), cut)
    ]
    out = (NamedSharding(mesh, P()), tuple(x.sharding for x in arguments[:2]))
    how = {"mesh": mesh, "row_axes": ("fsdp",), "vocab_axis": "tensor", "embed_axis": "fsdp"}
    lowered = jax.jit(functools.partial(policy_gradient, **how), out_shardings=out).lower(*arguments)
    sent = re.findall(r"stablehlo\.(all_gather|reduce_scatter|all_reduce)\b", lowered.as_text())
    # the head; its gradient; maximum, sums and hidden gradient of the rows. The compiler adds the loss's sum,
    # and may turn the scatter into a sum and a slice: here a shard of V is no multiple of 128
    assert sorted(sent) == ["all_gather", "all_reduce", "all_reduce", "all_reduce", "reduce_scatter"]
    shard = vocab // 8 * width * 2
    cores = 2 if name.startswith("v5p") else 1
    limit = cores * 2048 * width * 4 + 2 * shard + 16 * MIB
    assert lowered.compile().memory_analysis().temp_size_in_bytes <= limit
