// The session contract, state files, sampling and the C interface on a toy runtime, and the product with matrices in 4 bits:
// `ctest`, also under sanitizers and on emulated ARM.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <new>
#include <thread>

#include "../../export/kernels/matmul_4bit.h"
#include "backend.h"
#include "liger.h"
#include "sha256.h"
#include "unicode.h"

static std::atomic<std::size_t> allocations{0};

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which have their own
void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
#endif

namespace {

int failures = 0;

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);    \
      ++failures;                                                             \
    }                                                                         \
  } while (false)

constexpr std::int64_t kVocab = 8, kWidth = 4;

// state = state / 2 + token; logit i = weight i * state[i mod 4]. The weights are shared by all forks. Token 7 fails, and
// there is memory for three rows.
class Toy final : public liger::Backend {
 public:
  explicit Toy(std::shared_ptr<const std::vector<float>> weights) : weights_(std::move(weights)) {}

  void clear(std::int64_t rows) override {
    if (rows > 3) throw std::bad_alloc();
    state_.assign(static_cast<std::size_t>(rows * kWidth), 0);
    length_.assign(static_cast<std::size_t>(rows), 0);
    logits_.assign(static_cast<std::size_t>(rows * kVocab), 0);
  }

  liger::Result<const float*> run(const std::int64_t* tokens, std::int64_t width, const std::int64_t* valid) override {
    for (std::size_t row = 0; row < length_.size(); ++row) {
      float* state = state_.data() + row * kWidth;
      for (std::int64_t t = 0; t < valid[row]; ++t) {
        const auto token = tokens[static_cast<std::int64_t>(row) * width + t];
        if (token == 7) return liger::Error{liger::Code::runtime, "seven"};
        for (int i = 0; i < kWidth; ++i) state[i] = state[i] / 2 + static_cast<float>(token * (i + 1));
      }
      length_[row] += valid[row];
      for (std::size_t i = 0; i < kVocab; ++i) logits_[row * kVocab + i] = (*weights_)[i] * state[i % kWidth];
    }
    return logits_.data();
  }

  liger::State read() override {
    liger::State state;
    state.length = length_;
    state.tensors.push_back({"layers.0.recurrent", {static_cast<std::int64_t>(length_.size()), kWidth}, state_});
    return state;
  }

  void write(const std::vector<const liger::State::Tensor*>& tensors, const std::vector<std::int64_t>& length) override {
    state_ = tensors[0]->values, length_ = length;
  }

  liger::Result<std::unique_ptr<liger::Backend>> twin() override {
    return std::unique_ptr<liger::Backend>(std::make_unique<Toy>(weights_));
  }

 private:
  std::shared_ptr<const std::vector<float>> weights_;
  std::vector<float> state_, logits_;
  std::vector<std::int64_t> length_;
};

std::unique_ptr<liger::Session> toy() {
  liger::Bundle bundle;
  bundle.target = "toy", bundle.model = "m", bundle.vocab = kVocab, bundle.chunk = 3;
  liger::TensorInfo recurrent, length;
  recurrent.name = "layers.0.recurrent", recurrent.dtype = "float32", recurrent.shape = {kWidth};
  length.name = "length", length.dtype = "int64";
  bundle.state = {recurrent, length};
  std::vector<float> weights;
  for (int i = 0; i < kVocab; ++i) weights.push_back(std::sin(static_cast<float>(i * i + 1)));
  return std::make_unique<liger::Session>(
      bundle, std::make_unique<Toy>(std::make_shared<const std::vector<float>>(std::move(weights))));
}

std::vector<float> copy(liger::Result<liger::Logits> logits) {
  CHECK(logits);
  return {logits->data, logits->data + logits->rows * logits->vocab};
}

void prefill_in_parts_is_one_prefill() {
  auto one = toy(), parts = toy(), steps = toy();
  const std::vector<std::int64_t> tokens{1, 2, 3, 4, 5, 6, 1, 2};
  const auto expected = copy(one->prefill(tokens));
  copy(parts->prefill({1, 2, 3, 4, 5}));
  CHECK(copy(parts->prefill({6, 1, 2})) == expected);
  std::vector<float> last;
  for (auto token : tokens) last = copy(steps->step({token}));
  CHECK(last == expected);
  auto ragged = toy();
  const auto both = copy(ragged->prefill({1, 2, 3, 4, 5, 6, 1, 2, 4, 3, 0, 0, 0, 0, 0, 0}, 2, {8, 2}));
  const auto short_row = copy(toy()->prefill({4, 3}));
  CHECK(std::vector<float>(both.begin(), both.begin() + kVocab) == expected);
  CHECK(std::vector<float>(both.begin() + kVocab, both.end()) == short_row);
}

void bad_calls_change_nothing() {
  auto session = toy();
  const auto before = copy(session->prefill({1, 2}));
  for (auto& [tokens, rows] : std::vector<std::pair<std::vector<std::int64_t>, std::int64_t>>{
           {{}, 1}, {{8}, 1}, {{-1}, 1}, {{1, 2, 3}, 2}, {{1, 2}, 2}}) {
    auto refused = session->prefill(tokens, rows);
    CHECK(!refused && refused.error().code == liger::Code::token);
  }
  CHECK(!session->prefill({1, 2}, 1, {3}));
  CHECK(session->state()->length[0] == 2);
}

void without_memory_there_is_no_state() {
  auto session = toy();
  CHECK(!session->prefill({1, 2, 3, 4}, 4));
  const auto expected = copy(session->prefill({1, 2}));
  liger::State state = *session->state();
  state.length = {2, 2, 2, 2};
  state.tensors[0].shape[0] = 4, state.tensors[0].values.resize(4 * kWidth);
  CHECK(session->load_state(state).error().code == liger::Code::runtime);
  CHECK(session->state().error().code == liger::Code::state);
  CHECK(copy(session->prefill({1, 2})) == expected);
}

void a_failed_run_poisons() {
  auto session = toy();
  copy(session->prefill({1, 2}));
  auto kept = session->state();
  CHECK(!session->step({7}));
  for (auto code : {session->step({1}).error().code, session->state().error().code, session->fork().error().code})
    CHECK(code == liger::Code::poisoned);
  CHECK(session->load_state(*kept));
  CHECK(session->step({1}));
  CHECK(!session->step({7}));
  session->reset();
  CHECK(!session->state());
  CHECK(session->step({1}));
}

void a_state_of_another_model_is_refused() {
  auto session = toy();
  copy(session->prefill({1, 2}));
  auto state = session->state();
  for (int change = 0; change < 5; ++change) {
    auto other = *state;
    if (change == 0) other.model = "n";
    if (change == 1) other.tensors[0].shape = {1, 5};
    if (change == 2) other.tensors[0].name = "x";
    if (change == 3) other.tensors.push_back(other.tensors[0]);
    if (change == 4) other.tensors[0].values.pop_back();
    auto refused = session->load_state(other);
    CHECK(!refused && refused.error().code == liger::Code::state);
  }
  const auto path = (std::filesystem::temp_directory_path() / "liger-unit.state").string();
  CHECK(state->save(path));
  auto loaded = liger::State::load(path);
  CHECK(loaded && loaded->length == state->length && loaded->tensors[0].values == state->tensors[0].values);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
  CHECK(!liger::State::load(path));
  std::filesystem::remove(path);
  CHECK(!liger::State::load(path));
  CHECK(!state->save("/no/such/folder/x.state"));
}

void a_step_allocates_nothing() {
  auto session = toy();
  copy(session->prefill({1, 2}));
  const std::vector<std::int64_t> token{3};
  (void)session->step(token);
  const std::size_t before = allocations;
  for (int i = 0; i < 100; ++i) (void)session->step(token);
  CHECK(allocations == before);
}

void forks_run_in_threads_of_their_own() {
  auto session = toy();
  copy(session->prefill({1, 2, 3}));
  auto run = [](liger::Session& mine, std::int64_t token) {
    std::vector<std::int64_t> made;
    for (int i = 0; i < 200; ++i) {
      auto logits = mine.step({token});
      made.push_back(token = liger::argmax(*logits) % 7);
    }
    return made;
  };
  std::vector<std::unique_ptr<liger::Session>> forks;
  std::vector<std::vector<std::int64_t>> found(64), lone(64);
  for (int i = 0; i < 64; ++i) forks.push_back(std::move(*session->fork()));
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 64; ++i)
    threads.emplace_back([&, i] { found[i] = run(*forks[i], static_cast<std::int64_t>(i) % 7); });
  for (auto& thread : threads) thread.join();
  for (std::size_t i = 0; i < 64; ++i) lone[i] = run(**session->fork(), static_cast<std::int64_t>(i) % 7);
  CHECK(found == lone);
}

void generation_stops_where_it_should() {
  std::vector<std::int64_t> made;
  auto keep = [&](std::int64_t id) {
    made.push_back(id);
    return true;
  };
  liger::SamplingOptions options;
  options.temperature = 3, options.seed = 5;
  auto session = toy();
  session = toy();
  auto count = liger::generate(*session, {1, 2}, 20, options, {7}, keep);
  CHECK(count && *count == static_cast<std::int64_t>(made.size()) && made.size() <= 20);
  auto none = liger::generate(*toy(), {1, 2}, 20, options, {0, 1, 2, 3, 4, 5, 6, 7}, keep);
  CHECK(none && *none == 0);
  auto first = liger::generate(*toy(), {1, 2}, 20, options, {}, [](auto) { return false; });
  CHECK(first && *first == 1);
  options.top_p = 2;
  CHECK(!liger::Sampler::make(options));
}

void characters_come_whole() {
  liger::Characters stream;
  std::string all;
  const std::string text = "a\xC3\xA9\xE6\x97\xA5\xF0\x9F\x98\x80z";
  for (char byte : text) {
    const auto piece = stream.feed(std::string(1, byte));
    CHECK(piece.empty() || (static_cast<unsigned char>(piece[0]) & 0xC0) != 0x80);
    all += piece;
  }
  CHECK(all == text);
  CHECK(liger::unicode::nfc(U"e\u0301") == U"\u00E9");
  CHECK(liger::unicode::nfc(U"\u1100\u1161\u11A8") == U"\uAC01");
  CHECK(liger::unicode::nfc(U"a\u0323\u0307") == liger::unicode::nfc(U"a\u0307\u0323"));
}

void checksums_are_sha256() {
  const auto path = (std::filesystem::temp_directory_path() / "liger-unit.bin").string();
  std::ofstream(path, std::ios::binary) << "abc";
  CHECK(liger::sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  std::ofstream(path, std::ios::binary) << std::string(1000000, 'a');
  CHECK(liger::sha256(path) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  std::filesystem::remove(path);
  CHECK(liger::sha256(path).empty());
}

void the_c_interface_answers_in_words() {
  CHECK(liger_abi() == LIGER_ABI);
  liger_bundle* bundle = nullptr;
  CHECK(liger_bundle_open("/no/such/bundle", 1, &bundle) == LIGER_BUNDLE && !bundle);
  CHECK(std::string(liger_last_error()) == "/no/such/bundle is not a bundle: it has no manifest.json");
  CHECK(liger_bundle_open(nullptr, 1, &bundle) == LIGER_ARGUMENT);
  CHECK(liger_session_step(nullptr, nullptr, 0, nullptr) == LIGER_ARGUMENT);
  liger_session_close(nullptr), liger_bundle_close(nullptr), liger_text_close(nullptr), liger_session_reset(nullptr);
  std::string elsewhere = "x";
  std::thread([&] { elsewhere = liger_last_error(); }).join();
  CHECK(elsewhere.empty());
}

// Tokens whose largest value in a group is 127 are rounded to themselves: all forms give the exact product.
void products_of_4_bits_are_exact() {
  std::uint32_t seed = 1;
  const auto random = [&](std::uint32_t below) { return ((seed = seed * 1664525 + 1013904223) >> 8) % below; };
  constexpr std::int64_t kRows = 50, kTokens = 5;
  for (const char* limit : {"", "avx2", "plain"})
    for (const std::int64_t group : {32, 64, 128})
      for (const std::int64_t columns : {32, 160, 1000, 2816})
        for (const bool swiglu : {false, true}) {
          liger::Matrix4Bit w{nullptr, nullptr, nullptr, kRows, columns, group};
          const std::int64_t groups = w.groups(), zero_bytes = (groups + 1) / 2;
          std::vector<std::uint8_t> numbers(kRows * w.row_bytes()), zeros(kRows * zero_bytes);
          std::vector<std::uint16_t> scales(kRows * groups);
          std::vector<float> x(kTokens * columns), y(kTokens * kRows, NAN);
          for (auto& byte : numbers) byte = static_cast<std::uint8_t>(random(256));
          for (auto& byte : zeros) byte = static_cast<std::uint8_t>(random(256));
          for (auto& half : scales) half = static_cast<std::uint16_t>((14 + random(2)) << 10 | random(2) << 15);  // 1/2, 1
          for (std::size_t i = 0; i < x.size(); ++i)
            x[i] = i % columns % group ? static_cast<float>(static_cast<int>(random(255)) - 127) : 127.0f;
          w.numbers = numbers.data(), w.scales = scales.data(), w.zeros = zeros.data();
          const liger::MatMul4Bit form = liger::matmul_4bit(limit);
          liger::Tokens8Bit rounded;
          rounded.resize(kTokens, w);
          for (std::int64_t t = 0; t < kTokens; ++t) form.round(x.data() + t * columns, w, t, &rounded);
          const std::int64_t width = swiglu ? kRows / 2 : kRows;
          for (std::int64_t row = 0; row < width; row += 32)
            form.rows(w, swiglu, kTokens, rounded, row, std::min(row + 32, width), y.data());
          const auto exact = [&](std::int64_t t, std::int64_t row) {
            double sum = 0;
            for (std::int64_t k = 0; k < columns; ++k) {
              const std::int64_t g = k / group;
              const int number = numbers[row * w.row_bytes() + k / 2] >> k % 2 * 4 & 15;
              const int zero = zeros[row * zero_bytes + g / 2] >> g % 2 * 4 & 15;
              sum += liger::detail::from_half(scales[row * groups + g]) * (number - zero) * x[t * columns + k];
            }
            return sum;
          };
          double worst = 0, largest = 0;
          for (std::int64_t t = 0; t < kTokens; ++t)
            for (std::int64_t row = 0; row < width; ++row) {
              double want = exact(t, row);
              if (swiglu) want = want / (1 + std::exp(-want)) * exact(t, row + width);
              largest = std::max(largest, std::fabs(want));
              worst = std::max(worst, std::fabs(want - static_cast<double>(y[t * width + row])));
            }
          CHECK(worst < 1e-6 * largest);
        }
}

}  // namespace

int main() {
  prefill_in_parts_is_one_prefill();
  bad_calls_change_nothing();
  without_memory_there_is_no_state();
  a_failed_run_poisons();
  a_state_of_another_model_is_refused();
  a_step_allocates_nothing();
  forks_run_in_threads_of_their_own();
  generation_stops_where_it_should();
  characters_come_whole();
  checksums_are_sha256();
  the_c_interface_answers_in_words();
  products_of_4_bits_are_exact();
  std::printf(failures ? "%d checks failed\n" : "every check passed\n", failures);
  return failures ? 1 : 0;
}
