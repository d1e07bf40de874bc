// The native CPU kernels as one Python module, alure.kernels._native.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_native, m) {
    m.doc() = "Native CPU kernels of alure.";
}
