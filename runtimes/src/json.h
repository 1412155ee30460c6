// Reading JSON files: parsed whole, and looked into with a path for the message.
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace liger {

using Json = nlohmann::json;

struct Malformed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline Json read_json(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw Malformed("cannot be read");
  try {
    return Json::parse(in);
  } catch (const Json::exception&) {
    throw Malformed("is not JSON");
  }
}

inline const Json& member(const Json& object, const char* key) {
  if (!object.is_object()) throw Malformed(std::string("must be an object where it holds ") + key);
  auto found = object.find(key);
  if (found == object.end()) throw Malformed(std::string("lacks key '") + key + "'");
  return *found;
}

inline std::string text(const Json& object, const char* key) {
  const Json& value = member(object, key);
  if (!value.is_string()) throw Malformed(std::string(key) + " must be a string");
  return value.get<std::string>();
}

inline std::int64_t integer(const Json& value, const std::string& what, std::int64_t least, std::int64_t most) {
  if (!value.is_number_integer()) throw Malformed(what + " must be an integer");
  if (value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(most))
    throw Malformed(what + " is too large");
  auto number = value.get<std::int64_t>();
  if (number < least || number > most) throw Malformed(what + " is out of bounds");
  return number;
}

inline double real(const Json& value, const std::string& what) {
  if (!value.is_number()) throw Malformed(what + " must be a number");
  return value.get<double>();
}

}  // namespace liger
