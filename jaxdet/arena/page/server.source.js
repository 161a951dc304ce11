// Runs of `jaxdet serve`: jaxdet's column, made of ordinary requests to the API. Log-probabilities stand for logits:
// they are float32 too, and come from all of them.

export const COLUMNS = ["jaxdet"];
export const HEADING = "Log-probability";
export const VALUES = "log-probabilities";
const SIZES = 6;
const TOP = 20;

let name = "";

async function ask(path, body, signal) {
  const key = document.getElementById("key").value;
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) },
    body: body && JSON.stringify(body),
    signal,
  });
  const found = await response.json();
  if (response.ok) return found;
  throw Object.assign(new Error(found.error.message), { wantsKey: response.status === 401 });
}

export async function facts() {
  const [model] = (await ask("v1/models")).data;
  name = model.id;
  return { name, fingerprint: model.system_fingerprint };
}

export async function* events(settings, signal) {
  if (!name) await facts();
  const prompt = await tokens(settings.prompt, signal);
  const batches = deal(settings.completions, settings.load);
  yield { event: "start", batches };
  const answers = [];
  for (const [batch, { size, ours }] of batches.entries()) {
    yield { event: "progress", column: "jaxdet", batch, size, step: 0 };
    const others = new AbortController();
    if (size > ours) crowd(size - ours, settings.max_tokens, AbortSignal.any([signal, others.signal]));
    const body = { model: name, prompt: Array(ours).fill(prompt), logprobs: TOP };
    for (const field of ["max_tokens", "temperature", "seed"]) body[field] = settings[field];
    try {
      const { choices } = await ask("v1/completions", body, signal);
      answers.push(...choices.map((choice) => ({ size, ...choice.logprobs })));
    } finally {
      others.abort();
    }
    yield { event: "answers", column: "jaxdet", ...count(answers) };
  }
  const digest = await digestOf(answers);
  yield { event: "column", column: "jaxdet", digest, tree: node(answers, 0) };
  yield { event: "end" };
}

/** The prompt's token ids: through the chat template, if the model has one. */
async function tokens(text, signal) {
  try {
    const messages = [{ role: "user", content: text }];
    return (await ask("tokenize", { model: name, messages }, signal)).tokens;
  } catch (error) {
    if (error.name === "AbortError" || error.wantsKey) throw error;
    return (await ask("tokenize", { model: name, prompt: text }, signal)).tokens;
  }
}

/** Completions in batches of 1 to `load` requests; at most half of a batch is ours. */
function deal(completions, load) {
  const sizes = [...new Set([...Array(SIZES).keys()].map((i) => Math.round(load ** (i / (SIZES - 1)))))];
  const waiting = new Map(sizes.map((size) => [size, 0]));
  for (let i = 0; i < completions; i++) waiting.set(sizes[i % sizes.length], waiting.get(sizes[i % sizes.length]) + 1);
  const batches = [];
  for (let left = completions; left > 0; ) {
    for (const [size, count] of waiting) {
      const ours = Math.min(count, Math.ceil(size / 2));
      waiting.set(size, count - ours);
      left -= ours;
      if (ours) batches.push({ size, ours });
    }
  }
  return batches;
}

/** Other people's requests: random prompts of random lengths. Nobody waits for them. */
function crowd(size, longest, signal) {
  const random = (most) => 1 + Math.floor(Math.random() * most);
  const prompt = Array.from({ length: size }, () => Array.from({ length: random(64) }, () => random(200)));
  const body = { model: name, prompt, max_tokens: longest, temperature: 1, seed: random(2 ** 32), ignore_eos: true };
  ask("v1/completions", body, signal).catch(() => {});
}

function count(answers) {
  const index = (keys) => {
    const places = new Map();
    return keys.map((key) => places.get(key) ?? (places.set(key, places.size), places.size - 1));
  };
  const first = (differ) => {
    const found = answers.map((answer) => answers[0].tokens.findIndex((_, at) => differ(answer, at)));
    const places = found.filter((at) => at >= 0);
    return places.length ? Math.min(...places) + 1 : null;
  };
  return {
    outputs: index(answers.map((answer) => JSON.stringify(answer.tokens))),
    bits: index(answers.map(bitsOf)),
    sizes: answers.map((answer) => answer.size),
    diverges_at: first((answer, at) => answer.tokens[at] !== answers[0].tokens[at]),
    bits_differ_at: first((answer, at) => answer.token_logprobs[at] !== answers[0].token_logprobs[at]),
  };
}

const bitsOf = (answer) => JSON.stringify([answer.tokens, answer.token_logprobs, answer.top_logprobs.map(sorted)]);
const sorted = (logprobs) => Object.entries(logprobs).sort(([a], [b]) => (a < b ? -1 : 1));

async function digestOf(answers) {
  if (!globalThis.crypto?.subtle) return null; // browsers have it on secure pages only: https, or this machine
  const distinct = [...new Set(answers.map(bitsOf))].sort().join("\n");
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(distinct));
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// The tree, as `jaxdet.arena.tree` makes it. A token has no number here; its text stands for it.

function node(answers, start) {
  const { tokens } = answers[0];
  const longest = Math.max(...answers.map((answer) => answer.tokens.length));
  let end = start;
  while (end < longest && answers.every((answer) => answer.tokens[end] === tokens[end])) end++;
  const shared = tokens.slice(start, end);
  const found = { text: shared.join(""), tokens: shared.map((t, i) => token(t, start + i, answers)), branches: [] };
  if (end < longest) {
    const groups = Map.groupBy(answers, (answer) => answer.tokens[end] ?? ""); // "": it has ended
    found.branches = [...groups].sort((a, b) => b[1].length - a[1].length).map(([chosen, group]) => ({
      at: end + 1,
      chosen,
      count: group.length,
      batches: [...new Set(group.map((answer) => answer.size))].sort((a, b) => a - b),
      candidates: [...groups.keys()].map((other) => token(other, end, group)),
      ...node(group, end),
    }));
  }
  return found;
}

function token(piece, at, answers) {
  const seen = new Map();
  for (const answer of answers) {
    const value = answer.tokens[at] === piece ? answer.token_logprobs[at] : answer.top_logprobs[at]?.[piece];
    if (value !== undefined) seen.set(value, (seen.get(value) ?? 0) + 1);
  }
  const logits = [...seen].map(([value, times]) => ({ decimal: `${decimal(value)}`, hex: hex(value), count: times }));
  return { piece, id: piece, logits: logits.sort((a, b) => b.count - a.count) };
}

/** The shortest decimal that only this float32 rounds to. */
function decimal(value) {
  for (let digits = 1; digits < 9; digits++) {
    if (Math.fround(Number(value.toPrecision(digits))) === value) return Number(value.toPrecision(digits));
  }
  return Number(value.toPrecision(9));
}

/** C's hexadecimal notation of a normal float32, which says every bit: 0x1.26p+4. */
function hex(value) {
  const bits = new DataView(new ArrayBuffer(4));
  bits.setFloat32(0, value);
  const word = bits.getUint32(0);
  if ((word & 0x7fffffff) === 0) return `${word >>> 31 ? "-" : ""}0x0p+0`;
  const exponent = ((word >>> 23) & 255) - 127;
  const mantissa = ((word & 0x7fffff) << 1).toString(16).padStart(6, "0").replace(/0+$/, "");
  return `${word >>> 31 ? "-" : ""}0x1${mantissa && `.${mantissa}`}p${exponent < 0 ? "" : "+"}${exponent}`;
}
