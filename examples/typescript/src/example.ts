/**
 * Runs a command on a node of a hub and shows it as it goes: node out/example.js [NODE]
 *
 * CORTEX_URL names the hub; CORTEX_API_KEY, or CORTEX_USERNAME and CORTEX_PASSWORD, say who is asking.
 */

import { Cortex, Refused, type LiveEvent, type Schemas, type Task } from "./cortex-mesh.js";

const SCRIPT = 'echo "hello from $(uname -s)"; for i in 1 2 3; do echo "line $i"; done; echo "a warning" >&2';

async function main(): Promise<number> {
  const { CORTEX_URL: url = "http://127.0.0.1:8080", CORTEX_API_KEY: key, CORTEX_USERNAME, CORTEX_PASSWORD } = process.env;
  const hub = key ? new Cortex(url, key) : await Cortex.logIn(url, CORTEX_USERNAME ?? "", CORTEX_PASSWORD ?? "");
  const me = await hub.call<Schemas["MeReply"]>("GET", "/auth/me");
  console.log(`I am ${me.user.username}, ${me.role}`);

  const wanted = process.argv[2];
  let node: Schemas["NodeView"] | undefined;
  for await (const each of hub.items<Schemas["NodeView"]>("/nodes")) {
    console.log(`node ${each.name}: ${each.status}`);
    if (each.schedulable.ok && (wanted === undefined || wanted === each.name)) node ??= each;
  }
  if (!node) throw new Error(wanted === undefined ? "no node takes work" : `${wanted} is no node that takes work`);

  const session = await hub.call<Schemas["SessionView"]>("POST", "/sessions", { name: "typescript example" });
  console.log(`session ${session.id}`);
  await hub.call("PUT", `/sessions/${session.id}/nodes/${node.id}`);

  // The events are opened first, so that none of the task is missed.
  const ours = (event: LiveEvent) => (event.data as { session_id?: string | null }).session_id === session.id;
  let opened = () => {};
  const ready = new Promise<void>((resolve) => (opened = resolve));
  const watched = (async () => {
    for await (const event of hub.events(["tasks"], () => opened())) {
      // A reset says that events were missed: what is now stands in the lists.
      if (event.type === "reset" || !ours(event)) continue;
      console.log(`event ${event.type}`);
      if (event.type === "ended") return;
    }
  })();
  await Promise.race([ready, watched]);

  const dispatch: Schemas["DispatchRequest"] = { node: node.id, shell: { argv: ["sh", "-c", SCRIPT] } };
  const task = await hub.call<Task>("POST", `/sessions/${session.id}/dispatch`, dispatch);
  console.log(`task ${task.id}`);

  const pending: Record<string, Buffer> = {};
  const ended = await hub.follow(task.id, (stream, data) => {
    // Pieces end anywhere; lines are shown whole.
    let rest = Buffer.concat([pending[stream] ?? Buffer.alloc(0), data]);
    for (let at = rest.indexOf("\n"); at >= 0; at = rest.indexOf("\n")) {
      console.log(`${stream}: ${rest.subarray(0, at)}`);
      rest = rest.subarray(at + 1);
    }
    pending[stream] = rest;
  });
  for (const [stream, rest] of Object.entries(pending)) if (rest.length) console.log(`${stream}: ${rest}`);
  await watched;
  console.log(`${ended.state}, exit code ${ended.exit_code}`);
  await hub.call("DELETE", `/sessions/${session.id}`);
  return ended.state === "succeeded" ? 0 : 1;
}

main().then(
  (code) => (process.exitCode = code),
  (error: unknown) => {
    console.error(error instanceof Refused ? `refused: ${error.message}` : error);
    process.exitCode = 1;
  },
);
