# find_package(attention_ext) gives attention_ext::attention_ext: the operators of attention_ext for a libtorch program.
include(CMakeFindDependencyMacro)
find_dependency(Torch)

get_filename_component(_attention_ext_package "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET attention_ext::attention_ext)
  add_library(attention_ext::attention_ext SHARED IMPORTED)
  # A program that only runs TorchScript files uses no symbol of the library, so the linker must be told to keep it.
  set_target_properties(attention_ext::attention_ext PROPERTIES
    IMPORTED_LOCATION "${_attention_ext_package}/libattention_ext.so"
    INTERFACE_INCLUDE_DIRECTORIES "${_attention_ext_package}/include"
    INTERFACE_COMPILE_FEATURES cxx_std_20
    INTERFACE_LINK_LIBRARIES "${TORCH_LIBRARIES}"
    INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
endif()

unset(_attention_ext_package)
