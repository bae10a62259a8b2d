"""Runs a command on a node of a hub and shows it as it goes: python3 example.py [NODE]

CORTEX_URL names the hub; CORTEX_API_KEY, or CORTEX_USERNAME and CORTEX_PASSWORD, say who is asking."""

import os
import sys
import threading

from cortex_mesh import Cortex, Refused

SCRIPT = 'echo "hello from $(uname -s)"; for i in 1 2 3; do echo "line $i"; done; echo "a warning" >&2'


def main():
    url = os.environ.get("CORTEX_URL", "http://127.0.0.1:8080")
    if key := os.environ.get("CORTEX_API_KEY"):
        hub = Cortex(url, key)
    else:
        hub = Cortex.log_in(url, os.environ["CORTEX_USERNAME"], os.environ["CORTEX_PASSWORD"])
    me = hub.call("GET", "/auth/me")
    print(f"I am {me['user']['username']}, {me['role']}")

    nodes = list(hub.items("/nodes"))
    for node in nodes:
        print(f"node {node['name']}: {node['status']}")
    wanted = sys.argv[1] if len(sys.argv) > 1 else None
    usable = [n for n in nodes if n["schedulable"]["ok"] and wanted in (None, n["name"])]
    if not usable:
        sys.exit("no node takes work" if wanted is None else f"{wanted} is no node that takes work")
    node = usable[0]

    session = hub.call("POST", "/sessions", {"name": "python example"})
    print(f"session {session['id']}")
    hub.call("PUT", f"/sessions/{session['id']}/nodes/{node['id']}")

    # The events are opened first, so that none of the task is missed.
    opened = threading.Event()

    def watch():
        for event in hub.events(["tasks"], opened.set):
            if event["type"] == "reset":
                # Events were missed: what is now stands in the lists.
                continue
            if event["data"]["session_id"] == session["id"]:
                print(f"event {event['type']}", flush=True)
                if event["type"] == "ended":
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    if not opened.wait(90):
        sys.exit("no live events came")

    shell = {"argv": ["sh", "-c", SCRIPT]}
    task = hub.call("POST", f"/sessions/{session['id']}/dispatch", {"node": node["id"], "shell": shell})
    print(f"task {task['id']}")
    pending = {"stdout": b"", "stderr": b""}

    def write(stream, data):
        # Pieces end anywhere; lines are shown whole.
        *lines, pending[stream] = (pending[stream] + data).split(b"\n")
        for line in lines:
            print(f"{stream}: {line.decode(errors='replace')}", flush=True)

    ended = hub.follow(task["id"], write)
    for stream, rest in pending.items():
        if rest:
            write(stream, b"\n")
    watcher.join(90)
    print(f"{ended['state']}, exit code {ended['exit_code']}")
    hub.call("DELETE", f"/sessions/{session['id']}")
    sys.exit(0 if ended["state"] == "succeeded" else 1)


if __name__ == "__main__":
    try:
        main()
    except Refused as refused:
        sys.exit(f"refused: {refused}")
