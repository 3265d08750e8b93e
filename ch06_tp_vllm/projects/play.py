"""An engine without a model: it schedules, checks that the step could be executed, and accounts for it as the real one does."""

from ch06_tp_vllm.block_manager import BlockManager
from ch06_tp_vllm.request import Request, RequestStatus
from ch06_tp_vllm.scheduler import ScheduledRequest, SchedulerOutput
from common.sampling.params import SamplingParams
from common.teaching.expect import ask, expect

MAX_STEPS = 5000
TILE = 16  # kernels and captured graphs compute whole tiles of tokens


class Play:
    """late: the tokens of a step are known only when the next one has been scheduled, as with async_scheduling.

    It remembers what was written to each slot: a request that starts behind blocks of others must find its own text there.
    """

    def __init__(
        self, scheduler_class: type, blocks: BlockManager, *, budget: int = 64, rows: int = 8, chunked: bool = True,
        late: bool = False, **options,
    ):  # fmt: skip
        self.blocks, self.rows, self.budget, self.late = blocks, rows, budget, late
        self.scheduler = scheduler_class(
            blocks, max_num_batched_tokens=budget, max_num_seqs=rows, enable_chunked_prefill=chunked, settle=self.settle,
            **options,
        )  # fmt: skip
        self.requests: list[Request] = []
        self.steps = self.padded_tokens = self.tokens = 0
        self.written: dict[int, int | None] = {}  # slot -> _prefixes of the token whose K and V it has
        self._queued: list[Request] = []  # who gets a token out of the step that nobody has looked at

    def add(
        self, prompt: list[int], max_new_tokens: int, priority: int = 0, stops: frozenset[int] = frozenset()
    ) -> Request:
        """The n-th request is called "rn". stops: tokens that end it, which nobody knows before they are seen."""
        number, params = len(self.requests), SamplingParams(max_new_tokens=max_new_tokens)
        request = Request(f"r{number}", 0, prompt, params, seed=0, arrival=number, priority=priority, stops=stops)
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    @property
    def busy(self) -> bool:
        return any(not request.status.finished for request in self.requests)

    def run(self) -> None:
        """To the end of all requests."""
        while self.busy:
            assert self.steps < MAX_STEPS, f"got no end after {MAX_STEPS} steps, wanted {len(self.requests)} answers"
            self.step()

    def step(self) -> SchedulerOutput:
        """One iteration; AssertionError if it could not be executed."""
        before = {request: request.row for request in self.scheduler.running}
        output = ask(self.scheduler.schedule)
        self._check_step(output, before)
        if not output.scheduled and not self._queued and self.busy:
            waiting = [self.name(request) for request in self.scheduler.waiting]
            raise AssertionError(f"got an empty step, wanted one: nothing is on its way, and {waiting} wait")
        self._compute(output)
        emitting = []
        for request, num_computed, num_new, emits in output.scheduled:
            request.num_blocks_sent = len(request.block_table)
            request.num_computed_tokens = num_computed + num_new
            self._name_blocks(request)
            if emits:
                emitting.append(request)
        for request in emitting:
            request.pending, request.drawn_here = request.pending + 1, True
        if not self.late:
            self._queued = emitting
            self.settle()
        else:
            self.settle()
            self._queued = emitting
        self.blocks.check(self.scheduler.running)
        self.steps += bool(output.scheduled)
        self.tokens += output.num_tokens
        self.padded_tokens += -(-output.num_tokens // TILE) * TILE
        return output

    def settle(self) -> None:
        """Look at the tokens of the step that was queued last."""
        queued, self._queued = self._queued, []
        for request in queued:
            request.pending -= 1
            if request.status.finished:
                continue
            token = sum(request.all_token_ids) % 997
            request.output_token_ids.append(token)
            if token in request.stops:
                request.status = RequestStatus.FINISHED_STOPPED
            elif len(request.output_token_ids) >= request.params.max_new_tokens:
                request.status = RequestStatus.FINISHED_LENGTH_CAPPED
            self._name_blocks(request)
            if request.status.finished:
                self.scheduler.finish(request)

    def _compute(self, output: SchedulerOutput) -> None:
        """As in every layer: the K and V of all new tokens are written, then each attends to all before it."""
        for s in output.scheduled:
            stop, prefixes = s.num_computed + s.num_new, _prefixes(s.request)
            slots = self.blocks.slot_mapping(s.request, s.num_computed, stop)
            self.written.update(zip(slots, prefixes[s.num_computed : stop], strict=True))
        for s in output.scheduled:
            prefixes = _prefixes(s.request)
            for i, slot in enumerate(self.blocks.slot_mapping(s.request, 0, s.num_computed)):
                there = self.written.get(slot, "nothing")
                if there not in (prefixes[i], None):
                    block = s.request.block_table[i // self.blocks.block_size]
                    what = "nothing" if there == "nothing" else "another text"
                    expect(
                        f"{self.name(s.request)} attends to its token {i} in block {block}: there is",
                        what,
                        "what it wrote or shares",
                    )

    def name(self, request: Request) -> str:
        return request.group

    def _name_blocks(self, request: Request) -> None:
        # the last token of a finished request was never fed in, or in a step too many
        known = len(request.prompt_token_ids) + len(request.output_token_ids) - request.status.finished
        self.blocks.cache_full_blocks(request, min(request.num_computed_tokens, known))

    def _check_step(self, output: SchedulerOutput, before: dict[Request, int]) -> None:
        expect("what schedule returns", type(output).__name__, "SchedulerOutput")
        kinds = sorted({type(s).__name__ for s in output.scheduled} or {"ScheduledRequest"})
        expect("what `scheduled` is a list of", kinds, ["ScheduledRequest"])
        names = [self.name(s.request) for s in output.scheduled]
        expect("requests that take part twice", sorted({name for name in names if names.count(name) > 1}), [])
        for scheduled in output.scheduled:
            self._check_one(scheduled, before)
        assert output.num_tokens <= self.budget, (
            f"tokens of a step: got {output.num_tokens}, wanted at most {self.budget}"
        )
        running, waiting = self.scheduler.running, self.scheduler.waiting
        rows = sorted([request.row for request in running] + self.scheduler.free_rows)
        expect("rows of running requests and free rows together", rows, list(range(self.rows)))
        alive = [self.name(request) for request in self.requests if not request.status.finished]
        expect("running and waiting requests together", sorted(map(self.name, [*running, *waiting])), sorted(alive))
        for request in waiting:
            held = len(request.block_table), request.num_computed_tokens, request.row
            expect(f"blocks, num_computed_tokens and row of {self.name(request)}, which waits", held, (0, 0, -1))

    def _check_one(self, scheduled: ScheduledRequest, before: dict[Request, int]) -> None:
        request, num_computed, num_new, emits = scheduled
        who = f"{self.name(request)} ({request.num_computed_tokens} of {request.num_tokens} tokens computed)"
        expect(f"is {who}, which is scheduled, one of `running`", request in self.scheduler.running, True)
        expect(f"status of {who}, which is scheduled", request.status.name, "RUNNING")
        expect(f"num_computed of {who}", num_computed, request.num_computed_tokens)
        lacks = request.num_tokens - request.num_computed_tokens
        expect(f"is num_new={num_new} of {who} from 1 to {lacks}", 1 <= num_new <= lacks, True)
        slots = len(request.block_table) * self.blocks.block_size
        assert num_computed + num_new <= slots, f"slots of {who}: got {slots}, wanted {num_computed + num_new}"
        expect(f"emits of {who} with num_new={num_new}", bool(emits), num_new == lacks)
        expect(f"does {who} draw behind its end, {request.max_tokens}", request.num_tokens >= request.max_tokens, False)
        if before.get(request) != request.row:  # no rank knows anything about its row
            expect(f"num_blocks_sent and drawn_here of {who}, which has just started",
                   (request.num_blocks_sent, request.drawn_here), (0, False))  # fmt: skip


def _prefixes(request: Request) -> list[int | None]:
    """Of each token a number for it and all before it, on which its K and V depend; None from one that is still being drawn on."""
    prefixes, number = [], 0
    for token in request.all_token_ids:
        number = hash((number, token))
        prefixes.append(number)
    return prefixes + [None] * request.pending
