// A bundle in JavaScript: onnxruntime-node and onnxruntime-web alike, with the state between calls. No build step.
//
//   import * as ort from "onnxruntime-node";            // or onnxruntime-web
//   const session = await LigerSession.load(ort, manifest, await ort.InferenceSession.create("bundle/model.onnx"));
//   let logits = await session.prefill([1, 5, 9]);      // Float32Array, a value a token of the vocabulary
//   logits = await session.step(argmax(logits));

const FORMAT_VERSION = 1;

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

  async #run(tokens) {
    const int64 = (values, shape) => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
    const feeds = { tokens: int64(tokens, [1, tokens.length]), valid: int64([tokens.length], [1]), ...this.state };
    const results = await this.graph.run(feeds);
    for (const { input, output } of this.manifest.graph.state) this.state[input] = results[output];
    return results.logits.data;
  }
}

// The most likely token.
export function argmax(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; ++i) if (logits[i] > logits[best]) best = i;
  return best;
}
