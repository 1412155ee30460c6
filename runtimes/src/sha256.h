// SHA-256 (FIPS 180-4) of a file, as lower-case hexadecimal; "" where it cannot be read.
#pragma once

#include <string>

namespace liger {

std::string sha256(const std::string& path);

}  // namespace liger
