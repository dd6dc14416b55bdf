"""The token pass in plain jnp, which XLA fuses into one loop over [N, T]."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_kernels.clipped_policy_loss.rules import Operands, Rule, TokenTerms, token_terms


def token_pass(rule: Rule, with_slope: bool, operands: Operands) -> tuple[TokenTerms, Array | None]:
    """Sums f[N] over the rows' tokens, and the derivative f[N, T] of every token's loss if `with_slope`."""
    dtype = jnp.promote_types(operands.logp.dtype, jnp.float32)
    operands = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(dtype), operands)
    terms, slope = token_terms(rule, operands)
    return TokenTerms(*(jnp.sum(x, axis=1) for x in terms)), slope if with_slope else None
