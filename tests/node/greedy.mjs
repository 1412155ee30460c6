// Greedy tokens of a bundle after a prompt, and the state's size: node greedy.mjs BUNDLE COUNT ID ID ...
import { readFile } from "node:fs/promises";
import * as ort from "onnxruntime-node";
import { LigerSession, argmax } from "../../runtimes/web/liger.js";

const [bundle, count, ...prompt] = process.argv.slice(2);
const manifest = JSON.parse(await readFile(`${bundle}/manifest.json`, "utf8"));
const session = LigerSession.load(ort, manifest, await ort.InferenceSession.create(`${bundle}/model.onnx`));
const before = session.stateBytes;
let logits = await session.prefill(prompt.map(Number));
const tokens = [];
while (tokens.length < Number(count)) {
  tokens.push(argmax(logits));
  logits = await session.step(tokens.at(-1));
}
const refused = await session.prefill([manifest.model.vocab_size]).catch((error) => error.message);
console.log(JSON.stringify({ tokens, before, after: session.stateBytes, refused }));
