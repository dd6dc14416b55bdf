"""The mesh, the rules, and the forward pass on a mesh against one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.params import ParamSpec, map_specs
from jaxrl_llm.parallel.sharding import ShardingRules, batch_sharding, constrain, make_mesh, shardings

RULES = ShardingRules()


def test_mesh_sizes():
    assert dict(make_mesh(2, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(data=-1, tensor=2).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert make_mesh(fsdp=2).devices.size == 2
    assert dict(make_mesh(fsdp=-1, devices=jax.devices()[:3]).shape)["fsdp"] == 3


@pytest.mark.parametrize(
    "sizes,message",
    [
        ((4, 4, 1), "4x4x1 needs 16 devices, there are 8"),
        ((-1, 3, 1), "-1x3x1: 8 devices are no multiple of 3"),
        ((-1, -1, 1), "at most one"),
        ((0, 1, 1), "must be positive"),
        ((1, -2, 1), "must be positive"),
    ],
)
def test_mesh_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(*sizes)


def test_spec():
    assert RULES.spec(("layers", "embed", "heads", "head_dim")) == P(None, "fsdp", "tensor", None)
    assert RULES.spec(("batch", "length", None)) == P(("data", "fsdp"), None, None)
    with pytest.raises(ValueError, match=r"'fsdp' is used for both 'batch' and 'embed'"):
        RULES.spec(("batch", "length", "embed"))
    with pytest.raises(ValueError, match=r"'tensor' is used for both 'vocab' and 'mlp'"):
        RULES.spec(("vocab", "mlp"))
    with pytest.raises(ValueError, match=r"unknown logical axis 'width'; one of batch, length"):
        RULES.spec(("width",))
    with pytest.raises(ValueError, match=r"'data' is used for both 'embed' and 'embed'"):
        dataclasses.replace(RULES, embed=("data", "data")).spec(("embed",))


def test_shardings_name_the_parameter_that_does_not_divide():
    specs = {"layers": {"k": ParamSpec((3, 8, 2, 4), ("layers", "embed", "kv_heads", "head_dim"))}}
    mesh = make_mesh(fsdp=2, tensor=4)
    with pytest.raises(
        ValueError, match=r"layers/k of shape \(3, 8, 2, 4\): 'kv_heads' has size 2.*kv_heads=None"
    ):
        shardings(specs, mesh, RULES)
    replicated = shardings(specs, mesh, dataclasses.replace(RULES, kv_heads=None))
    assert replicated["layers"]["k"].spec == P(None, "fsdp", None, None)
    with pytest.raises(ValueError, match=r"rule for 'embed' names 'model'; mesh axes: data, fsdp, tensor"):
        shardings(specs, mesh, dataclasses.replace(RULES, embed="model"))


def test_constrain():
    x = jnp.zeros((4, 6))
    assert constrain(x, ("batch", "length"), None) is x
    with pytest.raises(ValueError, match="need a mesh"):
        constrain(x, ("batch", "length"), RULES)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        assert jax.jit(lambda x: constrain(x, ("batch", "length"), RULES))(x).sharding.spec == P(
            ("data", "fsdp")
        )
        with pytest.raises(ValueError, match=r"1 axes .* shape \(4, 6\)"):
            constrain(x, ("batch",), RULES)
        with pytest.raises(ValueError, match=r"'batch' has size 6, which mesh axes \('data', 'fsdp'\)"):
            constrain(x.T, ("batch", "length"), RULES)


def test_value_and_gradient_on_a_mesh_equal_one_device():
    cfg = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=48,
        window=5,
        layer_kinds=("local", "global"),
        tied_head=False,
    )
    specs, rng = transformer.param_specs(cfg), np.random.default_rng(0)
    params = map_specs(lambda s: rng.normal(size=s.shape).astype(np.float32) / s.fan_in**0.5, specs)
    tokens = rng.integers(0, cfg.vocab_size, (4, 12))

    def loss(params, tokens, rules):
        hidden = transformer.forward(params, tokens, cfg, rules=rules, remat="dots")
        z = transformer.logits(params, hidden, cfg)
        return -jnp.mean(jax.nn.log_softmax(z)[:, :-1] * jax.nn.one_hot(tokens[:, 1:], cfg.vocab_size)), z

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    (value, z), gradient = step(params, tokens, None)

    mesh = make_mesh(2, 2, 2)
    where = shardings(specs, mesh, RULES)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, where)
        (value_s, z_s), gradient_s = step(sharded, jax.device_put(tokens, batch_sharding(mesh, RULES)), RULES)
    assert sharded["layers"]["up"].addressable_shards[0].data.size * 4 == params["layers"]["up"].size
    assert float(value_s) == pytest.approx(float(value), abs=1e-6)
    np.testing.assert_allclose(z_s, z, atol=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_s)):
        np.testing.assert_allclose(one, other, atol=1e-5)
