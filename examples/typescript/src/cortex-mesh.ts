/** A small client of a Cortex Mesh hub: REST, output as it comes, and live events over a WebSocket. */

import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import WebSocket from "ws";
import type { components } from "./api.js";

export type Schemas = components["schemas"];
export type Task = Schemas["TaskView"];
export type LiveEvent = Schemas["EventView"];

/** Close codes that mean: come back with the last id. 1001 the hub stops, 1006 it is gone, 1013 we were too slow. */
const COME_BACK = [1001, 1006, 1013];

/** The hub said no. `code` is for programs, `detail` for people, `request_id` to ask an operator with. */
export class Refused extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    readonly detail: string,
    readonly requestId = "",
  ) {
    super(`${status} ${code}: ${detail} (request ${requestId})`);
  }
}

/** One hub, as one caller. */
export class Cortex {
  /** @param token an API key or an access token */
  constructor(
    private readonly url: string,
    private readonly token?: string,
  ) {}

  /** With a password. The token is good for ten minutes; long programs use an API key. */
  static async logIn(url: string, username: string, password: string): Promise<Cortex> {
    const given: Schemas["LoginRequest"] = { username, password, device_name: "typescript example" };
    const tokens = await new Cortex(url).call<{ access_token: string }>("POST", "/auth/login", given);
    return new Cortex(url, tokens.access_token);
  }

  /** One call of /api/v1. What is made is made once, however often the request has to be sent. */
  async call<T>(method: string, path: string, body?: unknown): Promise<T> {
    const headers: Record<string, string> = method === "POST" ? { "Idempotency-Key": randomUUID() } : {};
    for (let tries = 5; ; tries--) {
      const answer = await this.fetch(method, path, headers, body);
      const wait = answer.headers.get("retry-after");
      if (answer.ok) {
        const text = await answer.text();
        return (text ? JSON.parse(text) : undefined) as T;
      }
      if (wait === null || tries === 1) throw await refused(answer);
      await sleep(Number(wait) * 1000);
    }
  }

  /** All items of a list, page by page. */
  async *items<T>(path: string): AsyncGenerator<T> {
    for (let cursor = ""; ; ) {
      const query = new URLSearchParams({ limit: "100", ...(cursor && { cursor }) });
      const page = await this.call<{ items: T[]; next_cursor: string | null }>("GET", `${path}?${query}`);
      yield* page.items;
      if (page.next_cursor === null) return;
      cursor = page.next_cursor;
    }
  }

  /**
   * Gives each piece of output to `write` as it comes; resolves to the task as it ended. A broken stream is taken
   * up again after the last piece that came.
   */
  async follow(taskId: string, write: (stream: string, data: Buffer) => void): Promise<Task> {
    for (let last = ""; ; await sleep(1000)) {
      const headers = { Accept: "text/event-stream", ...(last && { "Last-Event-ID": last }) };
      try {
        const answer = await this.fetch("GET", `/tasks/${taskId}/output`, headers);
        if (answer.status === 503) continue;
        if (!answer.ok || !answer.body) throw await refused(answer);
        for await (const { name, id, data } of serverSent(answer.body)) {
          if (name === "output") {
            const piece = data as Schemas["OutputEvent"];
            write(piece.stream, Buffer.from(piece.data_base64, "base64"));
            last = id;
          } else if (name === "end") {
            return (data as Schemas["EndEvent"]).task;
          } else if (name === "denied") {
            const end = data as Schemas["StreamEnd"];
            throw new Refused(403, end.code, end.detail);
          }
        }
      } catch (error) {
        if (error instanceof Refused) throw error;
      }
    }
  }

  /** Live events, without end. `opened` is called once nothing more can be missed. */
  async *events(topics: string[], opened?: () => void): AsyncGenerator<LiveEvent> {
    for (let after = ""; ; await sleep(1000)) {
      const query = new URLSearchParams({ topics: topics.join(","), ...(after && { after }) });
      // Credentials go into the header, never into the address.
      const socket = new WebSocket(`${this.url.replace(/^http/, "ws")}/api/v1/ws?${query}`, { headers: this.headers() });
      const queue: LiveEvent[] = [];
      let wake = () => {};
      let end: Error | "come back" | undefined;
      socket.on("open", () => opened?.());
      socket.on("message", (text) => (queue.push(JSON.parse(String(text)) as LiveEvent), wake()));
      socket.on("unexpected-response", (_, answer) => {
        end = answer.statusCode === 503 ? "come back" : new Refused(answer.statusCode ?? 0, "refused", "no live events");
        answer.destroy();
        wake();
      });
      socket.on("error", () => ((end ??= "come back"), wake()));
      socket.on("close", (code, why) => {
        end ??= COME_BACK.includes(code) ? "come back" : new Refused(403, "closed", String(why));
        wake();
      });
      try {
        for (;;) {
          const event = queue.shift();
          if (event) {
            after = event.id;
            yield event;
          } else if (end) {
            break;
          } else {
            await new Promise<void>((resolve) => (wake = resolve));
          }
        }
      } finally {
        socket.terminate();
      }
      if (end instanceof Error) throw end;
    }
  }

  private headers(): Record<string, string> {
    return this.token ? { Authorization: `Bearer ${this.token}` } : {};
  }

  private fetch(method: string, path: string, headers: Record<string, string>, body?: unknown): Promise<Response> {
    const init: RequestInit = { method, headers: { ...this.headers(), ...headers } };
    if (body !== undefined) {
      init.headers = { ...init.headers, "Content-Type": "application/json" };
      init.body = JSON.stringify(body);
    }
    return fetch(`${this.url}/api/v1${path}`, init);
  }
}

async function refused(answer: Response): Promise<Refused> {
  const problem = (await answer.json().catch(() => ({}))) as Partial<Schemas["Problem"]>;
  return new Refused(answer.status, problem.code ?? "", problem.detail ?? answer.statusText, problem.request_id);
}

/** Server-sent events, one after the other, until the stream ends. */
async function* serverSent(body: ReadableStream<Uint8Array>): AsyncGenerator<{ name: string; id: string; data: unknown }> {
  const decoder = new TextDecoder();
  let text = "";
  for await (const piece of body) {
    text += decoder.decode(piece, { stream: true });
    for (let at = text.indexOf("\n\n"); at >= 0; at = text.indexOf("\n\n")) {
      const lines = text.slice(0, at).split("\n");
      text = text.slice(at + 2);
      const field = (name: string) => lines.find((l) => l.startsWith(`${name}: `))?.slice(name.length + 2);
      const data = field("data");
      if (data !== undefined) yield { name: field("event") ?? "", id: field("id") ?? "", data: JSON.parse(data) };
    }
  }
}
