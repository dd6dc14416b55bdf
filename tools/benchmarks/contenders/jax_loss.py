"""A loss in JAX as a contender: value and gradients with respect to hidden states and head, compiled."""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from loss_worker import Problem, norm

Loss = Callable[[Problem], jax.Array]


class JaxLoss:
    """See `loss_worker.Contender`.

    Args:
      loss: of a problem as arranged.
      arrange: brings the problem into the library's own layout, before the clock starts.
      name: which loss it is.
      others: further losses, by name, of which the value alone is computed, once.
      beside: of the arranged problem; timed after each repetition, as the part "products".
    """

    def __init__(
        self,
        loss: Loss,
        arrange: Callable[[Problem], Problem] = lambda problem: problem,
        name: str = "policy",
        others: Mapping[str, Loss] | None = None,
        beside: Callable[[Problem], Any] | None = None,
    ) -> None:
        self._arrange, self._name, self._loss = arrange, name, loss
        self._others, self._beside = dict(others or {}), beside

        def of_weights(hidden: jax.Array, head: jax.Array, problem: Problem) -> jax.Array:
            return loss(problem._replace(hidden=hidden, head=head))

        self._jitted = jax.jit(jax.value_and_grad(of_weights, (0, 1)))

    def prepare(self, problem: Problem) -> dict[str, Any]:
        self._problem = jax.block_until_ready(jax.tree.map(jnp.asarray, self._arrange(problem)))
        self._compiled = self._jitted.lower(*split(self._problem)).compile()
        value, gradients = self._compiled(*split(self._problem))
        losses = {self._name: value} | {
            name: jax.jit(other)(self._problem) for name, other in self._others.items()
        }
        return {
            "losses": {name: float(value) for name, value in losses.items()},
            "gradients": [norm(np.asarray(gradient)) for gradient in gradients],
            "temporaries": self._compiled.memory_analysis().temp_size_in_bytes,
        }

    def time(self) -> dict[str, Any]:
        reply: dict[str, Any] = {"seconds": seconds(lambda: self._compiled(*split(self._problem)))}
        if (beside := self._beside) is not None:
            reply["parts"] = {"products": seconds(lambda: beside(self._problem))}
        return reply

    def compile_for(
        self, topology: str, sequences: int, tokens: int, features: int, vocab: int
    ) -> int | None:
        if importlib.util.find_spec("libtpu") is None:
            return None
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # the other contenders have loaded theirs
        from jax.experimental import topologies

        chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        one = jax.sharding.SingleDeviceSharding(chips[0])
        per_token = jax.ShapeDtypeStruct((sequences, tokens), jnp.float32)
        arranged = jax.eval_shape(
            self._arrange,
            Problem(
                hidden=jax.ShapeDtypeStruct((sequences, tokens, features), jnp.bfloat16),
                head=jax.ShapeDtypeStruct((vocab, features), jnp.bfloat16),
                targets=jax.ShapeDtypeStruct((sequences, tokens), jnp.int32),
                old_logp=per_token,
                advantages=jax.ShapeDtypeStruct((sequences,), jnp.float32),
                mask=per_token,
            ),
        )
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), arranged)
        return self._jitted.lower(*split(placed)).compile().memory_analysis().temp_size_in_bytes


def split(problem: Problem) -> tuple[Any, Any, Problem]:
    """What is differentiated, and the problem without it."""
    return problem.hidden, problem.head, problem._replace(hidden=None, head=None)


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call, its result waited for and thrown away."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
