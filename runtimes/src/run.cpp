// liger-run: the native twin of `python -m liger_deploy.generate`, on the runtime that the bundle was made for.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>

#include "liger/liger.h"

namespace {

constexpr const char* kUsage =
    "usage: liger-run BUNDLE (--prompt TEXT | --tokens '12 7 99') [options]\n"
    "  --max-new-tokens N   (256)        --temperature T, --top-k K, --top-p P   (the model's own)\n"
    "  --seed S             (0)          --stop-token ID                         stop at this id too\n"
    "  --print-ids          ids, not text\n"
    "  --load-state FILE    continue from a saved state of any runtime\n"
    "  --save-state FILE    save the state when done, with every token of the text in it\n"
    "  --bench N            time N steps after the prompt instead of generating\n"
    "  --chat               put the prompt into the model's chat template\n"
    "  --threads N          of the runtime (its own choice)\n"
    "  --no-checksums       believe the bundle's files\n"
    "  --runtime PATH       ONNX Runtime: libonnxruntime.so ($LIGER_ONNXRUNTIME, libonnxruntime.so.1)\n"
    "  --ops PATH           ONNX Runtime: this project's kernels ($LIGER_ORT_OPS, libliger_ort_ops.so beside this; none)\n";

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "error: %s\n", message.c_str());
  std::exit(2);
}

template <class T>
T take(liger::Result<T> result) {
  if (!result) fail(result.error().message);
  return std::move(*result);
}

struct Arguments {
  std::string bundle;
  std::map<std::string, std::string> values;
  bool print_ids = false, chat = false, checksums = true;

  const char* find(const char* name) const {
    auto found = values.find(name);
    return found == values.end() ? nullptr : found->second.c_str();
  }
  std::string text(const char* name, const char* variable, const char* otherwise) const {
    if (const char* given = find(name)) return given;
    const char* set = variable ? std::getenv(variable) : nullptr;
    return set && *set ? set : otherwise;
  }
  double number(const char* name, double otherwise) const {
    const char* given = find(name);
    if (!given) return otherwise;
    char* end = nullptr;
    const double value = std::strtod(given, &end);
    if (end == given || *end) fail(std::string(name) + " must be a number, not '" + given + "'");
    return value;
  }
  std::int64_t integer(const char* name, std::int64_t otherwise) const {
    const double value = number(name, static_cast<double>(otherwise));
    if (!(value >= 0 && value <= 9e15 && value == static_cast<double>(static_cast<std::int64_t>(value))))
      fail(std::string(name) + " must be a whole number that is not negative");
    return static_cast<std::int64_t>(value);
  }
};

Arguments parse(int count, char** words) {
  static const char* const known[] = {"--prompt", "--tokens", "--max-new-tokens", "--temperature", "--top-k",
                                      "--top-p", "--seed", "--stop-token", "--load-state", "--save-state",
                                      "--bench", "--runtime", "--ops", "--threads"};
  Arguments arguments;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--help") std::fputs(kUsage, stdout), std::exit(0);
    if (word == "--print-ids") {
      arguments.print_ids = true;
    } else if (word == "--chat") {
      arguments.chat = true;
    } else if (word == "--no-checksums") {
      arguments.checksums = false;
    } else if (word.compare(0, 2, "--") != 0) {
      if (!arguments.bundle.empty()) fail("more than one bundle: " + arguments.bundle + " and " + word);
      arguments.bundle = word;
    } else if (std::none_of(std::begin(known), std::end(known), [&](auto name) { return word == name; })) {
      fail("unknown option " + word + "; see liger-run --help");
    } else if (i + 1 == count) {
      fail(word + " needs a value");
    } else {
      arguments.values[word] = words[++i];
    }
  }
  if (arguments.bundle.empty() || !arguments.find("--prompt") == !arguments.find("--tokens"))
    fail("give a bundle and either --prompt or --tokens; see liger-run --help");
  return arguments;
}

std::vector<std::int64_t> parse_ids(const char* text) {
  std::vector<std::int64_t> ids;
  for (char* end = nullptr; *text; text = end) {
    if (std::strchr(" ,\n\t", *text)) {
      end = const_cast<char*>(text) + 1;
      continue;
    }
    ids.push_back(std::strtoll(text, &end, 10));
    if (end == text) fail("--tokens takes token ids, like --tokens '12 7 99'");
  }
  return ids;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void bench(liger::Session& session, const std::vector<std::int64_t>& prompt, std::int64_t steps) {
  auto start = std::chrono::steady_clock::now();
  auto logits = take(session.prefill(prompt));
  const double prefill = seconds_since(start);
  std::vector<double> times;
  std::vector<std::int64_t> next(1);
  for (std::int64_t i = 0; i < steps; ++i) {
    next[0] = liger::argmax(logits);
    start = std::chrono::steady_clock::now();
    logits = take(session.step(next));
    times.push_back(seconds_since(start) * 1e3);
  }
  std::sort(times.begin(), times.end());
  auto at = [&](double share) {
    return times.empty() ? 0.0 : times[static_cast<std::size_t>(share * static_cast<double>(times.size() - 1))];
  };
  std::printf("{\"prompt_tokens\": %zu, \"prefill_ms\": %.4f, \"steps\": %zu, \"step_ms_median\": %.4f, "
              "\"step_ms_p10\": %.4f, \"step_ms_p90\": %.4f}\n",
              prompt.size(), prefill * 1e3, times.size(), at(0.5), at(0.1), at(0.9));
}

// This project's kernels where `make native` puts them, or "none".
std::string kernels_beside(const char* program) {
  std::error_code missing;
  auto self = std::filesystem::canonical("/proc/self/exe", missing);
  if (missing) self = program;
  const auto found = self.parent_path() / "libliger_ort_ops.so";
  return std::filesystem::exists(found, missing) ? found.string() : "none";
}

}  // namespace

int main(int count, char** words) {
  const Arguments arguments = parse(count, words);
  const auto bundle = take(liger::Bundle::open(arguments.bundle, arguments.checksums));
  liger::Options options;
  options.runtime = arguments.text("--runtime", "LIGER_ONNXRUNTIME", "");
  options.ops = arguments.text("--ops", "LIGER_ORT_OPS", kernels_beside(words[0]).c_str());
  if (options.ops == "none") options.ops.clear();
  options.threads = static_cast<int>(arguments.integer("--threads", 0));
  std::optional<liger::Text> text;
  if (!bundle.tokenizer.empty()) text = take(liger::Text::open(bundle));
  std::vector<std::int64_t> prompt;
  if (const char* ids = arguments.find("--tokens")) {
    prompt = parse_ids(ids);
  } else if (text) {
    const std::string given = arguments.find("--prompt");
    const bool begins = !arguments.find("--load-state");
    prompt = take(text->encode(arguments.chat ? take(text->chat(given, begins)) : given, begins));
  } else {
    fail("this bundle has no tokenizer: give the prompt as token ids, like --tokens '12 7 99'");
  }
  auto session = take(liger::open_session(bundle, options));
  if (const char* file = arguments.find("--load-state")) take(session->load_state(take(liger::State::load(file))));
  if (arguments.find("--bench")) {
    bench(*session, prompt, arguments.integer("--bench", 0));
    return 0;
  }
  liger::SamplingOptions sampling;
  sampling.temperature = arguments.number("--temperature", bundle.temperature);
  sampling.top_k = arguments.integer("--top-k", bundle.top_k);
  sampling.top_p = arguments.number("--top-p", bundle.top_p);
  sampling.seed = static_cast<std::uint64_t>(arguments.integer("--seed", 0));
  auto stop = bundle.eos;
  if (arguments.find("--stop-token")) stop.push_back(arguments.integer("--stop-token", 0));
  const auto most = arguments.integer("--max-new-tokens", 256);
  std::int64_t last = 0;
  liger::Characters characters;
  const auto start = std::chrono::steady_clock::now();
  const auto made = take(liger::generate(*session, prompt, most, sampling, stop, [&](std::int64_t id) {
    last = id;
    if (arguments.print_ids || !text) {
      std::printf("%lld ", static_cast<long long>(id));
    } else {
      const auto bytes = characters.feed(take(text->bytes(id)));
      std::fwrite(bytes.data(), 1, bytes.size(), stdout);
    }
    std::fflush(stdout);
    return true;
  }));
  const double seconds = seconds_since(start);
  std::puts("");
  std::fprintf(stderr, "[%zu tokens in, %lld out, %.1f tokens/s]\n", prompt.size(), static_cast<long long>(made),
               static_cast<double>(made) / seconds);
  if (const char* file = arguments.find("--save-state")) {
    if (made && made == most) take(session->step({last}));
    take(take(session->state()).save(file));
  }
  return 0;
}
