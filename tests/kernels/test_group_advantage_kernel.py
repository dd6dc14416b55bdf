"""The kernel equals the definitions in jaxrl_llm.advantages, whatever computes its statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import emulated, races_found
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies

from jaxrl_kernels.group_advantage import group_advantage, pallas_tpu, xla
from jaxrl_llm import advantages

BASES = {"grpo": advantages.grpo, "mean_only": advantages.dr_grpo, "rloo": advantages.rloo}


def defined(rewards, group, valid, mode="grpo", sample_weight=None, anchor=None, weight_scale=1.3, **options):
    """The same out of jaxrl_llm.advantages."""
    base = BASES[mode]
    if sample_weight is not None:
        scale = {"grpo": "group", "mean_only": "none"}[mode]
        base = partial(advantages.group_advantage, scale=scale, sample_weight=sample_weight)
    a, metrics = base(rewards, group, valid, **options)
    if anchor is not None:
        weights, more = advantages.ha_dw_weights(
            a, rewards, group, valid, anchor=anchor, weight_scale=weight_scale
        )
        a, metrics = a * weights, metrics | more
    return a, metrics


def assert_equal_to_definition(got, wanted, rtol=1e-6, size=1.0):
    a, metrics = wanted
    assert got.advantages.dtype == a.dtype
    np.testing.assert_allclose(got.advantages, a, rtol=rtol, atol=rtol * size)
    assert np.all((np.asarray(a) == 0) == (np.asarray(got.advantages) == 0))
    assert got.metrics.keys() == metrics.keys()
    for name, (total, weight) in got.metrics.items():
        np.testing.assert_allclose(total, metrics[name].sum, rtol=rtol, atol=rtol * size, err_msg=name)
        assert weight == metrics[name].weight, name


N = 11
CASES = {
    "grpo": {},
    "grpo, population": {"ddof": 0, "epsilon": 1e-4},
    "mean_only": {"mode": "mean_only"},
    "rloo": {"mode": "rloo"},
    "hacpo": {"sample_weight": np.linspace(0.1, 3, N).astype(np.float32)},
    "hacpo, mean_only": {"mode": "mean_only", "sample_weight": np.linspace(0.1, 3, N).astype(np.float32)},
    "ha_dw": {"anchor": 0.4},
    "ha_dw on rloo": {"mode": "rloo", "anchor": 0.4, "weight_scale": 1.0},
    "ha_dw on hacpo": {"anchor": 0.7, "sample_weight": np.linspace(2, 1, N).astype(np.float32)},
}
JITTED = {
    name: (
        jax.jit(partial(defined, **options)),
        {
            "xla": jax.jit(partial(group_advantage, implementation="xla", **options)),
            "pallas_tpu": jax.jit(partial(emulated(group_advantage), implementation="pallas_tpu", **options)),
        },
    )
    for name, options in CASES.items()
}
ANY_REWARD = st.one_of(
    st.floats(-2, 2, width=32),
    st.sampled_from([0.0, 0.7, 1.0, 1e6, float("nan"), float("inf"), -float("inf")]),
)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rewards=st.lists(ANY_REWARD, min_size=N, max_size=N),
    group=st.lists(st.sampled_from([-(2**31), -7, 0, 3, 2**31 - 1]), min_size=N, max_size=N),
    valid=st.lists(st.sampled_from([True, True, True, False]), min_size=N, max_size=N),
)
def test_equals_the_definition(implementation, name, rewards, group, valid):
    """Any rewards, any ids in any order, any rows left out; zeros are zeros exactly."""
    definition, kernels = JITTED[name]
    arrays = np.array(rewards, np.float32), np.array(group, np.int32), np.array(valid)
    size = np.max(np.abs(arrays[0][np.isfinite(arrays[0])]), initial=1)
    got = kernels[implementation](*arrays)
    assert_equal_to_definition(got, definition(*arrays), rtol=2e-6, size=4 * size)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_statistics_by_hand(implementation):
    """Group 5 has 0, 2, 4 and group −1 has 0.7, 0.7; the last row does not count."""
    rewards, group = jnp.array([0.0, 0.7, 2.0, 0.7, 4.0, 9.0]), jnp.array([5, -1, 5, -1, 5, 5])
    options = {"epsilon": 0.0, "anchor": 1.0, "weight_scale": 2.0, "implementation": implementation}
    got = emulated(group_advantage)(rewards, group, jnp.arange(6) < 5, **options)
    np.testing.assert_allclose(got.mean, [2, 0.7, 2, 0.7, 2, 2], rtol=1e-6)
    assert got.std.tolist() == [2, 0, 2, 0, 2, 2]
    assert got.is_equal.tolist() == [False, True, False, True, False, False]
    # A is −1, 0, 1 before the weights 2·exp(−sgn(A)·(2 − 1))
    np.testing.assert_allclose(got.weight, [2 * np.e, 2, 2, 2, 2 / np.e, 2], rtol=1e-6)
    np.testing.assert_allclose(got.advantages, [-2 * np.e, 0, 0, 0, 2 / np.e, 0], rtol=1e-6)
    assert got.advantages[1] == 0 and got.advantages[3] == 0


def test_tiles(monkeypatch):
    """Groups across blocks of 8 rows and 8 columns, which 20 rows do not fill; no races."""
    size = 20
    monkeypatch.setattr(pallas_tpu, "BLOCK_ROWS", 8)
    monkeypatch.setattr(pallas_tpu, "BLOCK_COLUMNS", 8)
    rng = np.random.default_rng(0)
    rewards = (rng.normal(size=size) + 1e3).astype(np.float32)
    extra = rng.normal(size=size).astype(np.float32)
    group = rng.choice([-2, 0, 2, 2**31 - 1], size)  # the last is what the emulation fills memory with
    counts = rng.random(size) > 0.2
    counts &= group != 2
    arrays = rewards, extra, jnp.asarray(group, jnp.int32), jnp.asarray(counts)
    found = emulated(pallas_tpu.statistics, detect_races=True, random_seed=size)(*arrays)
    assert not races_found()
    for name, got, wanted in zip(xla.GroupStatistics._fields, found, xla.statistics(*arrays)):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_precision_is_float32_at_least(dtype):
    rewards, group = jnp.array([0.1, 0.7, 3, 1]).astype(dtype), jnp.array([0, 0, 1, 1])
    got = group_advantage(rewards, group.astype(jnp.int8)).advantages
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, group_advantage(rewards.astype(jnp.float32), group).advantages)


def test_float64_and_ids_of_64_bits():
    """float64 stays so, though the TPU kernel computes in float32; ids may differ in high bits alone."""
    with jax.enable_x64(True):
        arrays = jnp.asarray([0.1, 0.7, 0.2, 0.4], jnp.float64), jnp.array([2**40, 2**40, 2**41, 2**41])
        wanted, _ = advantages.grpo(*arrays)
        for implementation, rtol in (("xla", 1e-14), ("pallas_tpu", 1e-6)):
            function = partial(emulated(group_advantage), implementation=implementation)
            got = jax.jit(function)(*arrays).advantages
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, wanted, rtol=rtol)


def test_rewards_are_constants_and_none_is_nothing():
    group = jnp.array([0, 0, 1, 1])
    gradient = jax.grad(lambda r: jnp.sum(group_advantage(r, group, anchor=r[0]).advantages ** 2))
    assert gradient(jnp.array([0.1, 0.7, 0.2, 0.4])).tolist() == [0] * 4
    empty = group_advantage(jnp.zeros(0), jnp.zeros(0, int))
    assert empty.advantages.shape == (0,) and empty.metrics["reward"] == (0, 0)


def test_errors_name_what_is_wrong():
    rewards, group = jnp.zeros(3), jnp.zeros(3, int)
    with pytest.raises(ValueError, match="mode 'std'; one of grpo, rloo, mean_only"):
        group_advantage(rewards, group, mode="std")
    with pytest.raises(ValueError, match="implementation 'cuda'; one of xla, pallas_tpu, or None"):
        group_advantage(rewards, group, implementation="cuda")
    with pytest.raises(ValueError, match="rloo has none"):
        group_advantage(rewards, group, mode="rloo", sample_weight=rewards)
    with pytest.raises(ValueError, match=r"rewards \(3,\), group \(2,\)"):
        group_advantage(rewards, group[:2])
    with pytest.raises(TypeError, match="float32 and must be integers"):
        group_advantage(rewards, rewards)


def lower(rows, sharding=None):
    arrays = [
        jax.ShapeDtypeStruct((rows,), dtype, sharding=sharding) for dtype in (jnp.float32, jnp.int32, bool)
    ]
    return jax.jit(partial(group_advantage, anchor=0.5)).trace(*arrays)


@pytest.mark.parametrize("rows", [7, 1000])
def test_tpu_gets_the_kernel_and_others_do_not(rows):
    assert lower(rows).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 1
    assert "tpu_custom_call" not in lower(rows).lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.aot
@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("rows", [7, 300, 4096])
def test_compiles(monkeypatch, chip, rows):
    pytest.importorskip("libtpu")
    for variable, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(variable, value)
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    compiled = lower(rows, jax.sharding.SingleDeviceSharding(device)).lower().compile()
    assert "group_statistics" in compiled.as_text()
    # no comparison [N, N] outside of the kernel
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**20 + 16 * 512 * rows
