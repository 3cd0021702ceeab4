// How the n columns of a packed factor are cut into panels of a multiple of 16 columns, as even as
// that allows: 160 columns at a width of 64 become 64 + 48 + 48. The packing follows the same rule.
struct Panels {
  int64_t n, base, extra, count;
  Panels(int64_t n, int64_t width) : n(n) {
    const int64_t units = ceil_div(n, 16);
    count = ceil_div(units, width / 16);
    base = units / count;
    extra = units % count;
  }
  int64_t start(int64_t p) const { return 16 * (p * base + least(p, extra)); }
  int64_t width(int64_t p) const { return 16 * (base + (p < extra)); }
  int64_t columns(int64_t p) const { return least(width(p), n - start(p)); }
  int64_t padded() const { return 16 * ceil_div(n, 16); }
};
