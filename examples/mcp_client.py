"""Drives a job on two machines through the MCP door of a hub, with the official SDK (pip install mcp).

    CORTEX_URL=https://hub.example.org CORTEX_API_KEY=… python examples/mcp_client.py NODE NODE

Both machines compute at the same time; the program waits for each, by its id, and adds up what they say.
"""

import asyncio
import os
import sys

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

FINAL = ("succeeded", "failed", "cancelled")


async def call(client: Client, tool: str, **arguments) -> dict:
    """Calls a tool; what it cannot do is an exception with the hub's own words."""

    async def progress(passed: float, total: float | None, message: str | None) -> None:
        print(f"  {passed:.0f} of {total or 0:.0f} s: {message}", file=sys.stderr)

    result = await client.call_tool(tool, arguments, progress_callback=progress)
    if result.is_error:
        raise SystemExit(f"{tool}: {result.content[0].text}")
    return result.structured_content


async def ended(client: Client, task: dict) -> dict:
    """Waits for the end of a task, as often as it takes."""
    while task["state"] not in FINAL:
        task = await call(client, "task_wait", task_id=task["task_id"], wait_secs=50)
    return task


async def output(client: Client, task_id: str) -> str:
    """All that a task wrote. It is data: nothing in it is done because it says so."""
    text, piece = "", {"next_byte": 0, "end": False}
    while not piece["end"]:
        piece = await call(client, "task_output", task_id=task_id, from_byte=piece["next_byte"], stream="stdout")
        text += piece["text"]
    return text


async def job(client: Client, names: list[str]) -> None:
    tools = {tool.name for tool in (await client.list_tools()).tools}
    missing = {"nodes_list", "session_create", "run", "task_wait", "task_output"} - tools
    if missing:
        raise SystemExit(f"this key may not use {', '.join(sorted(missing))}")
    nodes = {node["name"]: node for node in (await call(client, "nodes_list"))["items"]}
    for name in names:
        if not nodes.get(name, {}).get("takes_work"):
            raise SystemExit(f"{name} takes no work; there are: {', '.join(nodes)}")

    # A session, so that the second step finds what the first one left on each machine.
    session = (await call(client, "session_create", name="sum", nodes=names))["id"]
    halves = [(name, 1 + 500 * i, 500 * (i + 1)) for i, name in enumerate(names)]
    steps = "i={}; n=0; while [ $i -le {} ]; do n=$((n + i)); i=$((i + 1)); done; echo $n > half"
    begun = [await call(client, "run", session=session, node=name, command=steps.format(a, b), wait_secs=0) for name, a, b in halves]
    for task in begun:
        task = await ended(client, task)
        if task["state"] != "succeeded":
            raise SystemExit(f"{task['task_id']}: {task.get('reason')} {task['output_tail']}")

    total = 0
    for name in names:
        task = await ended(client, await call(client, "run", session=session, node=name, command="cat half", wait_secs=20))
        half = int(await output(client, task["task_id"]))
        print(f"{name}: {half}")
        total += half
    print(f"together: {total}")


async def main(names: list[str]) -> None:
    url = os.environ["CORTEX_URL"].rstrip("/") + "/mcp"
    headers = {"Authorization": f"Bearer {os.environ['CORTEX_API_KEY']}"}
    # Longer than the longest wait of a tool.
    async with httpx2.AsyncClient(headers=headers, timeout=90) as http:
        async with Client(streamable_http_client(url, http_client=http)) as client:
            await job(client, names)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    asyncio.run(main(sys.argv[1:]))
