// Runs of `jaxdet arena`: both columns, whose events the server sends.

export const COLUMNS = ["plain", "jaxdet"];
export const HEADING = "Logit";
export const VALUES = "logits";

export async function facts() {
  const { model, ...others } = await (await fetch("api/model")).json();
  return { name: model, ...others };
}

export async function* events(settings, signal) {
  const response = await fetch("api/run", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(settings),
    signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line.slice("data: ".length));
  }
}
