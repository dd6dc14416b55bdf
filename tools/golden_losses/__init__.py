"""Losses of other libraries on fixed inputs: one module per library, each with its `CASES`."""
