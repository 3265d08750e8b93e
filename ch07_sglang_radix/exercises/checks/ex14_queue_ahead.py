from types import ModuleType

from ch07_sglang_radix.exercises.checks.trees import a_req
from ch07_sglang_radix.request import Req
from common.request.end import End
from common.teaching.expect import ask, expect

STOP, ON_THE_GPU = 7, -1


def check(m: ModuleType) -> None:
    for what, output, pending, most, ended, want in (
        ("its last token is known", [8], 0, 9, False, (3, 8)),
        ("its last token is on its way", [8], 1, 9, False, (4, ON_THE_GPU)),
        ("its first token is on its way, out of the prefill", [], 1, 9, False, (3, ON_THE_GPU)),
        ("two are on their way", [8, 5], 2, 9, False, (6, ON_THE_GPU)),
        ("one token is missing, and it is on its way", [8], 1, 2, False, None),
        ("two tokens are missing, one is on its way", [8], 1, 3, False, (4, ON_THE_GPU)),
        ("all are there", [8, 9], 0, 2, False, None),
        ("it has ended", [8, STOP], 1, 9, True, None),
    ):
        req = _running(output, pending, most)
        if ended:
            req.finish(End("stop", matched=STOP))
        before = req.pending, req.kv_len
        step = ask(m.queue_decode, [req], why="(request, position, token) for each that steps", several=True)
        said = f"{what} (prompt of 3, output {output}, pending {pending}, max_new_tokens {most})"
        expect(f"{said}: (position, token) it feeds in", [tuple(one[1:]) for one in step], [want] if want else [])
        after = (before[0] + 1, before[1] + 1) if want else before
        expect(f"{said}: pending and kv_len afterwards", (req.pending, req.kv_len), after)
        expect(f"{said}: output_ids, which nobody has looked at", req.output_ids, output)
    for depth in (1, 2):
        _play(m, depth)


def _running(output: list[int], pending: int, most: int, rid: int = 0) -> Req:
    """Its prompt is in; each token put out or on its way, but the newest, has been fed in again."""
    kv_len = 3 + len(output) + pending - 1
    return a_req(rid, [1, 2, 3], most, output_ids=list(output), pending=pending, kv_len=kv_len, stops=frozenset({STOP}))


def _play(m: ModuleType, depth: int) -> None:
    """A GPU that draws token 10 + position, or STOP, and a CPU that looks at it `depth` steps later."""
    said, most = f"a GPU, and a CPU that looks {depth} steps later: ", {0: 6, 1: 9, 2: 1, 3: 4}
    stops_at = {1: 6}  # request 1 draws STOP at position 6
    reqs = [_running([], 1, n, rid) for rid, n in most.items()]
    newest = dict.fromkeys(
        most, 12
    )  # what each drew last, known to the GPU alone: 10 + position of the prompt's last token
    line, fed = [[(req, 12) for req in reqs]], {rid: [] for rid in most}
    for number in range(40):
        want = [req.rid for req in reqs if not req.finish_reason and len(req.output_ids) + req.pending < most[req.rid]]
        step = ask(m.queue_decode, list(reqs), why="(request, position, token) for each that steps", several=True)
        expect(f"{said}requests of step {number}", [req.rid for req, *_ in step], want)
        drawn = []
        for req, position, token in step:
            if token != ON_THE_GPU:
                expect(f"{said}token that request {req.rid} feeds in at {position}", token, newest[req.rid])
            fed[req.rid].append(position)
            newest[req.rid] = STOP if stops_at.get(req.rid) == position else 10 + position
            drawn.append((req, newest[req.rid]))
        line.append(drawn)
        while len(line) > depth or (line and not step):
            for req, token in line.pop(0):
                req.pending -= 1
                if not req.finish_reason:
                    req.take_token(token, None)
        if not step and not line:
            break
    for rid, n in most.items():
        positions = list(range(3, 3 + n - 1)) if rid not in stops_at else list(range(3, stops_at[rid] + depth + 1))
        expect(f"{said}positions that request {rid} was computed at, each once", fed[rid], positions)
    lengths = [len(req.output_ids) for req in reqs]
    expect(f"{said}lengths of the answers", lengths, [6, 5, 1, 4])
