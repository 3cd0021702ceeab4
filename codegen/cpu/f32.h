// Everything is float32. The micro-kernel C (M x N) = A (M x K) * B (K x N), row-major, is oneDNN's
// JIT batch-reduce GEMM as PyTorch exports it. It is declared here because the header that declares it
// takes twenty seconds to compile; a self-test at load notices when it is not what we think it is.
using T = float;
namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C,
            const float* A, const float* B, float* C, bool is_vnni);
}
using at::native::cpublas::brgemm;
static inline void release() {}

static inline float widen(float v) { return v; }
static inline void narrow(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, count * sizeof(float));
}

// The epilogue, in place, while the block is still in L1.
template <class Tail>
static inline void finish(float* y, int64_t ldy, int64_t rows, int64_t cols, const float* bias) {
  if (!Tail::any) return;
  for (int64_t t = 0; t < rows; ++t) {
    float* row = y + t * ldy;
#pragma GCC ivdep
    for (int64_t c = 0; c < cols; ++c) row[c] = Tail::apply(Tail::bias ? row[c] + bias[c] : row[c]);
  }
}

// out (rows x cols) = tail(A (rows x k) * B (k x width, packed)).
template <class Tail>
static inline void multiply(int64_t rows, int64_t cols, int64_t k, const float* A, int64_t lda,
                            const float* B, int64_t width, float* out, int64_t ldo,
                            const float* bias) {
  brgemm(rows, cols, k, lda, width, ldo, false, A, B, out, false);
  finish<Tail>(out, ldo, rows, cols, bias);
}
