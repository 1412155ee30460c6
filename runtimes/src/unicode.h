// As much of Unicode as tokenizers ask for: UTF-8, letters, numbers, white space, and normalization form C.
#pragma once

#include <string>

namespace liger::unicode {

bool letter(char32_t point);  // \p{L}
bool number(char32_t point);  // \p{N}
bool space(char32_t point);   // \s
std::u32string decode(const std::string& utf8);  // throws Malformed where it is none
void append(std::string& utf8, char32_t point);
std::u32string nfc(const std::u32string& text);

}  // namespace liger::unicode
