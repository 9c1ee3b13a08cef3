// exp2 and tanh of the baseline vectors, against the C library in the next wider type.
#include <cmath>
#include <limits>
#include <string>

#include "check.h"
#include "cpu/vec/portable.h"

#include "cpu/vec/math.h"  // after the instruction set

namespace attention_ext::test {

namespace {

template <class T>
using Wide = std::conditional_t<sizeof(T) == 4, double, long double>;

// The largest error, in units in the last place of the result.
template <class T, class F, class G>
double largest_error(T low, T high, F&& function, G&& exact) {
  constexpr int kSteps = 40001;
  double largest = 0;
  for (int i = 0; i < kSteps; ++i) {
    const T x = low + (high - low) * static_cast<T>(i) / static_cast<T>(kSteps - 1);
    const T got = function(splat<T>(x))[0];
    const Wide<T> want = exact(static_cast<Wide<T>>(x));
    const T rounded = static_cast<T>(want);
    if (std::abs(rounded) < std::numeric_limits<T>::min()) continue;
    const T unit = std::nextafter(std::abs(rounded), std::numeric_limits<T>::infinity()) - std::abs(rounded);
    largest =
        std::max(largest, static_cast<double>(std::abs(static_cast<Wide<T>>(got) - want) / static_cast<Wide<T>>(unit)));
  }
  return largest;
}

template <class T>
void test_functions(const std::string& name, T lowest) {
  const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const auto power = [](Vec<T> x) { return exp2<T>(x); };
  const auto tanh = [](Vec<T> x) { return attention_ext::tanh<T>(x); };
  const double of_exp2 = largest_error<T>(lowest, 0, power, [](auto x) { return std::exp2(x); });
  check(of_exp2 < 2, name + " exp2 is " + std::to_string(of_exp2) + " units off");
  for (const T bound : {T(1e-3), T(0.5), T(30)}) {
    const double of_tanh = largest_error<T>(-bound, bound, tanh, [](auto x) { return std::tanh(x); });
    check(of_tanh < 4, name + " tanh is " + std::to_string(of_tanh) + " units off");
  }
  check(power(splat<T>(-infinity))[0] == 0, name + " exp2(-inf)");
  check(power(splat<T>(T(0)))[0] == 1, name + " exp2(0)");
  check(std::isnan(power(splat<T>(nan))[0]), name + " exp2(nan)");
  check(tanh(splat<T>(infinity))[0] == 1 && tanh(splat<T>(-infinity))[0] == -1, name + " tanh(inf)");
  check(std::isnan(tanh(splat<T>(nan))[0]), name + " tanh(nan)");
}

}  // namespace

void test_vectors() {
  test_functions<float>("float", -125);
  test_functions<double>("double", -1020);
}

}  // namespace attention_ext::test
