// Vectors of 64 bytes as two of 32, with the operators that compilers give to vectors of one register: GCC keeps a
// larger vector in memory where the processor has no register for it, which costs most of the speed.
#pragma once

namespace herd {
namespace {

template <class T>
struct Twin {
  typedef T Half __attribute__((vector_size(32)));
  Half h[2];

  T operator[](int i) const { return h[i / kHalf][i % kHalf]; }
  void set(int i, T value) { h[i / kHalf][i % kHalf] = value; }
  static constexpr int kHalf = 32 / sizeof(T);
};

#define HERD_TWIN_OPERATOR(op)                                                    \
  template <class T>                                                              \
  inline Twin<T> operator op(Twin<T> a, Twin<T> b) {                              \
    return {{a.h[0] op b.h[0], a.h[1] op b.h[1]}};                                \
  }                                                                               \
  template <class T>                                                              \
  inline Twin<T> operator op(Twin<T> a, typename std::type_identity<T>::type b) { \
    return {{a.h[0] op b, a.h[1] op b}};                                          \
  }                                                                               \
  template <class T>                                                              \
  inline Twin<T> operator op(typename std::type_identity<T>::type a, Twin<T> b) { \
    return {{a op b.h[0], a op b.h[1]}};                                          \
  }                                                                               \
  template <class T, class U>                                                     \
  inline Twin<T>& operator op## = (Twin<T> & a, U b) {                            \
    return a = a op b;                                                            \
  }
HERD_TWIN_OPERATOR(+)
HERD_TWIN_OPERATOR(-)
HERD_TWIN_OPERATOR(*)
HERD_TWIN_OPERATOR(/)
HERD_TWIN_OPERATOR(&)
HERD_TWIN_OPERATOR(|)
HERD_TWIN_OPERATOR(<<)
HERD_TWIN_OPERATOR(>>)
#undef HERD_TWIN_OPERATOR

template <class T>
inline Twin<T> operator-(Twin<T> a) {
  return {{-a.h[0], -a.h[1]}};
}

}  // namespace
}  // namespace herd
