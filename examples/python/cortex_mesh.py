"""A small client of a Cortex Mesh hub: REST, output as it comes, and live events over a WebSocket."""

import base64
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

# Close codes that mean: come back with the last id. 1001 the hub stops, 1006 it is gone, 1013 we were too slow.
COME_BACK = (1001, 1006, 1013)


class Refused(Exception):
    """The hub said no. `code` is for programs, `detail` for people, `request_id` to ask an operator with."""

    def __init__(self, status, problem):
        self.status, self.code, self.detail = status, problem.get("code", ""), problem.get("detail", "")
        self.request_id = problem.get("request_id", "")
        super().__init__(f"{status} {self.code}: {self.detail} (request {self.request_id})")


class Cortex:
    """One hub, as one caller. `token` is an API key or an access token."""

    def __init__(self, url, token):
        self.url, self.token = url.rstrip("/"), token

    @classmethod
    def log_in(cls, url, username, password):
        """With a password. The token is good for ten minutes; long programs use an API key."""
        given = {"username": username, "password": password, "device_name": "python example"}
        return cls(url, cls(url, None).call("POST", "/auth/login", given)["access_token"])

    def call(self, method, path, body=None, tries=5):
        """One call of /api/v1. What is made is made once, however often the request has to be sent."""
        key = str(uuid.uuid4()) if method == "POST" else None
        while True:
            try:
                with self._open(method, path, body, {"Idempotency-Key": key} if key else {}) as answer:
                    text = answer.read()
                    return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                refused = self._refused(error)
                wait = error.headers.get("Retry-After")
                tries -= 1
                if wait is None or not tries:
                    raise refused from None
                time.sleep(int(wait))

    def items(self, path):
        """All items of a list, page by page."""
        cursor = None
        while True:
            query = {"limit": 100} | ({"cursor": cursor} if cursor else {})
            page = self.call("GET", f"{path}?{urllib.parse.urlencode(query)}")
            yield from page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def follow(self, task_id, write):
        """Gives each piece of output to write(stream, bytes) as it comes; returns the task as it ended.

        A broken stream is taken up again after the last piece that came."""
        last = None
        while True:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
            try:
                with self._open("GET", f"/tasks/{task_id}/output", None, headers) as stream:
                    for name, event_id, data in _events(stream):
                        if name == "output":
                            write(data["stream"], base64.b64decode(data["data_base64"]))
                            last = event_id
                        elif name == "end":
                            return data["task"]
                        elif name == "denied":
                            raise Refused(403, data)
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise self._refused(error) from None
            except (OSError, EOFError):
                pass
            time.sleep(1)

    def events(self, topics, opened=None):
        """Live events, without end. `opened()` is called once nothing more can be missed."""
        after = None
        while True:
            query = {"topics": ",".join(topics)} | ({"after": after} if after else {})
            url = "ws" + self.url.removeprefix("http") + "/api/v1/ws?" + urllib.parse.urlencode(query)
            try:
                # Credentials go into the header, never into the address.
                with connect(url, additional_headers={"Authorization": f"Bearer {self.token}"}) as socket:
                    if opened:
                        opened()
                        opened = None
                    for text in socket:
                        event = json.loads(text)
                        after = event["id"]
                        yield event
            except InvalidStatus as error:
                if error.response.status_code != 503:
                    raise Refused(error.response.status_code, json.loads(error.response.body or b"{}")) from None
            except ConnectionClosed as closed:
                frame = closed.rcvd
                if frame and frame.code not in COME_BACK:
                    raise Refused(403, {"code": "closed", "detail": frame.reason}) from None
            except OSError:
                pass
            time.sleep(1)

    def _open(self, method, path, body, headers):
        request = urllib.request.Request(f"{self.url}/api/v1{path}", method=method, headers=headers)
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps(body).encode()
        return urllib.request.urlopen(request, timeout=90)

    @staticmethod
    def _refused(error):
        try:
            return Refused(error.code, json.loads(error.read()))
        except ValueError:
            return Refused(error.code, {"detail": error.reason})


def _events(stream):
    """Server-sent events: (name, id, data). A stream that just breaks off is an EOFError."""
    fields = {}
    for line in stream:
        line = line.decode().rstrip("\n")
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        else:
            if "data" in fields:
                yield fields.get("event"), fields.get("id"), json.loads(fields["data"])
            fields = {}
    raise EOFError
