"""Systems that are more than a config: they wire the floors below and own nothing general."""
