// The extension module: a submodule a variant, a function an op (ops.h lists both).
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;

namespace pybind11::detail {

inline void* pointer(handle source) { return PyLong_AsVoidPtr(source.ptr()); }
inline int64_t integer(handle source) { return PyLong_AsLongLong(source.ptr()); }
inline double number(handle source) { return PyFloat_AsDouble(source.ptr()); }

// Structures travel as tuples of integers: a registered class costs a microsecond an object.
#define MEGALLAMA_CASTER(Struct, size, ...)                                     \
  template <>                                                                   \
  struct type_caster<megallama::Struct> {                                       \
    PYBIND11_TYPE_CASTER(megallama::Struct, const_name(#Struct));               \
    bool load(handle source, bool) {                                            \
      if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != size) return false; \
      auto at = [&](int i) { return handle(PyTuple_GET_ITEM(source.ptr(), i)); }; \
      value = {__VA_ARGS__};                                                    \
      if (PyErr_Occurred()) throw error_already_set();                          \
      return true;                                                              \
    }                                                                           \
  };
MEGALLAMA_CASTER(Launch, 4, static_cast<int>(integer(at(0))), integer(at(1)), integer(at(2)),
                 static_cast<uint64_t>(integer(at(3))))
MEGALLAMA_CASTER(Rows, 2, pointer(at(0)), integer(at(1)))
MEGALLAMA_CASTER(Partials, 2, pointer(at(0)), integer(at(1)))
MEGALLAMA_CASTER(Heads, 3, pointer(at(0)), integer(at(1)), integer(at(2)))
MEGALLAMA_CASTER(Attention, 4, static_cast<const int64_t*>(pointer(at(0))), integer(at(1)),
                 integer(at(2)), integer(at(3)))
MEGALLAMA_CASTER(AdamW, 7, number(at(0)), number(at(1)), number(at(2)), number(at(3)), number(at(4)),
                 number(at(5)), number(at(6)))

}  // namespace pybind11::detail

namespace {

// Whether this machine has the instructions that a variant is compiled for.
namespace runs {
#if defined(__x86_64__)
[[maybe_unused]] bool avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
[[maybe_unused]] bool avx512() {
  return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}
#endif
[[maybe_unused]] bool portable() { return true; }
[[maybe_unused]] bool cuda() { return true; }  // whether there is a device, torch knows
}  // namespace runs

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Kernels on raw pointers; megallama.kernels checks what it hands them.";
#define MEGALLAMA_BIND_OP(name, parameters) \
  variant.def(#name, &ops::name, py::call_guard<py::gil_scoped_release>());
#define MEGALLAMA_BIND_LIST(which, LIST)                \
  if (runs::which()) {                                  \
    namespace ops = megallama::which;                   \
    py::module_ variant = module.def_submodule(#which); \
    LIST(MEGALLAMA_BIND_OP)                             \
  }
#define MEGALLAMA_BIND(which) MEGALLAMA_BIND_LIST(which, MEGALLAMA_OPS)
#define MEGALLAMA_BIND_CPU(which) MEGALLAMA_BIND_LIST(which, MEGALLAMA_CPU_OPS)
  MEGALLAMA_VARIANTS(MEGALLAMA_BIND)
  MEGALLAMA_CPU_VARIANTS(MEGALLAMA_BIND_CPU)
}
