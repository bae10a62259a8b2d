"""Keeps requests made from the description from what no schema can say."""

import json
import os
import sys

import schemathesis
from schemathesis.generation import GenerationMode

# Things that exist, by the prefix of their ids; without them most calls would end at 404.
KNOWN = json.loads(os.environ["CORTEX_TEST_KNOWN"])


# RFC 8259 section 6 lets a receiver bound its numbers: here they are those of IEEE 754 double precision.
LARGEST = int(sys.float_info.max)


def plain(value):
    """1.0 is an integer to JSON Schema, and none to the hub; nor does a schema bound what it leaves open."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and abs(value) > LARGEST:
        return 10**300 if value > 0 else -(10**300)
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


@schemathesis.hook
def before_call(context, case, kwargs):
    query = case.query if isinstance(case.query, dict) else {}
    # Raw output, not followed: no task ends here, since the node is away.
    if case.path.endswith("/output"):
        for word in ("follow", "from_seq"):
            query.pop(word, None)
    # A request to be refused, in which nothing wrong was left: it is taken for what it is.
    if case.meta and "positive test case" in (getattr(case.meta.phase.data, "description", None) or ""):
        case.meta.generation.mode = GenerationMode.POSITIVE
    if case.meta is None or case.meta.generation.mode.is_positive:
        # Only the hub can make a cursor.
        query.pop("cursor", None)
        # Nor has the form of a selector a pattern: names may be of any script.
        if case.path == "/api/v1/nodes" and "select" in query:
            query["select"] = "os=linux,gpu"
        case.body = plain(case.body)
    # Any JSON may come to JSON-RPC, null as well: what is wrong with it stands in an answer with status 200.
    if case.meta and case.path in ("/", "/rpc") and case.body is None:
        case.meta.generation.mode = GenerationMode.POSITIVE
    # No test waits for a task that nobody runs.
    if isinstance(case.body, dict) and isinstance(case.body.get("wait_secs"), int) and 0 < case.body["wait_secs"] <= 60:
        case.body["wait_secs"] = 0
    # Every other well-formed id becomes one that is known, but the known node stays: most calls need it.
    given = case.path_parameters.get("id") if isinstance(case.path_parameters, dict) else None
    if case.path.startswith("/api/v1/nodes/") and (case.method == "DELETE" or case.path.endswith("/revoke")):
        given = None
    if isinstance(given, str) and "_" in given and given[-1] in "02468ace":
        case.path_parameters["id"] = KNOWN.get(given.split("_")[0], given)
