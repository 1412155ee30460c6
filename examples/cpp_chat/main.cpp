// A conversation on the terminal: cpp_chat BUNDLE [libonnxruntime.so]
#include <iostream>
#include <string>

#include <liger/liger.h>

int main(int count, char** words) {
  auto fail = [](const liger::Error& error) {
    std::cerr << "error: " << error.message << "\n";
    return 2;
  };
  if (count < 2) return fail({liger::Code::argument, "usage: cpp_chat BUNDLE [libonnxruntime.so]"});
  auto bundle = liger::Bundle::open(words[1]);
  if (!bundle) return fail(bundle.error());
  auto text = liger::Text::open(*bundle);
  if (!text) return fail(text.error());
  liger::Options options;
  if (count > 2) options.runtime = words[2];
  auto session = liger::open_session(*bundle, options);
  if (!session) return fail(session.error());

  std::string line;
  for (bool first = true; std::cout << "> " && std::getline(std::cin, line);) {
    if (line.empty()) continue;
    auto prompt = text->chat(line, first);  // a model without a chat template just continues the text
    auto ids = text->encode(prompt ? *prompt : line, first);
    if (!ids) return fail(ids.error());
    first = false;
    liger::Characters characters;
    auto made = liger::generate(**session, *ids, 200, {}, bundle->eos, [&](std::int64_t id) {
      if (auto bytes = text->bytes(id)) std::cout << characters.feed(*bytes) << std::flush;
      return true;
    });
    if (!made) return fail(made.error());
    std::cout << "\n";
  }
}
