// PyTorch's own thread pool, so that torch.set_num_threads holds and no second OpenMP is loaded.
// Exceptions inside the loop come back as a nonzero result.
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t, int64_t, void*), void* context);

static inline void release();  // what a thread does when its share of the work is done

// OpenMP's threads do not survive a fork, and a child that asks for them waits for ever. Who loads the
// library sets this in a process that is such a child already.
extern "C" bool structc_forked;
bool structc_forked = false;
[[maybe_unused]] static const int watching =
    pthread_atfork(nullptr, nullptr, [] { structc_forked = true; });

template <class Body>
static void share(int64_t begin, int64_t end, const Body& body) {
  struct Released {
    ~Released() { release(); }
  } released;  // also when a task throws
  for (int64_t task = begin; task < end; ++task) body(task);
}

template <class Body>
static int32_t parallel(int64_t tasks, const Body& body) {
  if (tasks == 1 || structc_forked) {
    share(0, tasks, body);
    return 0;
  }
  return torch_parallel_for(
      0, tasks, 1,
      [](int64_t begin, int64_t end, void* context) {
        share(begin, end, *static_cast<const Body*>(context));
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory of one thread that outlives the call: a fresh allocation would fault in its pages each time.
struct Scratch {
  void* data = nullptr;
  int64_t size = 0;
  template <class Value>
  Value* get(int64_t values) {
    const int64_t bytes = values * static_cast<int64_t>(sizeof(Value));
    if (bytes > size) {
      std::free(data);
      size = ceil_div(bytes, 64) * 64;
      data = std::aligned_alloc(64, size);
      if (!data) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<Value*>(data);
  }
  ~Scratch() { std::free(data); }
};

// Lanes of float32 in a vector register, as the compiler spells it for every instruction set.
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

// One step of a program: a block factor I_a (x) 1_{b x c} (x) I_d for the kinds panel and strided, b x c
// blocks for sparse, b = out and c = in for the others. `panel` is the width of its packed panels;
// `blocks` > 1 says that its input is read through a shuffle of so many blocks. `reads`, `keeps`, `muls`
// and `adds` are slots, or -1: where its input is when that is not the step before, where its output
// stays, what it is multiplied by and what is added. gain, shift and eps are of a normalisation.
struct Stage {
  int64_t a, b, c, d, panel, blocks, reads, keeps, muls, adds, out;
  float eps;
  const void* w;
  const float *bias, *gain, *shift;
  const int64_t* index;
};

constexpr int SLOTS = 16;  // inputs and kept outputs

// What a call hands over. Sizes are tile, split, the number of inputs, the features of each; then for
// each step a, b, c, d, panel, blocks, reads, keeps, muls, adds, out and the bits of eps. Weights are
// the packed factor, bias, gain, shift and index (or null) of each step.
template <int N>
struct Chain {
  int64_t tile, split, inputs;
  const int64_t* features;
  Stage stage[N];
  Chain(const int64_t* sizes, const void* const* weights)
      : tile(sizes[0]), split(sizes[1]), inputs(sizes[2]), features(sizes + 3) {
    for (int i = 0; i < N; ++i) {
      const int64_t* s = sizes + 3 + inputs + 12 * i;
      const void* const* w = weights + 5 * i;
      auto vector = [&](int at) { return static_cast<const float*>(w[at]); };
      const int32_t bits = static_cast<int32_t>(s[11]);
      float eps;
      std::memcpy(&eps, &bits, sizeof eps);
      stage[i] = {s[0], s[1], s[2],  s[3], s[4], s[5], s[6],      s[7],      s[8],
                  s[9], s[10], eps, w[0], vector(1), vector(2), vector(3),
                  static_cast<const int64_t*>(w[4])};
    }
  }
};

// The epilogue on a row of sums, and the rounding.
template <class Tail, class To>
static inline void finish(const float* sums, int64_t cols, const float* bias, To* to);
