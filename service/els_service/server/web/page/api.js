// Requests to this server, with the token of this tab.

const KEY = "els-token";

export class ApiError extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

// A header takes no other characters, and tokens of the server have none.
export function setToken(token) {
  const sent = token.trim();
  if (!/^[\x21-\x7e]*$/.test(sent)) throw new ApiError(401, "A token has printable ASCII only.");
  sessionStorage.setItem(KEY, sent);
}

function headers(more = {}) {
  const token = sessionStorage.getItem(KEY);
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

async function check(response) {
  if (response.ok) return response;
  const text = await response.text();
  let reason = text;
  try {
    reason = JSON.parse(text).error;
  } catch {
    // Of a proxy, as it is.
  }
  throw new ApiError(response.status, reason || `status ${response.status}`);
}

export async function get(path) {
  return (await check(await fetch(path, { headers: headers() }))).json();
}

export async function post(path, body, signal) {
  const sent = {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  };
  return (await check(await fetch(path, sent))).json();
}

// Calls `onLine` with each line of the response as it arrives.
export async function stream(path, body, signal, onLine) {
  const response = await check(await fetch(path, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json", Accept: "application/x-ndjson" }),
    body: JSON.stringify(body),
    signal,
  }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const message = JSON.parse(line);
      if (message.error) throw new ApiError(0, message.error);
      await onLine(message);
    }
  }
}
