// A bundle in JavaScript: onnxruntime-node and onnxruntime-web alike, with the state between calls. No build step.
//
//   import * as ort from "onnxruntime-node";            // or onnxruntime-web
//   const session = await LigerSession.load(ort, manifest, await ort.InferenceSession.create("bundle/model.onnx"));
//   let logits = await session.prefill([1, 5, 9]);      // Float32Array, a value a token of the vocabulary
//   logits = await session.step(argmax(logits));

const FORMAT_VERSION = 1;
const STATE = "liger_state";

// One conversation over a loaded graph. `manifest` is the parsed manifest.json of the bundle.
export class LigerSession {
  static load(ort, manifest, graph) {
    if (manifest.target !== "onnx") throw new Error(`this is a bundle for ${manifest.target}: export with --target onnx`);
    if (!(manifest.format_version <= FORMAT_VERSION)) {
      throw new Error(`bundle format ${manifest.format_version} is newer than ${FORMAT_VERSION}: update liger.js`);
    }
    return new LigerSession(ort, manifest, graph);
  }

  constructor(ort, manifest, graph) {
    this.ort = ort;
    this.manifest = manifest;
    this.graph = graph;
    this.reset();
  }

  // Forget all tokens. The state is zeros before the first.
  reset() {
    this.state = {};
    for (const { name, shape, dtype, input } of this.manifest.graph.state) {
      if (dtype !== "float32" && dtype !== "int64") throw new Error(`${name} is ${dtype}: export with --dtype float32`);
      const size = shape.reduce((a, b) => a * b, 1);
      const data = dtype === "int64" ? new BigInt64Array(size) : new Float32Array(size);
      this.state[input] = new this.ort.Tensor(dtype, data, [1, ...shape]);
    }
  }

  // Bytes of the state: the same after one token and after a million.
  get stateBytes() {
    return Object.values(this.state).reduce((sum, tensor) => sum + tensor.data.byteLength, 0);
  }

  // Feed token ids; the logits after the last one.
  async prefill(tokens) {
    if (!tokens.length) throw new Error("there are no tokens: the prompt is empty");
    const vocabulary = this.manifest.model.vocab_size;
    const bad = tokens.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabulary);
    if (bad !== undefined) throw new Error(`token id ${bad} is out of range: this model's ids are 0 .. ${vocabulary - 1}`);
    let logits;
    const { chunk } = this.manifest.graph;
    for (let start = 0; start < tokens.length; start += chunk) logits = await this.#run(tokens.slice(start, start + chunk));
    return logits;
  }

  step(token) {
    return this.prefill([token]);
  }

  // The state as a safetensors file that every runtime and language continues.
  saveState() {
    const header = { __metadata__: { format: STATE, version: "1", model: this.manifest.model.fingerprint } };
    let at = 0;
    for (const { name, shape, dtype, input } of this.manifest.graph.state) {
      const bytes = this.state[input].data.byteLength;
      header[name] = { dtype: dtype === "int64" ? "I64" : "F32", shape: [1, ...shape], data_offsets: [at, at + bytes] };
      at += bytes;
    }
    let json = JSON.stringify(header);
    json = json.padEnd(Math.ceil(json.length / 8) * 8);
    const file = new Uint8Array(8 + json.length + at);
    new DataView(file.buffer).setBigUint64(0, BigInt(json.length), true);
    file.set(new TextEncoder().encode(json), 8);
    for (const { name, input } of this.manifest.graph.state) {
      const { buffer, byteOffset, byteLength } = this.state[input].data;
      file.set(new Uint8Array(buffer, byteOffset, byteLength), 8 + json.length + header[name].data_offsets[0]);
    }
    return file;
  }

  // Continue a state of the same model, whichever runtime wrote it. A refused one changes nothing.
  loadState(file) {
    const { header, start } = parseHeader(file);
    if (header.__metadata__.model !== this.manifest.model.fingerprint) {
      throw new Error(`this state belongs to model ${header.__metadata__.model}, not to ${this.manifest.model.fingerprint}`);
    }
    const state = {};
    for (const { name, shape, dtype, input } of this.manifest.graph.state) {
      const [kind, Values] = dtype === "int64" ? ["I64", BigInt64Array] : ["F32", Float32Array];
      const entry = header[name];
      const bytes = shape.reduce((a, b) => a * b, 1) * Values.BYTES_PER_ELEMENT;
      const [begin, end] = entry?.data_offsets ?? [];
      const fits = entry?.dtype === kind && String(entry.shape) === String([1, ...shape]) && end - begin === bytes;
      if (!fits || start + end > file.length) throw new Error(`the state's tensor '${name}' is not this model's, or cut short`);
      state[input] = new this.ort.Tensor(dtype, new Values(file.slice(start + begin, start + end).buffer), [1, ...shape]);
    }
    this.state = state;
  }

  async #run(tokens) {
    const int64 = (values, shape) => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
    const feeds = { tokens: int64(tokens, [1, tokens.length]), valid: int64([tokens.length], [1]), ...this.state };
    const results = await this.graph.run(feeds);
    for (const { input, output } of this.manifest.graph.state) this.state[input] = results[output];
    return results.logits.data;
  }
}

function parseHeader(file) {
  try {
    const size = Number(new DataView(file.buffer, file.byteOffset).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(file.slice(8, 8 + size)));
    if (header.__metadata__.format === STATE && header.__metadata__.version === "1") return { header, start: 8 + size };
  } catch {
    // said below
  }
  throw new Error("this is not a state file, or a newer one, or damaged");
}

// The most likely token.
export function argmax(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; ++i) if (logits[i] > logits[best]) best = i;
  return best;
}
