// liger: run a bundle that `python -m liger_deploy.export` wrote, from C++17. No exception leaves this library.
//
//     auto bundle  = liger::Bundle::open("bundle-onnx");
//     auto session = liger::open_session(*bundle);               // its runtime is found by the bundle's target
//     auto logits  = (*session)->prefill({40, 2, 7});            // the prompt; [1, vocab] float32
//     auto next    = (*session)->step({liger::argmax(*logits)}); // one token; as often as you like
//
// Every call that can fail returns Result<T>: test it, then take the value with * or read error().message, one line that
// says what is wrong, where, and what to do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace liger {

enum class Code { bundle = 1, state, token, argument, runtime, poisoned };

struct Error {
  Code code;
  std::string message;
};

// A value or an Error.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : held_(std::move(value)) {}
  Result(Error error) : held_(std::move(error)) {}
  explicit operator bool() const { return held_.index() == 0; }
  T& operator*() { return *std::get_if<0>(&held_); }  // only after testing
  T* operator->() { return std::get_if<0>(&held_); }
  const Error& error() const { return *std::get_if<1>(&held_); }

 private:
  std::variant<T, Error> held_;
};
struct Done {};
using Status = Result<Done>;

// One tensor of the state: its canonical name and shape without the batch, and what the graph calls it.
struct TensorInfo {
  std::string name, dtype, input, output;
  std::vector<std::int64_t> shape;
  bool ring = false;  // a window whose graph keeps token t in slot t mod W
};

// What the model's chat template puts around messages, where it has one that is as plain as that.
struct Chat {
  std::string before, after, between;  // a first message; any message; an answer and the next message
  explicit operator bool() const { return !after.empty(); }
};

// manifest.json, checked: sizes in bounds, paths inside the bundle, every file there with its size and SHA-256 sum.
struct Bundle {
  static Result<Bundle> open(const std::string& directory, bool checksums = true);
  Result<std::string> file(const std::string& role) const;  // path of a graph file
  std::string requires_of(const std::string& name) const;   // what the machine must have; empty where any will do

  std::string path, target, model, tokenizer;  // `model` is the fingerprint that ties states to it
  Chat chat;
  std::vector<std::pair<std::string, std::string>> requirements;  // what the machine must have, by name
  std::int64_t vocab = 0, chunk = 0, batch = 0;  // batch 0: any number of rows
  std::vector<TensorInfo> state;                 // in call order; the last is `length`
  std::vector<std::pair<std::string, std::string>> files;  // role, name
  std::int64_t bos = -1;
  std::vector<std::int64_t> eos;
  double temperature = 0, top_p = 1;  // the model's own sampling
  std::int64_t top_k = 0;
};

// The state in canonical form, the same in every runtime and language: a safetensors file on disk.
struct State {
  struct Tensor {
    std::string name;
    std::vector<std::int64_t> shape;  // batch first
    std::vector<float> values;
  };
  static Result<State> load(const std::string& path);
  Status save(const std::string& path) const;  // whole or not at all

  std::string model;
  std::vector<std::int64_t> length;  // [batch] tokens seen
  std::vector<Tensor> tensors;
};

// Logits of each row's last token, [rows, vocab]; they stay as they are until the session's next call.
struct Logits {
  const float* data;
  std::int64_t rows, vocab;
  const float* row(std::int64_t i) const { return data + i * vocab; }
};

// How a bundle runs. What a runtime does not know it ignores.
struct Options {
  std::string runtime;  // ONNX Runtime: libonnxruntime's path, or a name that the loader finds
  std::string ops;      // ONNX Runtime: this project's kernels (libliger_ort_ops), or "" for stock operators
  int threads = 0;      // 0: the runtime's choice
};

class Backend;

// One conversation, or a batch of them, over a loaded model. A call with bad arguments changes nothing. If a run itself
// fails the state may be half-written: every call then returns Code::poisoned until reset() or load_state().
class Session {
 public:
  Session(Bundle bundle, std::unique_ptr<Backend> backend);
  ~Session();
  // Tokens of `rows` rows, one row after the other. `valid`: how many of each row are real (none given: all).
  Result<Logits> prefill(const std::vector<std::int64_t>& tokens, std::int64_t rows = 1,
                         const std::vector<std::int64_t>& valid = {});
  // One token for each row.
  Result<Logits> step(const std::vector<std::int64_t>& tokens);
  Result<State> state();
  Status load_state(const State& state);
  Result<std::unique_ptr<Session>> fork();  // same weights, a copy of the state
  void reset();
  const Bundle& bundle() const { return bundle_; }

 private:
  Status usable() const;
  Status check(const std::vector<std::int64_t>& tokens, std::int64_t rows) const;
  Result<Logits> run(const std::int64_t* tokens, std::int64_t width, const std::int64_t* valid);
  Bundle bundle_;
  std::unique_ptr<Backend> backend_;
  std::int64_t rows_ = 0;
  std::vector<std::int64_t> ones_;
  std::vector<float> kept_;
  std::string poison_;
};

// A session on the runtime that the bundle was made for. A program that links that runtime's library (liger_onnx,
// liger_executorch, liger_inductor) gets it from there; else it is loaded from where this library lies.
Result<std::unique_ptr<Session>> open_session(const Bundle& bundle, const Options& options = {});

// temperature 0 is greedy; top_k 0 and top_p 1 keep everything.
struct SamplingOptions {
  double temperature = 0, top_p = 1;
  std::int64_t top_k = 0;
  std::uint64_t seed = 0;
};

// Draws token ids; the same ids as Python's Sampler for one seed.
class Sampler {
 public:
  static Result<Sampler> make(const SamplingOptions& options);
  std::int64_t operator()(const float* logits, std::int64_t vocab);

 private:
  explicit Sampler(const SamplingOptions& options) : options_(options), state_(options.seed) {}
  double uniform();
  SamplingOptions options_;
  std::uint64_t state_;
  std::vector<double> scaled_, total_;
  std::vector<std::int64_t> order_;
};

std::int64_t argmax(const Logits& logits, std::int64_t row = 0);

// Feed `prompt`, then hand each new id to `on_token` until it returns false, a stop id comes (not handed over), or there
// are `max_new_tokens`. Returns how many came. The session has then seen all but the last.
Result<std::int64_t> generate(Session& session, const std::vector<std::int64_t>& prompt, std::int64_t max_new_tokens,
                              const SamplingOptions& options, const std::vector<std::int64_t>& stop,
                              const std::function<bool(std::int64_t)>& on_token);

// A byte-level BPE tokenizer.json: the kinds of GPT-2, Llama 3 and Qwen.
class Text {
 public:
  static Result<Text> open(const Bundle& bundle);
  // Bytes of one id; "" for a special token. A character may be spread over several ids: see Characters.
  Result<std::string> bytes(std::int64_t id) const;
  // Ids of a prompt in UTF-8, begun as the model was trained to begin, or going on with what the session has seen.
  // Code::argument for another kind of tokenizer.
  Result<std::vector<std::int64_t>> encode(const std::string& text, bool begins = true) const;
  // A user message as the model's chat template has it, up to where the answer begins.
  Result<std::string> chat(const std::string& message, bool begins = true) const;

 private:
  struct Tables;
  std::shared_ptr<const Tables> tables_;
};

// Whole characters of a stream of bytes: what ends inside a character waits for the rest.
class Characters {
 public:
  std::string feed(const std::string& bytes);

 private:
  std::string rest_;
};

}  // namespace liger
