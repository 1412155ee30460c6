#include <filesystem>

#include "backend.h"
#include "json.h"

namespace liger {
namespace {

constexpr std::int64_t kFormat = 1, kLimit = (std::int64_t{1} << 31) - 1;

void check_inside(const std::string& name) {
  bool odd = name.empty() || name[0] == '/' || name.find('\\') != name.npos || name.find(':') != name.npos;
  for (const auto& part : std::filesystem::path(name)) odd = odd || part == "..";
  if (odd) throw Malformed("names a file outside the bundle: '" + name + "'");
}

TensorInfo tensor(const Json& value) {
  TensorInfo info{text(value, "name"), text(value, "dtype"), text(value, "input"), text(value, "output"), {}};
  const Json& shape = member(value, "shape");
  if (!shape.is_array() || shape.size() > 8) throw Malformed("shape of " + info.name + " must be a short list");
  double elements = 1;
  for (const auto& size : shape) {
    info.shape.push_back(integer(size, "a size of " + info.name, 1, kLimit));
    elements *= static_cast<double>(info.shape.back());
  }
  if (elements > static_cast<double>(kLimit)) throw Malformed(info.name + " is absurdly large");
  return info;
}

Bundle parse(const std::string& directory, const Json& manifest) {
  std::int64_t version = integer(member(manifest, "format_version"), "format_version", 1, kLimit);
  if (version > kFormat)
    throw Malformed("has bundle format " + std::to_string(version) + ", this library reads up to " +
                    std::to_string(kFormat) + ": update liger");
  const Json &model = member(manifest, "model"), &graph = member(manifest, "graph");
  const Json &generation = member(manifest, "generation"), &files = member(manifest, "files");
  Bundle bundle;
  bundle.path = directory;
  bundle.target = text(manifest, "target");
  bundle.model = text(model, "fingerprint");
  bundle.vocab = integer(member(model, "vocab_size"), "vocab_size", 1, kLimit);
  bundle.chunk = integer(member(graph, "chunk"), "chunk", 1, 1024);
  bundle.batch = integer(member(graph, "batch"), "batch", 0, kLimit);
  if (!files.is_object()) throw Malformed("files must be an object");
  for (const auto& [name, info] : files.items()) {
    check_inside(name);
    auto path = std::filesystem::path(directory) / name;
    auto size = integer(member(info, "size"), "a file's size", 0, std::int64_t{1} << 50);
    std::error_code missing;
    auto found = std::filesystem::file_size(path, missing);
    if (missing) throw Malformed("lists " + name + ", which is missing: the bundle is incomplete; copy it again");
    if (static_cast<std::int64_t>(found) != size)
      throw Malformed("says that " + name + " has " + std::to_string(size) + " bytes, it has " +
                      std::to_string(found) + ": copy the bundle again");
  }
  const Json& roles = member(graph, "files");
  if (!roles.is_object()) throw Malformed("graph.files must be an object");
  for (const auto& [role, name] : roles.items()) {
    if (!name.is_string() || !files.contains(name.get<std::string>()))
      throw Malformed("uses a file for '" + role + "' that is not listed in files");
    bundle.files.emplace_back(role, name.get<std::string>());
  }
  const Json& state = member(graph, "state");
  if (!state.is_array() || state.empty()) throw Malformed("graph.state must be a list");
  for (const auto& value : state) bundle.state.push_back(tensor(value));
  const auto& length = bundle.state.back();
  if (length.name != "length" || length.dtype != "int64" || !length.shape.empty())
    throw Malformed("the state must end with 'length', int64");
  bundle.bos = integer(member(generation, "bos_token_id"), "bos_token_id", -1, kLimit);
  const Json& eos = member(generation, "eos_token_ids");
  if (!eos.is_array()) throw Malformed("eos_token_ids must be a list");
  for (const auto& id : eos) bundle.eos.push_back(integer(id, "an end-of-text id", 0, kLimit));
  bundle.temperature = real(member(generation, "temperature"), "temperature");
  bundle.top_k = integer(member(generation, "top_k"), "top_k", 0, kLimit);
  bundle.top_p = real(member(generation, "top_p"), "top_p");
  if (manifest.contains("tokenizer") && !text(manifest, "tokenizer").empty()) {
    bundle.tokenizer = text(manifest, "tokenizer");
    if (!files.contains(bundle.tokenizer)) throw Malformed("its tokenizer is not listed in files");
  }
  return bundle;
}

}  // namespace

Result<Bundle> Bundle::open(const std::string& directory) {
  const auto path = (std::filesystem::path(directory) / "manifest.json").string();
  return guarded<Bundle>(Code::bundle, path, [&]() -> Result<Bundle> {
    if (!std::filesystem::is_regular_file(path))
      return Error{Code::bundle, directory + " is not a bundle: it has no manifest.json"};
    return parse(directory, read_json(path));
  });
}

Result<std::string> Bundle::file(const std::string& role) const {
  for (const auto& [name, file] : files)
    if (name == role) return (std::filesystem::path(path) / file).string();
  return Error{Code::bundle, path + ": graph.files has no '" + role + "'"};
}

}  // namespace liger
