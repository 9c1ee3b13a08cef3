"""The operators, and how they take part in torch's subsystems: a module for each.

Schemas, autograd, autocast, meta and fake tensors are in C++ (csrc/torch), so they hold without Python too.
"""

from attention_ext.ops import library

library.load()

from attention_ext.ops import dropout, flops, sharding, vmap  # noqa: E402

dropout.register()
flops.register()
vmap.register()
sharding.register_if_imported()
