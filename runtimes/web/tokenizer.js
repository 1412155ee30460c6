// A byte-level BPE tokenizer.json (the kinds of GPT-2, Llama 3 and Qwen) in JavaScript.
//
//   const tokenizer = new Tokenizer(await (await fetch("bundle/tokenizer.json")).json(), manifest);
//   const ids = tokenizer.encode("def add(a, b):");
//   const stream = tokenizer.stream();  stream(id) -> the characters that this id completes

const GPT2 = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;
const HEAD = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}";
const TAIL = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const ANY_CASE = "'[sS\u017F]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"; // what (?i:...) of HEAD means
// \s of these tokenizers knows U+0085 and not U+FEFF; JavaScript's the other way round.
const SPACE = "\\t-\\r \\u0085\\u00A0\\u1680\\u2000-\\u200A\\u2028\\u2029\\u202F\\u205F\\u3000";

const spaced = (source) =>
  source.replace(/\[\^\\s/g, `[^${SPACE}`).replaceAll("(?!\\S)", `(?![^${SPACE}])`).replaceAll("\\s", `[${SPACE}]`);

// Each byte as a printable character, as GPT-2 has them.
function byteCharacters() {
  const table = [];
  for (let byte = 0, next = 256; byte < 256; ++byte) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    table.push(String.fromCodePoint(printable ? byte : next++));
  }
  return table;
}

// The pre-tokenizer's pattern, or null where it is of another kind.
function pattern(pre) {
  if (pre?.type === "ByteLevel") return pre.use_regex !== false && !pre.add_prefix_space ? GPT2.source : null;
  const [split, bytes] = pre?.type === "Sequence" && pre.pretokenizers.length === 2 ? pre.pretokenizers : [];
  const plain = split?.type === "Split" && split.behavior === "Isolated" && !split.invert && bytes.type === "ByteLevel";
  const found = plain && split.pattern.Regex;
  for (const digits of ["", "{1,3}"]) {
    if (found === HEAD + digits + TAIL) return ANY_CASE + HEAD.slice(HEAD.indexOf(")") + 1) + digits + TAIL;
  }
  return null;
}

// Ids that the post-processor puts before a text.
function beginning(post) {
  if (post?.type === "Sequence") return post.processors.flatMap(beginning);
  if (post?.type !== "TemplateProcessing") return [];
  const first = post.single.slice(0, post.single.findIndex((item) => item.Sequence));
  return first.flatMap((item) => post.special_tokens[item.SpecialToken.id].ids);
}

export class Tokenizer {
  constructor(json, manifest) {
    const source = pattern(json.pre_tokenizer);
    const normal = json.normalizer === null || json.normalizer?.type === "NFC";
    if (json.model?.type !== "BPE" || !source || !normal) throw new Error("this tokenizer is of a kind not known here");
    this.words = new RegExp(spaced(source), "gu");
    this.composes = json.normalizer?.type === "NFC";
    this.wholeWords = json.model.ignore_merges === true;
    this.bos = manifest.generation.bos_token_id;
    this.chat = manifest.chat ?? {};
    this.begin = beginning(json.post_processor);
    this.ids = new Map(Object.entries(json.model.vocab));
    this.ranks = new Map(json.model.merges.map((merge, rank) => [Array.isArray(merge) ? merge.join(" ") : merge, rank]));
    this.characters = byteCharacters();
    this.added = [...json.added_tokens].sort((a, b) => b.content.length - a.content.length);
    const bytes = new Map(this.characters.map((character, byte) => [character, byte]));
    this.bytes = [];
    for (const [token, id] of this.ids) this.bytes[id] = Uint8Array.from([...token], (c) => bytes.get(c) ?? 0);
    for (const { id, content, special } of this.added) this.bytes[id] = new TextEncoder().encode(special ? "" : content);
  }

  // Token ids; `begins`: whether the text begins a conversation, or goes on with what the session has seen.
  encode(text, begins = true) {
    if (!text) throw new Error("the prompt is empty: give it some text");
    const ids = begins ? [...this.begin] : [];
    for (let at = 0; at < text.length; ) {
      const found = this.added.find(({ content }) => text.startsWith(content, at));
      if (found) {
        ids.push(found.id);
        at += found.content.length;
        continue;
      }
      let stop = at;
      while (stop < text.length && !this.added.some(({ content }) => text.startsWith(content, stop))) ++stop;
      const part = this.composes ? text.slice(at, stop).normalize("NFC") : text.slice(at, stop);
      for (const [word] of part.matchAll(this.words)) ids.push(...this.#merge(word));
      at = stop;
    }
    if (!begins || this.bos < 0) return ids;
    return [this.bos, ...ids.slice(ids.findIndex((id) => id !== this.bos))];
  }

  // A user message in the model's chat template, up to where the answer begins.
  message(text, begins = true) {
    if (!this.chat.after) return text; // no template, or not a plain one: the text goes on
    return (begins ? this.chat.before : this.chat.between) + text + this.chat.after;
  }

  // A function from one id to the characters that it completes.
  stream() {
    const decoder = new TextDecoder("utf-8");
    return (id) => decoder.decode(this.bytes[id] ?? new Uint8Array(), { stream: true });
  }

  #merge(word) {
    let parts = Array.from(new TextEncoder().encode(word), (byte) => this.characters[byte]);
    if (this.wholeWords && this.ids.has(parts.join(""))) return [this.ids.get(parts.join(""))];
    for (;;) {
      let best = Infinity;
      let at = -1;
      for (let i = 0; i + 1 < parts.length; ++i) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map((part) => this.ids.get(part));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }
}
