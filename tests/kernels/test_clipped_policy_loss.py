"""The kernel equals advantage → surrogate → KL → aggregate of jaxrl_llm: value, metrics and gradient."""

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

from jaxrl_kernels.clipped_policy_loss import api, clipped_policy_loss, pallas_tpu
from jaxrl_llm import advantages, losses

NORM = 8.0

PUBLISHED = {
    "ppo": (losses.ppo_clip, None, "token_mean"),
    "grpo": (losses.ppo_clip, advantages.grpo, "seq_mean_token_mean"),
    "dr_grpo": (losses.ppo_clip, advantages.dr_grpo, "seq_mean_token_sum_norm"),
    "dapo": (partial(losses.ppo_clip, epsilon_high=0.28), advantages.grpo, "token_mean"),
    "gspo": (losses.gspo, advantages.grpo, "seq_mean_token_mean"),
    "cispo": (losses.cispo, advantages.grpo, "token_mean"),
    "dgpo": (losses.dgpo, advantages.grpo, "token_mean"),
}

MODES = {"grpo": advantages.grpo, "rloo": advantages.rloo, "mean_only": advantages.dr_grpo}

OF_SURROGATE = ("epsilon", "epsilon_high", "delta", "left_decay", "right_decay")
OF_ADVANTAGE = ("ddof", "advantage_epsilon", "sample_weight", "anchor", "weight_scale")


def defined(batch, kind, *, mode=None, aggregation=None, beta=0.0, **options):
    """The loss as a composition: (sum, weight, metrics)."""
    surrogate, advantage, usual = PUBLISHED[kind]
    metrics = {}
    values = batch["values"]
    if batch["group"] is not None:
        if mode is not None:
            advantage = MODES[mode]
        given = {name.removeprefix("advantage_"): options[name] for name in OF_ADVANTAGE if name in options}
        weighting = {name: given.pop(name) for name in ("anchor", "weight_scale") if name in given}
        if "sample_weight" in given:
            advantage = advantages.hacpo
        rewards = values
        values, metrics = advantage(rewards, batch["group"], batch["valid"], **given)
        if weighting:
            weights, more = advantages.ha_dw_weights(
                values, rewards, batch["group"], batch["valid"], **weighting
            )
            values, metrics = values * weights, metrics | more
    if values.ndim == 1:
        values = values[:, None]
    chosen = {name: options[name] for name in OF_SURROGATE if name in options}
    loss, more = surrogate(batch["logp"], batch["old_logp"], values, batch["mask"], **chosen)
    metrics = metrics | more
    if batch["ref_logp"] is not None:
        kl, more = losses.kl_k3(batch["logp"], batch["ref_logp"], batch["mask"])
        loss, metrics = loss + beta * kl, metrics | more
    return *losses.aggregate(loss, batch["mask"], aggregation or usual, norm=NORM), metrics


def fused(batch, kind, **options):
    arrays = {name: batch[name] for name in ("ref_logp", "valid")}
    return clipped_policy_loss(
        *(batch[name] for name in ("logp", "old_logp", "values", "group", "mask")),
        kind=kind,
        norm=NORM,
        **arrays,
        **options,
    )


def differentiated(function, batch):
    """(sum, weight, metrics) and the gradients of the sum by the float arrays."""
    floats = {name: x for name, x in batch.items() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)}

    def total(floats):
        out = function(batch | floats)
        return out[0], out

    gradients, out = jax.grad(total, has_aux=True)(floats)
    return tuple(out), gradients


def random_batch(seed, rows=5, width=7, dtype=np.float32, *, per_token=False, rewards=True, reference=True):
    """Ragged masks with holes, ragged groups, a row without tokens; NaN wherever it must not matter."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(width) < rng.integers(1, width + 1, (rows, 1))) & (rng.random((rows, width)) > 0.2)
    mask[0] = False
    mask[1, 0] = True
    batch = {name: -rng.uniform(0.1, 1.1, (rows, width)) for name in ("logp", "old_logp", "ref_logp")}
    batch["old_logp"] = np.where(rng.random((rows, width)) > 0.9, batch["logp"], batch["old_logp"])
    valid = None
    if rewards:
        batch["values"] = np.where(rng.random(rows) > 0.5, rng.normal(size=rows), rng.integers(0, 2, rows))
        valid = rng.random(rows) > 0.2
        batch["values"][~valid] = np.nan
    else:
        batch["values"] = rng.normal(size=(rows, width) if per_token else rows)
        batch["values"] = np.where(mask if per_token else mask.any(1), batch["values"], np.nan)
    for name in ("logp", "old_logp", "ref_logp"):
        batch[name] = np.where(mask, batch[name], rng.choice([np.nan, np.inf, -1e3, 1e3], mask.shape))
    batch = {name: x.astype(dtype) for name, x in batch.items()} | {"mask": mask, "valid": valid}
    batch["group"] = rng.choice([-3, 7, 2**31 - 1], rows).astype(np.int32) if rewards else None
    if not reference:
        batch["ref_logp"] = None
    return batch


def assert_equal_to_definition(got, wanted, rtol, batch):
    (total, weight, metrics), gradients = got
    (wanted_total, wanted_weight, wanted_metrics), wanted_gradients = wanted
    assert weight == wanted_weight
    # the rounding of a sum goes with its terms: tokens, each of size about 1
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=rtol * np.sum(batch["mask"]))
    close(total, wanted_total)
    assert metrics.keys() == wanted_metrics.keys()
    for name, (numerator, denominator) in metrics.items():
        close(numerator, wanted_metrics[name].sum, err_msg=name)
        assert denominator == wanted_metrics[name].weight, name
    for name, gradient in gradients.items():
        assert gradient.dtype == batch[name].dtype
        np.testing.assert_allclose(gradient, wanted_gradients[name], rtol=rtol, atol=rtol, err_msg=name)
    assert np.all(np.asarray(gradients["logp"])[~np.asarray(batch["mask"])] == 0)


REWARDS, ROWS, TOKENS = {}, {"rewards": False}, {"rewards": False, "per_token": True}
CASES = {
    "ppo": (TOKENS, {"kind": "ppo"}),
    "ppo, dual clip": (ROWS, {"kind": "ppo", "epsilon": 0.1, "epsilon_high": 0.4, "delta": 1.5}),
    "ppo, rloo": (REWARDS, {"kind": "ppo", "mode": "rloo", "aggregation": "seq_mean_token_sum"}),
    "grpo": (REWARDS, {"kind": "grpo", "beta": 0.04}),
    "grpo, hacpo": (REWARDS, {"kind": "grpo", "sample_weight": jnp.array([0.5, 1, 2, 1, 3])}),
    "grpo, ha_dw": (REWARDS, {"kind": "grpo", "anchor": 0.4, "weight_scale": 1.5, "ddof": 0}),
    "dr_grpo": (REWARDS | {"reference": False}, {"kind": "dr_grpo"}),
    "dapo": (REWARDS | {"reference": False}, {"kind": "dapo", "advantage_epsilon": 1e-4}),
    "gspo": (REWARDS, {"kind": "gspo"}),
    "gspo, low": (REWARDS | {"reference": False}, {"kind": "gspo", "epsilon": 0.1}),
    "gspo, token mean": (ROWS, {"kind": "gspo", "epsilon": 0.2, "beta": 0.1, "aggregation": "token_mean"}),
    "cispo": (REWARDS, {"kind": "cispo", "beta": 0.01}),
    "cispo, upper": (TOKENS, {"kind": "cispo", "epsilon": float("inf"), "epsilon_high": 0.3}),
    "dgpo": (REWARDS | {"reference": False}, {"kind": "dgpo"}),
    "dgpo, steep": (
        TOKENS,
        {"kind": "dgpo", "left_decay": 2.5, "right_decay": 1.0, "aggregation": "seq_mean_token_sum_norm"},
    ),
}  # fmt: skip


EVERY_BODY = ("ppo, dual clip", "dr_grpo", "grpo, ha_dw", "gspo, token mean", "cispo, upper", "dgpo, steep")


@cache
def jitted(name, implementation):
    if implementation == "definition":
        function = defined
    elif implementation == "pallas_tpu":
        function = partial(emulated(fused), implementation=implementation)
    else:
        function = partial(fused, implementation=implementation)
    return jax.jit(partial(differentiated, partial(function, **CASES[name][1])))


def evaluate(name, implementation, batch):
    """On the host, as float64 only lives inside `enable_x64`."""
    with jax.enable_x64(batch["logp"].dtype == np.float64):
        return jax.device_get(jitted(name, implementation)(batch))


def definition(name, batch):
    """In float64, whatever the batch."""
    return evaluate(name, "definition", {key: double(x) for key, x in batch.items()})


def double(x):
    return x.astype(np.float64) if x is not None and x.dtype == np.float32 else x


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_equals_the_definition(name, seed):
    """In float64 to 1e-13: the same function, not one within float32 of it."""
    batch = random_batch(seed, dtype=np.float64, **CASES[name][0])
    got = evaluate(name, "xla", batch)
    assert_equal_to_definition(got, definition(name, batch), 1e-13, batch)


@pytest.mark.parametrize("name", EVERY_BODY)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_the_tpu_kernel_equals_the_definition(name, seed):
    batch = random_batch(seed, **CASES[name][0])
    got = evaluate(name, "pallas_tpu", batch)
    assert_equal_to_definition(got, definition(name, batch), 1e-6, batch)


@pytest.mark.parametrize("name", ["grpo", "gspo, token mean"])
def test_float32_equals_the_definition(name):
    """Also where the platform chooses."""
    batch = random_batch(2, **CASES[name][0])
    assert_equal_to_definition(evaluate(name, None, batch), definition(name, batch), 1e-6, batch)


@pytest.mark.parametrize("name", ["grpo", "gspo, token mean"])
def test_tiles(monkeypatch, name):
    """5 rows and 300 tokens in blocks of 2 by 128, which they do not fill; no races."""
    monkeypatch.setattr(pallas_tpu, "BLOCK_ROWS", 2)
    monkeypatch.setattr(pallas_tpu, "BLOCK_TOKENS", 128)
    batch = random_batch(4, 5, 300, **CASES[name][0])
    options = {"implementation": "pallas_tpu"} | CASES[name][1]
    function = partial(emulated(fused, detect_races=True), **options)
    got = jax.jit(partial(differentiated, function))(batch)
    assert not races_found()
    assert_equal_to_definition(got, definition(name, batch), 1e-6, batch)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("name", [name for name in EVERY_BODY if "dr_grpo" not in name])
def test_one_token_at_log_ratio_1000(implementation, name):
    """Finite in value and gradient, and still the definition's: clamped at 20."""
    dtype = np.float64 if implementation == "xla" else np.float32
    for lowered in ("logp", "old_logp", "ref_logp"):
        batch = random_batch(1, dtype=dtype, **CASES[name][0])
        batch[lowered][1, 0] -= 1000
        (total, _, metrics), gradients = evaluate(name, implementation, batch)
        (wanted, _, wanted_metrics), wanted_gradients = definition(name, batch)
        assert np.all(np.isfinite(gradients["logp"]))
        np.testing.assert_allclose(total, wanted, rtol=2e-6, atol=1e-5)
        # e^20 is known to 20·2^-24 in float32
        np.testing.assert_allclose(gradients["logp"], wanted_gradients["logp"], rtol=1e-5, atol=1e-6)
        for key in ("clamped_ratio", "kl_clamped_ratio", "clip_ratio/region_mean"):
            assert float(metrics[key][0]) == float(wanted_metrics[key].sum), key


@pytest.mark.parametrize("kind", ["ppo", "gspo", "dgpo"])
def test_the_bounds_themselves_are_inside(kind):
    """At r = 1 ± ε exactly the gradient is −A·r; a hair beyond it is the rule's."""
    ratios = jnp.array([[1.25], [0.75]])
    logp, a = jnp.log(ratios), jnp.array([2.0, -2.0])
    high, low = jnp.exp(logp)[:, 0].tolist()  # as exp rounds them
    for hair, wanted in ((0.0, -2 * 1.25), (1e-6, -2 * 1.25 if kind == "dgpo" else 0)):
        options = {"epsilon": 1 - low - hair, "epsilon_high": high - 1 - hair, "kind": kind}

        def total(x, options=options):
            loss = clipped_policy_loss(x, jnp.zeros((2, 1)), a, None, jnp.ones((2, 1), bool), **options)
            return loss.sum, loss.metrics["clip_ratio/region_mean"][0]

        gradient, beyond = jax.grad(total, has_aux=True)(logp)
        assert float(gradient[0, 0]) == pytest.approx(wanted, rel=1e-5)
        assert beyond == (2 if hair else 0)


def test_no_tokens_and_no_rows():
    batch = random_batch(0, dtype=np.float64)
    batch["mask"][:] = False
    (total, weight, metrics), gradients = evaluate("grpo", "xla", batch)
    assert total == 0 and weight == 0 and metrics["kl"] == (0, 0)
    assert np.all(gradients["logp"] == 0)
    x = jnp.zeros((0, 7))
    empty = clipped_policy_loss(x, x, jnp.zeros(0), jnp.zeros(0, int), x == 0, kind="grpo", ref_logp=x)
    assert empty.sum == 0 and empty.weight == 0


HALVES = [("xla", jnp.bfloat16), ("pallas_tpu", jnp.bfloat16), ("pallas_tpu", jnp.float16)]


@pytest.mark.parametrize("implementation, dtype", HALVES)
def test_half_precision_is_computed_in_float32(implementation, dtype):
    def cast(batch, dtype):
        floats = ("logp", "old_logp", "ref_logp", "values")
        return batch | {name: jnp.asarray(batch[name], dtype) for name in floats}

    half = cast(random_batch(5, rewards=False), dtype)
    options = {"implementation": implementation, "kind": "dapo", "beta": 0.1}
    function = jax.jit(partial(differentiated, partial(emulated(fused), **options)))
    from_half, from_single = function(half), function(cast(half, jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, from_half[0], from_single[0])
    assert from_half[0][0].dtype == jnp.float32
    np.testing.assert_array_equal(from_half[1]["logp"], from_single[1]["logp"].astype(dtype))


def test_expm1():
    """The kernel's own in float32 against float64: relative error 3e-7 near 0 and everywhere."""
    small = np.logspace(-30, 0, 200)
    x = np.concatenate([np.linspace(-20, 20, 4001), small, -small]).astype(np.float32)
    np.testing.assert_allclose(pallas_tpu.expm1(jnp.asarray(x)), np.expm1(x.astype(np.float64)), rtol=3e-7)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_rows_over_four_devices(implementation):
    """Inside shard_map, given advantages: sums add up over devices, and so do gradients of shared params."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    batch = random_batch(6, 8, 7, rewards=False)
    options = {"kind": "gspo", "epsilon": 0.1, "beta": 0.1, "implementation": implementation}
    arrays = [jnp.asarray(batch[name]) for name in ("logp", "old_logp", "ref_logp", "values", "mask")]

    def total(scale, logp, old_logp, ref_logp, values, mask):
        found = emulated(clipped_policy_loss)(
            jnp.where(mask, logp, 0) * scale, old_logp, values, None, mask, ref_logp=ref_logp, **options
        )
        return found.sum, found

    def local(scale, *arrays):
        (value, found), gradient = jax.value_and_grad(total, has_aux=True)(scale, *arrays)
        return value[None], gradient, jax.tree.map(lambda x: jax.lax.psum(x, "data"), found)

    specs = (P(), *[P("data")] * 5)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P("data"), P(), P()), check_vma=True)
    scale = jnp.float32(1.1)
    values, gradient, found = jax.jit(run)(scale, *arrays)
    (whole, alone), whole_gradient = jax.value_and_grad(total, has_aux=True)(scale, *arrays)
    np.testing.assert_allclose(jnp.sum(values), whole, rtol=1e-5)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, alone)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "grpa"}, "kind 'grpa'; one of ppo, grpo"),
        ({"kind": "ppo"}, "'ppo' has no group advantage: pass advantages, or a mode"),
        ({"aggregation": "mean"}, "aggregation 'mean'; one of token_mean"),
        ({"kind": "dr_grpo", "norm": None}, "needs norm"),
        ({"epsilon": -0.1}, "must not be negative"),
        ({"epsilon_high": -0.1}, "must not be negative"),
        ({"delta": 1.0}, "delta=1.0 bounds"),
        ({"kind": "gspo", "delta": 3.0}, "kind 'gspo' has no dual clip"),
        ({"kind": "dgpo", "right_decay": 0.5}, "right_decay=0.5"),
        ({"mode": "std"}, "mode 'std'"),
        ({"implementation": "cuda"}, "implementation 'cuda'"),
        ({"old_logp": jnp.zeros((2, 4))}, r"logp \(2, 3\), old_logp \(2, 4\)"),
        ({"ref_logp": jnp.zeros((2, 4))}, r"ref_logp \(2, 4\)"),
        ({"values": jnp.zeros((2, 1))}, r"rewards \(2, 1\) must be \(2,\)"),
        ({"group": None, "anchor": 0.5, "mode": "rloo"}, "mode, anchor turn rewards into advantages"),
        ({"values": jnp.zeros(3), "group": None}, r"advantages \(3,\) of kind 'grpo'"),
        ({"values": jnp.zeros((2, 3)), "group": None, "kind": "gspo"}, r"\(2, 3\) of kind 'gspo'"),
    ],
)
def test_errors_name_what_is_wrong(options, message):
    x = jnp.zeros((2, 3))
    usual = {"logp": x, "old_logp": x, "values": jnp.zeros(2), "group": jnp.zeros(2, int), "mask": x == 0}
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(**usual | {"kind": "grpo"} | options)


def test_the_example_runs():
    assert doctest.testmod(api).failed == 0


def lower(shape, dtype=jnp.float32, sharding=None, **options):
    def of(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def step(logp, old_logp, ref_logp, rewards, group, mask):
        return jax.value_and_grad(
            lambda x: clipped_policy_loss(x, old_logp, rewards, group, mask, ref_logp=ref_logp, **options).sum
        )(logp)

    arrays = [of(shape, dtype)] * 3 + [of(shape[:1], x) for x in (jnp.float32, jnp.int32)] + [of(shape, bool)]
    return jax.jit(step).trace(*arrays)


KINDS = {
    "grpo": {"kind": "grpo", "beta": 0.04, "delta": 3.0},
    "gspo": {"kind": "gspo", "beta": 0.04},
    "cispo": {"kind": "cispo"},
    "dgpo": {"kind": "dgpo", "left_decay": 2.0, "anchor": 0.5},
}


@pytest.mark.parametrize("kind, shape", [*((kind, (300, 1500)) for kind in KINDS), ("grpo", (5, 7))])
def test_tpu_gets_the_kernel_and_others_do_not(kind, shape):
    traced = lower(shape, **KINDS[kind])
    tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert tpu.count("tpu_custom_call") == 2  # groups, tokens; the backward pass only scales
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


SHAPES = [((5, 7), "float32"), ((300, 1500), "bfloat16"), ((1024, 8192), "float32")]


@pytest.mark.aot
@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, dtype", SHAPES)
def test_compiles(monkeypatch, chip, kind, shape, dtype):
    """Without a temporary of float32 [N, T]: the mask as int8, some numbers for every row, and 1 MiB."""
    pytest.importorskip("libtpu")
    for variable, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(variable, value)
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    compiled = lower(shape, jnp.dtype(dtype), sharding, **KINDS[kind]).lower().compile()
    rows, width = -(-shape[0] // 32) * 32, -(-shape[1] // 128) * 128
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries <= 1.25 * rows * width + rows * 16 * 512 + 2**20
