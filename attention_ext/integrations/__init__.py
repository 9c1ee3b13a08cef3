"""Adapters for other libraries: a module for each, which imports nothing of it before it is used."""
