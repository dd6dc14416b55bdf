"""The decoder, its params, and its weights in and out of Hugging Face folders."""
