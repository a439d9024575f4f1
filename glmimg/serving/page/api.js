// Calls to the server this page came from, and the events of a stream. Paths are relative: it may lie below a prefix.

export function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// In place of a browser's "Failed to fetch" and "network error".
async function heard(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer: is it running?");
  }
}

export async function get(path) {
  const response = await heard(fetch(path, { headers: headers() }));
  if (!response.ok) throw await problem(response);
  return response.json();
}

async function problem(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no JSON: the status has to do */ }
  const wait = response.headers.get("Retry-After");
  const error = new Error(wait ? `${message} (in ${wait} s)` : message);
  error.status = response.status;
  return error;
}

// Sends fields (and files, as a form) and hands each event to `told`. Rejects with what the server said was wrong.
export async function stream(path, fields, files, told, signal) {
  let body, type = {};
  if (files.length) {
    body = new FormData();
    for (const [name, value] of Object.entries(fields)) {
      body.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
    }
    for (const file of files) body.append("image[]", file, file.name || "reference.png");
  } else {
    body = JSON.stringify(fields);
    type = { "Content-Type": "application/json" };
  }
  const response = await heard(fetch(path, { method: "POST", body, signal, headers: { ...headers(), ...type } }));
  if (!response.ok) throw await problem(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await heard(reader.read());
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((one) => one.startsWith("data: "));
      if (!line) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      told(event);
    }
  }
}

// The same request as a line for a shell.
export function curl(path, fields, files) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl ${new URL(path, document.baseURI)}`];
  if (sessionStorage.getItem("key")) lines.push('-H "Authorization: Bearer $GLMIMG_KEY"');
  if (files.length) {
    for (const [name, value] of Object.entries(fields)) {
      lines.push(`--form-string ${quoted(`${name}=${typeof value === "object" ? JSON.stringify(value) : value}`)}`);
    }
    files.forEach((file, k) => lines.push(`-F ${quoted(`image[]=@${file.name || `reference-${k + 1}.png`}`)}`));
  } else {
    lines.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(fields))}`);
  }
  return lines.join(" \\\n  ");
}
