// The micro-kernel C (M x N) = A (M x K) * B (K x N) [+ C], row-major, is oneDNN's JIT batch-reduce
// GEMM as PyTorch exports it. It is declared here because the header that declares it takes twenty
// seconds to compile; a self-test at load notices when it is not what we think it is.
namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C,
            const float* A, const float* B, float* C, bool is_vnni);
}
using at::native::cpublas::brgemm;

// PyTorch's own thread pool, so that torch.set_num_threads holds and no second OpenMP is loaded.
// Exceptions inside the loop come back as a nonzero result.
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t, int64_t, void*), void* context);

template <class Body>
static int32_t parallel(int64_t tasks, const Body& body) {
  return torch_parallel_for(
      0, tasks, 1,
      [](int64_t begin, int64_t end, void* context) {
        const Body& run = *static_cast<const Body*>(context);
        for (int64_t task = begin; task < end; ++task) run(task);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Ask for floats that will be read soon, one cache line after the other.
static inline void fetch(const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(from + i, 0, 2);
}

// Memory of one thread that outlives the call: a fresh allocation would fault in its pages each time.
struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  float* get(int64_t floats) {
    if (floats > size) {
      std::free(data);
      size = ceil_div(floats, 16) * 16;
      data = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
      if (!data) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};
