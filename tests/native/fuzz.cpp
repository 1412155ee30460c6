// Readers of manifests, tokenizers and states on broken input: each must answer, with a value or with a sentence.
//   liger-fuzz BUNDLE STATE COUNT   COUNT mutations of each kind; prints how many were refused
// Built with clang and -DLIGER_FUZZ=ON it is a libFuzzer target instead, over FUZZ_BUNDLE; a first byte chooses the kind.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "liger/liger.h"

namespace {

namespace fs = std::filesystem;

std::string read(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(in), {}};
  if (bytes.empty()) std::fprintf(stderr, "%s is empty or not there\n", path.c_str()), std::exit(2);
  return bytes;
}

void write(const fs::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

// A bundle's files beside which a broken one is put.
class Place {
 public:
  explicit Place(const fs::path& bundle) : folder_(fs::temp_directory_path() / ("liger-fuzz-" + std::to_string(std::random_device()()))) {
    fs::create_directory(folder_);
    for (const auto& entry : fs::directory_iterator(bundle)) fs::create_symlink(fs::absolute(entry), folder_ / entry.path().filename());
    fs::remove(folder_ / "manifest.json");
    write(folder_ / "manifest.json", read(bundle / "manifest.json"));
    auto opened = liger::Bundle::open(folder_.string());
    if (!opened) std::fprintf(stderr, "%s\n", opened.error().message.c_str()), std::exit(2);
    bundle_ = *opened;
    bundle_.tokenizer = "broken.json";
  }
  ~Place() { fs::remove_all(folder_); }

  // Whether a broken file of this kind was refused; what is read must also be usable.
  bool refused(char kind, const std::string& bytes) {
    if (kind == 'm') {
      write(folder_ / "manifest.json", bytes);
      return !liger::Bundle::open(folder_.string(), false);
    }
    if (kind == 't') {
      write(folder_ / bundle_.tokenizer, bytes);
      auto text = liger::Text::open(bundle_);
      if (!text) return true;
      auto ids = text->encode("def f(x):\n\treturn 12 * x  # \xC3\xA9 it's");
      for (std::int64_t id = -1; id < bundle_.vocab; id += 97) (void)text->bytes(id);
      return !ids;
    }
    write(folder_ / "x.state", bytes);
    return !liger::State::load((folder_ / "x.state").string());
  }

 private:
  fs::path folder_;
  liger::Bundle bundle_;
};

}  // namespace

#ifdef LIGER_FUZZ
extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  static Place place(std::getenv("FUZZ_BUNDLE"));
  if (size) place.refused("mts"[data[0] % 3], {data + 1, data + size});
  return 0;
}
#else
int main(int count, char** words) {
  if (count != 4) return 2;
  Place place(words[1]);
  std::mt19937 random(0);
  const std::string tokenizer = read(fs::path(words[1]) / "tokenizer.json");
  for (char kind : {'m', 't', 's'}) {
    const std::string whole = kind == 'm' ? read(fs::path(words[1]) / "manifest.json") : kind == 't' ? tokenizer : read(words[2]);
    int refused = 0;
    // A tokenizer is large, and what may break it is at its beginning or near its end.
    const int times = std::atoi(words[3]) / (kind == 't' ? 20 : 1);
    for (int i = 0; i < times; ++i) {
      std::string broken = whole;
      const std::size_t reach = std::min<std::size_t>(broken.size(), 6000);
      const std::size_t start = kind == 't' && random() % 2 ? broken.size() - reach : 0;
      for (int changes = 1 + static_cast<int>(random() % 4); changes-- && broken.size() >= start + reach;) {
        const std::size_t at = start + random() % reach;
        switch (random() % 5) {
          case 0: broken[at] = static_cast<char>(random()); break;
          case 1: broken[at] = "0123456789-\"{}[],:"[random() % 18]; break;
          case 2: broken.erase(at, 1 + random() % 40); break;
          case 3: broken.insert(at, broken.substr(random() % reach, random() % 40)); break;
          default: broken.resize(random() % 2 ? at : broken.size());
        }
      }
      refused += place.refused(kind, broken);
    }
    std::printf("%d ", refused);
  }
  std::puts("");
  return 0;
}
#endif
