"""Reward functions, built-in and the user's own, in worker processes under a deadline. Imports no jax."""
