"""Rubbish and nearly right requests, made up from /openapi.json: no 5xx, no hang, nothing lost."""

from ch07_sglang_radix.serving.served import served
from tests.ch07.serving.openapi_fuzz import FLAGS, run


def test_whatever_comes_in_the_server_says_no_or_answers_and_lives(tmp_path):
    cases = 2000
    with served(*FLAGS, "--profile-dir", str(tmp_path)) as (url, _):
        fuzz = run(url, cases, derandomize=True)
    statuses = fuzz.statuses
    assert not fuzz.wrong
    assert sum(statuses.values()) >= cases
    assert sum(count for (path, status), count in statuses.items() if (path, status) == ("/generate", 200)) > cases / 50
    assert sum(count for (path, status), count in statuses.items() if (path, status) == ("/generate", 400)) > cases / 50
