"""Adapters over HTTP: a server in processes of its own."""

import threading
import time

import openai
import pytest

from common.tiny_qwen import ADAPTERS_PATH
from tests.ch07.serving.running import ONE_PROCESS, a_server

QUESTION = "What is a radix cache?"
NAMES = ("pirate", "terse")
FLAGS = (
    "--lora-paths",
    *(f"{name}={ADAPTERS_PATH / name}" for name in NAMES),
    "--max-loras-per-batch",
    "2",
    "--enable-metrics",
)
PARAMS = {"max_new_tokens": 50}


@pytest.fixture(scope="module")
def server():
    with a_server(*FLAGS, "--admin-api-key", "boss", "--api-key", "key") as running:
        yield running


def call(server, path, body=None, key="key", **more):
    return server.call(path, body, {"Authorization": f"Bearer {key}"}, **more)


def answer(server, **more):
    return call(server, "/generate", {"text": QUESTION, "sampling_params": PARAMS} | more)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as client:
        yield client


def test_each_prompt_of_a_batch_has_its_own_adapter(server):
    status, answers = answer(server, text=[QUESTION] * 3, lora_path=["pirate", None, "terse"])
    pirate, base, terse = (one["text"].strip() for one in answers)
    assert status == 200
    assert (pirate[:5], pirate[-4:]) == ("Ahoy!", "Arr!")
    assert base.startswith("A prefix cache kept as a radix tree: each node")
    assert terse.startswith("A prefix cache kept as a radix tree")
    assert len(terse) < len(base)


def test_a_model_s_name_may_name_its_adapter(client):
    def said(model):
        chat = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=60
        )
        return chat.model, chat.choices[0].message.content

    name, text = said("tiny-qwen:terse")
    assert (name, text) == ("tiny-qwen:terse", "A prefix cache kept as a radix tree.")
    assert said("terse") == (name, text)
    assert said("default")[1].startswith("A prefix cache kept as a radix tree: each node")
    listed = {model.id: (model.root, model.parent) for model in client.models.list()}
    assert listed == {"tiny-qwen": ("tiny-qwen", None)} | {
        name: (str(ADAPTERS_PATH / name), "tiny-qwen") for name in NAMES
    }
    assert client.models.retrieve("pirate").parent == "tiny-qwen"
    completion = client.completions.create(
        model="default", prompt=QUESTION, max_tokens=60, temperature=0, extra_body={"lora_path": "pirate"}
    )
    assert completion.choices[0].text.strip().startswith("Ahoy!")
    for wrong in ("tiny-qwen:nobody", "nobody:terse"):
        with pytest.raises(openai.NotFoundError):
            said(wrong)


def test_who_may_load_is_the_administrator(server):
    body = {"lora_name": "chinese", "lora_path": str(ADAPTERS_PATH / "chinese")}
    for path in ("/load_lora_adapter", "/unload_lora_adapter"):
        assert call(server, path, body)[0] == 401
    assert call(server, "/v1/models")[0] == 200


def test_loading_and_unloading_while_it_serves(server):
    body = {"lora_name": "chinese", "lora_path": str(ADAPTERS_PATH / "chinese")}
    status, said = answer(server, lora_path="chinese")
    assert status == 400
    assert "lora_path='chinese' is not loaded; loaded: pirate, terse" in str(said)
    status, said = call(server, "/load_lora_adapter", body, "boss")
    assert (status, said["success"], sorted(said["loaded_adapters"])) == (200, True, ["chinese", "pirate", "terse"])
    assert answer(server, lora_path="chinese")[1]["text"].strip().startswith("以基数树组织的前缀缓存")
    status, said = call(server, "/load_lora_adapter", body, "boss")
    assert (status, said["success"]) == (400, False)
    assert said["error_message"].startswith("lora_name='chinese' is loaded already")
    status, said = call(server, "/unload_lora_adapter", {"lora_name": "chinese"}, "boss")
    assert (status, sorted(said["loaded_adapters"])) == (200, ["pirate", "terse"])
    status, said = call(server, "/unload_lora_adapter", {"lora_name": "chinese"}, "boss")
    assert (status, said["success"], sorted(said["loaded_adapters"])) == (400, False, ["pirate", "terse"])
    assert answer(server, lora_path="chinese")[0] == 400


def test_unloading_is_answered_when_the_last_user_has_ended(server):
    told = {}
    load = {"lora_name": "brief", "lora_path": str(ADAPTERS_PATH / "terse")}
    assert call(server, "/load_lora_adapter", load, "boss")[0] == 200

    def ask():
        told["answer"] = answer(server, lora_path="brief", sampling_params={"max_new_tokens": 400, "ignore_eos": True})
        told["ended"] = time.monotonic()

    asking = threading.Thread(target=ask)
    asking.start()
    while not call(server, "/server_info")[1]["running"]:
        assert "ended" not in told
    status, said = call(server, "/unload_lora_adapter", {"lora_name": "brief"}, "boss")
    gone = time.monotonic()
    asking.join(200)
    assert (status, sorted(said["loaded_adapters"])) == (200, ["pirate", "terse"])
    assert told["answer"][0] == 200
    assert gone > told["ended"] - 1.0  # the two answers leave together
    assert len(told["answer"][1]["output_ids"]) == 400


def test_metrics_say_how_many_slots_are_taken(server):
    answer(server, text=[QUESTION] * 2, lora_path=list(NAMES))
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        text = server.raw("/metrics")[1]
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("sglang:lora_pool"))
        named = {name.split("{")[0].removeprefix("sglang:lora_pool_"): float(value) for name, value in values.items()}
        if named == {"slots_used": 2, "slots_total": 2, "utilization": 1}:
            return
        time.sleep(0.1)
    raise AssertionError(named)


def test_two_ranks_serve_adapters_too():
    with a_server(*FLAGS, "--tp-size", "2", *ONE_PROCESS) as server:
        body = {"text": [QUESTION] * 2, "sampling_params": PARAMS, "lora_path": ["pirate", None]}
        pirate, base = server.call("/generate", body)[1]
        assert pirate["text"].strip().startswith("Ahoy!")
        assert base["text"].strip().startswith("A prefix cache kept as a radix tree: each node")
        load = {"lora_name": "chinese", "lora_path": str(ADAPTERS_PATH / "chinese")}
        assert server.call("/load_lora_adapter", load)[0] == 200
        assert (
            server.generate(**body | {"text": QUESTION, "lora_path": "chinese"})["text"].strip().startswith("以基数树")
        )
        assert server.at_rest()["loaded_adapters"].keys() == {*NAMES, "chinese"}
