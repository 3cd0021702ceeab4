// PyTorch's own thread pool, so that torch.set_num_threads holds and no second OpenMP is loaded.
// Exceptions inside the loop come back as a nonzero result.
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t, int64_t, void*), void* context);

static inline void release();  // what a thread does when its share of the work is done

template <class Body>
static int32_t parallel(int64_t tasks, const Body& body) {
  return torch_parallel_for(
      0, tasks, 1,
      [](int64_t begin, int64_t end, void* context) {
        const Body& run = *static_cast<const Body*>(context);
        for (int64_t task = begin; task < end; ++task) run(task);
        release();
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Ask for bytes that will be read soon, one cache line after the other.
static inline void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

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

// One block factor I_a (x) 1_{b x c} (x) I_d. `parts`: into how many equal pieces each block's output
// is cut, one for each group of a next factor that reads through a shuffle; `group` is that factor's c;
// `shuffle` says whether a shuffle stands behind this one. `add` is the input that is added to its
// output, or -1; gain, shift and eps are of a normalisation.
struct Stage {
  int64_t a, b, c, d, panel, parts, shuffle, add, group;
  const void* w;
  const float *bias, *gain, *shift;
  float eps;
  int64_t in() const { return a * c * d; }
  int64_t out() const { return a * b * d; }
};

// What a call hands over: sizes are tile, split, then a, b, c, d, panel, parts, shuffle, add and the bits
// of eps of each stage; weights are the packed factor, bias, gain and shift (or null) of each stage.
template <int N>
struct Chain {
  int64_t tile, split;
  Stage stage[N];
  Chain(const int64_t* sizes, const void* const* weights) : tile(sizes[0]), split(sizes[1]) {
    for (int i = 0; i < N; ++i) {
      const int64_t* s = sizes + 2 + 9 * i;
      auto vector = [&](int at) { return static_cast<const float*>(weights[4 * i + at]); };
      const int32_t bits = static_cast<int32_t>(s[8]);
      float eps;
      std::memcpy(&eps, &bits, sizeof eps);
      stage[i] = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], 0, weights[4 * i],
                  vector(1), vector(2), vector(3), eps};
      if (i) stage[i - 1].group = s[2];
    }
  }
  // Features between the factors: the widest of those that share a buffer.
  int64_t room(int parity) const {
    int64_t most = 0;
    for (int i = parity; i + 1 < N; i += 2) most = stage[i].out() > most ? stage[i].out() : most;
    return most;
  }
};
