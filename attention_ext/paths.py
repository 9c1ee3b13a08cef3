"""Where the compiled library, the C++ header and the CMake package are."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def library_path() -> str:
    """The operator library: `torch.ops.load_library` takes it, and C++ programs link to it. It contains no Python."""
    return str(_PACKAGE / "libattention_ext.so")


def include_path() -> str:
    """The folder of `#include <attention_ext/attention.h>`."""
    return str(_PACKAGE / "include")


def cmake_prefix() -> str:
    """For CMAKE_PREFIX_PATH, beside `torch.utils.cmake_prefix_path`; then `find_package(attention_ext)` works."""
    return str(_PACKAGE / "share" / "cmake")
