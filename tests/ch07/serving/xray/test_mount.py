"""The page in a real server: its stream comes from the scheduler's process, and ends with the server."""

import http.client
import json
from urllib.parse import urlsplit

import pytest

from tests.ch07.serving.running import a_server


@pytest.mark.parametrize("flags", [(), ("--single-process",)], ids=["processes", "one process"])
def test_the_stream_tells_of_the_engine_and_ends_with_the_server(flags):
    with a_server(*flags) as server:
        assert "<title>X-ray" in server.raw("/")[1], "the printed address leads to the page"
        assert server.call("/xray/source")[1]["kind"] == "live"
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=200)
        connection.request("GET", "/xray/events")
        stream = connection.getresponse()

        def event():
            while not (line := stream.readline()).startswith(b"data: "):
                assert line, "the stream has ended"
            return json.loads(line.removeprefix(b"data: "))

        first = event()
        assert (first["type"], first["state"]["requests"]) == ("snapshot", {})
        assert server.call("/health")[0] == 200, "a probe is no request"
        server.generate(text="What is a page?", sampling_params={"max_new_tokens": 4})
        seen = {}
        while not any(row and row.get("phase") == "done" for row in seen.values()):
            for rid, row in event()["change"].get("requests", {}).items():
                seen[rid] = row and seen.get(rid, {}) | row
        assert list(seen) == ["0"]
        assert seen["0"]["out"] == 4
        assert server.end() == 0
        while stream.readline():
            pass
        connection.close()


def test_with_a_key_the_page_comes_without_it_and_the_prompts_do_not():
    with a_server("--api-key", "secret", "--single-process") as server:
        assert server.raw("/xray")[0] == 200
        assert server.raw("/xray/xray.js")[0] == 200
        assert server.raw("/xray/events")[0] == 401
        assert server.raw("/xray", headers={"Host": "evil.example"})[0] == 403
