#include <algorithm>
#include <cmath>
#include <numeric>

#include "liger/liger.h"

namespace liger {

Result<Sampler> Sampler::make(const SamplingOptions& options) {
  if (!std::isfinite(options.temperature) || options.temperature < 0)
    return Error{Code::argument, "temperature must be 0 (greedy) or positive"};
  if (options.top_k < 0) return Error{Code::argument, "top-k must be 0 (off) or positive"};
  if (!(options.top_p > 0 && options.top_p <= 1)) return Error{Code::argument, "top-p must be above 0 and at most 1"};
  return Sampler(options);
}

std::int64_t argmax(const Logits& logits, std::int64_t row) {
  return std::max_element(logits.row(row), logits.row(row) + logits.vocab) - logits.row(row);
}

// Temperature, top-k, top-p on float64 weights sorted by (probability descending, id ascending), as sampling.py says.
std::int64_t Sampler::operator()(const float* logits, std::int64_t vocab) {
  if (options_.temperature == 0) return std::max_element(logits, logits + vocab) - logits;
  scaled_.assign(logits, logits + vocab);
  for (auto& value : scaled_) value /= options_.temperature;
  order_.resize(static_cast<std::size_t>(vocab));
  std::iota(order_.begin(), order_.end(), 0);
  const auto keep = options_.top_k ? std::min(options_.top_k, vocab) : vocab;
  auto before = [&](auto a, auto b) {
    const double x = scaled_[static_cast<std::size_t>(a)], y = scaled_[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  };
  std::partial_sort(order_.begin(), order_.begin() + keep, order_.end(), before);
  total_.clear();
  const double largest = scaled_[static_cast<std::size_t>(order_[0])];
  double sum = 0;
  for (std::int64_t i = 0; i < keep; ++i)
    total_.push_back(sum += std::exp(scaled_[static_cast<std::size_t>(order_[static_cast<std::size_t>(i)])] - largest));
  const auto cut = std::lower_bound(total_.begin(), total_.end(), options_.top_p * sum);
  const auto kept = std::min<std::ptrdiff_t>(cut - total_.begin() + 1, keep);
  const double draw = uniform() * total_[static_cast<std::size_t>(kept - 1)];
  const auto at = std::upper_bound(total_.begin(), total_.begin() + kept, draw) - total_.begin();
  return order_[static_cast<std::size_t>(std::min(at, kept - 1))];
}

// SplitMix64, the upper 53 bits as a number in [0, 1).
double Sampler::uniform() {
  std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

}  // namespace liger
