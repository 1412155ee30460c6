// The page: ?bundle=URL (default: bundle/), with ONNX Runtime's web build in ort/ beside it (onnxruntime-web's dist).
import * as ort from "./ort/ort.all.min.mjs";
import { LigerSession, argmax } from "./liger.js";
import { Tokenizer } from "./tokenizer.js";

const at = (id) => document.getElementById(id);
const bundle = new URL(new URLSearchParams(location.search).get("bundle") ?? "bundle/", location.href);
let session, tokenizer, stopped, begun = false;

function say(text, error = false) {
  at("status").textContent = text;
  at("status").className = error ? "error" : "";
}

function enable(on) {
  for (const id of ["go", "reset", "save", "load", "prompt"]) at(id).disabled = !on;
  at("stop").disabled = on;
}

const guarded = (action) => async () => {
  try {
    await action();
  } catch (error) {
    say(error.message, true);
  }
};

const get = async (name) => {
  const answer = await fetch(new URL(name, bundle));
  if (!answer.ok) throw new Error(`${new URL(name, bundle)} is not there: give a bundle's address with ?bundle=`);
  return answer;
};

async function load() {
  const manifest = await (await get("manifest.json")).json();
  const { model, weights } = manifest.graph.files;
  const data = async (name) => new Uint8Array(await (await get(name)).arrayBuffer());
  const externalData = weights ? [{ path: weights, data: await data(weights) }] : [];
  // WebGPU lacks the recurrence's operator: what it cannot run falls back to WASM.
  const options = { executionProviders: navigator.gpu ? ["webgpu", "wasm"] : ["wasm"], externalData };
  session = LigerSession.load(ort, manifest, await ort.InferenceSession.create(await data(model), options));
  tokenizer = new Tokenizer(await (await get(manifest.tokenizer)).json(), manifest);
  say(ready());
  enable(true);
}

const ready = () => `ready; the state is ${session.stateBytes.toLocaleString("en")} bytes, at any length`;

async function go() {
  const prompt = at("prompt").value;
  const ids = tokenizer.encode(tokenizer.message(prompt, !begun), !begun);
  enable(false);
  stopped = false;
  at("text").append(prompt);
  at("prompt").value = "";
  const { eos_token_ids: ends } = session.manifest.generation;
  const show = tokenizer.stream();
  const made = [];
  try {
    let logits = await session.prefill(ids);
    begun = true;
    const start = performance.now();
    while (made.length < Number(at("count").value) && !stopped) {
      const token = argmax(logits);
      if (ends.includes(token)) break;
      made.push(token);
      at("text").append(show(token));
      logits = await session.step(token); // the state has seen all that is shown
      const rate = (made.length / (performance.now() - start)) * 1e3;
      say(`${made.length} tokens, ${rate.toFixed(1)} tokens/s; the state is ${session.stateBytes.toLocaleString("en")} bytes`);
      if (made.length % 8 === 0) await new Promise((next) => setTimeout(next));
    }
  } finally {
    enable(true);
  }
  at("text").dataset.tokens = made.join(" ");
}

at("go").onclick = guarded(go);
at("stop").onclick = () => (stopped = true);
at("reset").onclick = guarded(() => {
  session.reset();
  begun = false;
  at("text").textContent = "";
  say(ready());
});
at("save").onclick = guarded(() => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([session.saveState()], { type: "application/octet-stream" }));
  link.download = "chat.safetensors";
  link.click();
  URL.revokeObjectURL(link.href);
});
at("load").onclick = () => at("file").click();
at("file").onchange = guarded(async () => {
  session.loadState(new Uint8Array(await at("file").files[0].arrayBuffer()));
  begun = true;
  at("text").textContent = "";
  say(`loaded; ${ready()}`);
});
guarded(load)();
