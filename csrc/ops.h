// Every op of the extension: one line each, its name and its parameters.
//
// A launcher of that name exists once in the namespace of each variant: `avx2`, `avx512` or
// `portable` from cpu/, `cuda` from cuda/. All write into memory that they are given.
#pragma once

#include <cstdint>

namespace megallama {

// The codes of element types, as megallama/kernels/native.py has them.
enum Type : int { FP32 = 0, BF16 = 1, FP16 = 2, FP64 = 3 };

// What every launch needs. `where`: the number of threads on a CPU, the stream on CUDA.
struct Launch {
  int type;
  int64_t rows, columns;
  uint64_t where;
};

// Rows of contiguous elements, `stride` elements apart; a vector is one row. No data: not there.
struct Rows {
  void* data;
  int64_t stride;
};

// Sums over shares of the rows: `count` contiguous rows of fp32 (fp64 for fp64).
struct Partials {
  void* data;
  int64_t count;
};

// (T, heads, E) with contiguous E: elements from a token, and from a head, to the next.
struct Heads {
  void* data;
  int64_t token_stride, head_stride;
};

// Causal attention: token offsets[s] is segment s's first, and offsets[segments] is T. `heads` of
// queries share `key_heads` of keys and values.
struct Attention {
  const int64_t* offsets;
  int64_t segments, heads, key_heads;
};

// The factors of one AdamW update; csrc/adamw.h uses them.
struct AdamW {
  double decay, toward_gradient, beta2, square_share, step_size, root_correction, eps;
};

#define MEGALLAMA_OPS(OP)                                                      \
  OP(rms_norm_forward, (Launch launch, Rows x, Rows residual, Rows w, double eps, Rows n, Rows sum)) \
  OP(rms_norm_backward, (Launch launch, Rows dn, Rows x, Rows w, double eps, Rows residual,         \
                         Rows dx, Partials dw))                                                     \
  OP(add_partials, (Launch launch, Partials partials, Rows sum))                                    \
  OP(rope, (Launch launch, int64_t heads, Heads x, Rows cos, Rows sin, bool inverse))               \
  OP(swiglu_forward, (Launch launch, Rows gate_up, Rows act))                                       \
  OP(swiglu_backward, (Launch launch, Rows dact, Rows gate_up, Rows dgate_up, Rows act))            \
  OP(cross_entropy_statistics, (Launch launch, Rows logits, Rows labels, int64_t first,             \
                                int64_t width, Rows log_sums, Rows targets))                        \
  OP(cross_entropy_gradient, (Launch launch, Rows logits, Rows labels, Rows lse, int64_t first,     \
                              int64_t width))                                                       \
  OP(cross_entropy, (Launch launch, Rows logits, Rows labels, int64_t width, Rows loss,             \
                     Partials scratch))                                                             \
  OP(adamw, (Launch launch, Rows master, Rows gradient, Rows exp_avg, Rows exp_avg_sq, Rows weight, \
             Rows divisor, AdamW update))                                                           \
  OP(squared_norm, (Launch launch, Rows x, Rows partials, Rows sum))

// What CUDA's libraries do well enough: ops of the CPU variants only.
#define MEGALLAMA_CPU_OPS(OP)                                                                        \
  OP(attention_forward, (Launch launch, Attention attention, Heads q, Heads k, Heads v, Heads o,     \
                         Rows lse))                                                                  \
  OP(attention_backward, (Launch launch, Attention attention, Heads d_o, Heads q, Heads k, Heads v,  \
                          Heads o, Rows lse, Heads dq, Heads dk, Heads dv))                          \
  OP(linear_wgrad, (Launch launch, int64_t outputs, Rows dy, Rows x, Rows dw, Rows scratch))

#define MEGALLAMA_DECLARE_OP(name, parameters) void name parameters;
#define MEGALLAMA_DECLARE(variant) \
  namespace variant {              \
  MEGALLAMA_OPS(MEGALLAMA_DECLARE_OP) \
  }
#define MEGALLAMA_DECLARE_CPU(variant) \
  namespace variant {                  \
  MEGALLAMA_CPU_OPS(MEGALLAMA_DECLARE_OP) \
  }
MEGALLAMA_VARIANTS(MEGALLAMA_DECLARE)
MEGALLAMA_CPU_VARIANTS(MEGALLAMA_DECLARE_CPU)

}  // namespace megallama
