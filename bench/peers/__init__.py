"""Loaders that bench/loader.py compares: one module per loader, which writes the tiles and reads them."""
