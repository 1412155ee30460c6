// Ids of strings on stdin, ended by NUL each, a line each: node encode.mjs BUNDLE
import { readFileSync } from "node:fs";
import { Tokenizer } from "../../runtimes/web/tokenizer.js";

const read = (name) => JSON.parse(readFileSync(`${process.argv[2]}/${name}`, "utf8"));
const tokenizer = new Tokenizer(read("tokenizer.json"), read("manifest.json"));
for (const text of readFileSync(0, "utf8").split("\0")) console.log(tokenizer.encode(text).join(" "));
