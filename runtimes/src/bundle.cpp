#include <filesystem>

#include "backend.h"
#include "json.h"
#include "sha256.h"

namespace liger {
namespace {

constexpr std::int64_t kFormat = 1, kLimit = (std::int64_t{1} << 31) - 1;
constexpr std::int64_t kVocab = 1 << 24, kState = std::int64_t{1} << 30;  // readers allocate as much: elements of a row

void check_inside(const std::string& name) {
  bool odd = name.empty() || name[0] == '/' || name.find('\\') != name.npos || name.find(':') != name.npos;
  for (const auto& part : std::filesystem::path(name)) odd = odd || part == "..";
  if (odd) throw Malformed("names a file outside the bundle: '" + name + "'");
}

TensorInfo tensor(const Json& value) {
  TensorInfo info;
  info.name = text(value, "name"), info.dtype = text(value, "dtype");
  info.input = text(value, "input"), info.output = text(value, "output");
  info.ring = value.value("ring", false);
  const Json& shape = member(value, "shape");
  if (!shape.is_array() || shape.size() > 8) throw Malformed("shape of " + info.name + " must be a short list");
  double elements = 1;
  for (const auto& size : shape) {
    info.shape.push_back(integer(size, "a size of " + info.name, 1, kLimit));
    elements *= static_cast<double>(info.shape.back());
  }
  if (elements > static_cast<double>(kState)) throw Malformed(info.name + " is absurdly large");
  return info;
}

// What the manifest says of a file is so.
void check_file(const std::string& directory, const std::string& name, const Json& info, bool checksums) {
  check_inside(name);
  const auto path = std::filesystem::path(directory) / name;
  const auto size = integer(member(info, "size"), "a file's size", 0, std::int64_t{1} << 50);
  const auto sum = text(info, "sha256");
  std::error_code missing;
  const auto found = std::filesystem::file_size(path, missing);
  if (missing) throw Malformed("lists " + name + ", which is missing: the bundle is incomplete; copy it again");
  if (static_cast<std::int64_t>(found) != size)
    throw Malformed("says that " + name + " has " + std::to_string(size) + " bytes, it has " + std::to_string(found) +
                    ": copy the bundle again");
  if (checksums && sha256(path.string()) != sum)
    throw Malformed("does not match the checksum of " + name + ": it is damaged or was edited; copy the bundle again");
}

Bundle parse(const std::string& directory, const Json& manifest, bool checksums) {
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
  bundle.vocab = integer(member(model, "vocab_size"), "vocab_size", 1, kVocab);
  bundle.chunk = integer(member(graph, "chunk"), "chunk", 1, 1024);
  bundle.batch = integer(member(graph, "batch"), "batch", 0, 1 << 16);
  if (!files.is_object()) throw Malformed("files must be an object");
  for (const auto& [name, info] : files.items()) check_file(directory, name, info, checksums);
  const Json& roles = member(graph, "files");
  if (!roles.is_object()) throw Malformed("graph.files must be an object");
  for (const auto& [role, name] : roles.items()) {
    if (!name.is_string() || !files.contains(name.get<std::string>()))
      throw Malformed("uses a file for '" + role + "' that is not listed in files");
    bundle.files.emplace_back(role, name.get<std::string>());
  }
  const Json& state = member(graph, "state");
  if (!state.is_array() || state.empty()) throw Malformed("graph.state must be a list");
  double elements = 0;
  for (const auto& value : state) {
    bundle.state.push_back(tensor(value));
    elements += static_cast<double>(count(bundle.state.back().shape));
  }
  if (elements > static_cast<double>(kState)) throw Malformed("the state is absurdly large");
  const auto& length = bundle.state.back();
  if (length.name != "length" || length.dtype != "int64" || !length.shape.empty())
    throw Malformed("the state must end with 'length', int64");
  if (graph.contains("requires"))
    for (const auto& [name, value] : member(graph, "requires").items())
      bundle.requirements.emplace_back(name, value.is_string() ? value.get<std::string>() : "");
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
  if (manifest.contains("chat") && !manifest["chat"].empty()) {
    const Json& chat = manifest["chat"];
    bundle.chat = {text(chat, "before"), text(chat, "after"), text(chat, "between")};
  }
  return bundle;
}

}  // namespace

Result<Bundle> Bundle::open(const std::string& directory, bool checksums) {
  const auto path = (std::filesystem::path(directory) / "manifest.json").string();
  return guarded<Bundle>(Code::bundle, path, [&]() -> Result<Bundle> {
    if (!std::filesystem::is_regular_file(path))
      return Error{Code::bundle, directory + " is not a bundle: it has no manifest.json"};
    return parse(directory, read_json(path), checksums);
  });
}

Result<std::string> Bundle::file(const std::string& role) const {
  for (const auto& [name, file] : files)
    if (name == role) return (std::filesystem::path(path) / file).string();
  return Error{Code::bundle, path + ": graph.files has no '" + role + "'"};
}

std::string Bundle::requires_of(const std::string& name) const {
  for (const auto& [key, value] : requirements)
    if (key == name) return value;
  return {};
}

}  // namespace liger
