#include "unicode.h"

#include <algorithm>
#include <iterator>

#include "json.h"
#include "unicode_tables.h"

namespace liger::unicode {
namespace {

// The last entry whose `first` is not above the point, of a table sorted by it.
template <class Entry, std::size_t N>
const Entry* at(const Entry (&table)[N], char32_t point) {
  auto after = std::upper_bound(std::begin(table), std::end(table), point,
                                [](char32_t value, const Entry& entry) { return value < entry.first; });
  return after == std::begin(table) || (after - 1)->last < point ? nullptr : after - 1;
}

char32_t combining_class(char32_t point) {
  const auto* found = at(kClasses, point);
  return found ? found->value : 0;
}

// Hangul syllables are arithmetic: 19 leading, 21 vowel and 27 trailing parts (Unicode, section 3.12).
constexpr char32_t kSyllable = 0xAC00, kFirst = 0x1100, kVowel = 0x1161, kTrail = 0x11A7;
constexpr char32_t kLeads = 19, kVowels = 21, kTrails = 28, kSyllables = kLeads * kVowels * kTrails;

void decompose(char32_t point, std::u32string& out) {
  if (point >= kSyllable && point < kSyllable + kSyllables) {
    const char32_t index = point - kSyllable;
    out += kFirst + index / (kVowels * kTrails);
    out += kVowel + index % (kVowels * kTrails) / kTrails;
    if (index % kTrails) out += kTrail + index % kTrails;
    return;
  }
  auto found = std::lower_bound(std::begin(kParts), std::end(kParts), point,
                                [](const Parts& entry, char32_t value) { return entry.whole < value; });
  if (found == std::end(kParts) || found->whole != point) {
    out += point;
    return;
  }
  for (char32_t part : found->parts)
    if (part) out += part;
}

// The composed character of two, or 0.
char32_t compose(char32_t first, char32_t second) {
  if (first >= kFirst && first < kFirst + kLeads && second >= kVowel && second < kVowel + kVowels)
    return kSyllable + ((first - kFirst) * kVowels + (second - kVowel)) * kTrails;
  const bool open = first >= kSyllable && first < kSyllable + kSyllables && (first - kSyllable) % kTrails == 0;
  if (open && second > kTrail && second < kTrail + kTrails) return first + (second - kTrail);
  auto found = std::lower_bound(std::begin(kPairs), std::end(kPairs), Pair{first, second, 0},
                                [](const Pair& a, const Pair& b) {
                                  return a.first != b.first ? a.first < b.first : a.second < b.second;
                                });
  return found != std::end(kPairs) && found->first == first && found->second == second ? found->whole : 0;
}

}  // namespace

bool letter(char32_t point) { return at(kLetters, point) != nullptr; }
bool number(char32_t point) { return at(kNumbers, point) != nullptr; }
bool space(char32_t point) {
  return (point >= '\t' && point <= '\r') || point == ' ' || point == 0x85 || point == 0xA0 || point == 0x1680 ||
         (point >= 0x2000 && point <= 0x200A) || point == 0x2028 || point == 0x2029 || point == 0x202F ||
         point == 0x205F || point == 0x3000;
}

std::u32string decode(const std::string& utf8) {
  std::u32string out;
  for (std::size_t i = 0; i < utf8.size();) {
    const auto lead = static_cast<unsigned char>(utf8[i]);
    const std::size_t more = lead < 0x80 ? 0 : lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
    char32_t point = more ? lead & (0x3Fu >> more) : lead;
    bool odd = (lead >= 0x80 && lead < 0xC2) || lead > 0xF4 || i + more >= utf8.size();
    for (std::size_t k = 1; k <= more && !odd; ++k) {
      const auto next = static_cast<unsigned char>(utf8[i + k]);
      odd = (next & 0xC0) != 0x80;
      point = point << 6 | (next & 0x3F);
    }
    constexpr char32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    if (odd || point < kLeast[more] || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000))
      throw Malformed("is not UTF-8 at byte " + std::to_string(i));
    out += point;
    i += more + 1;
  }
  return out;
}

void append(std::string& utf8, char32_t point) {
  auto byte = [&](char32_t value) { utf8 += static_cast<char>(static_cast<unsigned char>(value)); };
  if (point < 0x80) return byte(point);
  const int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
  constexpr char32_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
  byte(kLead[more] | point >> (6 * more));
  for (int k = more - 1; k >= 0; --k) byte(0x80 | (point >> (6 * k) & 0x3F));
}

std::u32string nfc(const std::u32string& text) {
  if (std::all_of(text.begin(), text.end(), [](char32_t c) { return c < 0x300; })) return text;
  std::u32string whole;
  for (char32_t point : text) decompose(point, whole);
  for (auto start = whole.begin(); start != whole.end();) {  // marks in the order of their classes
    auto stop = start;
    while (stop != whole.end() && combining_class(*stop)) ++stop;
    std::stable_sort(start, stop, [](char32_t a, char32_t b) { return combining_class(a) < combining_class(b); });
    start = stop == whole.end() ? stop : stop + 1;
  }
  std::u32string out;
  std::size_t base = whole.size();  // index in `out` of the last character of class 0; none yet
  char32_t before = 0;              // class of the last character that was not composed into the base
  for (char32_t point : whole) {
    const char32_t kind = combining_class(point);
    const bool next = base < out.size() && (base + 1 == out.size() || (before && before < kind));
    if (const char32_t composed = next ? compose(out[base], point) : 0) {
      out[base] = composed;
      continue;
    }
    if (!kind) base = out.size();
    before = kind;
    out += point;
  }
  return out;
}

}  // namespace liger::unicode
