// base.h
// words.h
// bf16.h
// tile.h

struct Plain {
  static constexpr bool any = false, bias = false;
  static inline float apply(float v) { return v; }
};

struct Bias {
  static constexpr bool any = true, bias = true;
  static inline float apply(float v) { return v; }
};

extern "C" int32_t structc_run(const void* const* inputs, const void* const* weights, void* y,
                               int64_t rows, const int64_t* sizes) {
  try {
    static constexpr Step steps[] = {
        {panel<Plain>, panels},
        {shuffle<Plain>, eighths},
        {panel<Bias>, panels},
    };
    static constexpr Whole wholes[] = {
        nullptr,
        nullptr,
        nullptr,
    };
    return run(steps, wholes, Chain<3>(sizes, weights), inputs, static_cast<T*>(y), rows);
  } catch (...) {
    return 2;  // out of memory; an exception may not cross into C
  }
}
