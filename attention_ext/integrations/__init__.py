"""Ways into existing code: `replace_` and `sdpa` for torch, and a module for each other library, imported by itself."""
