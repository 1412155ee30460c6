#include <cmath>
#include <cstring>
#include <filesystem>

#include "backend.h"
#include "json.h"

namespace liger {
namespace {

constexpr std::int64_t kVersion = 1;

// Bytes of a tensor at its offsets in the file's data, checked against its shape.
struct Span {
  std::int64_t begin, bytes;
  std::vector<std::int64_t> shape;
};

Span span(const Json& info, const std::string& name, std::int64_t size, std::int64_t available) {
  Span found{0, 0, {}};
  const Json &shape = member(info, "shape"), &offsets = member(info, "data_offsets");
  if (!shape.is_array() || shape.size() > 8 || !offsets.is_array() || offsets.size() != 2)
    throw Malformed("tensor " + name + " has a malformed entry");
  std::int64_t bytes = size;
  for (const auto& value : shape) {
    found.shape.push_back(integer(value, "a size of " + name, 1, std::int64_t{1} << 31));
    if (bytes > available / found.shape.back()) throw Malformed("tensor " + name + " is larger than the file");
    bytes *= found.shape.back();
  }
  constexpr std::int64_t kFar = std::int64_t{1} << 60;
  found.begin = integer(offsets[0], "an offset of " + name, 0, kFar);
  const std::int64_t end = integer(offsets[1], "an offset of " + name, 0, kFar);
  if (end > available) throw Malformed("is truncated: tensor " + name + " ends beyond the file");
  if (end - found.begin != bytes) throw Malformed("tensor " + name + " does not fill its place");
  found.bytes = bytes;
  return found;
}

State parse(std::ifstream& in, std::int64_t size) {
  std::uint64_t header = 0;
  in.read(reinterpret_cast<char*>(&header), 8);
  if (!in || header > static_cast<std::uint64_t>(size) - 8) throw Malformed("is not a readable state file");
  std::string json(header, ' ');
  in.read(json.data(), static_cast<std::streamsize>(header));
  Json entries = Json::parse(json, nullptr, false);
  if (!in || !entries.is_object() || !entries.contains("__metadata__"))
    throw Malformed("is not a readable state file: not written by State.save, or damaged");
  const Json& meta = entries["__metadata__"];
  if (text(meta, "format") != "liger_state") throw Malformed("is not a state file");
  const std::string version = text(meta, "version");
  if (version.empty() || version.size() > 9 || version.find_first_not_of("0123456789") != version.npos)
    throw Malformed("has a malformed version");
  if (std::stoll(version) > kVersion)
    throw Malformed("has state format " + version + ", this library reads up to " + std::to_string(kVersion));
  State state;
  state.model = text(meta, "model");
  const std::int64_t start = 8 + static_cast<std::int64_t>(header), available = size - start;
  for (const auto& [name, info] : entries.items()) {
    if (name == "__metadata__") continue;
    const bool is_length = name == "length";
    if (text(info, "dtype") != (is_length ? "I64" : "F32")) throw Malformed("tensor " + name + " has another dtype");
    Span at = span(info, name, is_length ? 8 : 4, available);
    in.seekg(start + at.begin);
    if (is_length) {
      if (at.shape.size() != 1) throw Malformed("length must be [batch]");
      state.length.resize(static_cast<std::size_t>(at.shape[0]));
      in.read(reinterpret_cast<char*>(state.length.data()), at.bytes);
      for (auto n : state.length)
        if (n < 0) throw Malformed("length is negative");
      continue;
    }
    State::Tensor tensor{name, at.shape, std::vector<float>(static_cast<std::size_t>(at.bytes / 4))};
    in.read(reinterpret_cast<char*>(tensor.values.data()), at.bytes);
    for (float value : tensor.values)
      if (!std::isfinite(value)) throw Malformed("tensor " + name + " holds values that are not finite");
    state.tensors.push_back(std::move(tensor));
  }
  if (!in) throw Malformed("is truncated");
  if (state.length.empty()) throw Malformed("has no tensor 'length'");
  return state;
}

}  // namespace

Result<State> State::load(const std::string& path) {
  return guarded<State>(Code::state, path, [&]() -> Result<State> {
    std::ifstream in(path, std::ios::binary);
    std::error_code missing;
    auto size = std::filesystem::file_size(path, missing);
    if (!in || missing) return Error{Code::state, path + " cannot be read"};
    if (size < 8) return Error{Code::state, path + " is not a readable state file"};
    return parse(in, static_cast<std::int64_t>(size));
  });
}

Status State::save(const std::string& path) const {
  return guarded<Done>(Code::state, path, [&]() -> Status {
    Json header{{"__metadata__", {{"format", "liger_state"}, {"version", std::to_string(kVersion)}, {"model", model}}}};
    std::int64_t at = static_cast<std::int64_t>(length.size()) * 8;
    header["length"] = {{"dtype", "I64"}, {"shape", {length.size()}}, {"data_offsets", {0, at}}};
    for (const auto& tensor : tensors) {
      const auto bytes = static_cast<std::int64_t>(tensor.values.size()) * 4;
      header[tensor.name] = {{"dtype", "F32"}, {"shape", tensor.shape}, {"data_offsets", {at, at + bytes}}};
      at += bytes;
    }
    std::string json = header.dump();
    json.resize((json.size() + 7) / 8 * 8, ' ');
    const std::uint64_t size = json.size();
    const std::string beside = path + ".partial";
    std::ofstream out(beside, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&size), 8);
    out.write(json.data(), static_cast<std::streamsize>(size));
    out.write(reinterpret_cast<const char*>(length.data()), static_cast<std::streamsize>(length.size() * 8));
    for (const auto& tensor : tensors)
      out.write(reinterpret_cast<const char*>(tensor.values.data()),
                static_cast<std::streamsize>(tensor.values.size() * 4));
    out.close();
    std::error_code failed;
    if (out) std::filesystem::rename(beside, path, failed);
    if (!out || failed) {
      std::filesystem::remove(beside, failed);
      return Error{Code::state, path + " cannot be written: is the folder there, and the disk not full?"};
    }
    return Done{};
  });
}

}  // namespace liger
