"""Fused kernels of jaxrl_llm. Imports jax alone."""
