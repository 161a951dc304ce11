// The page of `jaxdet arena` and `jaxdet serve`. What a model says is only ever set as text, never as HTML.

import { COLUMNS, HEADING, VALUES, events, facts } from "./source.js";

const byId = (id) => document.getElementById(id);
const form = byId("settings");
const FIELDS = ["prompt", "completions", "max_tokens", "load", "temperature", "seed"];
// What jaxdet's bits depend on: the same values must give the same digest.
const REQUEST = ["prompt", "max_tokens", "temperature", "seed"];
const WORDS = { outputs: ["text", "different texts"], bits: ["set of bits", "different sets of bits"] };
const NAMES = { plain: "Plain JAX", jaxdet: "jaxdet" };

let model = {};
let running = null; // the AbortController of a run
const known = new Map(); // what is known of a request's bits: by its settings the digest, who said so, the fingerprint

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const plural = (count, word, words = `${word}s`) => `${count} ${count === 1 ? word : words}`;

function letter(index) {
  const name = String.fromCharCode(65 + (index % 26));
  return index < 26 ? name : name + Math.floor(index / 26);
}

// Settings, and the link that carries them.

function settings() {
  const found = {};
  for (const name of FIELDS) {
    const { value } = form.elements[name];
    found[name] = name === "prompt" ? value : Number(value);
  }
  return found;
}

const requestOf = (chosen) => JSON.stringify(REQUEST.map((name) => chosen[name]));

function linkOf(chosen, digest) {
  const carried = new URLSearchParams(chosen);
  if (digest) carried.set("digest", digest);
  carried.set("fingerprint", model.fingerprint);
  return `#${carried}`;
}

function readLink() {
  const carried = new URLSearchParams(location.hash.slice(1));
  if (!carried.has("prompt")) return;
  for (const name of FIELDS) if (carried.has(name)) form.elements[name].value = carried.get(name);
  showLoad();
  const digest = carried.get("digest");
  if (digest) {
    known.set(requestOf(settings()), { digest, who: "the link", fingerprint: carried.get("fingerprint") });
    say("This link says which bits jaxdet must give. Run it to compare.");
  }
}

function showLoad() {
  const load = Number(form.elements.load.value);
  byId("load-says").textContent =
    load === 1 ? "idle: every request runs alone" : `1 to ${load} requests share a batch`;
}

function say(text, failed = false) {
  byId("status").textContent = text;
  byId("status").className = failed ? "bad" : "";
}

// One column.

class Column {
  constructor(id, completions) {
    this.section = byId(id);
    this.name = NAMES[id];
    this.counts = null;
    this.completions = completions;
    this.section.querySelectorAll(".body").forEach((old) => old.remove());
    this.body = element("div", { className: "body" }, byId("column").content.cloneNode(true));
    this.section.append(this.body);
    this.find("progress").setAttribute("aria-label", `${this.name}: progress`);
    for (const strip of this.body.querySelectorAll(".strip")) {
      strip.setAttribute("aria-label", "nothing yet");
      for (let i = 0; i < completions; i++) strip.append(element("span"));
    }
  }

  find(selector) {
    return this.body.querySelector(selector);
  }

  progress(event, batches, tokens) {
    this.find("progress").value = (event.batch + event.step / tokens) / batches.length;
    if (event.size === null) return this.where("");
    const doing = event.step ? `token ${event.step}` : "the prompt";
    this.where(`batch ${event.batch + 1} of ${batches.length}, ${plural(event.size, "request")}: ${doing}`);
  }

  where(text) {
    this.find(".where").textContent = text || "\u00a0";
  }

  count(event) {
    this.counts = event;
    for (const total of this.body.querySelectorAll(".counts dd")) {
      const count = new Set(event[total.dataset.of]).size;
      total.textContent = count;
      total.previousElementSibling.textContent = WORDS[total.dataset.of][count === 1 ? 0 : 1];
    }
    for (const strip of this.body.querySelectorAll(".strip")) {
      const of = event[strip.dataset.of];
      const tally = {};
      of.forEach((index, place) => {
        const cell = strip.children[place];
        cell.textContent = letter(index);
        cell.className = `v${index % 8}`;
        cell.title = `in a batch of ${event.sizes[place]}`;
        tally[letter(index)] = (tally[letter(index)] ?? 0) + 1;
      });
      const told = Object.entries(tally).map(([name, count]) => `${name} ${plural(count, "time")}`);
      strip.setAttribute("aria-label", told.join(", "));
    }
    const findings = [
      ["Completions", `${event.outputs.length} of ${this.completions}`],
      ["Bits first differ", event.bits_differ_at === null ? "nowhere" : `in the ${VALUES} of token ${event.bits_differ_at}`],
      ["Texts first differ", event.diverges_at === null ? "nowhere" : `in token ${event.diverges_at}`],
    ];
    this.find(".findings").replaceChildren(
      ...findings.flatMap(([term, value]) => [
        element("dt", { textContent: term }),
        element("dd", { textContent: value }),
      ]),
    );
  }

  end(event) {
    this.find("progress").value = 1;
    this.where("");
    this.find(".findings").append(
      element("dt", { textContent: "Digest" }),
      element("dd", { className: "mono digest", textContent: event.digest ?? "needs https" }),
    );
    const title = event.tree.branches.length ? "Where the answers part" : "The answer";
    this.find(".tree").append(element("h3", { textContent: title }), ...this.node(event.tree, this.completions));
  }

  get summary() {
    const [texts, bits] = [this.counts.outputs, this.counts.bits].map((all) => new Set(all).size);
    return `${this.name}: ${plural(texts, "text")}, ${plural(bits, "set")} of bits`;
  }

  // The tree: nested lists, a branch for every token that some answers went on with.

  node(node, count) {
    const parts = [];
    if (node.text) parts.push(element("p", { className: "said" }, element("bdi", { textContent: node.text })));
    if (node.tokens.length) {
      const caption = `${plural(node.tokens.length, "token")}, ${plural(count, "completion")}: ${VALUES} to the last bit`;
      parts.push(element("details", {}, element("summary", { textContent: caption }), table(node.tokens)));
    }
    if (node.branches.length) {
      parts.push(element("ul", {}, ...node.branches.map((branch) => this.branch(branch))));
    }
    return parts;
  }

  branch(branch) {
    const batches = branch.batches.join(", ");
    const title = `${plural(branch.count, "completion")} of ${this.completions}, in batches of ${batches}`;
    const head = element("p", { className: "branch" }, element("strong", { textContent: title }));
    const logits = element("p", { className: "again", textContent: `Token ${branch.at}, as they saw it:` });
    return element("li", {}, head, logits, table(branch.candidates, branch.chosen), ...this.node(branch, branch.count));
  }
}

function table(tokens, chosen) {
  const head = element("tr", {});
  for (const name of ["Token", HEADING, "Seen by"]) head.append(element("th", { scope: "col", textContent: name }));
  const rows = tokens.map((token) => {
    const row = element("tr", { className: token.id === chosen ? "chosen" : "" });
    const text = token.piece === "" ? "(the end)" : JSON.stringify(token.piece);
    const piece = element("td", { title: `id ${token.id}` }, element("bdi", { textContent: text }));
    if (token.id === chosen) piece.append(" ← chosen");
    const values = element("td", { className: "mono" });
    const counts = element("td", { className: "mono" });
    for (const logit of token.logits) {
      const hex = element("span", { className: "hex", textContent: logit.hex });
      values.append(element("div", {}, `${logit.decimal} `, hex));
      counts.append(element("div", { textContent: logit.count }));
    }
    if (!token.logits.length) values.append("not among the largest");
    row.append(piece, values, counts);
    return row;
  });
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
}

// A run.

async function run(chosen, signal) {
  const columns = {};
  let batches = [];
  let ended = false;
  for await (const event of events(chosen, signal)) {
    const column = columns[event.column];
    if (event.event === "start") {
      batches = event.batches;
      for (const name of COLUMNS) columns[name] = new Column(name, chosen.completions);
    } else if (event.event === "progress") column.progress(event, batches, chosen.max_tokens);
    else if (event.event === "answers") column.count(event);
    else if (event.event === "column") {
      column.end(event);
      if (event.column === "jaxdet") judge(chosen, event.digest);
    } else if (event.event === "error") throw new Error(event.message);
    else if (event.event === "end") ended = true;
  }
  if (!ended) throw new Error("the server went away before the end");
  say(`Done. ${COLUMNS.map((name) => columns[name].summary).join(". ")}.`);
}

function judge(chosen, digest) {
  const request = requestOf(chosen);
  const before = digest && known.get(request);
  const verdict = byId("verdict");
  if (before) {
    const same = before.digest === digest;
    const other = before.fingerprint !== model.fingerprint;
    const blame = other
      ? `The link was made with ${before.fingerprint}, this is ${model.fingerprint}: ` +
        "other weights, another dtype, backend or kind of machine."
      : "The fingerprint is the same, so this must not happen: please report it.";
    verdict.textContent = same
      ? `✓ jaxdet gave the same bits as ${before.who}: ${digest.slice(0, 16)}…`
      : `✗ jaxdet gave other bits than ${before.who}. ${blame}`;
    verdict.className = `verdict ${same ? "good" : "bad"}`;
  }
  verdict.hidden = !before;
  if (digest && !before) known.set(request, { digest, who: "the run before", fingerprint: model.fingerprint });
  history.replaceState(null, "", linkOf(chosen, digest));
  byId("link").value = location.href;
  byId("share").hidden = false;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const go = byId("go");
  running = new AbortController();
  go.textContent = "Stop";
  byId("verdict").hidden = byId("share").hidden = true;
  say("Running. Programs for new batch sizes are compiled first, which can take a while.");
  try {
    await run(settings(), running.signal);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error.message, true);
  } finally {
    running = null;
    go.textContent = "Run";
  }
});

form.elements.load.addEventListener("input", showLoad);
addEventListener("hashchange", readLink);
byId("share").addEventListener("submit", (event) => event.preventDefault());
byId("copy").addEventListener("click", async () => {
  byId("link").select();
  try {
    await navigator.clipboard.writeText(byId("link").value);
    say("Link copied.");
  } catch {
    say("The link is selected; copy it from there."); // browsers allow the clipboard on secure pages only
  }
});

async function introduce() {
  try {
    model = await facts();
    const { name, dtype, backend, numerics_version: numerics, fingerprint } = model;
    const said = [name, dtype, backend && `backend ${backend}`, numerics && `numerics version ${numerics}`, fingerprint];
    byId("facts").textContent = said.filter(Boolean).join(" · ");
    if (byId("status").className === "bad") say("");
  } catch (error) {
    byId("key-field").hidden = !error.wantsKey;
    say(error.message, true);
  }
}

const alone = !COLUMNS.includes("plain");
for (const part of document.querySelectorAll("[data-of-both]")) part.hidden = alone;
for (const part of document.querySelectorAll("[data-of-server]")) part.hidden = !alone;
form.elements.key.addEventListener("change", introduce);
showLoad();
readLink();
introduce();
