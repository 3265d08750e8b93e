"""The manifest is what the published types allow, and fits the server that it starts; the entry maps names to flags."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from ch07_sglang_radix.serving.deploy.lws_entry import flags
from ch07_sglang_radix.serving.http_args import parse_args

ROOT = Path(__file__).parents[4]
HERE = ROOT / "ch07_sglang_radix" / "serving" / "deploy"
SCHEMA = json.loads((Path(__file__).parent / "leader_worker_set.schema.json").read_text(encoding="utf-8"))
SET, SERVICE = yaml.safe_load_all((HERE / "leader_worker_set.yaml").read_text(encoding="utf-8"))
TEMPLATE = SET["spec"]["leaderWorkerTemplate"]
LEADER, WORKER = (TEMPLATE[f"{who}Template"]["spec"]["containers"][0] for who in ("leader", "worker"))
POD = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "radix-0.radix", "MEET_PORT": "20000"}


def test_the_manifest_obeys_the_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(SET, SCHEMA)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "leaderWorkerTemplate", "sise"), 2),
        (("spec", "leaderWorkerTemplate", "size"), "2"),
        (("spec", "leaderWorkerTemplate", "size"), 0),
        (("spec", "leaderWorkerTemplate", "restartPolicy"), "Always"),
        (("spec", "startupPolicy"), "LeaderFirst"),
        (("apiVersion",), "leaderworkerset.x-k8s.io/v2"),
        (("spec", "leaderWorkerTemplate", "leaderTemplate", "spec", "terminationGracePeriod"), 75),
    ],
)
def test_the_schema_finds_what_is_wrong(where, value):
    wrong = copy.deepcopy(SET)
    place = wrong
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


def test_every_pod_has_flags_that_the_server_takes():
    for index in range(TEMPLATE["size"]):
        container = WORKER if index else LEADER
        environment = {one["name"]: one["value"] for one in container["env"]} | POD | {"LWS_WORKER_INDEX": str(index)}
        args = parse_args(flags(environment, container["args"]))
        assert (args.engine.nnodes, args.engine.node_rank) == (TEMPLATE["size"], index)
        assert args.engine.dist_init_addr == "radix-0.radix:20000"
        assert args.engine.tp_size % args.engine.nnodes == 0
        assert args.host == "0.0.0.0"
        assert args.enable_metrics


def test_probes_and_ports_are_the_server_s():
    args = parse_args(LEADER["args"])
    ports = {one["name"]: one["containerPort"] for one in LEADER["ports"]}
    assert ports == {"http": args.port, "meet": int(POD["MEET_PORT"])}
    routes = "".join((HERE.parent / name).read_text(encoding="utf-8") for name in ("control.py", "exposition.py"))
    probes = [LEADER[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
    annotations = TEMPLATE["leaderTemplate"]["metadata"]["annotations"]
    for path in {probe["path"] for probe in probes} | {annotations["prometheus.io/path"]}:
        assert f'"{path}"' in routes, path
    assert all(probe["port"] in ports for probe in probes)
    assert annotations["prometheus.io/port"] == str(args.port)


def test_a_pod_has_time_to_drain():
    drain = parse_args(LEADER["args"]).drain_timeout
    before = int(LEADER["lifecycle"]["preStop"]["exec"]["command"][1])
    for who in ("leader", "worker"):
        assert TEMPLATE[f"{who}Template"]["spec"]["terminationGracePeriodSeconds"] >= before + drain + 5


def test_the_service_leads_to_leaders_alone():
    assert SERVICE["spec"]["selector"].items() <= TEMPLATE["leaderTemplate"]["metadata"]["labels"].items()
    assert not SERVICE["spec"]["selector"].items() <= TEMPLATE["workerTemplate"]["metadata"]["labels"].items()
    assert SERVICE["spec"]["ports"][0]["targetPort"] in [one["name"] for one in LEADER["ports"]]


# --- the entry


def test_a_group_of_one_is_a_server_of_one_host():
    assert flags({"LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"}, ["--port", "1"]) == [
        "--port",
        "1",
        "--host",
        "0.0.0.0",
    ]


def test_a_host_of_the_user_s_own_stays():
    assert flags(POD, ["--host=::"])[0:1] == ["--host=::"]
    assert "0.0.0.0" not in flags(POD, ["--host=::"])


@pytest.mark.parametrize(
    ("change", "given", "said"),
    [
        ({"LWS_GROUP_SIZE": ""}, [], "LWS_GROUP_SIZE='' must be a whole number; a LeaderWorkerSet sets LWS_"),
        ({"LWS_WORKER_INDEX": "two"}, [], "LWS_WORKER_INDEX='two' must be a whole number"),
        ({"LWS_WORKER_INDEX": "2"}, [], r"LWS_WORKER_INDEX=2 is outside 0..1 \(LWS_GROUP_SIZE=2\)"),
        ({"LWS_LEADER_ADDRESS": ""}, [], "LWS_LEADER_ADDRESS is not set"),
        ({"MEET_PORT": ""}, [], "MEET_PORT='' must be a whole number"),
        ({}, ["--node-rank", "0"], "--node-rank comes from the LeaderWorkerSet; leave it out"),
        ({}, ["--nnodes=2"], "--nnodes comes from the LeaderWorkerSet; leave it out"),
    ],
)
def test_what_no_pod_can_have_is_one_line(change, given, said):
    with pytest.raises(ValueError, match=said):
        flags(POD | change, given)


def test_the_entry_becomes_the_server():
    """Its flags are looked at by launch_server itself, in the same process."""
    argv = [sys.executable, "-m", "ch07_sglang_radix.serving.deploy.lws_entry", "--no-such-flag"]
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env=os.environ | POD | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 1
    assert re.match(r"error: unknown flag '--no-such-flag'", done.stderr), done.stderr
