"""Decoders under jit."""
