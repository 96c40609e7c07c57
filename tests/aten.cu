// ATen's sigmoid and its gradient, as ATen/native/cuda/UnarySpecialOpsKernel.cu and BinaryMiscBackwardOpsKernels.cu state them:
// in the dtype of the arithmetic, which is float for 16 bit. Compiled by nvcc for tests/test_n1.py.
#include <cmath>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T> struct Arithmetic { using type = T; };
template <> struct Arithmetic<__half> { using type = float; };
template <> struct Arithmetic<__nv_bfloat16> { using type = float; };

#define OPERATORS(name, T)                                                                                     \
  extern "C" __global__ void sigmoid_##name(const T* x, T* sigma, int n) {                                     \
    using A = Arithmetic<T>::type;                                                                             \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                                                       \
    if (i < n) {                                                                                               \
      const A one = A{1};                                                                                      \
      sigma[i] = T(one / (one + std::exp(-A(x[i]))));                                                          \
    }                                                                                                          \
  }                                                                                                            \
  extern "C" __global__ void sigmoid_backward_##name(const T* grad, const T* sigma, T* grad_input, int n) {    \
    using A = Arithmetic<T>::type;                                                                             \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                                                       \
    if (i < n) {                                                                                               \
      const A one = A{1};                                                                                      \
      grad_input[i] = T(A(grad[i]) * (one - A(sigma[i])) * A(sigma[i]));                                       \
    }                                                                                                          \
  }

OPERATORS(f64, double)
OPERATORS(f32, float)
OPERATORS(f16, __half)
OPERATORS(bf16, __nv_bfloat16)
