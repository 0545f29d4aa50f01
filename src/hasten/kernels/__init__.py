"""The native CPU stack: a C++ library with a plain C interface, loaded by ctypes; without it everything runs on torch."""
