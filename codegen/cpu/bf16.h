// Values are bfloat16, sums are float32. The micro-kernel C (M x N) = A (M x K) * B (K x N), B with pairs
// of rows interleaved, is oneDNN's JIT batch-reduce GEMM as PyTorch exports it (AMX where there is one).
// It is declared here because the header that declares it takes twenty seconds to compile; a self-test at
// load notices when it is not what we think it is.
using T = uint16_t;
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C,
            const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool is_vnni);
void brgemm_release(bool is_vnni);
}
using at::native::cpublas::brgemm;
// A thread that used AMX gives its tiles back, or each context switch saves eight kilobytes more.
static inline void release() { at::native::cpublas::brgemm_release(true); }

static inline float widen(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// To the nearest, ties to even; NaN stays NaN.
static inline void narrow(const float* from, int64_t count, uint16_t* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i] = static_cast<uint16_t>(from[i] != from[i] ? 0x7fc0u : rounded);
  }
}

// The epilogue on a row of sums, and the rounding.
template <class Tail>
static inline void finish(float* sums, int64_t cols, const float* bias, uint16_t* to) {
  if (Tail::any) {
#pragma GCC ivdep
    for (int64_t c = 0; c < cols; ++c) sums[c] = Tail::apply(Tail::bias ? sums[c] + bias[c] : sums[c]);
  }
  narrow(sums, cols, to);
}

// out (rows x cols) = tail(A (rows x k) * B (k x width, packed)).
template <class Tail>
static inline void multiply(int64_t rows, int64_t cols, int64_t k, const uint16_t* A, int64_t lda,
                            const uint16_t* B, int64_t width, uint16_t* out, int64_t ldo,
                            const float* bias) {
  static thread_local Scratch memory;
  float* sums = memory.get<float>(rows * width);
  brgemm(rows, width, k, lda, width, width, false, reinterpret_cast<const c10::BFloat16*>(A),
         reinterpret_cast<const c10::BFloat16*>(B), sums, true);
  for (int64_t t = 0; t < rows; ++t) finish<Tail>(sums + t * width, cols, bias, out + t * ldo);
}
