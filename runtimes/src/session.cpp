#include <algorithm>
#include <unordered_map>

#include "backend.h"

namespace liger {
namespace {

std::string show(const std::vector<std::int64_t>& shape) {
  std::string out = "[";
  for (auto size : shape) out += (out.size() > 1 ? "," : "") + std::to_string(size);
  return out + "]";
}

}  // namespace

Session::Session(Bundle bundle, std::unique_ptr<Backend> backend)
    : bundle_(std::move(bundle)), backend_(std::move(backend)) {}
Session::~Session() = default;

Status Session::usable() const {
  if (poison_.empty()) return Done{};
  return Error{Code::poisoned, "this session failed earlier (" + poison_ + "): reset() it or load_state() first"};
}

Status Session::check(const std::vector<std::int64_t>& tokens, std::int64_t rows) const {
  if (tokens.empty()) return Error{Code::token, "there are no tokens: the prompt is empty"};
  if (rows < 1 || static_cast<std::int64_t>(tokens.size()) % rows)
    return Error{Code::token, std::to_string(tokens.size()) + " tokens are not " + std::to_string(rows) + " rows"};
  for (auto id : tokens)
    if (id < 0 || id >= bundle_.vocab)
      return Error{Code::token, "token id " + std::to_string(id) + " is out of range: this model's ids are 0 .. " +
                                    std::to_string(bundle_.vocab - 1)};
  if (bundle_.batch && rows != bundle_.batch)
    return Error{Code::token, "this bundle was exported for a batch of " + std::to_string(bundle_.batch) + ", not " +
                                  std::to_string(rows) + ": export with --batch dynamic"};
  if (rows_ && rows != rows_)
    return Error{Code::token, std::to_string(rows) + " rows of tokens for a session of " + std::to_string(rows_) +
                                  ": reset() it to change that"};
  return usable();
}

Result<Logits> Session::run(const std::int64_t* tokens, std::int64_t width, const std::int64_t* valid) {
  auto logits = backend_->run(tokens, width, valid);
  if (!logits) {
    poison_ = logits.error().message;
    return logits.error();
  }
  return Logits{*logits, rows_, bundle_.vocab};
}

Result<Logits> Session::prefill(const std::vector<std::int64_t>& tokens, std::int64_t rows,
                                const std::vector<std::int64_t>& valid) {
  return guarded<Logits>(Code::runtime, bundle_.path, [&]() -> Result<Logits> {
    if (auto ok = check(tokens, rows); !ok) return ok.error();
    const auto width = static_cast<std::int64_t>(tokens.size()) / rows;
    if (!valid.empty() && static_cast<std::int64_t>(valid.size()) != rows)
      return Error{Code::token, "valid must be one number for each row"};
    for (auto n : valid)
      if (n < 1 || n > width) return Error{Code::token, "valid must lie between 1 and " + std::to_string(width)};
    if (!rows_) {
      backend_->clear(rows);
      rows_ = rows;
    }
    kept_.clear();
    Logits last{};
    for (std::int64_t start = 0; start < width; start += bundle_.chunk) {
      const auto part = std::min(bundle_.chunk, width - start);
      std::vector<std::int64_t> ids, left;
      for (std::int64_t row = 0; row < rows; ++row) {
        ids.insert(ids.end(), tokens.begin() + row * width + start, tokens.begin() + row * width + start + part);
        const auto all = valid.empty() ? width : valid[static_cast<std::size_t>(row)];
        left.push_back(std::clamp(all - start, std::int64_t{0}, part));
      }
      if (std::all_of(left.begin(), left.end(), [](auto n) { return n == 0; })) break;
      auto logits = run(ids.data(), part, left.data());
      if (!logits) return logits.error();
      last = *logits;
      if (rows == 1) continue;
      kept_.resize(static_cast<std::size_t>(rows * bundle_.vocab));
      for (std::int64_t row = 0; row < rows; ++row)
        if (left[static_cast<std::size_t>(row)])
          std::copy_n(last.row(row), bundle_.vocab, kept_.begin() + row * bundle_.vocab);
    }
    return rows == 1 ? last : Logits{kept_.data(), rows, bundle_.vocab};
  });
}

Result<Logits> Session::step(const std::vector<std::int64_t>& tokens) {
  const auto rows = static_cast<std::int64_t>(tokens.size());
  if (auto ok = check(tokens, rows); !ok) return ok.error();
  if (!rows_) return prefill(tokens, rows);
  ones_.assign(tokens.size(), 1);
  return run(tokens.data(), 1, ones_.data());
}

Result<State> Session::state() {
  if (auto ok = usable(); !ok) return ok.error();
  if (!rows_) return Error{Code::state, "this session has no state yet: prefill it first"};
  auto state = guarded<State>(Code::runtime, bundle_.path, [&] { return backend_->read(); });
  if (state) state->model = bundle_.model;
  return state;
}

Status Session::load_state(const State& state) {
  return guarded<Done>(Code::runtime, bundle_.path, [&]() -> Result<Done> {
    if (state.model != bundle_.model)
      return Error{Code::state, "this state belongs to model " + (state.model.empty() ? "unknown" : state.model) +
                                    ", not to " + bundle_.model};
    const auto rows = static_cast<std::int64_t>(state.length.size());
    if (rows < 1 || (bundle_.batch && rows != bundle_.batch))
      return Error{Code::state, "this bundle was exported for a batch of " + std::to_string(bundle_.batch) + ", not " +
                                    std::to_string(rows)};
    std::unordered_map<std::string, const State::Tensor*> named;
    for (const auto& tensor : state.tensors) named[tensor.name] = &tensor;
    std::vector<const State::Tensor*> tensors;
    for (const auto& info : bundle_.state) {
      if (info.name == "length") continue;
      const auto shape = shape_of(info, rows);
      auto found = named.find(info.name);
      const char* odd = ": it belongs to another model or configuration";
      if (found == named.end()) return Error{Code::state, "the state lacks tensor '" + info.name + "'" + odd};
      const auto& tensor = *found->second;
      if (tensor.shape != shape || static_cast<std::int64_t>(tensor.values.size()) != count(shape))
        return Error{Code::state, "state tensor '" + info.name + "' is " + show(tensor.shape) + ", this model needs " +
                                      show(shape) + odd};
      tensors.push_back(&tensor);
    }
    if (state.tensors.size() + 1 != bundle_.state.size())
      return Error{Code::state, "the state has tensors that this model does not know"};
    rows_ = 0;  // until the state is written whole, there is none
    backend_->clear(rows);
    backend_->write(tensors, state.length);
    rows_ = rows;
    poison_.clear();
    return Done{};
  });
}

Result<std::unique_ptr<Session>> Session::fork() {
  return guarded<std::unique_ptr<Session>>(Code::runtime, bundle_.path, [&]() -> Result<std::unique_ptr<Session>> {
    if (auto ok = usable(); !ok) return ok.error();
    auto twin = backend_->twin();
    if (!twin) return twin.error();
    auto session = std::make_unique<Session>(bundle_, std::move(*twin));
    if (rows_) {
      auto now = state();
      if (!now) return now.error();
      if (auto ok = session->load_state(*now); !ok) return ok.error();
    }
    return session;
  });
}

void Session::reset() {
  rows_ = 0;
  poison_.clear();
}

Result<std::int64_t> generate(Session& session, const std::vector<std::int64_t>& prompt, std::int64_t max_new_tokens,
                              const SamplingOptions& options, const std::vector<std::int64_t>& stop,
                              const std::function<bool(std::int64_t)>& on_token) {
  auto sampler = Sampler::make(options);
  if (!sampler) return sampler.error();
  auto logits = session.prefill(prompt);
  if (!logits) return logits.error();
  std::vector<std::int64_t> next(1);
  for (std::int64_t made = 0; made < max_new_tokens; ++made) {
    next[0] = (*sampler)(logits->data, logits->vocab);
    if (std::find(stop.begin(), stop.end(), next[0]) != stop.end()) return made;
    if (!on_token(next[0]) || made + 1 == max_new_tokens) return made + 1;
    logits = session.step(next);
    if (!logits) return logits.error();
  }
  return max_new_tokens;
}

}  // namespace liger
