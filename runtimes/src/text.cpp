#include <algorithm>
#include <array>
#include <filesystem>
#include <unordered_map>

#include "backend.h"
#include "json.h"

namespace liger {

struct Text::Tables {
  struct Merge {
    std::int64_t rank, into;
  };
  std::unordered_map<std::uint64_t, Merge> merges;  // by (left << 32 | right)
  std::unordered_map<std::string, std::int64_t> ids;
  std::vector<std::string> bytes;                           // by id
  std::vector<std::pair<std::string, std::int64_t>> added;  // found in the text before anything else, longest first
  std::array<std::int64_t, 256> byte_ids{};
  std::int64_t bos = -1;
  bool whole_words = false;   // `ignore_merges`: a word that is a token is taken as it is
  std::string not_encodable;  // why, if this kind of pre-tokenizer is not known here
};

namespace {

// GPT-2's table: each byte as a printable character, in UTF-8.
std::array<std::string, 256> characters() {
  std::array<std::string, 256> table;
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    const int point = printable ? byte : next++;
    auto& out = table[static_cast<std::size_t>(byte)];
    if (point < 0x80) {
      out = static_cast<char>(point);
    } else {
      out = {static_cast<char>(0xC0 | point >> 6), static_cast<char>(0x80 | (point & 0x3F))};
    }
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

bool letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool digit(char c) { return c >= '0' && c <= '9'; }
bool space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool other(char c) { return !letter(c) && !digit(c) && !space(c); }

// End of the word that begins at i: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
std::size_t word_end(const std::string& text, std::size_t i) {
  for (const char* ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
    if (text.compare(i, std::char_traits<char>::length(ending), ending) == 0)
      return i + std::char_traits<char>::length(ending);
  const std::size_t body = text[i] == ' ' && i + 1 < text.size() ? i + 1 : i;
  for (auto kind : {letter, digit, other}) {
    std::size_t end = body;
    while (end < text.size() && kind(text[end])) ++end;
    if (end > body) return end;
  }
  std::size_t end = i;
  while (end < text.size() && space(text[end])) ++end;
  return end < text.size() && end - i > 1 ? end - 1 : end;
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
    const auto table = characters();
    std::unordered_map<std::string, char> back;
    for (std::size_t byte = 0; byte < 256; ++byte) back[table[byte]] = static_cast<char>(byte);
    tables->bos = bundle.bos;
    tables->bytes.resize(static_cast<std::size_t>(bundle.vocab));
    auto check = [&](const Json& id) { return integer(id, "a token's id", 0, bundle.vocab - 1); };
    if (const Json* added = json.contains("added_tokens") ? &json["added_tokens"] : nullptr)
      for (const auto& token : *added) tables->added.emplace_back(text(token, "content"), check(member(token, "id")));
    for (const auto& [token, value] : vocab.items()) {
      const auto id = check(value);
      tables->ids[token] = id;
      auto same = [&, name = token](const auto& added) { return added.first == name; };
      if (std::none_of(tables->added.begin(), tables->added.end(), same))
        tables->bytes[static_cast<std::size_t>(id)] = unmapped(token, back);
    }
    if (json.contains("added_tokens"))
      for (const auto& token : json["added_tokens"])
        if (!token.value("special", false))
          tables->bytes[static_cast<std::size_t>(check(member(token, "id")))] = text(token, "content");
    std::sort(tables->added.begin(), tables->added.end(),
              [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
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
      const auto a = tables->ids.find(left), b = tables->ids.find(right), into = tables->ids.find(left + right);
      if (a == tables->ids.end() || b == tables->ids.end() || into == tables->ids.end())
        throw Malformed("merges '" + left + "' and '" + right + "', which are not all tokens");
      const auto key = static_cast<std::uint64_t>(a->second) << 32 | static_cast<std::uint64_t>(b->second);
      tables->merges.emplace(key, Tables::Merge{rank++, into->second});
    }
    for (std::size_t byte = 0; byte < 256; ++byte) {
      auto found = tables->ids.find(table[byte]);
      tables->byte_ids[byte] = found == tables->ids.end() ? -1 : found->second;
    }
    tables->whole_words = model.value("ignore_merges", false);
    const Json pre = json.value("pre_tokenizer", Json());
    const bool known = pre.is_object() && pre.value("type", "") == "ByteLevel" && pre.value("use_regex", true) &&
                       !pre.value("add_prefix_space", true);
    if (!known || !json.value("normalizer", Json()).is_null())
      tables->not_encodable = "this tokenizer's way to split text is not known here: give the prompt as token ids";
    Text opened;
    opened.tables_ = tables;
    return opened;
  });
}

Result<std::string> Text::bytes(std::int64_t id) const {
  if (id < 0 || id >= static_cast<std::int64_t>(tables_->bytes.size()))
    return Error{Code::token, "token id " + std::to_string(id) + " is out of range"};
  return tables_->bytes[static_cast<std::size_t>(id)];
}

Result<std::vector<std::int64_t>> Text::encode(const std::string& text) const {
  const Tables& t = *tables_;
  if (!t.not_encodable.empty()) return Error{Code::argument, t.not_encodable};
  if (text.empty()) return Error{Code::token, "the prompt is empty: give it some text"};
  if (std::any_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) >= 0x80; }))
    return Error{Code::argument, "text beyond ASCII is not encoded here yet: give the prompt as token ids"};
  std::vector<std::int64_t> ids, word;
  auto flush = [&](const std::string& piece) {  // BPE of one word
    if (auto whole = t.ids.find(piece); t.whole_words && whole != t.ids.end()) return ids.push_back(whole->second);
    word.clear();
    for (char c : piece) word.push_back(t.byte_ids[static_cast<unsigned char>(c)]);
    while (word.size() > 1) {
      std::size_t at = 0;
      const Tables::Merge* best = nullptr;
      for (std::size_t i = 0; i + 1 < word.size(); ++i) {
        auto found = t.merges.find(static_cast<std::uint64_t>(word[i]) << 32 | static_cast<std::uint64_t>(word[i + 1]));
        if (found != t.merges.end() && (!best || found->second.rank < best->rank)) best = &found->second, at = i;
      }
      if (!best) break;
      word[at] = best->into;
      word.erase(word.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
    ids.insert(ids.end(), word.begin(), word.end());
  };
  auto added_at = [&](std::size_t i) -> const std::pair<std::string, std::int64_t>* {
    for (const auto& token : t.added)
      if (!token.first.empty() && text.compare(i, token.first.size(), token.first) == 0) return &token;
    return nullptr;
  };
  for (std::size_t i = 0; i < text.size();) {
    if (const auto* token = added_at(i)) {
      ids.push_back(token->second);
      i += token->first.size();
      continue;
    }
    std::size_t end = i;
    while (end < text.size() && !added_at(end)) ++end;
    const std::string part = text.substr(i, end - i);
    for (std::size_t at = 0; at < part.size();) {
      const auto stop = word_end(part, at);
      flush(part.substr(at, stop - at));
      at = stop;
    }
    i = end;
  }
  if (std::any_of(ids.begin(), ids.end(), [](auto id) { return id < 0; }))
    return Error{Code::argument, "the tokenizer lacks a byte of this text"};
  if (t.bos >= 0 && ids[0] != t.bos) ids.insert(ids.begin(), t.bos);
  return ids;
}

}  // namespace liger
