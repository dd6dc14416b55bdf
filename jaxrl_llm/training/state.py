"""What training carries from step to step, and the optimizers that move it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models.params import Tree
from jaxrl_llm.parallel.sharding import ShardingRules, shardings

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Arrays of a run; its checkpoint holds these and the host's cursors.

    Attributes:
      params: float32.
      opt_state: of optax.
      version: i32 scalar, updates made to the params.
      nonfinite: i32 scalar, updates skipped in a row because loss or gradient was NaN or infinite.
      skipped: i32 scalar, updates skipped in all.
      tracker: what the advantage remembers of earlier batches (`advantages.TRACKED`); () for most.
    """

    params: Tree
    opt_state: Any
    version: Array
    nonfinite: Array
    skipped: Array
    tracker: Any = ()


def schedule(c: ConfigDict, num_updates: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up, then constant, linear or cosine to `final_fraction`."""
    rate, warmup = c.learning_rate, c.warmup_steps
    rest = max(1, num_updates - warmup)
    after = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, rate * c.final_fraction, rest),
        "cosine": optax.cosine_decay_schedule(rate, rest, c.final_fraction),
    }[c.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def make_optimizer(c: ConfigDict, num_updates: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then the optimizer that the config names."""
    rate = schedule(c, num_updates)
    match c.name:
        case "adamw":
            inner = optax.adamw(rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay)
        case "lion":
            inner = optax.lion(rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay)
        case "sgd":
            inner = optax.sgd(rate, momentum=c.b1)
        case _:
            raise ValueError(f"unknown optimizer {c.name!r}; one of adamw, lion, sgd")
    return optax.chain(optax.clip_by_global_norm(c.max_grad_norm), inner)


def state_shardings(
    specs: Tree, optimizer: optax.GradientTransformation, mesh: Mesh, rules: ShardingRules, tracker: Any = ()
) -> Any:
    """A `TrainState` of shardings: what has a param's shape lies as the param does."""
    placed = shardings(specs, mesh, rules)
    whole = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.eval_shape(optimizer.init, params_lib.abstract(specs))
    tree: Any = TrainState  # of shardings here, of arrays elsewhere
    return tree(
        params=placed,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer, lambda _, sharding: sharding, opt_state, placed, transform_non_params=lambda _: whole
        ),
        version=whole,
        nonfinite=whole,
        skipped=whole,
        tracker=jax.tree.map(lambda _: whole, tracker),
    )


def _fresh(params: Tree, optimizer: optax.GradientTransformation, tracker: Any) -> TrainState:
    # one array each: the state is donated, and one buffer cannot be given away three times
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        version=jnp.zeros((), jnp.int32),
        nonfinite=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        tracker=jax.tree.map(jnp.array, tracker),
    )


def init_state(
    params: Tree, optimizer: optax.GradientTransformation, placed: Any, tracker: Any = ()
) -> TrainState:
    """A fresh state around `params`, laid out as `placed` (from `state_shardings`) says."""

    def init(params: Tree) -> TrainState:
        return _fresh(params, optimizer, tracker)

    return jax.jit(init, out_shardings=placed)(params)


def abstract_state(
    specs: Tree, optimizer: optax.GradientTransformation, placed: Any, tracker: Any = ()
) -> TrainState:
    """Shapes and shardings of the state: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda params: _fresh(params, optimizer, tracker), params_lib.abstract(specs))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)
