"""Ways into other libraries, a module for each, imported by itself; only `transformers` needs its library."""
