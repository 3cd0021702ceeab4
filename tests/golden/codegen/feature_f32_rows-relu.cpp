// base.h
// f32.h
// transpose.h
// feature.h
// relu.h

struct Relu {
  static constexpr bool any = true, bias = false;
  static inline float apply(float v) { return relu(v); }
};

extern "C" int32_t structc_run(const void* const* inputs, const void* const* weights, void* y,
                               int64_t rows, const int64_t* sizes) {
  try {
    return run<Relu>(Chain<1>(sizes, weights), static_cast<const T*>(*inputs),
               static_cast<T*>(y), rows);
  } catch (...) {
    return 2;  // out of memory; an exception may not cross into C
  }
}
