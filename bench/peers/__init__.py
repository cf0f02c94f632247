"""Loaders that are measured beside each other, one file each: how it writes the tiles, and how it reads them."""
