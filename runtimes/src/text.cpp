// Byte-level BPE: split the text into words as the tokenizer's pattern does, write each word's bytes as characters, and
// join neighbours by the merge of lowest rank until there is none.
#include <algorithm>
#include <array>
#include <filesystem>
#include <unordered_map>

#include "backend.h"
#include "json.h"
#include "unicode.h"

namespace liger {

struct Text::Tables {
  struct Merge {
    std::int64_t rank, into;
  };
  std::unordered_map<std::uint64_t, Merge> merges;  // by (left << 32 | right)
  std::unordered_map<std::string, std::int64_t> ids;
  std::vector<std::string> bytes;                                           // by id
  std::array<std::vector<std::pair<std::string, std::int64_t>>, 256> added;  // by first byte, longest first
  std::array<std::int64_t, 256> byte_ids{};
  std::vector<std::int64_t> begin, end;  // what the tokenizer puts around every text
  std::int64_t bos = -1;
  Chat chat;
  bool whole_words = false;  // `ignore_merges`: a word that is a token is taken as it is
  bool composes = false;     // normalization form C first
  std::size_t digits = 0;    // most digits of a word; 0: GPT-2's pattern, which has no limit
  std::string not_encodable;  // why, if this tokenizer is of another kind
};

namespace {

using Points = std::u32string;

// GPT-2's table: each byte as a printable character, in UTF-8.
std::array<std::string, 256> characters() {
  std::array<std::string, 256> table;
  char32_t next = 256;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    unicode::append(table[byte], printable ? byte : next++);
  }
  return table;
}

std::string unmapped(const std::string& token, const std::unordered_map<std::string, char>& back) {
  std::string out;
  for (std::size_t i = 0; i < token.size();) {
    const std::size_t size = static_cast<unsigned char>(token[i]) < 0x80 ? 1 : 2;
    auto found = back.find(token.substr(i, size));
    if (found == back.end()) throw Malformed("has token '" + token + "', which is not byte-level");
    out += found->second;
    i += size;
  }
  return out;
}

bool newline(char32_t c) { return c == '\r' || c == '\n'; }
bool other(char32_t c) { return !unicode::letter(c) && !unicode::number(c) && !unicode::space(c); }

std::size_t run(const Points& text, std::size_t i, bool (*kind)(char32_t)) {
  while (i < text.size() && kind(text[i])) ++i;
  return i;
}

// End of 's, 't, 're, 've, 'm, 'll or 'd at i, or i.
std::size_t ending(const Points& text, std::size_t i, bool any_case) {
  for (const char* word : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
    std::size_t at = i;
    for (; *word && at < text.size(); ++word, ++at) {
      char32_t c = text[at];
      if (any_case) c = c >= 'A' && c <= 'Z' ? c + 32 : c == 0x17F ? U's' : c;  // the long s folds to s
      if (c != static_cast<unsigned char>(*word)) break;
    }
    if (!*word) return at;
  }
  return i;
}

// \s+(?!\S)|\s+ : white space, less its last character if a word follows.
std::size_t spaces(const Points& text, std::size_t i) {
  const std::size_t stop = run(text, i, unicode::space);
  return stop < text.size() && stop - i > 1 ? stop - 1 : stop;
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
std::size_t gpt2_word(const Points& text, std::size_t i) {
  if (const auto stop = ending(text, i, false); stop > i) return stop;
  const std::size_t body = text[i] == ' ' ? i + 1 : i;
  for (auto kind : {unicode::letter, unicode::number, other})
    if (const auto stop = run(text, body, kind); stop > body) return stop;
  return spaces(text, i);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,D}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
std::size_t llama3_word(const Points& text, std::size_t i, std::size_t digits) {
  if (const auto stop = ending(text, i, true); stop > i) return stop;
  const bool lead = !newline(text[i]) && !unicode::letter(text[i]) && !unicode::number(text[i]);
  if (const auto stop = run(text, i + lead, unicode::letter); stop > i + lead) return stop;
  if (const auto stop = run(text, i, unicode::number); stop > i) return std::min(stop, i + digits);
  const std::size_t body = text[i] == ' ' ? i + 1 : i;
  if (const auto stop = run(text, body, other); stop > body) return run(text, stop, newline);
  const std::size_t blank = run(text, i, unicode::space);
  for (std::size_t at = blank; at > i; --at)
    if (newline(text[at - 1])) return at;
  return spaces(text, i);
}

// How the pre-tokenizer splits: whether it is one of the patterns above, and its number of digits.
bool known_split(const Json& pre, std::size_t& digits) {
  const std::string kind = pre.is_object() ? pre.value("type", "") : "";
  if (kind == "ByteLevel") return pre.value("use_regex", true) && !pre.value("add_prefix_space", true);
  if (kind != "Sequence" || !pre.contains("pretokenizers") || pre["pretokenizers"].size() != 2) return false;
  const Json &split = pre["pretokenizers"][0], &bytes = pre["pretokenizers"][1];
  const bool plain = bytes.value("type", "") == "ByteLevel" && !bytes.value("use_regex", true) &&
                     !bytes.value("add_prefix_space", true);
  if (!plain || split.value("type", "") != "Split" || split.value("behavior", "") != "Isolated" ||
      split.value("invert", false) || !split.contains("pattern"))
    return false;
  const std::string head = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}",
                    tail = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
  const std::string pattern = split["pattern"].value("Regex", "");
  digits = pattern == head + tail ? 1 : pattern == head + "{1,3}" + tail ? 3 : 0;
  return digits > 0;
}

// Ids that the post-processor puts before and after a text.
bool known_frame(const Json& post, std::vector<std::int64_t>& begin, std::vector<std::int64_t>& end) {
  const std::string kind = post.is_object() ? post.value("type", "") : "";
  if (post.is_null() || kind == "ByteLevel") return true;
  if (kind == "Sequence") {
    for (const auto& part : member(post, "processors"))
      if (!known_frame(part, begin, end)) return false;
    return true;
  }
  if (kind != "TemplateProcessing") return false;
  bool after = false;
  for (const auto& item : member(post, "single")) {
    if (item.contains("Sequence")) {
      after = true;
      continue;
    }
    const auto name = text(member(item, "SpecialToken"), "id");
    for (const auto& id : member(member(member(post, "special_tokens"), name.c_str()), "ids"))
      (after ? end : begin).push_back(id.get<std::int64_t>());
  }
  return true;
}

}  // namespace

Result<Text> Text::open(const Bundle& bundle) {
  if (bundle.tokenizer.empty())
    return Error{Code::argument, "this bundle has no tokenizer: give the prompt as token ids"};
  const auto path = (std::filesystem::path(bundle.path) / bundle.tokenizer).string();
  return guarded<Text>(Code::bundle, path, [&]() -> Result<Text> {
    const Json json = read_json(path);
    const Json &model = member(json, "model"), &vocab = member(model, "vocab");
    if (text(model, "type") != "BPE" || !vocab.is_object()) throw Malformed("is not a BPE tokenizer");
    auto tables = std::make_shared<Tables>();
    Tables& t = *tables;
    const auto table = characters();
    std::unordered_map<std::string, char> back;
    for (std::size_t byte = 0; byte < 256; ++byte) back[table[byte]] = static_cast<char>(byte);
    auto check = [&](const Json& id) { return integer(id, "a token's id", 0, bundle.vocab - 1); };
    auto put = [&](std::int64_t id, std::string bytes) {
      if (static_cast<std::size_t>(id) >= t.bytes.size()) t.bytes.resize(static_cast<std::size_t>(id) + 1);
      t.bytes[static_cast<std::size_t>(id)] = std::move(bytes);
    };
    std::unordered_map<std::string, bool> added;
    bool trims = false;
    if (json.contains("added_tokens"))
      for (const auto& token : json["added_tokens"]) {
        const auto content = text(token, "content");
        const auto id = check(member(token, "id"));
        added[content] = true;
        trims = trims || token.value("lstrip", false) || token.value("rstrip", false) ||
                token.value("single_word", false);
        put(id, token.value("special", false) ? "" : content);
        if (!content.empty()) t.added[static_cast<unsigned char>(content[0])].emplace_back(content, id);
      }
    for (auto& tokens : t.added)
      std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
    for (const auto& [token, value] : vocab.items()) {
      const auto id = check(value);
      t.ids[token] = id;
      if (!added.count(token)) put(id, unmapped(token, back));
    }
    std::int64_t rank = 0;
    for (const auto& merge : member(model, "merges")) {
      std::string left, right;
      if (merge.is_array() && merge.size() == 2) {
        left = merge[0].get<std::string>(), right = merge[1].get<std::string>();
      } else {
        const auto both = merge.get<std::string>();
        const auto gap = both.find(' ');
        if (gap == both.npos) throw Malformed("has a merge of one part");
        left = both.substr(0, gap), right = both.substr(gap + 1);
      }
      const auto a = t.ids.find(left), b = t.ids.find(right), into = t.ids.find(left + right);
      if (a == t.ids.end() || b == t.ids.end() || into == t.ids.end())
        throw Malformed("merges '" + left + "' and '" + right + "', which are not all tokens");
      const auto key = static_cast<std::uint64_t>(a->second) << 32 | static_cast<std::uint64_t>(b->second);
      t.merges.emplace(key, Tables::Merge{rank++, into->second});
    }
    for (std::size_t byte = 0; byte < 256; ++byte) {
      auto found = t.ids.find(table[byte]);
      t.byte_ids[byte] = found == t.ids.end() ? -1 : found->second;
    }
    t.bos = bundle.bos;
    t.chat = bundle.chat;
    t.whole_words = model.value("ignore_merges", false);
    const Json normalizer = json.value("normalizer", Json());
    t.composes = normalizer.is_object() && normalizer.value("type", "") == "NFC";
    if (!(normalizer.is_null() || t.composes) || trims ||
        !known_split(json.value("pre_tokenizer", Json()), t.digits) ||
        !known_frame(json.value("post_processor", Json()), t.begin, t.end))
      t.not_encodable = "this tokenizer's way to split text is not known here: give the prompt as token ids";
    Text opened;
    opened.tables_ = tables;
    return opened;
  });
}

Result<std::string> Text::bytes(std::int64_t id) const {
  if (id < 0) return Error{Code::token, "token id " + std::to_string(id) + " is out of range"};
  // A vocabulary may have more rows than the tokenizer has tokens.
  return id < static_cast<std::int64_t>(tables_->bytes.size()) ? tables_->bytes[static_cast<std::size_t>(id)] : "";
}

Result<std::vector<std::int64_t>> Text::encode(const std::string& prompt, bool begins) const {
  const Tables& t = *tables_;
  if (!t.not_encodable.empty()) return Error{Code::argument, t.not_encodable};
  if (prompt.empty()) return Error{Code::token, "the prompt is empty: give it some text"};
  return guarded<std::vector<std::int64_t>>(Code::argument, "the prompt", [&]() -> Result<std::vector<std::int64_t>> {
    std::vector<std::int64_t> ids, word;
    if (begins) ids = t.begin;
    auto flush = [&](const std::string& bytes) {  // BPE of one word
      if (t.whole_words) {
        static const auto table = characters();
        std::string mapped;
        for (char c : bytes) mapped += table[static_cast<unsigned char>(c)];
        if (auto whole = t.ids.find(mapped); whole != t.ids.end()) return ids.push_back(whole->second);
      }
      word.clear();
      for (char c : bytes) word.push_back(t.byte_ids[static_cast<unsigned char>(c)]);
      while (word.size() > 1) {
        std::size_t at = 0;
        const Tables::Merge* best = nullptr;
        for (std::size_t i = 0; i + 1 < word.size(); ++i) {
          auto found =
              t.merges.find(static_cast<std::uint64_t>(word[i]) << 32 | static_cast<std::uint64_t>(word[i + 1]));
          if (found != t.merges.end() && (!best || found->second.rank < best->rank)) best = &found->second, at = i;
        }
        if (!best) break;
        word[at] = best->into;
        word.erase(word.begin() + static_cast<std::ptrdiff_t>(at) + 1);
      }
      ids.insert(ids.end(), word.begin(), word.end());
    };
    auto added_at = [&](std::size_t i) -> const std::pair<std::string, std::int64_t>* {
      for (const auto& token : t.added[static_cast<unsigned char>(prompt[i])])
        if (prompt.compare(i, token.first.size(), token.first) == 0) return &token;
      return nullptr;
    };
    for (std::size_t i = 0; i < prompt.size();) {
      if (const auto* token = added_at(i)) {
        ids.push_back(token->second);
        i += token->first.size();
        continue;
      }
      std::size_t stop = i;
      while (stop < prompt.size() && !added_at(stop)) ++stop;
      auto part = unicode::decode(prompt.substr(i, stop - i));
      if (t.composes) part = unicode::nfc(part);
      std::string bytes;
      for (std::size_t at = 0; at < part.size();) {
        const auto end = t.digits ? llama3_word(part, at, t.digits) : gpt2_word(part, at);
        bytes.clear();
        for (; at < end; ++at) unicode::append(bytes, part[at]);
        flush(bytes);
      }
      i = stop;
    }
    if (begins) ids.insert(ids.end(), t.end.begin(), t.end.end());
    if (std::any_of(ids.begin(), ids.end(), [](auto id) { return id < 0; }))
      throw Malformed("has a byte that the tokenizer lacks");
    if (begins && t.bos >= 0) {  // one, though the tokenizer may have put one before a chat template's own
      const auto rest = std::find_if(ids.begin(), ids.end(), [&](auto id) { return id != t.bos; });
      ids.erase(ids.begin(), rest);
      ids.insert(ids.begin(), t.bos);
    }
    return ids;
  });
}

Result<std::string> Text::chat(const std::string& message, bool begins) const {
  const Chat& chat = tables_->chat;
  if (!chat) return Error{Code::argument, "this bundle has no chat template, or not a plain one: give the whole prompt"};
  return (begins ? chat.before : chat.between) + message + chat.after;
}

std::string Characters::feed(const std::string& bytes) {
  rest_ += bytes;
  std::size_t whole = rest_.size();
  for (std::size_t back = 1; back <= 3 && back <= rest_.size(); ++back) {
    const auto byte = static_cast<unsigned char>(rest_[rest_.size() - back]);
    if ((byte & 0xC0) == 0x80) continue;
    const std::size_t size = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
    if (size > back) whole = rest_.size() - back;
    break;
  }
  std::string out = rest_.substr(0, whole);
  rest_.erase(0, whole);
  return out;
}

}  // namespace liger
