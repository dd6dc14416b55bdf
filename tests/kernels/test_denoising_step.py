"""Both bodies of the denoising step against float64 numpy, row by row, and against one another."""

import doctest
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import emulated, races_found
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from jaxrl_kernels.denoising_step import DenoisingStep, Look, api, denoising_step, pallas_tpu

INF = np.inf
FLOATS = ("probability", "margin", "entropy", "raw_logp", "probs", "change")


def random_batch(seed, rows=5, vocab=37, tracked=4):
    """Logits and weights on a grid, so that there are ties and no rounding before the soft-max."""
    rng = np.random.default_rng(seed)
    logits, negative = (rng.integers(-12, 13, (2, rows, vocab)) / 4).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -INF
    ids = np.argsort(rng.random((rows, vocab)), axis=1)[:, :tracked]
    ids[rng.random(ids.shape) < 0.1] = -1
    probs = rng.dirichlet(np.ones(tracked + 1), rows)[:, :tracked] * (ids >= 0)
    last = Look(ids.astype(np.int32), probs.astype(np.float32), rng.random(rows) < 0.8)
    weight = rng.choice([0, 0.5, 1.5], rows).astype(np.float32)
    banned, distrusted = (rng.integers(-1, vocab, (rows, 2)).astype(np.int32) for _ in range(2))
    distrusted[::2, 0] = np.argmax(logits[::2], axis=1)  # often what is proposed
    names = "logits negative weight banned distrusted last"
    return dict(zip(names.split(), (logits, negative, weight, banned, distrusted, last)))


def probabilities(z, left_out):
    z = np.where(np.isin(np.arange(len(z)), left_out), -INF, z)
    p = np.exp(z - z.max())
    return p / p.sum()


def divergence(p, q):
    """Jensen-Shannon, of tokens and their rest."""
    total = 0.0
    for own, other in zip([*p, 1 - sum(p)], [*q, 1 - sum(q)]):
        for x in (own, other):
            total += 0.5 * x * np.log(2 * x / (own + other)) if x > 1e-12 else 0
    return total


def definition(logits, negative, weight, banned, distrusted, last, judge):
    """In float64, one row after another."""
    found = []
    for i, z in enumerate(np.asarray(logits, np.float64)):
        guided = z + weight[i] * (z - negative[i]) if weight[i] else z
        candidates = probabilities(guided, banned[i])
        token = int(np.argmax(np.where(np.isin(np.arange(len(z)), banned[i]), -INF, guided)))
        judged = probabilities(guided if judge == "guided" else z, [*banned[i], *distrusted[i]])
        second, first = np.sort(judged)[-2:]
        some = judged[judged > 0]
        plain = probabilities(z, [])
        look = probabilities(z, banned[i])
        ids = sorted(range(len(z)), key=lambda v, look=look: (-look[v], v))[: last.ids.shape[1]]
        then = [(look[v] if v >= 0 else 0, q) for v, q in zip(last.ids[i], last.probs[i])]
        assert candidates[token] == candidates.max()
        found.append(
            DenoisingStep(
                token,
                judged[token],
                first - second,
                -np.sum(some * np.log(some)),
                np.log(plain[token]),
                [v if look[v] > 0 else -1 for v in ids],
                look[ids],
                divergence(*zip(*then)) if last.seen[i] else np.log(2),
            )
        )
    return DenoisingStep(*(np.array(x) for x in zip(*found)))


@cache
def jitted(implementation, judge="guided"):
    function = emulated(denoising_step) if implementation == "pallas_tpu" else denoising_step

    def step(logits, **others):
        return function(logits, judge=judge, implementation=implementation, **others)

    return jax.jit(step)


def evaluate(implementation, batch, judge="guided"):
    return jax.device_get(jitted(implementation, judge)(**batch))


def assert_close(got, wanted, atol=5e-6):
    np.testing.assert_array_equal(got.token, wanted.token)
    np.testing.assert_array_equal(got.ids, wanted.ids)
    for name in FLOATS:
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), atol=atol, err_msg=name)


@pytest.mark.parametrize("judge", api.JUDGES)
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_equals_the_definition(implementation, judge, seed):
    """With ties, tokens without probability, banned and distrusted ones, and rows without guidance."""
    batch = random_batch(seed)
    assert_close(evaluate(implementation, batch, judge), definition(**batch, judge=judge))


@pytest.mark.parametrize("vocab", [1300, 1536])
def test_tiles(monkeypatch, vocab):
    """19 rows in blocks of 16, a vocabulary in blocks of 512 that do or do not divide it; no races."""
    monkeypatch.setattr(pallas_tpu, "BLOCK_COLUMNS", 512)
    batch = random_batch(vocab, 19, vocab, tracked=6)
    function = emulated(denoising_step, detect_races=True)
    got = jax.jit(partial(function, implementation="pallas_tpu"))(**batch)
    assert not races_found()
    assert_close(got, definition(**batch, judge="guided"))


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_by_hand(implementation):
    """Of 1/2, 1/4, 1/8, 1/8 the first is banned and was likely before; l⁻ turns the order of the others."""
    probs = np.array([[0.5, 0.25, 0.125, 0.125], [1, 0, 0, 0]], np.float32)
    batch = random_batch(0, 2, 4, 3)
    batch["logits"] = np.log(probs, where=probs > 0, out=np.full(probs.shape, -INF, np.float32))
    batch["negative"] = np.log(np.array([[0.25, 0.5, 0.125, 0.125]] * 2, np.float32))
    batch["weight"] = np.array([2, 0], np.float32)
    batch["banned"] = np.array([[0, -1], [-1, -1]], np.int32)
    batch["distrusted"] = np.full((2, 2), -1, np.int32)
    batch["last"] = Look(np.array([[1, 2, 3]] * 2), np.array([[0.5, 0.25, 0.25]] * 2), np.array([True, True]))
    got = evaluate(implementation, batch)
    # l + 2(l - l⁻) is log of 1/4·(1/2)², 1/8, 1/8: a tie of two, each twice as likely as the first
    assert got.token.tolist() == [2, 0]
    np.testing.assert_allclose(got.probability, [0.4, 1], rtol=1e-6)
    np.testing.assert_allclose(got.margin, [0, 1], atol=1e-6)
    np.testing.assert_allclose(got.entropy, [np.log(5) - 0.8 * np.log(2), 0], atol=1e-6)
    np.testing.assert_allclose(got.raw_logp, [-np.log(8), 0], rtol=1e-6)
    assert got.ids.tolist() == [[1, 2, 3], [0, -1, -1]]
    np.testing.assert_allclose(got.probs, [[0.5, 0.25, 0.25], [1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(got.change, [0, np.log(2)], atol=1e-6)  # nothing in common: the rest was 0


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_a_nan_stays_in_its_row(implementation):
    """And shows in every number of it."""
    batch = random_batch(3)
    batch["weight"][1] = 0
    batch["last"].seen[:] = True
    wanted = evaluate(implementation, batch)
    batch["logits"][1, 7] = np.nan
    got = evaluate(implementation, batch)
    assert 0 <= got.token[1] < 37
    assert got.ids[1].tolist() == [-1] * 4
    for name in FLOATS:
        assert np.all(np.isnan(getattr(got, name)[1])), name
    for x, y in zip(got, wanted):
        np.testing.assert_array_equal(np.delete(x, 1, axis=0), np.delete(y, 1, axis=0))


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_rows_of_weight_0_are_the_plain_ones_bit_for_bit(implementation):
    """Whatever their negative input gave."""
    batch = random_batch(4)
    batch["weight"][:] = 0
    guided = evaluate(implementation, batch | {"negative": batch["negative"] * np.nan})
    plain = evaluate(implementation, {k: x for k, x in batch.items() if k not in ("negative", "weight")})
    jax.tree.map(np.testing.assert_array_equal, guided, plain)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    batch = random_batch(5, rows=20)
    half = batch | {name: jnp.asarray(batch[name], dtype) for name in ("logits", "negative")}
    assert_close(evaluate("pallas_tpu", half), definition(**batch, judge="guided"))
    assert_close(evaluate("xla", half), definition(**batch, judge="guided"))


def test_large_logits():
    """The kernel's sums are relative to the largest logit, and so are log-probs and the entropy."""
    batch = random_batch(6)
    shifted = batch | {name: batch[name] + np.float32(4096) for name in ("logits", "negative")}
    assert_close(evaluate("pallas_tpu", shifted), definition(**batch, judge="guided"))


def test_leading_dimensions_and_what_is_left_out():
    """[B, W, V] with ids and weights of B is [B·W, V] with those of rows; no look, no ids."""
    batch = random_batch(7, rows=6)
    b, w = 2, 3
    per_prompt = {name: batch[name][::w] for name in ("weight", "banned", "distrusted")}
    wide = {name: x[:, None] for name, x in per_prompt.items()}
    wide |= {name: batch[name].reshape(b, w, -1) for name in ("logits", "negative")}
    rows = {name: np.repeat(x, w, axis=0) for name, x in per_prompt.items()}
    rows |= {name: batch[name] for name in ("logits", "negative")}
    got, wanted = denoising_step(**wide), denoising_step(**rows)
    assert got.token.shape == (b, w) and got.ids.shape == got.probs.shape == (b, w, 0)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.reshape(y.shape), y), got, wanted)
    alone = denoising_step(batch["logits"])
    np.testing.assert_array_equal(alone.token, np.argmax(batch["logits"], axis=1))
    np.testing.assert_allclose(alone.raw_logp, np.log(alone.probability), atol=1e-6)
    assert denoising_step(jnp.zeros((0, 3, 5))).token.shape == (0, 3)


def test_rows_over_four_devices():
    """Inside shard_map the kernel works on each device's rows."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    batch = random_batch(8, rows=8)
    step = partial(emulated(denoising_step), implementation="pallas_tpu")
    run = jax.shard_map(lambda x: step(**x), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert_close(jax.jit(run)(batch), definition(**batch, judge="guided"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"judge": "raw"}, "judge 'raw'; one of guided, plain"),
        ({"implementation": "cuda"}, "implementation 'cuda'; one of xla, pallas_tpu, or None"),
        ({"weight": None}, "negative and weight belong together"),
        ({"negative": np.zeros((5, 38))}, r"logits \(5, 37\) and negative \(5, 38\)"),
        ({"weight": np.zeros(4)}, r"weight \(4,\) must have the leading dimensions \(5,\)"),
        ({"banned": np.zeros(2, int)}, r"banned \(2,\) must have"),
        ({"logits": np.zeros((5, 1))}, "have 1 token"),
        ({"last": Look(np.zeros((5, 38), int), np.zeros((5, 38)), np.zeros(5, bool))}, r"1 to 37 tokens"),
    ],
)
def test_errors_name_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        denoising_step(**random_batch(0) | options)


def test_the_example_runs():
    assert doctest.testmod(api).failed == 0


def trace(shape, tracked, dtype="float32", sharding=None):
    def of(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = shape[0]
    batch = {name: of(shape, dtype) for name in ("logits", "negative")}
    batch |= {name: of((rows, 2), "int32") for name in ("banned", "distrusted")}
    batch["weight"] = of((rows,), "float32")
    if tracked:
        look = of((rows, tracked), "int32"), of((rows, tracked), "float32"), of((rows,), "bool")
        batch["last"] = Look(*look)
    return jax.jit(lambda batch: denoising_step(**batch)).trace(batch)


def test_tpu_gets_the_kernel_and_others_do_not():
    """Nor does a TPU where the compiler is to partition the program."""

    def kernels(platform):
        return trace((32, 1000), 8).lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")

    assert kernels("tpu") == 1
    assert kernels("cpu") == 0
    with jax.set_mesh(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])):
        assert kernels("tpu") == 0


SHAPES = [((32, 126464), 8, "float32"), ((512, 126464), 8, "bfloat16"), ((512, 126464), 0, "float32")]
SHAPES += [((5, 300), 4, "float32"), ((12, 152064), 8, "float32")]


@pytest.mark.aot
@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("shape, tracked, dtype", SHAPES)
def test_compiles(monkeypatch, chip, shape, tracked, dtype):
    """Up to 512 positions of LLaDA; no temporary of [N, V], but some numbers for every row."""
    pytest.importorskip("libtpu")
    for variable, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(variable, value)
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    compiled = trace(shape, tracked, dtype, sharding).lower().compile()
    assert "denoising_step" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**20 + 16 * 512 * shape[0]
